"""Finds the answer inside a response. Every scan is linear in the text, because the text is hostile.

    "boxed"   the last balanced \\boxed{...}, never joined with its neighbours
    "marked"  failing that, what follows the last "####", or the last "answer is" / "answer:"
    "last"    failing those, the last number

Only text after the last </think> counts: an answer that the model weighed and dropped is not its answer.
"""

import re

RULES = ("boxed", "marked", "last")
TEXT_CAP = 64 * 1024  # characters; only the end of a longer text is read
BOX_CAP = 512  # characters of an answer; a longer one is reported but never parsed
NESTING_CAP = 64  # braces inside one box

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####")
_ANSWER = re.compile(r"answer[ \t]{0,4}(?:is(?![a-z])|:)[ \t]{0,4}:?", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?|(?<!\w)[-+]?\.\d+")


def find_answer(response, rule="boxed"):
    """Returns the answer's text, stripped of blanks, or None where the rule finds none or an empty one.

    Raises:
        ValueError: `rule` is not one of RULES.
    """
    if rule not in RULES:
        raise ValueError(f"extract: {rule!r} is not a rule; use one of {', '.join(RULES)}.")
    text = _after_thinking(response)
    if text is None:
        return None
    finders = {"boxed": (_last_box,), "marked": (_last_box, _last_mark), "last": (_last_box, _last_mark, _last_number)}
    for finder in finders[rule]:
        found = finder(text)
        if found is not None and found.strip():
            return found.strip()
    return None


def _after_thinking(response):
    """Text after the last </think>; None if a <think> is still open at the end."""
    close = response.rfind("</think>")
    if response.rfind("<think>") > close:
        return None
    return response if close < 0 else response[close + len("</think>"):]


def _last_box(text):
    """Content of the box that closes last. Where the end of a long text has none, the last opening before it is tried."""
    found = _scan_boxes(text[-TEXT_CAP:])
    if found is None and len(text) > TEXT_CAP:
        start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
        found = _scan_boxes(text[start:start + TEXT_CAP]) if start >= 0 else None
    return found


def _scan_boxes(text):
    """One pass with a stack of open braces, so that 100,000 unclosed boxes cost no more than plain text."""
    first = _BOX.search(text)
    if first is None:
        return None
    opened = []  # (start of content, True = a box)
    last = None
    for match in _BRACES.finditer(text, first.start()):  # 20 times faster: most of a response stands before its only box
        token = match.group()
        if token == "}":
            if opened:
                start, is_box = opened.pop()
                last = (start, match.start()) if is_box else last
        elif token == "{" or len(token) > 2:
            opened.append((match.end(), bool(_BOX.fullmatch(token))))
    return None if last is None else text[last[0]:last[1]]


def _last_mark(text):
    """What follows the last "####", or else the last "answer is" / "answer:", up to the end of the line."""
    text = text[-TEXT_CAP:]
    for pattern in (_HASHES, _ANSWER):
        end = None
        for match in pattern.finditer(text):
            end = match.end()
        if end is not None:
            return _first_clause(text[end:].strip(" \t\n*").partition("\n")[0])
    return None


def _first_clause(line):
    """Cuts the sentence that goes on after the answer: "42. I hope it is correct" is 42; "$5$ apples" is 5."""
    line = line.strip(" \t*")
    if line.startswith("$") and "$" in line[1:]:
        return line[1:line.index("$", 1)]
    return re.split(r"\.(?:\s|$)", line, maxsplit=1)[0]


def _last_number(text):
    for word in reversed(text[-TEXT_CAP:].split()):  # no number holds a blank, and few words hold a number
        if numbers := _NUMBER.findall(word):
            return numbers[-1]
    return None


def nesting(text):
    """Deepest nesting of braces in `text`."""
    depth = deepest = 0
    for char in text:
        depth += (char == "{") - (char == "}")
        deepest = max(deepest, depth)
    return deepest
