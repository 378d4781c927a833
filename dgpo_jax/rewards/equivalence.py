"""Decides whether two parsed answers are the same answer. Deterministic: points come from a hash of the pair.

Scalars are compared exactly where both are rational, else as numbers at several points, to 50 digits. Two different
expressions of this size cannot agree there by accident, so no symbolic simplification (unbounded work) is needed.
Collections, tuples, intervals, matrices and equations are compared part by part.
"""

import hashlib

import mpmath

from dgpo_jax.rewards import evaluate, realsets
from dgpo_jax.rewards.exact import Exact, numbers_equal
from dgpo_jax.rewards.nodes import SCALARS
from dgpo_jax.rewards.tokens import TooLargeError, UnparsableError

DIGITS = 50  # working precision; GUARD more for the second look that tells rounding from difference
GUARD = 25
POINTS = 4  # valid positive points that must agree
TRIES = 10
MIXED_TRIES = 4  # points with negative coordinates, used where both sides are real
ITEMS_CAP = 64
SET_OPERATIONS = frozenset(("union", "intersection", "difference", "reals"))
_DECIMAL_TOLERANCE = 1e-6


def equivalent(gold, prediction, seed):
    """True if the two trees mean the same answer.

    Args:
        gold, prediction: nodes of nodes.py.
        seed: str that fixes the points; the same text gives the same verdict in any process.
    Raises:
        UnparsableError (or TooLargeError, UndefinedError): the two cannot be compared within the bounds.
    """
    return Comparison(seed, evaluate.symbols(gold) | evaluate.symbols(prediction)).equal(gold, prediction)


class Comparison:
    """One pair of answers: the points it is tested at, and the values already computed there."""

    def __init__(self, seed, names):
        names = sorted(names)
        self.constant = not names
        self.positive = [_point(seed, names, index, mixed=False) for index in range(TRIES)]
        self.mixed = [_point(seed, names, index, mixed=True) for index in range(MIXED_TRIES)]
        self.cache = {}

    def equal(self, left, right):
        left, right = unwrap(left), unwrap(right)
        if "relation" in (left[0], right[0]):
            return self.relations_equal(left, right)
        if left[0] in SCALARS and right[0] in SCALARS:
            return self.scalars_equal(left, right)
        if left[0] in ("list", "set") and right[0] in ("list", "set"):
            return self.same_items(left[1], right[1])
        if left[0] == right[0] == "matrix":
            return self.same_rows(left[1], right[1])
        if left[0] == right[0] == "group":
            return self.groups_equal(left, right)
        if SET_OPERATIONS & {left[0], right[0]}:
            return realsets.sets_equal(left, right)
        return False

    def groups_equal(self, left, right):
        return (left[1], left[3]) == (right[1], right[3]) and self.same_row(left[2], right[2])

    def same_row(self, left, right):
        return len(left) == len(right) and all(self.equal(a, b) for a, b in zip(left, right, strict=True))

    def same_rows(self, left, right):
        return len(left) == len(right) and all(self.same_row(a, b) for a, b in zip(left, right, strict=True))

    def same_items(self, left, right):
        """Each item has its equal on the other side: order and repetition do not count."""
        if max(len(left), len(right)) > ITEMS_CAP:
            raise TooLargeError(f"more than {ITEMS_CAP} items")
        matched = set()
        for item in left:
            hits = [index for index, other in enumerate(right) if self.equal(item, other)]
            if not hits:
                return False
            matched.update(hits)
        return len(matched) == len(right)

    # Equations and inequalities

    def relations_equal(self, left, right):
        if left[0] != "relation":
            left, right = right, left
        if right[0] != "relation":
            value = self.value_of(left)
            if value is not None:
                return self.equal(value, right)
            return right[0] in SET_OPERATIONS | {"group"} and realsets.sets_equal(left, right)
        if left[2] == right[2] and self.same_row(left[1], right[1]):
            return True
        values = self.value_of(left), self.value_of(right)
        if None not in values and left[1][0] == right[1][0]:
            return self.equal(*values)
        return self.same_solutions(left, right)

    def value_of(self, relation):
        """What "x = 5" or "f(x) = 2x" or "2 + 3 = 5" says the answer is; None if it says no such thing."""
        sides, ops = relation[1], relation[2]
        if not set(ops) <= {"=", "approx"}:
            return None
        if is_name(sides[0]):
            sides, ops = sides[1:], ops[1:]
        elif evaluate.symbols(relation):
            return None
        pairs = zip(sides, sides[1:], ops, strict=False)
        return sides[0] if all(self.chain_link_holds(*pair) for pair in pairs) else None

    def chain_link_holds(self, left, right, op):
        if op == "=":
            return self.equal(left, right)
        if not (left[0] in SCALARS and right[0] in SCALARS) or evaluate.symbols(left) or evaluate.symbols(right):
            return False
        a, b = self.values(left, self.positive)[0], self.values(right, self.positive)[0]
        return a is not None and b is not None and abs(a - b) <= abs(a) / 100

    def same_solutions(self, left, right):
        """One is the other times a constant (above 0 for an inequality): 2x + 4y = 6 and y = (3 - x) / 2 * ..."""
        if len(left[2]) == len(right[2]) == 1 and all(side[0] in SCALARS for side in left[1] + right[1]):
            (left_gap, left_op), (right_gap, right_op) = standard_form(left), standard_form(right)
            if left_op == right_op and self.proportional(left_gap, right_gap, signed=left_op in ("<", "<=")):
                return True
        if not (evaluate.symbols(left) == evaluate.symbols(right) and len(evaluate.symbols(left)) == 1):
            return False
        ordered = set(left[2] + right[2]) <= set(realsets.ORDER)
        return ordered and realsets.sets_equal(left, right)

    def proportional(self, left, right, signed):
        pairs = list(zip(self.values(left, self.positive), self.values(right, self.positive), strict=True))
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        if len(pairs) < POINTS and not self.constant:
            raise UnparsableError("equation undefined at too many points")
        a0, b0 = pairs[0] if pairs else (0, 0)
        if a0 == 0 or b0 == 0 or (signed and mpmath.re(a0 / b0) <= 0):
            return False
        return not self.constant and all(close(a * b0, b * a0) for a, b in pairs)

    # Numbers

    def scalars_equal(self, left, right):
        exact = as_exact(left), as_exact(right)
        if None not in exact:
            return numbers_equal(*exact)
        if "percent" in (left[0], right[0]) and left[0] != right[0]:
            bare, percent = (right, left) if left[0] == "percent" else (left, right)
            return self.values_agree(bare, percent[1]) or self.values_agree(bare, percent)
        return self.values_agree(left, right)

    def values_agree(self, left, right):
        decimal = evaluate.has_decimal(left) or evaluate.has_decimal(right)
        same = close_decimal if decimal else close
        pairs = zip(self.values(left, self.positive), self.values(right, self.positive), strict=True)
        agreed = 0
        for a, b in pairs:
            if a is None or b is None:
                continue
            if not same(a, b) and not self.rounding_explains(left, right, a - b):
                return False
            agreed += 1
        if agreed < (1 if self.constant else POINTS):
            raise evaluate.UndefinedError("too few points where both sides have a value")
        return self.constant or self.agree_below_zero(left, right, same)

    def agree_below_zero(self, left, right, same):
        """Tells |x| from x; points where a side is not real are skipped: \\ln(ab) is \\ln a + \\ln b all the same."""
        for a, b in zip(self.values(left, self.mixed), self.values(right, self.mixed), strict=True):
            real = a is not None and b is not None and mpmath.im(a) == 0 and mpmath.im(b) == 0
            if real and not same(a, b) and not self.rounding_explains(left, right, a - b):
                return False
        return True

    def values(self, node, points):
        """Values at the points, None where undefined. If even the tries run dry at TooLargeError, that is raised."""
        points = points[:1] if self.constant else points
        key = (node, points is self.mixed)
        if key not in self.cache:
            self.cache[key] = [value_at(node, point) for point in points]
        return self.cache[key]

    def rounding_explains(self, left, right, gap):
        """True if the gap shrinks with the precision: cancellation, as in \\sin^2 x + \\cos^2 x - 1 against 0."""
        if not mpmath.isfinite(gap) or abs(gap) > mpmath.mpf(10) ** (GUARD - DIGITS):
            return False
        for point in (self.positive[:1] if self.constant else self.positive[:3] + self.mixed):
            a, b = value_at(left, point), value_at(right, point)
            with mpmath.workdps(DIGITS + GUARD):
                fine_a, fine_b = value_at(left, point), value_at(right, point)
                if None in (a, b, fine_a, fine_b):
                    continue
                if abs(fine_a - fine_b) > abs(a - b) * mpmath.mpf(10) ** (5 - GUARD):
                    return False
        return True


def _point(seed, names, index, mixed):
    """A value in (0.25, 2.25) for each name, negative for about half of the names of a mixed point."""
    point = {}
    for name in names:
        digest = hashlib.sha256(repr((seed, name, index, mixed)).encode("utf-8", "surrogatepass")).digest()
        value = mpmath.mpf(int.from_bytes(digest[:8], "big")) / 2**63 + 0.25
        point[name] = -value if mixed and digest[8] % 2 else value
    if mixed and names and all(value > 0 for value in point.values()):
        point[names[index % len(names)]] *= -1
    return point


def value_at(node, point):
    try:
        return evaluate.numeric(node, point)
    except evaluate.UndefinedError:
        return None


def as_exact(node):
    """The node as an exact number with its way of writing, or None if it is irrational or has variables."""
    percent = node[0] == "percent"
    value = evaluate.rational(node[1] if percent else node)
    if value is None:
        return None
    inner = node[1] if percent else node
    sign_dropped = inner[2] if inner[0] == "mul" and inner[1][1] == -1 else inner
    if sign_dropped[0] == "number":
        return Exact(value, sign_dropped[2], percent)
    return Exact(value, 12 if evaluate.has_decimal(inner) else None, percent)


def close(a, b):
    if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
        return a == b
    return abs(a - b) <= max(abs(a), abs(b)) * mpmath.mpf(10) ** (10 - DIGITS)


def close_decimal(a, b):
    if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
        return a == b
    return abs(a - b) <= max(abs(a), abs(b)) * _DECIMAL_TOLERANCE


def unwrap(node):
    """A set or list of one item is that item, for an answer's purposes."""
    while node[0] in ("set", "list") and len(node[1]) == 1:
        node = node[1][0]
    return node


def is_name(node):
    """True for x, f(x), AB or (x, y): a left side that only names the answer."""
    if node[0] == "group":
        return all(is_name(item) for item in node[2])
    if node[0] == "mul":
        return is_name(node[1]) and (is_name(node[2]))
    return node[0] == "symbol"


def standard_form(relation):
    """(difference, op) with the difference compared to 0 by "=", "!=", "<" or "<=": 5 >= x is x - 5 <= 0."""
    (left, right), (op,) = relation[1], relation[2]
    if op in (">", ">="):
        left, right, op = right, left, {">": "<", ">=": "<="}[op]
    return ("add", left, ("mul", ("number", -1, None), right)), op
