"""Decides whether two parsed answers are the same answer. Deterministic: points come from a hash of the pair.

Scalars are compared exactly where both are rational. Else numbers at several points, to 50 digits, refute most wrong answers;
where they agree, SymPy is asked for a proof (symbolic.py), and where it proves nothing within its bounds, their agreement
decides: it holds to 300 digits at two of the points, or to 1e-6 where a side is written as a decimal.
Collections, tuples, intervals, matrices and equations are compared part by part.
"""

import hashlib

import mpmath

from dgpo_jax.rewards import arithmetic, real_sets, symbolic
from dgpo_jax.rewards.exact import Exact, numbers_equal
from dgpo_jax.rewards.nodes import SCALARS
from dgpo_jax.rewards.tokens import TooLargeError, UnparsableError

DIGITS = 50  # working precision
FINE, FINER = 300, 330  # digits of the second look, which tells rounding from difference
CLOSE_POINTS = 2
POINTS = 4  # valid positive points that must agree
TRIES = 10
MIXED_TRIES = 4  # points with negative coordinates, used where both sides are real
WIDE_TRIES = 3  # points further out: a side may change its form at 3, as |x - 3| does
WIDE = 20
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
    return Comparison(seed, arithmetic.symbols(gold) | arithmetic.symbols(prediction)).equal(gold, prediction)


class Comparison:
    """One pair of answers: the points it is tested at, and the values already computed there."""

    def __init__(self, seed, names):
        names = sorted(names)
        self.constant = not names
        self.points = {
            "positive": [_point(seed, names, index, mixed=False) for index in range(TRIES)],
            "mixed": [_point(seed, names, index, mixed=True) for index in range(MIXED_TRIES)],
            "wide": [_point(seed, names, index, mixed=index > 0, scale=WIDE) for index in range(WIDE_TRIES)],
        }
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
            return real_sets.sets_equal(left, right)
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
            return right[0] in SET_OPERATIONS | {"group"} and real_sets.sets_equal(left, right)
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
        elif arithmetic.symbols(relation):
            return None
        pairs = zip(sides, sides[1:], ops, strict=False)
        return sides[0] if all(self.chain_link_holds(*pair) for pair in pairs) else None

    def chain_link_holds(self, left, right, op):
        if op == "=":
            return self.equal(left, right)
        if not (left[0] in SCALARS and right[0] in SCALARS) or arithmetic.symbols(left) or arithmetic.symbols(right):
            return False
        a, b = self.values(left, "positive")[0], self.values(right, "positive")[0]
        return a is not None and b is not None and abs(a - b) <= abs(a) / 100

    def same_solutions(self, left, right):
        """One is the other times a constant (above 0 for an inequality): 2x + 4y = 6 and y = (3 - x) / 2 * ..."""
        if len(left[2]) == len(right[2]) == 1 and all(side[0] in SCALARS for side in left[1] + right[1]):
            (left_gap, left_op), (right_gap, right_op) = standard_form(left), standard_form(right)
            if left_op == right_op and self.proportional(left_gap, right_gap, signed=left_op in ("<", "<=")):
                return True
        if not (arithmetic.symbols(left) == arithmetic.symbols(right) and len(arithmetic.symbols(left)) == 1):
            return False
        ordered = set(left[2] + right[2]) <= set(real_sets.ORDER)
        return ordered and real_sets.sets_equal(left, right)

    def proportional(self, left, right, signed):
        pairs = list(zip(self.values(left, "positive"), self.values(right, "positive"), strict=True))
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        if len(pairs) < POINTS and not self.constant:
            raise UnparsableError("equation undefined at too many points")
        a0, b0 = pairs[0] if pairs else (0, 0)
        if a0 == 0 or b0 == 0 or (signed and mpmath.re(a0 / b0) <= 0):
            return False
        if self.constant or not all(close(a * b0, b * a0) for a, b in pairs):
            return False
        return symbolic.proportional(left, right) is not False

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
        """Numbers first, as they refute most wrong answers; then SymPy's proof; what that leaves open, numbers decide."""
        if arithmetic.has_decimal(left) or arithmetic.has_decimal(right):
            return self.numbers_agree(left, right, close_decimal)
        try:
            agree = self.numbers_agree(left, right, close)
        except UnparsableError:  # no values to compare
            proved = symbolic.equal(left, right)
            if proved is None:
                raise
            return proved
        if not agree or left == right:
            return agree
        proved = symbolic.equal(left, right)
        return self.agree_closely(left, right) if proved is None else proved

    def numbers_agree(self, left, right, same):
        agreed = 0
        for index, (a, b) in enumerate(zip(self.values(left, "positive"), self.values(right, "positive"), strict=True)):
            if a is None or b is None:
                continue
            if not same(a, b):
                differ = self.gap_is_real(left, right, self.points["positive"][index])
                if differ:
                    return False
                if differ is None:
                    continue
            agreed += 1
        if agreed < (1 if self.constant else POINTS):
            raise arithmetic.UndefinedError("too few points where both sides have a value")
        return self.constant or (self.real_values_agree(left, right, same, "mixed") and self.real_values_agree(left, right, same, "wide"))

    def real_values_agree(self, left, right, same, where):
        """Tells |x| from x, and |x - 5| from 5 - x. Points where a side is not real are skipped: \\ln(ab) is \\ln a + \\ln b."""
        for index, (a, b) in enumerate(zip(self.values(left, where), self.values(right, where), strict=True)):
            real = a is not None and b is not None and mpmath.im(a) == 0 and mpmath.im(b) == 0
            if real and not same(a, b) and self.gap_is_real(left, right, self.points[where][index]):
                return False
        return True

    def values(self, node, where):
        """Values at the points of one kind, None where there is none within the bounds."""
        if (node, where) not in self.cache:
            points = self.points[where][:1] if self.constant else self.points[where]
            self.cache[node, where] = [value_at(node, point) for point in points]
        return self.cache[node, where]

    def gap_is_real(self, left, right, point):
        """True if the gap between two values stays as it is with more digits; False if it is rounding, and so shrinks.

        Both happen at any size: \\cosh^2 90 - \\sinh^2 90 against 1 is wide open at 50 digits; \\pi and \\pi + 10^{-60} look equal.
        None if no precision tells.
        """
        fine, finer = gap_at(left, right, point, FINE), gap_at(left, right, point, FINER)
        if fine is None or finer is None:
            return None
        if not mpmath.isfinite(fine):
            return True
        if abs(fine - finer) * 1000 <= abs(fine):
            return fine != 0
        return False if abs(finer) <= abs(fine) * mpmath.mpf(10) ** ((FINE - FINER) // 2) else None

    def agree_closely(self, left, right):
        """A last look at a pair that SymPy leaves open: values that agree to 50 digits may differ at the 60th."""
        points = self.points["positive"][:1 if self.constant else CLOSE_POINTS]
        return not any(self.gap_is_real(left, right, point) for point in points)


def _point(seed, names, index, mixed, scale=1):
    """A value in (0.25, 2.25) * scale for each name, negative for about half of the names of a mixed point."""
    point = {}
    for name in names:
        digest = hashlib.sha256(repr((seed, name, index, mixed, scale)).encode("utf-8", "surrogatepass")).digest()
        value = mpmath.mpf(int.from_bytes(digest[:8], "big")) / 2**63 + 0.25
        value *= scale
        point[name] = -value if mixed and digest[8] % 2 else value
    if mixed and names and all(value > 0 for value in point.values()):
        point[names[index % len(names)]] *= -1
    return point


def value_at(node, point):
    """The number a tree stands for at a point {symbol: value}; None where it has none, or only a huge one."""
    try:
        return arithmetic.numeric(node, point)
    except (arithmetic.UndefinedError, TooLargeError):
        return None


def gap_at(left, right, point, digits):
    """left - right at a point, to so many digits; None where either side has no value."""
    with mpmath.workdps(digits):
        a, b = value_at(left, point), value_at(right, point)
        if a is None or b is None:
            return None
        return mpmath.mpf(0) if a == b else a - b  # infinity equals itself


def as_exact(node):
    """The node as an exact number with its way of writing, or None if it is irrational or has variables."""
    percent = node[0] == "percent"
    value = arithmetic.rational(node[1] if percent else node)
    if value is None:
        return None
    inner = node[1] if percent else node
    sign_dropped = inner[2] if inner[0] == "mul" and inner[1][1] == -1 else inner
    if sign_dropped[0] == "number":
        return Exact(value, sign_dropped[2], percent)
    return Exact(value, 12 if arithmetic.has_decimal(inner) else None, percent)


def close(a, b):
    """Equal but for the last ten digits of the working precision; infinities only if the same."""
    if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
        return a == b
    return abs(a - b) <= max(abs(a), abs(b)) * mpmath.mpf(10) ** (10 - DIGITS)


def close_decimal(a, b):
    """Equal to the relative tolerance that a written decimal allows."""
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
        return all(is_name(factor) for factor in node[1:])
    return node[0] == "symbol"


def standard_form(relation):
    """(difference, op) with the difference compared to 0 by "=", "!=", "<" or "<=": 5 >= x is x - 5 <= 0."""
    (left, right), (op,) = relation[1], relation[2]
    if op in (">", ">="):
        left, right, op = right, left, {">": "<", ">=": "<="}[op]
    return ("add", left, ("mul", ("number", -1, None), right)), op
