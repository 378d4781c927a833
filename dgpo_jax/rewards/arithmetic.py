"""Values of a scalar tree: an exact `Fraction` where there is one, else numbers at given points, at 50 digits.

Every operation checks the size of what it is about to compute, so that the work is bounded whatever the text says.
"""

import functools
import math
import operator
from fractions import Fraction

import mpmath

from dgpo_jax.rewards.tokens import TooLargeError, UnparsableError

FACTORIAL_CAP = 200
BINOMIAL_CAP = 1000
BITS_CAP = 20_000  # of any exact intermediate value
LOG_CAP = 10_000  # natural logarithm of any inexact intermediate value


class UndefinedError(UnparsableError):
    """No value here: a division by zero, 0 ** -1, a logarithm of 0."""


def rational(node):
    """The exact value of a node, or None where it is not (visibly) rational.

    Raises:
        UndefinedError: division by zero. TooLargeError: beyond the caps above.
    """
    head = node[0]
    if head == "number":
        return node[1]
    if head in ("symbol", "constant", "infinity"):
        return None
    values = [rational(child) for child in node[1:] if isinstance(child, tuple)]
    if any(value is None for value in values):
        return None
    return exact_operation(node[1] if head == "call" else head, *values)


def exact_operation(name, *values):
    """The operation on `Fraction`s; None where its value is not rational or the operation is unknown. Raises as `rational`."""
    compute = _EXACT.get(name)
    value = None if compute is None else compute(*values)
    if value is not None and max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS_CAP:
        raise TooLargeError("exact value of too many digits")
    return value


def _product(*factors):
    return functools.reduce(operator.mul, factors)


def _divide(a, b):
    if b == 0:
        raise UndefinedError("division by zero")
    return a / b


def _power(base, exponent):
    if exponent.denominator != 1:
        return None
    if base == 0 and exponent < 0:
        raise UndefinedError("division by zero")
    bits = max(abs(base.numerator), base.denominator).bit_length()
    if base not in (0, 1, -1) and bits * abs(exponent) > BITS_CAP:
        raise TooLargeError("power of too many digits")
    return base ** int(exponent)


def _factorial(value):
    if value.denominator != 1 or value < 0:
        return None
    if value > FACTORIAL_CAP:
        raise TooLargeError("factorial of too large a number")
    return Fraction(mpmath.libmp.ifac(int(value)))


def _binomial(n, k):
    if n.denominator != 1 or k.denominator != 1 or n < 0:
        return None
    if n > BINOMIAL_CAP:
        raise TooLargeError("binomial of too large a number")
    if not 0 <= k <= n:
        return Fraction(0)
    ways = Fraction(1)
    for step in range(1, int(min(k, n - k)) + 1):
        ways = ways * (n - step + 1) / step
    return ways


def _of_integers(function):
    def on_integers(*values):
        return Fraction(function(*map(int, values))) if all(value.denominator == 1 for value in values) else None

    return on_integers


def _modulo(a, b):
    if b == 0:
        raise UndefinedError("modulo zero")
    return a % b


_EXACT = {
    "add": lambda *terms: sum(terms, Fraction(0)),
    "mul": _product,
    "div": _divide,
    "pow": _power,
    "percent": lambda a: a / 100,
    "factorial": _factorial,
    "binomial": _binomial,
    "abs": abs,
    "floor": lambda a: Fraction(a // 1),
    "ceil": lambda a: Fraction(-(-a // 1)),
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "mod": _modulo,
    "gcd": _of_integers(math.gcd),
    "lcm": _of_integers(math.lcm),
}


def numeric(node, point):
    """The value of a node where each symbol has its value in `point`; an mpf or mpc at mpmath's working precision.

    Raises:
        UndefinedError: no finite value there (infinity itself is fine as a whole answer). TooLargeError: beyond the caps.
    """
    head = node[0]
    if head == "number":
        return mpmath.mpf(node[1].numerator) / node[1].denominator
    if head == "symbol":
        return point[node[1]]
    if head == "constant":
        return {"pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}[node[1]]
    if head == "infinity":
        return mpmath.inf
    if head == "pow":
        return _numeric_power(node, point)
    values = [numeric(child, point) for child in node[1:] if isinstance(child, tuple)]
    compute = _NUMERIC.get(node[1] if head == "call" else head)
    if compute is None:
        raise UnparsableError(f"function {node[1]}")
    return checked(compute, *values)


def checked(operation, *values):
    """operation(*values), with sizes bounded on both sides and mpmath's errors turned into UndefinedError."""
    for value in values:
        _check_size(value)
    try:
        result = operation(*values)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
        raise UndefinedError(str(error)) from error
    if mpmath.isnan(result):
        raise UndefinedError("not a number")
    _check_size(result)
    return result


def _check_size(value):
    if mpmath.isfinite(value) and value != 0 and abs(mpmath.mag(value)) > 1.5 * LOG_CAP:
        raise TooLargeError("value too large to compute")


def _numeric_power(node, point):
    exact_exponent = rational(node[2])
    base, exponent = numeric(node[1], point), numeric(node[2], point)
    if not (mpmath.isfinite(base) and mpmath.isfinite(exponent)):
        raise UndefinedError("power of infinity")
    if base == 0:
        if mpmath.re(exponent) <= 0:
            raise UndefinedError("zero to a power not above zero")
        return mpmath.mpf(0)
    if abs(exponent) * (abs(mpmath.log(abs(base))) + 4) > LOG_CAP:
        raise TooLargeError("power too large to compute")
    if exact_exponent is not None and exact_exponent.denominator % 2 and mpmath.im(base) == 0:
        return _real_power(mpmath.re(base), exact_exponent)
    return checked(mpmath.power, base, exponent)


def _real_power(base, exponent):
    """Keeps odd roots of negative numbers real, as schoolbooks do: (-8) ** (1/3) is -2."""
    size = mpmath.power(abs(base), mpmath.mpf(exponent.numerator) / exponent.denominator)
    return -size if base < 0 and exponent.numerator % 2 else size


def _root(value, degree):
    if mpmath.im(degree) == 0 and degree == mpmath.floor(mpmath.re(degree)) and degree % 2 == 1 and mpmath.im(value) == 0:
        return _real_power(mpmath.re(value), Fraction(1, int(degree)))
    return mpmath.power(value, 1 / degree) if value != 0 else value


def _exp(value):
    if abs(value) > LOG_CAP:
        raise TooLargeError("exponential too large to compute")
    return mpmath.exp(value)


def _log(value, base=10):
    """A logarithm without a base is to base 10; \\ln is natural. The convention matters only between the two."""
    return mpmath.log(value) / mpmath.log(base)


def _gamma_factorial(value):
    if abs(value) > FACTORIAL_CAP:
        raise TooLargeError("factorial of too large a number")
    return mpmath.factorial(value)


def _gamma_binomial(n, k):
    if max(abs(n), abs(k)) > BINOMIAL_CAP:
        raise TooLargeError("binomial of too large a number")
    return mpmath.binomial(n, k)


def _unknown(*values):
    """Stands for \\sum, \\prod and f(2): some fixed smooth function that tells its arguments apart."""
    return functools.reduce(lambda total, value: mpmath.sin(total + 1) * 3 + value * mpmath.sqrt(total**2 + 2), values)


def _real_only(function):
    def on_reals(*values):
        if any(mpmath.im(value) != 0 for value in values):
            raise UndefinedError("order of complex numbers")
        return function(*(mpmath.re(value) for value in values))

    return on_reals


_NUMERIC = {
    "add": lambda *terms: sum(terms, mpmath.mpf(0)),
    "mul": _product,
    "div": lambda a, b: a / b,
    "percent": lambda a: a / 100,
    "root": _root,
    "exp": _exp,
    "log": _log,
    "ln": mpmath.log,
    "abs": abs,
    "floor": _real_only(mpmath.floor),
    "ceil": _real_only(mpmath.ceil),
    "min": _real_only(min),
    "max": _real_only(max),
    "factorial": _gamma_factorial,
    "binomial": _gamma_binomial,
    "mod": _real_only(lambda a, b: a - b * mpmath.floor(a / b)),
    "sum": _unknown,
    "apply": lambda *values: _unknown(mpmath.mpf(3), *values),
    "prod": lambda *values: _unknown(mpmath.mpf(7), *values),
    "arcsinh": mpmath.asinh, "arccosh": mpmath.acosh, "arctanh": mpmath.atanh,
    "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "arccot": mpmath.acot, "arcsec": mpmath.asec,
    "arccsc": mpmath.acsc,
}  # fmt: skip


def _bounded(function):
    """Hyperbolic growth, which complex arguments bring to sin and cos too, is refused like exp's."""

    def on_small(value):
        if abs(value) > LOG_CAP:
            raise TooLargeError("argument too large to compute")
        return function(value)

    return on_small


for _name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "sech", "csch"):
    _NUMERIC[_name] = _bounded(getattr(mpmath, _name))


def symbols(node):
    """Names of the variables in a tree."""
    if node[0] == "symbol":
        return {node[1]}
    return set().union(*(symbols(child) for child in node if isinstance(child, tuple) and child))


def has_decimal(node):
    """True if some number in the tree is written as a decimal, and so may be rounded."""
    if node[0] == "number":
        return node[2] is not None
    return any(has_decimal(child) for child in node if isinstance(child, tuple) and child)
