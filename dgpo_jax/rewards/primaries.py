"""The grammar's factors: numbers, letters, brackets, functions, roots, fractions. Matrices and sums are in constructs.py.

Each rule is called with the parser standing just after `token` and returns a node.
"""

import re
from fractions import Fraction

from dgpo_jax.rewards import constructs, exact
from dgpo_jax.rewards.constructs import argument_text, split_digit
from dgpo_jax.rewards.nodes import scalar
from dgpo_jax.rewards.tokens import UnparsableError

_TRIGONOMETRIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))
_HYPERBOLIC = frozenset(("sinh", "cosh", "tanh"))
_CALL_NAMES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh",
    "arsinh": "arcsinh", "arcosh": "arccosh", "artanh": "arctanh",
}  # fmt: skip
ACCENTS = frozenset(("overline", "bar", "hat", "tilde", "vec", "dot", "ddot"))
_CALL_CLOSE = {"(": ")", "{": "}", "[": "]", "\\{": "\\}"}
_BEFORE_THOUSANDS = frozenset(("-", "+", "=", "approx"))
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
    if parser.position == 1 and parser.at("="):  # \\text{Area} = 5
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
    if "." in digits and parser.accept("overline", "bar"):
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
        if not re.fullmatch(r"\d{3}(?:\.\d+)?", token.value) or _is_proper(parser):
            break
        digits += token.value
        parser.position += 1
    start, commas = parser.position, [t.value for t in parser.tokens].count(",")
    if not commas or any(t.kind != "letter" and t.value not in _BEFORE_THOUSANDS for t in parser.tokens[:start - 1]):
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


def _is_proper(parser):
    """True before "119/120": after a whole number that is a mixed number's fraction, and no thousands."""
    top, slash, bottom = (parser.peek(offset) for offset in range(3))
    return bottom is not None and slash.value == "/" and bottom.value.isdigit() and top.value.isdigit() and int(top.value) < int(bottom.value)


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
    return named(parser, token.value)


def named(parser, name):
    """A symbol of that name, with the subscript and the primes that follow; f(x, y) is a symbol that keeps its arguments."""
    if parser.accept("_"):
        name += "_" + argument_text(parser)
    while parser.accept("'", "prime"):
        name += "'"
    symbol = parser.node("symbol", name)
    if not parser.at("(") or not _is_application(parser):
        return symbol
    parser.position += 1
    arguments = parser.items()
    parser.expect(")")
    return parser.node("call", "apply", symbol, *map(scalar, arguments))


def _is_application(parser):
    """True for f(2) and f(x, y): not f times 2, nor f times a pair. f(x) is left to be a product, as x(y + 1) is one."""
    values = [token.value for token in parser.tokens[parser.position:parser.position + 4]]
    number = 2 if values[1:2] == ["-"] else 1
    if not parser.peek().spaced and values[number:number + 1] and values[number].isdigit() and values[number + 1:number + 2] == [")"]:
        return True
    depth = 0
    for token in parser.tokens[parser.position:]:
        depth += (token.value in ("(", "[", "{", "\\{")) - (token.value in (")", "]", "}", "\\}"))
        if depth == 0:
            return False
        if depth == 1 and token.value == ",":
            return True
    return False


def accent(parser, token):
    """\\bar{x}, \\vec{v}, \\overline{AB}: a name of its own, never x."""
    return named(parser, f"{token.value} {argument_text(parser)}")


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
        if name == "log" and parser.accept("_"):
            base = argument(parser)
        elif parser.accept("^"):
            power = parser.nested(parser.exponent)
    if power == ("mul", ("number", Fraction(-1), None), ("number", Fraction(1), None)) and name in _TRIGONOMETRIC | _HYPERBOLIC:
        name, power = "arc" + name, None
    parser.trigonometric += name in _TRIGONOMETRIC
    arguments = call_arguments(parser)
    parser.trigonometric -= name in _TRIGONOMETRIC
    call = parser.node("call", name, *arguments, *([] if base is None else [base]))
    return call if power is None else parser.node("pow", call, power)


def call_arguments(parser):
    """Arguments of a function: in brackets, or the product that follows as in sin 2x."""
    if opener := parser.accept(*_CALL_CLOSE):
        items = parser.items()
        parser.expect(_CALL_CLOSE[opener])
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
    """\\{1, 2\\}, also empty, and \\{x \\mid x > 3\\}, which is what its conditions say."""
    if parser.accept("\\}"):
        return parser.node("set", ())
    if _builder(parser):
        conditions = parser.items()
        parser.expect("\\}")
        if any(condition[0] != "relation" for condition in conditions):
            raise UnparsableError("a set of all x that is not given by inequalities")
        return parser.all_of(conditions)
    items = parser.items()
    parser.expect("\\}")
    return parser.node("set", items)


def _builder(parser):
    """Skips "x \\mid" or "x \\in \\mathbb{R} :" at the start of a set; False if it does not start so."""
    values = [token.value for token in parser.tokens[parser.position:parser.position + 7]]
    start = 6 if values[1:6] == ["in", "mathbb", "{", "R", "}"] else 1
    if parser.peek() is None or parser.peek().kind != "letter" or values[start:start + 1] not in (["mid"], [":"], ["|"]):
        return False
    parser.position += start + 1
    return True


def enclosed(parser, token):
    """|x|, floor and ceiling."""
    parser.bars += token.value == "|"
    inner = scalar(parser.sum())
    parser.bars -= token.value == "|"
    parser.expect(_CLOSE[token.value])
    return parser.node("call", _ENCLOSING_CALL[token.value], inner)


def number_set(parser, token):
    """\\mathbb{R}; other sets of numbers are known by name only."""
    name = argument_text(parser)
    if name not in ("R", "Z", "N", "Q", "C"):
        raise UnparsableError("number set")
    return parser.node("reals") if name == "R" else parser.node("numbers", name)


_OP_RULES = {
    "(": bracket, "[": bracket, "{": brace, "\\{": set_brace, "|": enclosed, "lvert": enclosed, "lfloor": enclosed,
    "lceil": enclosed, "frac": frac, "sqrt": sqrt, "binom": binom, "begin": constructs.matrix, "sum": constructs.big_sum, "prod": constructs.big_sum,
    "mathbb": number_set, **dict.fromkeys(ACCENTS, accent),
    "pi": lambda parser, token: parser.node("constant", "pi"),
    "infty": lambda parser, token: parser.node("infinity"),
    "emptyset": lambda parser, token: parser.node("set", ()),
}  # fmt: skip
