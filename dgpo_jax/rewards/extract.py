"""Finds the answer inside a response. Every scan is linear in the text, because the text is hostile.

    "boxed"   the last balanced \\boxed{...}, never joined with its neighbours
    "marked"  failing that, what follows the last "####", or the last "answer is" / "answer:"
    "last"    failing those, the last formula, or the last number where that stands later

Only text after the last </think> counts: an answer that the model weighed and dropped is not its answer.
"""

import re

RULES = ("boxed", "marked", "last")
TEXT_CAP = 64 * 1024  # characters; only the end of a longer text is read
BOX_CAP = 512  # characters of an answer; a longer one is reported but never parsed
NESTING_CAP = 64  # braces inside one box
LINE_CAP = 2 * BOX_CAP  # characters after a mark that are looked at

_BRACES = re.compile(r"\\\\|\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"(?<!#)####(?!#)")
_HEADING = re.compile(  # "#### Step 2", "#### 1. Setup"
    r"[\s*]{0,8}(?:(?!(?:sqrt|pi|sin|cos|tan|ln|log)\b)[A-Za-z]{2}|\d{1,3}[.)][ \t]{1,4}[A-Za-z*])"
)
_ANSWER = re.compile(
    r"answer(?: to (?:the|this) (?:problem|question))?[ \t*]{0,4}(?:is(?![a-z])|[:=])[ \t*]{0,4}:?", re.IGNORECASE
)
_FILLER = re.compile(r"^(?:(?:therefore|thus|hence|so|then|simply|just|indeed|exactly|given by|equal to|option|choice)[ ,:]+){1,3}", re.IGNORECASE)
_CLAUSE_END = re.compile(r"\.(?:\s|$)|,? (?:which|because|since|where|so|as)\b")
_GOES_ON = re.compile(  # "$5$ or six", "$5$!", "$5$ million", "$5$x": more than the formula is the answer
    r"[$\d\\+\-−–*/^=!|%]|^[a-zA-Z]|\b(?:or|but|not|and|to|times|plus|minus|over|mod|half|dozen|hundred|thousand|million|billion|trillion|"
    r"percent|squared|cubed|factorial|versus|vs|about|approximately|maybe|perhaps|possibly)\b",
    re.IGNORECASE,
)
_SECOND_ANSWER = re.compile(r"\s*(?:or|and|but|not)\b", re.IGNORECASE)
_PROSE = re.compile(r"[A-Za-z]{2,}[ ,]")
_DOLLARS = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")
_PAIRS = frozenset((("$", "$"), ("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]")))
_TWO_WORDS = re.compile(r"(?<![\\{a-zA-Z])[a-zA-Z]{3,}[ ,]+[a-zA-Z]{2,}(?![a-zA-Z}])")
_SAYS_SOMETHING = re.compile(r"[\d=+^/<>]|\\(?:frac|sqrt|infty|pi|cup|emptyset|text)")  # more than the name of a variable
_FORMULA_SIGNS = re.compile(r"[\\^_{}()\[\]=+*<>|!]|\d[a-zA-Z]?/|[a-zA-Z]\d")
_NUMBER = re.compile(r"(?<![\w.])[-+−–]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?|(?<!\w)[-+−–]?\.\d+")


def find_answer(response, rule="boxed"):
    """Returns the answer's text, stripped of blanks, or None where the rule finds none or an empty one.

    Raises:
        ValueError: `rule` is not one of RULES.
    """
    if rule not in RULES:
        raise ValueError(f"extract: {rule!r} is not a rule; use one of {', '.join(RULES)}.")
    text = after_thinking(response)
    if text is None:
        return None
    finders = {"boxed": (_last_box,), "marked": (_last_box, _last_mark), "last": (_last_box, _last_mark, _last_value)}
    for finder in finders[rule]:
        found = finder(text)
        if found is not None and found.strip():
            return found.strip()
    return None


def after_thinking(response):
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
        elif token == "{" or len(token) > 2:  # a row's end, \\\\, keeps the brace after it from being an escaped one
            opened.append((match.end(), bool(_BOX.fullmatch(token))))
    return None if last is None else text[last[0]:last[1]]


def _last_mark(text):
    """What follows the last "####" that is no Markdown heading, or else the last "answer is" / "answer:"."""
    text = text[-TEXT_CAP:]
    for pattern in (_HASHES, _ANSWER):
        end = None
        for match in pattern.finditer(text):
            if pattern is _ANSWER or not _HEADING.match(text, match.end()):
                end = match.end()
        if end is not None:
            return _first_clause(text[end:end + LINE_CAP].strip(" \t\n*:"))
    return None


def _first_clause(text):
    """Cuts what goes on after the answer: "42. I hope it is correct" is 42; "$5$ apples" is 5, but "$5$ or $6$" is both."""
    for opener, closer in (("$$", "$$"), ("\\[", "\\]")):  # may span lines
        stop = text.find(closer, len(opener))
        if text.startswith(opener) and stop > 0:
            rest, end = text[stop + len(closer):], stop + len(closer)
            same_line = _CLAUSE_END.split(rest.partition("\n")[0], maxsplit=1)[0]
            if _SECOND_ANSWER.match(rest) or _GOES_ON.search(same_line):
                return f"{text[:end]} {' '.join(rest.split())}"
            return text[len(opener):stop]
    line = text.partition("\n")[0].strip(" \t*")
    clause = _CLAUSE_END.split(_FILLER.sub("", line, count=1), maxsplit=1)[0].strip(" \t*")
    for opener, closer in (("$", "$"), ("\\(", "\\)")):
        stop = clause.find(closer, len(opener))
        if clause.startswith(opener) and stop > 0 and not _GOES_ON.search(clause[stop + len(closer):]):
            return clause[len(opener):stop]
    if _PROSE.match(clause) and " is " in clause:  # "The largest $n$ is 34"
        return _first_clause(clause.rpartition(" is ")[2])
    return clause


def _last_value(text):
    """The last formula, or the last number where that stands after it."""
    text = text[-TEXT_CAP:]
    formula, end = _last_formula(text)
    return _last_number(text[end:]) or formula


def _last_formula(text):
    r"""(content, where it ends) of the last $...$, \(...\) or \[...\]; (None, 0) if that reads like a price or like prose."""
    marks = list(_DOLLARS.finditer(text))[-2:]
    if len(marks) < 2 or (marks[0].group(), marks[1].group()) not in _PAIRS:
        return None, 0
    start, end = marks[0].end(), marks[1].start()
    content = text[start:end]
    price = marks[1].group() == "$" and text[marks[1].end():marks[1].end() + 1].isdigit()
    if price or len(content) > BOX_CAP or _TWO_WORDS.search(content) or not _SAYS_SOMETHING.search(content):
        return None, 0
    return content, marks[1].end()


def _last_number(text):
    """The last number; or the last word that holds one, where the number is only a part of it: f(2), \frac{1}{2}, (3, 4)."""
    words = text.split()
    for index in range(len(words) - 1, -1, -1):
        if not (numbers := _NUMBER.findall(words[index])):
            continue
        term = words[index].strip(".,;:!?*")
        for before in range(index - 1, max(-1, index - 8), -1):
            if _opened(term):
                break
            term = f"{words[before]} {term}"
        term = term.strip(".,;:!?*$")
        part = len(term) <= BOX_CAP and _FORMULA_SIGNS.search(term) and not _TWO_WORDS.search(term)
        return term if part else numbers[-1]
    return None


def _opened(term):
    """True if every bracket that closes in `term` was opened in it."""
    return all(term.count(opener) >= term.count(closer) for opener, closer in ("()", "[]", "{}"))


def nesting(text):
    """Deepest nesting of braces in `text`."""
    depth = deepest = 0
    for char in text:
        depth += (char == "{") - (char == "}")
        deepest = max(deepest, depth)
    return deepest
