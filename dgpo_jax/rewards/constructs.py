"""Constructs of several parts: matrices, sums and products over an index; and the raw arguments that are never evaluated."""

from dgpo_jax.rewards.arithmetic import rational
from dgpo_jax.rewards.nodes import scalar, substitute
from dgpo_jax.rewards.tokens import Token, UnparsableError

TERMS_CAP = 100  # of a sum that is written out
_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "array", "smallmatrix"))


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
    """\\sum_{k=1}^{n} body, and \\prod: written out between whole numbers, else an unknown function of its parts.

    The index gets a name that depends only on how deep the sum stands, so that another letter for it makes no difference.
    """
    lower = upper = None
    for _ in range(2):
        if parser.accept("_"):
            parser.expect("{")
            lower = parser.items()[0]
            parser.expect("}")
        elif parser.accept("^"):
            upper = scalar(parser.primary())
    if upper is None or lower is None or lower[0] != "relation" or lower[2] != ("=",) or lower[1][0][0] != "symbol":
        raise UnparsableError("sum without its bounds")
    ((_, index), start), head = lower[1], {"sum": "add", "prod": "mul"}[token.value]
    parser.bound += 1
    body = scalar(parser.nested(parser.term))
    level = ("symbol", f"index {parser.bound}")
    parser.bound -= 1
    first, last = rational(scalar(start)), rational(upper)
    if first is not None and last is not None and first.denominator == last.denominator == 1 and 0 <= last - first < TERMS_CAP:
        terms = [substitute(body, index, ("number", first + step, None)) for step in range(int(last - first) + 1)]
        parser.count_nodes(terms)
        return terms[0] if len(terms) == 1 else (head, *terms)
    end = ("symbol", "no end") if upper == ("infinity",) else upper
    return parser.node("call", token.value, start, end, substitute(body, index, level))
