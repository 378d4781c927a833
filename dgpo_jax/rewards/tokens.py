"""Splits a normalised answer into tokens. Words become functions, units, separators, or single letters."""

import re
from typing import NamedTuple

from dgpo_jax.rewards.normalise import TEXT_COMMANDS


class UnparsableError(Exception):
    """The text is not an answer this parser knows."""


class TooLargeError(UnparsableError):
    """The answer is well formed, but beyond the bounds on what is computed."""


class Token(NamedTuple):
    """kind is "number", "letter", "function", "constant", "text" (dropped words, units) or "op"."""

    kind: str
    value: str
    spaced: bool  # True if a blank stands before it


TOKENS_CAP = 600


def _words(text):
    return frozenset(text.split())


FUNCTIONS = _words(
    "sin cos tan cot sec csc sinh cosh tanh coth sech csch arcsin arccos arctan asin acos atan arccot arcsec arccsc "
    "log ln lg exp sqrt min max gcd lcm abs"
)
GREEK = _words(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega hbar ell"
)
UNITS = _words(
    "cm mm km dm nm meter meters metre metres centimeter centimeters kilometer kilometers inch inches foot feet ft yard "
    "yards mile miles mph kph kmh gram grams kg kilogram kilograms mg pound pounds lb lbs ounce ounces oz liter liters "
    "litre litres ml second seconds sec secs minute minutes mins hour hours hr hrs day days week weeks month months year "
    "years degree degrees radian radians rad dollar dollars usd cent cents euro euros yuan rupees rupee unit units square "
    "cubic sq person people student students point points apple apples way ways time times joule joules newton newtons "
    "watt watts volt volts hz pa per"
)
_WORD_OPS = {
    "and": "and", "or": "and", "infinity": "infty", "infty": "infty", "pi": "pi", "cup": "cup", "union": "cup",
}  # fmt: skip
# LaTeX commands and ASCII spellings that mean the same operator.
_COMMAND_OPS = {
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=",
    "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "approx", "approxeq": "approx",
    "simeq": "approx", "equiv": "=", "cup": "cup", "cap": "cap", "setminus": "setminus", "backslash": "setminus",
    "in": "in", "pm": "pm", "mp": "mp", "infty": "infty", "emptyset": "emptyset", "varnothing": "emptyset", "pi": "pi",
    "degree": "degree", "circ": "degree", "frac": "frac", "sqrt": "sqrt", "binom": "binom", "dbinom": "binom",
    "tbinom": "binom", "sum": "sum", "prod": "sum", "begin": "begin", "end": "end", "lvert": "lvert", "rvert": "rvert",
    "vert": "|", "mid": "mid", "lfloor": "lfloor", "rfloor": "rfloor", "lceil": "lceil", "rceil": "rceil",
    "langle": "(", "rangle": ")", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "colon": ":",
    "land": "and", "lor": "and", "mathbb": "mathbb", "overline": "overline", "prime": "prime", "angle": "",
    "triangle": "", "dots": "dots", "ldots": "dots", "cdots": "dots",
}  # fmt: skip
_LEXEME = re.compile(
    rf"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{{1,3}}(?![\w.]))?)"
    rf"|(?P<text>\\(?:{TEXT_COMMANDS})(?![a-zA-Z])\s*\{{(?P<content>[^{{}}]*)\}})"
    r"|(?P<environment>\\(?:begin|end)\s*\{(?P<name>[a-z]+)\*?\})"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<word>[a-zA-Z]+)"
    r"|(?P<op>\\\\|\\[{}|]|\*\*|<=|>=|!=|==|[-+*/^_(){}\[\]|,;:=<>!%&'])"
)
_NOT_UNITS = re.compile(r"\b(?:if|for|mod|not|no|none|is|are|but|where|when|with|base|million|billion|thousand|hundred)\b", re.I)


def tokenize(text, depth=0):
    """Returns the tokens of a normalised answer.

    Raises:
        UnparsableError: a character or a word that belongs to no answer; TooLargeError beyond TOKENS_CAP.
    """
    tokens = []
    position = 0
    while position < len(text):
        spaced = text[position] == " "
        if spaced:
            position += 1
            continue
        match = _LEXEME.match(text, position)
        if match is None:
            raise UnparsableError(f"character {text[position]!r}")
        spaced = position > 0 and text[position - 1] == " "
        tokens += _lexeme_tokens(match, spaced, depth)
        if len(tokens) > TOKENS_CAP:
            raise TooLargeError(f"more than {TOKENS_CAP} tokens")
        position = match.end()
    return tokens


def _lexeme_tokens(match, spaced, depth):
    kind, value = match.lastgroup, match.group()
    if match.group("content") is not None:
        return _text_tokens(match.group("content"), spaced, depth)
    if match.group("name") is not None:
        return [Token("op", value[1:4].replace("beg", "begin"), spaced), Token("text", match.group("name"), False)]
    if kind == "number":
        return [Token("number", value, spaced)]
    if kind == "word":
        return _word_tokens(value, spaced)
    if kind == "command":
        return _command_tokens(value[1:], spaced)
    return [Token("op", {"**": "^", "==": "=", "\\|": "|"}.get(value, value), spaced)]


def _command_tokens(name, spaced):
    if name in FUNCTIONS and name != "sqrt":
        return [Token("function", name, spaced)]
    if name in GREEK:
        return [Token("letter", "\\" + name, spaced)]
    if name in _COMMAND_OPS:
        return [Token("op", _COMMAND_OPS[name], spaced)] if _COMMAND_OPS[name] else []
    raise UnparsableError(f"command \\{name}")


def _word_tokens(word, spaced):
    """A bare run of letters: a known word, a function glued to its argument, or up to four variables."""
    if word in _WORD_OPS:
        return [Token("op", _WORD_OPS[word], spaced)]
    if word == "sqrt":
        return [Token("op", "sqrt", spaced)]
    if word in FUNCTIONS:
        return [Token("function", word, spaced)]
    if word.lower() in UNITS:
        return [Token("text", word, spaced)]
    for prefix in ("sqrt", "sin", "cos", "tan", "ln", "log", "pi", "or", "and"):
        if word.startswith(prefix) and len(word) - len(prefix) <= 1:
            return _word_tokens(prefix, spaced) + _word_tokens(word[len(prefix):], False)
    for suffix in ("sqrt", "pi", "or"):
        if word.endswith(suffix) and len(word) - len(suffix) == 1:
            return _word_tokens(word[:-len(suffix)], spaced) + _word_tokens(suffix, False)
    if len(word) > 4:
        raise UnparsableError(f"word {word!r}")
    return [Token("letter", letter, spaced and index == 0) for index, letter in enumerate(word)]


def _text_tokens(content, spaced, depth):
    """\\text{...}: a separator, a function name, a constant, a nested answer ("18 dollars"), or words to drop."""
    words = content.strip().strip(".").strip()
    bare = words.strip(",").strip().lower()
    if bare in ("and", "or", "and/or"):
        return [Token("op", "and", spaced)]
    if words in FUNCTIONS and words not in ("min", "sec"):  # 9 \text{ min} is nine minutes
        return [Token("function", words, spaced)]
    choices = re.fullmatch(r"\(?[A-Z]\)?(?:\s*,\s*\(?[A-Z]\)?)*", words)
    if choices and len(words) > 1 and depth == 0:  # "(B)" or "B, E"
        return tokenize(words, depth + 1)
    if words in ("e", "i") or (len(words) == 1 and not words.isalnum()):
        return tokenize(words, depth + 1)
    if re.search(r"\d", words) and depth == 0 and not re.search(r"[a-zA-Z]\s*\^?-?\d", words):
        return tokenize(words, depth + 1)
    if not words:
        return []
    if _NOT_UNITS.search(words) or not re.fullmatch(r"[A-Za-zµ°/^*.\- \d()]{1,40}", words):
        raise UnparsableError(f"text {content!r}")
    return [Token("text", words, spaced)]
