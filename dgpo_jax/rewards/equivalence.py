"""Decides whether two parsed answers are the same answer. Deterministic: points come from a hash of the pair.

Scalars are compared exactly where both are rational. Else numbers at several points, to 50 digits, refute most wrong answers;
where they agree, SymPy is asked for a proof (symbolic.py), and where it proves nothing within its bounds, their agreement
decides: it holds to 300 digits at two of the points, or to 1e-6 where a side is written as a decimal.
Collections, tuples, intervals, matrices and equations are compared part by part.
"""

import functools

import mpmath

from dgpo_jax.rewards import arithmetic, points, real_sets, relations, symbolic
from dgpo_jax.rewards.exact import TOLERANCE, Exact, numbers_equal
from dgpo_jax.rewards.nodes import SCALARS
from dgpo_jax.rewards.tokens import TooLargeError, UnparsableError

DIGITS = 50  # working precision
FINE, FINER = 300, 330  # digits of the second look, which tells rounding from difference
CLOSE_POINTS = 2
POINTS = 4  # valid positive points that must agree
ITEMS_CAP = 64
_INFINITE = (("infinity",), ("mul", ("number", -1, None), ("infinity",)))
SET_OPERATIONS = frozenset(("union", "intersection", "difference", "reals"))


def equivalent(gold, prediction, seed, tolerance=TOLERANCE):
    """True if the two trees mean the same answer.

    Args:
        gold, prediction: nodes of nodes.py.
        seed: str that fixes the points; the same text gives the same verdict in any process.
        tolerance: relative; as in exact.numbers_equal.
    Raises:
        UnparsableError (or TooLargeError, UndefinedError): the two cannot be compared within the bounds.
    """
    return Comparison(seed, (gold, prediction), tolerance).equal(gold, prediction)


class Comparison:
    """One pair of answers: the points it is tested at, and the values already computed there."""

    def __init__(self, seed, trees, tolerance=TOLERANCE):
        names = sorted(set().union(*map(arithmetic.symbols, trees)))
        self.tolerance = tolerance
        self.constant = not names
        self.points = points.make(seed, names, trees)
        self.cache = {}

    def equal(self, left, right):
        left, right = unwrap(left), unwrap(right)
        if left == right and left[0] not in SCALARS:
            return True
        if "relation" in (left[0], right[0]):
            return relations.equal(self, left, right)
        if left[0] in SCALARS and right[0] in SCALARS:
            return self.scalars_equal(left, right)
        if left[0] in ("list", "set") and right[0] in ("list", "set"):
            numbers = left[0] == right[0] == "list" and all(item[0] in SCALARS for item in left[1] + right[1])
            return self.same_items(left[1], right[1], once_each=numbers)
        if left[0] == right[0] == "matrix":
            return self.same_rows(left[1], right[1])
        if left[0] == right[0] == "group":
            return self.groups_equal(left, right)
        if {left[0], right[0]} == {"matrix", "group"}:
            return self.groups_equal(vector(left), vector(right))
        if left[0] == right[0] == "congruence":
            return self.congruences_equal(left, right)
        if SET_OPERATIONS & {left[0], right[0]}:
            if any(side[0] in SCALARS and arithmetic.symbols(side) for side in (left, right)):
                return False
            return self.same_parts(left, right) or real_sets.sets_equal(left, right)
        return left == right

    def groups_equal(self, left, right):
        return brackets(left) == brackets(right) and self.same_row(left[2], right[2])

    def same_parts(self, left, right):
        """The same operation on equal sets, one by one; so that their ends may be rounded."""
        return left[0] == right[0] and self.same_row(left[1:], right[1:])

    def congruences_equal(self, left, right):
        """3 modulo 7 is 10 modulo 7, and so is x = 3 modulo 7."""
        if not self.equal(left[2], right[2]):
            return False
        values = [relations.value_of(self, side[1]) if side[1][0] == "relation" else side[1] for side in (left, right)]
        exact = [arithmetic.rational(value) if value and value[0] in SCALARS else None for value in (*values, left[2])]
        if None not in exact and exact[2]:
            return (exact[0] - exact[1]) % exact[2] == 0
        return self.equal(left[1], right[1])

    def same_row(self, left, right):
        return len(left) == len(right) and all(self.equal(a, b) for a, b in zip(left, right, strict=True))

    def same_rows(self, left, right):
        return len(left) == len(right) and all(self.same_row(a, b) for a, b in zip(left, right, strict=True))

    def same_items(self, left, right, once_each):
        """Each item has its equal on the other side, whatever the order. Repetition counts among numbers (once_each), not in sets."""
        if max(len(left), len(right)) > ITEMS_CAP:
            raise TooLargeError(f"more than {ITEMS_CAP} items")
        if once_each and len(left) != len(right):
            return False
        matched = set()
        for item in left:
            hits = [index for index, other in enumerate(right) if self.equal(item, other)]
            if not hits:
                return False
            if once_each:  # the first that is still free
                hits = [index for index in hits if index not in matched][:1]
            matched.update(hits)
        return len(matched) == len(right)

    # Equations: how one may be a multiple of another

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
        for where in ("mixed", "wide", "far"):  # |x| = 1 is not x = 1
            for a, b in zip(self.values(left, where), self.values(right, where), strict=True):
                real = a is not None and b is not None and mpmath.im(a) == 0 and mpmath.im(b) == 0
                if real and not close(a * b0, b * a0):
                    return False
        return symbolic.proportional(left, right) is not False

    # Numbers

    def scalars_equal(self, left, right):
        exact = as_exact(left), as_exact(right)
        if None not in exact:
            return numbers_equal(*exact, self.tolerance)
        if "percent" in (left[0], right[0]) and left[0] != right[0]:
            bare, percent = (right, left) if left[0] == "percent" else (left, right)
            return self.values_agree(bare, percent) or (self.at_least_one(bare) and self.values_agree(bare, percent[1]))
        return self.values_agree(left, right)

    def at_least_one(self, node):
        """True for a number of 1 or more in size: below it, nobody leaves a percent sign out."""
        value = None if arithmetic.symbols(node) else self.values(node, "positive")[0]
        return value is not None and abs(value) >= 1

    def values_agree(self, left, right):
        """Numbers first, as they refute most wrong answers; then SymPy's proof; what that leaves open, numbers decide."""
        if self.tolerance > TOLERANCE and not (arithmetic.symbols(left) or arithmetic.symbols(right)):
            return self.numbers_agree(left, right, functools.partial(close_decimal, tolerance=self.tolerance))
        if arithmetic.has_decimal(left) or arithmetic.has_decimal(right):
            last_place = min(last_place_of(left), last_place_of(right))
            rule = functools.partial(close_decimal, tolerance=min(self.tolerance, TOLERANCE), last_place=last_place)
            return self.numbers_agree(left, right, rule)
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
        return self.constant or all(self.real_values_agree(left, right, same, where) for where in ("mixed", "wide", "far"))

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
            chosen = self.points[where][:1] if self.constant else self.points[where]
            self.cache[node, where] = [value_at(node, point) for point in chosen]
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
        chosen = self.points["positive"][:1 if self.constant else CLOSE_POINTS]
        return not any(self.gap_is_real(left, right, point) for point in chosen)


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
    sign_dropped = inner[2] if inner[0] == "mul" and inner[1][1] == -1 and len(inner) == 3 else inner
    if sign_dropped[0] == "number":
        return Exact(value, sign_dropped[2], percent)
    return Exact(value, 12 if arithmetic.has_decimal(inner) else None, percent)


def last_place_of(node):
    """One unit of the last written place of a plain decimal; infinity for anything else."""
    exact = as_exact(node)
    return mpmath.inf if exact is None or exact.places is None else mpmath.mpf(10) ** -exact.places


def close(a, b):
    """Equal but for the last ten digits of the working precision; infinities only if the same."""
    if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
        return a == b
    return abs(a - b) <= max(abs(a), abs(b)) * mpmath.mpf(10) ** (10 - DIGITS)


def close_decimal(a, b, tolerance, last_place=mpmath.inf):
    """Equal to the relative tolerance that a written decimal, or a set of rounded golds, allows, and to its last place."""
    if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
        return a == b
    gap = abs(a - b)
    return gap <= max(abs(a), abs(b)) * tolerance and (gap == 0 or gap < last_place * (1 - mpmath.mpf(10) ** -20))


def brackets(group):
    """The brackets of a tuple or interval; at infinity an interval is open whatever it is written with."""
    opener, items, closer = group[1:]
    if len(items) == 2 and opener in "([":
        opener = "(" if items[0] in _INFINITE else opener
        closer = ")" if items[1] in _INFINITE else closer
    return opener, closer


def vector(node):
    """A column (or row) of numbers as the tuple that it stands for; other matrices and groups as they are."""
    if node[0] == "matrix" and 1 in (len(node[1]), len(node[1][0])):
        return ("group", "(", tuple(entry for row in node[1] for entry in row), ")")
    return node if node[0] == "group" else ("group", "matrix", (node,), "matrix")


def unwrap(node):
    """A set or list of one item is that item, for an answer's purposes."""
    while node[0] in ("set", "list") and len(node[1]) == 1 and node[1] != (("set", ()),):
        node = node[1][0]
    return node
