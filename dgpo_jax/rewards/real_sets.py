"""Sets of real numbers compared by membership: intervals, unions, inequalities in one variable.

A set built from finitely many intervals and points changes only at its breakpoints. So two such sets are equal exactly if
they agree at every breakpoint of either, between neighbours, and beyond the ends.
"""

import functools
import itertools
from fractions import Fraction

import mpmath

from dgpo_jax.rewards.arithmetic import UndefinedError, numeric, symbols
from dgpo_jax.rewards.nodes import SCALARS
from dgpo_jax.rewards.tokens import TooLargeError, UnparsableError

BREAKPOINTS_CAP = 64
_SAME = mpmath.mpf(10) ** -40  # relative: breakpoints closer than this are one
# Where a side is tested for being linear; the first two give its slope. The others see |x|, \lfloor x \rfloor and \sin \pi x.
_SAMPLES = (0, 1, 2, 7, mpmath.mpf("-3.7"), mpmath.mpf("0.37"), -1009, 1013)
ORDER = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}

_TURNED = str.maketrans("<>", "><")


def sets_equal(left, right):
    """Raises UnparsableError where a side is not a set of reals with computable ends."""
    left, right = without_bars(left), without_bars(right)
    points = _distinct(breakpoints(left) + breakpoints(right))
    return all(contains(left, probe, points) == contains(right, probe, points) for probe in _probes(points))


def without_bars(node):
    """The set with |u| < c as -c < u < c and |u| > c as u < -c or u > c, for an absolute value that is a whole side."""
    if node[0] in ("union", "intersection", "difference"):
        return (node[0], without_bars(node[1]), without_bars(node[2]))
    if node[0] in ("set", "list"):
        return (node[0], tuple(map(without_bars, node[1])))
    if node[0] != "relation" or not ORDER.keys() >= set(node[2]) or not any(map(_is_absolute, node[1])):
        return node
    links = [_link_without_bars(*link) for link in zip(node[1], node[2], node[1][1:], strict=False)]
    return functools.reduce(lambda one, other: ("intersection", one, other), links)


def _is_absolute(node):
    return node[:2] == ("call", "abs")


def _link_without_bars(left, op, right):
    if _is_absolute(right):
        left, op, right = right, op.translate(_TURNED), left
    if not _is_absolute(left) or symbols(right):
        return ("relation", (left, right), (op,))
    opposite = ("mul", ("number", Fraction(-1), None), right)
    parts = ("relation", (left[2], right), (op,)), ("relation", (left[2], opposite), (op.translate(_TURNED),))
    return ("intersection" if op in ("<", "<=") else "union", *parts)


def breakpoints(node):
    """Finite numbers at which membership may change."""
    head = node[0]
    if head == "reals":
        return []
    if head in ("union", "intersection", "difference"):
        return breakpoints(node[1]) + breakpoints(node[2])
    if head in ("set", "list"):
        if head == "list" and any(item[0] in SCALARS for item in node[1]):  # "[1, 9] or 7" is no way to write [1, 9]
            raise UnparsableError("a list of numbers and sets")
        return [point for item in node[1] for point in breakpoints(item)]
    if head == "group" and node[1] in "([" and len(node[2]) == 2:
        return [end for end in map(real_value, node[2]) if mpmath.isfinite(end)]
    if head == "relation":
        return _relation_breakpoints(node)
    if head == "group":
        raise UnparsableError("a tuple is no set of reals")
    return [real_value(node)]


def contains(node, x, points):
    """Membership of x; values within rounding of one of `points` have been replaced by it in x."""
    head = node[0]
    if head == "reals":
        return True
    if head == "union":
        return contains(node[1], x, points) or contains(node[2], x, points)
    if head == "intersection":
        return contains(node[1], x, points) and contains(node[2], x, points)
    if head == "difference":
        return contains(node[1], x, points) and not contains(node[2], x, points)
    if head in ("set", "list"):
        return any(contains(item, x, points) for item in node[1])
    if head == "group":
        low, high = (_snap(real_value(end), points) for end in node[2])
        above = x >= low if node[1] == "[" else x > low
        return above and (x <= high if node[3] == "]" else x < high)
    if head == "relation":
        return _relation_holds(node, x, points)
    return x == _snap(real_value(node), points)


def real_value(node):
    """The value of a constant real tree; UndefinedError otherwise."""
    if symbols(node):
        raise UnparsableError("a variable where a number should stand")
    return _real(node, {})


def _real(node, point):
    if node[0] not in SCALARS:
        raise UnparsableError(f"a {node[0]} where a number should stand")
    value = numeric(node, point)
    if mpmath.im(value) != 0:
        raise UndefinedError("a complex number in a set of reals")
    return mpmath.re(value)


def _distinct(values):
    distinct = []
    for value in sorted(values):
        if not distinct or abs(value - distinct[-1]) > _SAME * max(1, abs(value)):
            distinct.append(value)
    if len(distinct) > BREAKPOINTS_CAP:
        raise TooLargeError("too many ends of intervals")
    return distinct


def _probes(points):
    if not points:
        return [mpmath.mpf(0)]
    between = [(low + high) / 2 for low, high in itertools.pairwise(points)]
    return [points[0] - 1, *points, *between, points[-1] + 1]


def _snap(value, points):
    if not mpmath.isfinite(value):
        return value
    for point in points:
        if abs(value - point) <= _SAME * max(1, abs(value)):
            return point
    return value


def _linear_roots(sides, name):
    """Where neighbouring sides of an inequality meet; only for sides that are linear in the one variable."""
    roots = []
    for left, right in itertools.pairwise(sides):
        gaps = [_real(left, {name: mpmath.mpf(x)}) - _real(right, {name: mpmath.mpf(x)}) for x in _SAMPLES]
        slope = gaps[1] - gaps[0]
        straight = all(abs(gap - gaps[0] - slope * x) <= _SAME * (1 + abs(gap)) for gap, x in zip(gaps, _SAMPLES, strict=True))
        if any(not mpmath.isfinite(gap) for gap in gaps):  # x < infinity
            roots.append(None)
        elif slope == 0 or not straight:
            raise UnparsableError("an inequality that is not linear in its variable")
        else:
            roots.append(-gaps[0] / slope)
    return roots


def _relation_breakpoints(node):
    names = symbols(node)
    if len(names) != 1 or not set(node[2]) <= set(ORDER) | {"!=", "="}:
        raise UnparsableError("not an inequality in one variable")
    return [root for root in _linear_roots(node[1], next(iter(names))) if root is not None]


def _relation_holds(node, x, points):
    """x against each side's root rather than the sides' values, so that rounding cannot flip an end point."""
    name = next(iter(symbols(node)))
    roots = _linear_roots(node[1], name)
    for root, op, left, right in zip(roots, node[2], node[1], node[1][1:], strict=False):
        if root is not None and x == _snap(root, points):
            holds = op in ("<=", ">=", "=")
        else:
            a, b = _real(left, {name: x}), _real(right, {name: x})
            holds = ORDER[op](a, b) if op in ORDER else (a == b) == (op == "=")
        if not holds:
            return False
    return True
