"""The grammar's factors: numbers, letters, brackets, functions, roots, fractions, matrices.

Each rule is called with the parser standing just after `token` and returns a node.
"""

import re
from fractions import Fraction

from dgpo_jax.rewards import exact
from dgpo_jax.rewards.nodes import scalar
from dgpo_jax.rewards.tokens import Token, UnparsableError

_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_CALL_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "array", "smallmatrix"))
_CLOSE = {"lvert": "rvert", "|": "|", "lfloor": "rfloor", "lceil": "rceil"}
_ENCLOSING_CALL = {"lvert": "abs", "|": "abs", "lfloor": "floor", "lceil": "ceil"}


def rule(token):
    """Returns the function that parses what starts with `token`, or raises UnparsableError."""
    if token.kind == "op":
        if token.value not in _OP_RULES:
            raise UnparsableError(f"unexpected {token.value!r}")
        return _OP_RULES[token.value]
    return {"number": number, "letter": letter, "function": function, "text": leading_text}[token.kind]


def leading_text(parser, token):
    """Words where a value should stand: a single letter is a name, anything else is refused."""
    if len(token.value) == 1:  # \\text{B}: where a value should stand, a letter is a name and no unit
        return parser.node("symbol", token.value)
    raise UnparsableError(f"words {token.value!r} where a value should stand")


def number(parser, token):
    """A literal, a number in a base (1011_2), thousands (1 000), repeating decimals, or a mixed number (3 1/2)."""
    digits, _, exponent = token.value.lower().partition("e")
    digits = _joined_thousands(parser, digits)
    if parser.at("_"):
        parser.position += 1
        base = argument_text(parser)
        return parser.node("symbol", f"{digits} in base {base}")
    if "." in digits and parser.accept("overline"):
        return _repeating(parser, digits)
    read = exact.read_decimal(digits, int(exponent or 0), scientific=bool(exponent))
    if read is None:
        raise UnparsableError("number of too many digits")
    literal = parser.node("number", *read)
    part = _proper_fraction(parser) if digits.isdigit() and not exponent else None
    return literal if part is None else parser.node("number", read[0] + part, None)


def _joined_thousands(parser, digits):
    """"1 234 567" and, where no list can be meant, "1,234,567": the whole answer is that one number."""
    if not re.fullmatch(r"\d{1,3}", digits):
        return digits
    while (token := parser.peek()) is not None and token.kind == "number" and token.spaced:
        if not re.fullmatch(r"\d{3}(?:\.\d+)?", token.value):
            break
        digits += token.value
        parser.position += 1
    start, commas = parser.position, [t.value for t in parser.tokens].count(",")
    if start != 1 or not commas:
        return digits
    joined = digits
    for _ in range(commas):
        following = parser.peek(1)
        if not parser.at(",") or following is None or following.spaced or not re.fullmatch(r"\d{3}(?:\.\d+)?", following.value):
            parser.position = start
            return digits
        parser.position += 2
        joined += following.value
    return joined


def _repeating(parser, digits):
    repeat = argument_text(parser)
    if not repeat.isdigit() or len(repeat) + len(digits) > exact.DIGITS_CAP:
        raise UnparsableError("overline over something other than digits")
    decimals = len(digits.partition(".")[2])
    value, _ = exact.read_decimal(digits)
    value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10**decimals)
    return parser.node("number", value, None)


def _proper_fraction(parser):
    """The fraction of a mixed number if one follows: "1/2" after a blank, or \\frac{1}{2}; else None."""
    start = parser.position
    if parser.accept("frac"):
        parts = [argument_text(parser, digits_only=True) for _ in range(2)]
    else:
        tokens = [parser.peek(offset) for offset in range(3)]
        if None in tokens or not tokens[0].spaced or tokens[1].value != "/":
            return None
        parts = [tokens[0].value, tokens[2].value]
        parser.position += 3
    if all(part and part.isdigit() for part in parts) and int(parts[0]) < int(parts[1]):
        return Fraction(int(parts[0]), int(parts[1]))
    parser.position = start
    return None


def letter(parser, token):
    """A variable with its subscript, or one of the constants e and i."""
    if token.value in ("e", "i") and not parser.at("_"):
        return parser.node("constant", token.value)
    name = token.value
    if parser.accept("_"):
        name += "_" + argument_text(parser)
    while parser.accept("'", "prime"):
        name += "'"
    return parser.node("symbol", name)


def argument_text(parser, digits_only=False):
    """The raw text of the next {...} or of the next single token, for subscripts: never evaluated."""
    if not parser.accept("{"):
        token = parser.peek()
        if token is None or token.kind == "op":
            return "" if digits_only else _raise("missing argument")
        if token.kind == "number" and digits_only:
            return split_digit(parser).value
        parser.position += 1
        return token.value
    depth, parts = 1, []
    while depth:
        token = parser.peek()
        if token is None:
            raise UnparsableError("unbalanced brace")
        parser.position += 1
        depth += (token.value == "{") - (token.value == "}")
        parts.append(token.value)
    return " ".join(parts[:-1])


def _raise(message):
    raise UnparsableError(message)


def split_digit(parser):
    """Takes one digit off the next number, as TeX does: \\frac12 is 1/2."""
    token = parser.tokens[parser.position]
    rest = token.value[1:]
    if not token.value[0].isdigit() or rest[:1] in ("e", "E"):
        raise UnparsableError("an argument that is no digit")
    if rest:
        parser.tokens[parser.position] = Token("number", rest, False)
    else:
        parser.position += 1
    return Token("number", token.value[0], token.spaced)


def argument(parser, single_digit=False):
    """The next {...}, or else the next factor: the argument of \\frac, \\sqrt, \\binom."""
    token = parser.peek()
    if token is not None and token.kind == "number" and single_digit:
        return number_node(parser, split_digit(parser))
    return scalar(parser.primary())


def number_node(parser, token):
    """A number as an exact fraction."""
    return parser.node("number", Fraction(int(token.value)), None)


def frac(parser, token):
    """\\frac{1}{2}, and \\frac12 with single digits."""
    return parser.div(argument(parser, single_digit=True), argument(parser, single_digit=True))


def binom(parser, token):
    """\\binom{n}{k}."""
    return parser.node("call", "binomial", argument(parser, single_digit=True), argument(parser, single_digit=True))


def sqrt(parser, token):
    """\\sqrt{x} and \\sqrt[n]{x}."""
    degree = ("number", Fraction(2), None)
    if parser.accept("["):
        degree = scalar(parser.sum())
        parser.expect("]")
    return parser.node("call", "root", argument(parser), degree)


def function(parser, token):
    """\\sin x, \\sin(x), \\sin^2 x, \\sin^{-1} x, \\log_2 x; without brackets the argument is a product: \\ln xy."""
    name = _CALL_NAMES.get(token.value, token.value)
    if name == "sqrt":
        return sqrt(parser, token)
    base = power = None
    for _ in range(2):
        if parser.accept("_"):
            base = argument(parser)
        elif parser.accept("^"):
            power = parser.nested(parser.exponent)
    if power == ("mul", ("number", Fraction(-1), None), ("number", Fraction(1), None)) and name in _TRIGONOMETRIC:
        name, power = "arc" + name, None
    parser.trigonometric += name in _TRIGONOMETRIC
    arguments = call_arguments(parser)
    parser.trigonometric -= name in _TRIGONOMETRIC
    call = parser.node("call", name, *arguments, *([] if base is None else [base]))
    return call if power is None else parser.node("pow", call, power)


def call_arguments(parser):
    """Arguments of a function: in brackets, or the product that follows as in sin 2x."""
    if parser.at("(", "{", "["):
        opener = parser.accept("(", "{", "[")
        items = parser.items()
        parser.expect({"(": ")", "{": "}", "[": "]"}[opener])
        return [scalar(item) for item in items]
    product = parser.power()
    while parser.starts_factor() and parser.peek().kind != "function" and not parser.at("(", "["):
        product = parser.mul(product, parser.power())
    return [scalar(product)]


def bracket(parser, token):
    """( and [: a grouping around one item, else a tuple or interval, whose brackets are kept."""
    bars, parser.bars = parser.bars, 0
    items = parser.items()
    parser.bars = bars
    close = parser.accept(")", "]")
    if close is None:
        raise UnparsableError("unbalanced bracket")
    matching = (token.value, close) in (("(", ")"), ("[", "]"))
    if len(items) == 1 and matching:
        return items[0]
    return parser.node("group", token.value, items, close)


def brace(parser, token):
    """{...}: invisible around one item; around several, a set whose backslashes were forgotten."""
    bars, parser.bars = parser.bars, 0
    items = parser.items()
    parser.bars = bars
    parser.expect("}")
    return items[0] if len(items) == 1 else parser.node("set", items)


def set_brace(parser, token):
    """\\{1, 2\\}, also empty."""
    if parser.accept("\\}"):
        return parser.node("set", ())
    items = parser.items()
    parser.expect("\\}")
    return parser.node("set", items)


def enclosed(parser, token):
    """|x|, floor and ceiling."""
    parser.bars += token.value == "|"
    inner = scalar(parser.sum())
    parser.bars -= token.value == "|"
    parser.expect(_CLOSE[token.value])
    return parser.node("call", _ENCLOSING_CALL[token.value], inner)


def matrix(parser, token):
    """\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}; brackets of any kind compare alike."""
    name = argument_text(parser).replace(" ", "")
    if name not in _MATRICES:
        raise UnparsableError(f"environment {name!r}")
    if name == "array":
        argument_text(parser)
    rows, row = [], []
    while True:
        row.append(scalar(parser.sum()))
        if parser.accept("&"):
            continue
        rows.append(tuple(row))
        row = []
        ended = not parser.accept("\\\\") or parser.at("end")
        if ended:
            break
    parser.expect("end")
    if argument_text(parser).replace(" ", "") != name or len({len(row) for row in rows}) != 1:
        raise UnparsableError("ragged or unclosed matrix")
    return parser.node("matrix", tuple(rows))


def big_sum(parser, token):
    """\\sum_{k=0}^{n} body: kept as an unknown function of its parts, equal only where the parts are."""
    parser.expect("_")
    parser.expect("{")
    lower = parser.items()[0]
    parser.expect("}")
    parser.expect("^")
    upper = scalar(parser.primary())
    if lower[0] != "relation" or lower[2] != ("=",):
        raise UnparsableError("sum without a lower bound")
    return parser.node("call", "sum", *lower[1], upper, scalar(parser.term()))


def number_set(parser, token):
    """\\mathbb{R}; no other set of numbers is known."""
    if argument_text(parser) != "R":
        raise UnparsableError("number set")
    return parser.node("reals")


_OP_RULES = {
    "(": bracket, "[": bracket, "{": brace, "\\{": set_brace, "|": enclosed, "lvert": enclosed, "lfloor": enclosed,
    "lceil": enclosed, "frac": frac, "sqrt": sqrt, "binom": binom, "begin": matrix, "sum": big_sum, "mathbb": number_set,
    "pi": lambda parser, token: parser.node("constant", "pi"),
    "infty": lambda parser, token: parser.node("infinity"),
    "emptyset": lambda parser, token: parser.node("set", ()),
}  # fmt: skip
