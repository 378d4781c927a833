"""Splits a normalised answer into tokens. Words become functions, units, separators, or single letters (see units.py)."""

import re
from typing import NamedTuple

from dgpo_jax.rewards import units
from dgpo_jax.rewards.normalise import CHOICES, TEXT_COMMANDS


class UnparsableError(Exception):
    """The text is not an answer this parser knows."""


class TooLargeError(UnparsableError):
    """The answer is well formed, but beyond the bounds on what is computed."""


class Token(NamedTuple):
    """kind is "number", "letter", "function", "text" (dropped words, units), "environment" (its name) or "op"."""

    kind: str
    value: str
    spaced: bool  # True if a blank stands before it


TOKENS_CAP = 600


def _words(text):
    return frozenset(text.split())


FUNCTIONS = _words(
    "sin cos tan cot sec csc sinh cosh tanh coth sech csch arcsin arccos arctan asin acos atan arccot arcsec arccsc "
    "arcsinh arccosh arctanh arsinh arcosh artanh asinh acosh atanh log ln lg exp sqrt min max gcd lcm abs floor ceil"
)
GREEK = _words(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega hbar ell odot oplus star dagger perp"
)
_WORD_OPS = {
    "and": "and", "or": "or", "mod": "mod", "infinity": "infty", "infty": "infty", "pi": "pi", "cup": "cup", "union": "cup",
}  # fmt: skip
# LaTeX commands and ASCII spellings that mean the same operator.
_COMMAND_OPS = {
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=",
    "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "approx", "approxeq": "approx",
    "simeq": "approx", "equiv": "=", "cup": "cup", "cap": "cap", "setminus": "setminus", "backslash": "setminus",
    "in": "in", "pm": "pm", "mp": "mp", "infty": "infty", "emptyset": "emptyset", "varnothing": "emptyset", "pi": "pi",
    "degree": "degree", "circ": "degree", "frac": "frac", "sqrt": "sqrt", "binom": "binom", "dbinom": "binom",
    "tbinom": "binom", "sum": "sum", "prod": "prod", "begin": "begin", "end": "end", "lvert": "lvert", "rvert": "rvert",
    "vert": "|", "mid": "mid", "lfloor": "lfloor", "rfloor": "rfloor", "lceil": "lceil", "rceil": "rceil",
    "langle": "(", "rangle": ")", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "colon": ":",
    "land": "and", "wedge": "and", "lor": "or", "vee": "or", "bmod": "mod",
    "mod": "mod", "pmod": "pmod", "mathbb": "mathbb", "overline": "overline", "prime": "prime", "angle": "",
    "triangle": "", "dots": "dots", "ldots": "dots", "cdots": "dots", "bar": "bar",
    "hat": "hat", "widehat": "hat", "tilde": "tilde", "vec": "vec", "overrightarrow": "vec", "dot": "dot", "ddot": "ddot",
}  # fmt: skip
_LEXEME = re.compile(
    rf"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{{1,3}}(?![\w.]))?)"
    rf"|(?P<text>\\(?P<font>{TEXT_COMMANDS})(?![a-zA-Z])\s*\{{(?P<content>[^{{}}]*)\}})"
    r"|(?P<environment>\\(?:begin|end)\s*\{\s*(?P<name>[a-z]+)\*?\s*\})"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<word>[a-zA-Z]+)"
    r"|(?P<op>\\\\|\\[{}|]|(?<=[\d)}])!(?==)|\*\*|<=|>=|!=|==|[-+*/^_(){}\[\]|,;:=<>!%&'])"
)
_NOT_UNITS = re.compile(  # words that change a value, add a second one, put a condition on it, or take it back
    r"(?<!\^)(?<!\^-)\d|\b(?:if|for|mod|modulo|not|no|none|neither|is|are|was|but|where|when|with|without|base|plus|minus|over|maybe|perhaps|"
    r"guess|wrong|false|incorrect|or|and|versus|vs|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|\w*ten|\w+teen|twelf|\w+tie|hundred|thousand|\w+ion)ths?|dozens?|tens?|hundreds?|thousands?|millions?|billions?|"
    r"trillions?|lakhs?|crores?|scores?|gross|times \w+|squared|cubed|root|power|factorials?|divided|multiplied|doubled|pi|hex|octal|"
    r"binary|choose|less|minus|fewer|more|greater|least|most|below|above|under|about|around|approx\w*|zero|one|ones|two|twos|three|threes|four|"
    r"fours|five|fives|six|sixes|seven|sevens|eight|eights|nine|nines|eleven|twelve|\w+teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|even|odd|prime)\b",
    re.I,
)
_NOUN = re.compile(r"\b[a-z]{3,}s\b", re.I)  # "dogs", "right triangles": what is counted stands in the plural
_LETTER_UNITS = frozenset("mglLshNJWVAKCF")
_VARIABLE = re.compile(rf"(?<![A-Za-z])(?![a{''.join(sorted(_LETTER_UNITS))}])[A-Za-z](?![A-Za-z])")  # "x cm" holds a factor
_ROMAN = re.compile("[IVX]{2,}")
_VARIABLE_FONTS = frozenset(("mathbf", "mathit", "mathcal", "boldsymbol", "bm", "bf"))
_VALUE_ENDS = frozenset((")", "]", "}", "\\}", "!", "%", "'", "|", "rvert", "rfloor", "rceil", "degree", "pi", "infty"))
_GLUED = ("leq", "geq", "neq", "cup", "cap", "cdot", "times", "infty", "pi", "pm", "le", "ge", "lt", "gt", "ne", "in")
_ALL_REALS = frozenset(("all real numbers", "all reals", "real numbers", "all real number", "the real numbers"))


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
        tokens += _lexeme_tokens(match, spaced, depth, tokens)
        if len(tokens) > TOKENS_CAP:
            raise TooLargeError(f"more than {TOKENS_CAP} tokens")
        position = match.end()
    return tokens


def _lexeme_tokens(match, spaced, depth, before):
    kind, value = match.lastgroup, match.group()
    if match.group("content") is not None:
        return _text_tokens(match.group("font"), match.group("content"), spaced, depth, before)
    if match.group("name") is not None:
        return [Token("op", value[1:4].replace("beg", "begin"), spaced), Token("environment", match.group("name"), False)]
    if kind == "number":
        return [Token("number", value, spaced)]
    if kind == "word":
        return _word_tokens(value, spaced, before)
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
    for prefix in _GLUED:  # "\lex" where "\le x" was meant
        if name[:-1] == prefix:
            return [*_command_tokens(prefix, spaced), Token("letter", name[-1], False)]
    raise UnparsableError(f"command \\{name}")


def _ends_value(before):
    """True where a unit may stand: after a number, a bracket, another unit."""
    return bool(before) and (before[-1].kind in ("number", "letter", "text") or before[-1].value in _VALUE_ENDS)


def _is_unit(word, spaced, before):
    if len(before) > 1 and before[-1].value in ("/", "*") and before[-2].kind == "text":
        return word in units.AFTER_SLASH or word.lower() in units.BARE
    if word.lower() in ("am", "pm"):
        return any(token.value == ":" for token in before)
    if word.lower() in units.LIKE_LETTERS and not spaced:
        return False
    return word.lower() in units.BARE and _ends_value(before)


def _word_tokens(word, spaced, before):
    """A bare run of letters: a known word, a function glued to its argument, or up to four variables."""
    if word in _WORD_OPS:
        return [Token("op", _WORD_OPS[word], spaced)]
    if word == "sqrt":
        return [Token("op", "sqrt", spaced)]
    if word in FUNCTIONS:
        return [Token("function", word, spaced)]
    if _is_unit(word, spaced, before):
        return [Token("text", word, spaced)]
    if word.lower() in units.SCALES and _ends_value(before):
        return _scale(word)
    if _ROMAN.fullmatch(word):  # IV is not V times I
        return [Token("letter", word, spaced)]
    if word == "to" and _ends_value(before):
        return [Token("op", ":", spaced)]
    for prefix in ("sqrt", "sin", "cos", "tan", "ln", "log", "pi", "or", "and"):
        if word.startswith(prefix) and len(word) - len(prefix) <= 1:
            return _word_tokens(prefix, spaced, before) + _word_tokens(word[len(prefix):], False, [])
    for suffix in ("sqrt", "pi", "or"):
        if word.endswith(suffix) and len(word) - len(suffix) == 1:
            return _word_tokens(word[:-len(suffix)], spaced, before) + _word_tokens(suffix, False, [])
    if len(word) > 4:
        raise UnparsableError(f"word {word!r}")
    return [Token("letter", letter, spaced and index == 0) for index, letter in enumerate(word)]


def _scale(word):
    """3.5 million is 3.5 times 1000000."""
    return [Token("op", "*", False), Token("number", str(units.SCALES[word.lower()]), False)]


def _text_tokens(font, content, spaced, depth, before):
    """\\text{...}: a separator, a function name, a constant, a nested answer ("18 dollars"), or words to drop."""
    words = content.strip().strip(".").strip()
    bare = words.strip(",").strip().lower()
    if bare in ("and", "or", "and/or"):
        return [Token("op", "and" if bare == "and" else "or", spaced)]
    if bare == "to" and _ends_value(before):
        return [Token("op", ":", spaced)]
    if bare in _ALL_REALS:
        return tokenize("\\mathbb{R}", depth + 1)
    if words in FUNCTIONS and words not in ("min", "sec"):  # 9 \text{ min} is nine minutes
        return [Token("function", words, spaced)]
    if font in _VARIABLE_FONTS and len(words) == 1 and words.isalpha():  # 2\mathbf{v} is no 2
        return [Token("letter", f"\\mathbf {words}" if words in "ei" else words, spaced)]
    scale, _, rest = words.partition(" ")
    if scale.lower() in units.SCALES and _ends_value(before):
        return _scale(scale) + (_dropped(rest.strip(), True) if rest.strip() else [])
    if len(words) == 1 and words.isalpha() and words not in _LETTER_UNITS:  # 5\text{k} is no 5
        return [Token("letter", words, spaced)] if words not in "ei" else tokenize(words, depth + 1)
    if CHOICES.fullmatch(words) and len(words) > 1 and depth == 0:  # "(B)", "B, E", "II and III"
        return tokenize(words, depth + 1)
    if len(words) == 1 and not words.isalnum():
        return tokenize(words, depth + 1)
    if re.search(r"\d", words) and depth == 0 and not re.search(r"[a-zA-Z]\s*\^?-?\d", words):
        return tokenize(words, depth + 1)
    if not words:
        return []
    in_subscript = "_" in [token.value for token in before[-2:]] and before[-1].value in ("_", "{")  # v_{\\text{final}}
    return _dropped(words, spaced, as_name=not before or in_subscript)


def _dropped(words, spaced, as_name=False):
    """Words that carry no value: units, and what is counted. Any others are refused, unless they only name what follows."""
    understood = as_name or (not _VARIABLE.search(words) and (units.names_a_unit(words) or _NOUN.search(words)))
    if not understood or _NOT_UNITS.search(words) or not re.fullmatch(r"[A-Za-zµ°/^*.\- \d()]{1,40}", words):
        raise UnparsableError(f"text {words!r}")
    return [Token("text", words, spaced)]
