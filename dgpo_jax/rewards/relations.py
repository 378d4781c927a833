"""Compares equations and inequalities, with each other and with what they say the answer is.

"x = 5", "f(x) = 2x" and "2 + 3 = 5" say what the answer is, since their left side only names it or comes to it. An equation
between two expressions says no such thing: x + z = 1 is not the answer 1.
"""

from dgpo_jax.rewards import arithmetic, real_sets
from dgpo_jax.rewards.nodes import SCALARS
from dgpo_jax.rewards.real_sets import ORDER

_FUNCTION_LETTERS = frozenset("fghpqFGHPQT")
_SETS = frozenset(("union", "intersection", "difference", "reals", "group"))


def equal(comparison, left, right):
    """True if two answers are the same, at least one of which is a relation. `comparison` compares the parts."""
    if left[0] != "relation":
        left, right = right, left
    if right[0] != "relation":
        value = value_of(comparison, left)
        if value is not None:
            return comparison.equal(value, right)
        return right[0] in _SETS and real_sets.sets_equal(with_one_name(left), right)
    if left[2] == right[2] and comparison.same_row(left[1], right[1]):
        return True
    values = value_of(comparison, left), value_of(comparison, right)
    if None not in values and name_of(left) == name_of(right):
        return comparison.equal(*values)
    return _same_solutions(comparison, left, right)


def value_of(comparison, relation):
    """What "x = 5" or "f(x) = 2x" or "2 + 3 = 5" says the answer is; None if it says no such thing."""
    sides, ops = relation[1], relation[2]
    if not set(ops) <= {"=", "approx"}:
        return None
    if is_name(sides[0]):
        sides, ops = sides[1:], ops[1:]
    elif len(sides) == 2 and is_name(sides[1]) and not arithmetic.symbols(sides[0]):  # 5 = x
        return sides[0]
    elif arithmetic.symbols(relation):
        return None
    pairs = zip(sides, sides[1:], ops, strict=False)
    return sides[0] if all(_link_holds(comparison, *pair) for pair in pairs) else None


def _link_holds(comparison, left, right, op):
    """A link of a chain such as x = 1/3 \\approx 0.33: one that does not hold is a second answer, and so the chain is none."""
    if op == "=":
        return comparison.equal(left, right)
    if not (left[0] in SCALARS and right[0] in SCALARS) or arithmetic.symbols(left) or arithmetic.symbols(right):
        return False
    a, b = comparison.values(left, "positive")[0], comparison.values(right, "positive")[0]
    return a is not None and b is not None and abs(a - b) <= abs(a) / 100


def _same_solutions(comparison, left, right):
    """One is the other times a constant (above 0 for an inequality): 2x + 4y = 6 and y = (3 - x) / 2 * ..."""
    if len(left[2]) == len(right[2]) == 1 and all(side[0] in SCALARS for side in left[1] + right[1]):
        (left_gap, left_op), (right_gap, right_op) = standard_form(left), standard_form(right)
        if left_op == right_op and comparison.proportional(left_gap, right_gap, signed=left_op in ("<", "<=")):
            return True
    if not (arithmetic.symbols(left) == arithmetic.symbols(right) and len(arithmetic.symbols(left)) == 1):
        return False
    return set(left[2] + right[2]) <= set(ORDER) and real_sets.sets_equal(left, right)


def standard_form(relation):
    """(difference, op) with the difference compared to 0 by "=", "!=", "<" or "<=": 5 >= x is x - 5 <= 0."""
    (left, right), (op,) = relation[1], relation[2]
    if op in (">", ">="):
        left, right, op = right, left, {">": "<", ">=": "<="}[op]
    return ("add", left, ("mul", ("number", -1, None), right)), op


def name_of(relation):
    """The side that only names the answer, or None."""
    return next((side for side in relation[1] if is_name(side)), None)


def is_name(node):
    """True for x, f(x), f(2), f^{-1}(x), AB, |AB|, AB/CD or (x, y): a side that only names the answer."""
    head = node[0]
    if head == "group":
        return all(is_name(item) for item in node[2]) and _in_usual_order(node[1], node[2])
    if head == "mul":
        first, *rest = node[1:]
        return (is_name(first) or _is_inverse(first)) and all(is_name(factor) for factor in rest)
    if head == "div":
        return is_name(node[1]) and is_name(node[2])
    if head == "call":
        return node[1] == "apply" or (node[1] == "abs" and _is_segment(node[2]))
    return head == "symbol"


def _is_inverse(node):
    """f^{-1}, before its argument."""
    minus_one = ("mul", ("number", -1, None), ("number", 1, None))
    return node[0] == "pow" and node[1][0] == "symbol" and node[1][1] in _FUNCTION_LETTERS and node[2] == minus_one


def _in_usual_order(bracket, names):
    """(x, y) is read as such where only its value is given; (b, a) = (1, 2) says that (a, b) is (2, 1)."""
    spelt = [name[1].lstrip("\\") if name[0] == "symbol" else repr(name) for name in names]
    if bracket == ":" and any(len(name) > 1 for name in spelt):  # S_{MBCN} : S, in whatever order the problem asks for it
        return True
    return spelt == sorted(spelt) or spelt == ["rho", "theta", "phi"]


def _is_segment(node):
    """AB, whose length |AB| is, or a set S of |S| members: |x| = 5 does not say that x is 5."""
    if node[0] == "symbol":
        return node[1][0].isupper()
    return node[0] == "mul" and all(factor[0] == "symbol" and factor[1][0].isupper() for factor in node[1:])


def with_one_name(relation):
    """0 < f(x) < 1 with one variable for f(x), so that it can be compared with an interval."""
    sides = tuple(("symbol", "value") if is_name(side) and side[0] in ("mul", "call", "div") else side for side in relation[1])
    return ("relation", sides, relation[2])
