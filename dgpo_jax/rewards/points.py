"""Where two expressions are compared: points that depend on nothing but the two texts.

Most differences show at any point. Functions that are made of pieces, such as |x - 200|, differ from one of their pieces only
beyond a place that some constant of theirs tells: for them there are also points around their constants, and far out.
"""

import hashlib
import itertools

import mpmath

from dgpo_jax.rewards import arithmetic
from dgpo_jax.rewards.nodes import SCALARS

TRIES = 10
MIXED_TRIES = 4  # points with negative coordinates, used where both sides are real
WIDE_TRIES = 3  # points further out: a side may change its form at 3, as |x - 3| does
WIDE = 20
FAR = (10**3, 10**5)
CONSTANTS_CAP = 8  # constants around which points are put
CONSTANT_CAP = 10**30
FAR_CAP = 24
_PIECES = frozenset(("abs", "floor", "ceil", "min", "max", "mod", "root"))


def make(seed, names, trees):
    """The points {symbol: value} of each kind: "positive", "mixed" (in sign), "wide", and "far" (none where nothing has pieces)."""
    return {
        "positive": [_point(seed, names, index, mixed=False) for index in range(TRIES)],
        "mixed": [_point(seed, names, index, mixed=True) for index in range(MIXED_TRIES)],
        "wide": [_point(seed, names, index, mixed=index > 0, scale=WIDE) for index in range(WIDE_TRIES)],
        "far": _far_points(seed, names, trees) if names and any(map(_has_pieces, trees)) else [],
    }


def _point(seed, names, index, mixed, scale=1):
    """A value in (0.25, 2.25) * scale for each name, negative for about half of the names of a mixed point."""
    point = {}
    for name in names:
        share, negative = _hash(seed, name, index, mixed, scale)
        value = (2 * share + 0.25) * scale
        point[name] = -value if mixed and negative else value
    if mixed and names and all(value > 0 for value in point.values()):
        point[names[index % len(names)]] *= -1
    return point


def _far_points(seed, names, trees):
    """Coordinates just beside a constant of the trees, or its opposite, or far out, each in both signs."""
    constants = sorted(set(itertools.chain.from_iterable(map(_constants, trees))))[-CONSTANTS_CAP:]
    places = [sign * mpmath.mpf(size) for size in (*constants, *FAR) for sign in (1, -1)]
    sides = [(place, side) for place in places for side in (1, -1)][-FAR_CAP:]
    found = []
    for index, (place, side) in enumerate(sides):
        point = {}
        for shift, name in enumerate(names):
            share, _ = _hash(seed, name, index, "far", 0)
            own_place, own_side = (place, side) if shift == 0 else sides[int(share * 10**6) % len(sides)]
            point[name] = own_place + own_side * (share / 2 + 0.125) * max(1, abs(own_place) / 10)
        found.append(point)
    return found


def _hash(seed, name, index, kind, scale):
    """(a number in [0, 1), a bit) that only these tell."""
    digest = hashlib.sha256(repr((seed, name, index, kind, scale)).encode("utf-8", "surrogatepass")).digest()
    return mpmath.mpf(int.from_bytes(digest[:8], "big")) / 2**64, digest[8] % 2


def _has_pieces(node):
    if node[0] == "call" and node[1] in _PIECES and arithmetic.symbols(node):
        return True
    if node[0] == "pow" and arithmetic.symbols(node[1]) and not _is_whole(node[2]):
        return True
    return any(_has_pieces(child) for child in node if isinstance(child, tuple) and child)


def _is_whole(exponent):
    value = _rational(exponent)
    return value is not None and value.denominator == 1


def _rational(node):
    try:
        return arithmetic.rational(node)
    except arithmetic.UnparsableError:
        return None


def _constants(node):
    if node[0] == "number":
        return {float(abs(node[1]))} if 3 < abs(node[1]) < CONSTANT_CAP else set()
    if node[0] in SCALARS and not arithmetic.symbols(node) and (value := _rational(node)) is not None:  # 2^{20}
        return {float(abs(value))} if 3 < abs(value) < CONSTANT_CAP else set()
    return set().union(*(_constants(child) for child in node if isinstance(child, tuple) and child))
