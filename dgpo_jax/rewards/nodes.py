"""The syntax tree of an answer.

A node is a plain tuple (head, *arguments), so that it can be hashed and compared:

    ("number", Fraction, places)             places as in exact.Exact
    ("symbol", name) ("constant", "e" | "i" | "pi") ("infinity",)
    ("add", *terms) ("mul", *factors) ("div", a, b) ("pow", base, exponent) ("call", name, *arguments)
    ("percent", a)                           only as a whole answer is the sign's absence forgiven
    ("group", open, items, close)            a tuple, an interval, or a ratio (open = ":")
    ("set", items) ("list", items)           both unordered; a list has no braces
    ("union" | "intersection" | "difference", a, b) ("reals",) ("numbers", "Z" | "N" | "Q" | "C")
    ("matrix", rows)
    ("relation", sides, ops)                 ops has one entry fewer than sides
    ("congruence", a, modulus)               a modulo a number; a may be a relation
"""

from dgpo_jax.rewards.tokens import UnparsableError

SCALARS = frozenset(("number", "symbol", "constant", "infinity", "add", "mul", "div", "pow", "call", "percent"))


def scalar(node):
    """Raises UnparsableError unless `node` is a number-like value: sets and tuples have no arithmetic here."""
    if node[0] not in SCALARS:
        raise UnparsableError(f"arithmetic on a {node[0]}")
    return node


def terms(node, head):
    """The terms of a sum (factors of a product), so that a long one is flat and not a tower of pairs."""
    return node[1:] if node[0] == head else (scalar(node),)


def matrix_add(parser, left, right):
    """Sum of two matrices of one shape, entry by entry; raises UnparsableError for other shapes."""
    if left[0] != right[0] or [len(row) for row in left[1]] != [len(row) for row in right[1]]:
        raise UnparsableError("sum of a matrix and something of another shape")
    rows = zip(left[1], right[1], strict=True)
    return ("matrix", tuple(tuple(parser.add(a, b) for a, b in zip(*pair, strict=True)) for pair in rows))


def matrix_mul(parser, left, right):
    """Scalar times matrix, or matrix product. The node cap bounds the work."""
    if left[0] != "matrix":
        return ("matrix", tuple(tuple(parser.mul(left, entry) for entry in row) for row in right[1]))
    if right[0] != "matrix":
        return matrix_mul(parser, right, left)
    if len(left[1][0]) != len(right[1]):
        raise UnparsableError("matrix product of shapes that do not fit")
    return ("matrix", tuple(tuple(_dot(parser, row, column) for column in zip(*right[1], strict=True)) for row in left[1]))


def _dot(parser, row, column):
    total = parser.mul(row[0], column[0])
    for left, right in zip(row[1:], column[1:], strict=True):
        total = parser.add(total, parser.mul(left, right))
    return total


def substitute(node, name, value):
    """The tree with the node `value` where the symbol `name` stood, in subscripts too: a_k becomes a_1."""
    if node[0] == "symbol":
        if node[1] == name:
            return value
        base, _, index = node[1].partition("_")
        if name in index.split(" "):
            return ("symbol", f"{base}_" + " ".join(str(value[1]) if part == name else part for part in index.split(" ")))
        return node
    return tuple(substitute(child, name, value) if isinstance(child, tuple) and child else child for child in node)


def size(node):
    """Nodes of a tree."""
    return 1 + sum(size(child) for child in node if isinstance(child, tuple) and child)
