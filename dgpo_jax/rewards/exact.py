"""Plain numbers, exactly: integers, decimals, fractions, mixed numbers, percent and powers of ten as `Fraction`.

This settles most answers in microseconds inside the trainer's process, with no mpmath and no worker.
"""

import functools
import re
from fractions import Fraction
from typing import NamedTuple

DIGITS_CAP = 300  # digits of one literal
TOLERANCE = 1e-6  # relative, and only where a side is written as a decimal
_ROUNDING = Fraction(10**9 + 1, 10**9)  # a tolerance is a float: 0.1 / 1.7 * 1.7 must still reach 0.1


class Exact(NamedTuple):
    """A number and how it was written."""

    value: Fraction
    places: int | None = None  # decimal places; None = not written as a decimal, so it must match exactly
    percent: bool = False  # value is the number before the sign: 25 for 25%


_DECIMAL = r"(?:(?!0)\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_PLAIN = re.compile(rf"({_DECIMAL})(?:[eE]([-+]?\d{{1,3}}))?")
_POWER_OF_TEN = re.compile(rf"({_DECIMAL})\s*(?:\\times|\\cdot|\*)\s*10\s*(?:\^|\*\*)\s*(?:\{{\s*([-+]?\d{{1,3}})\s*\}}|(\d{{1,3}}))")
_RATIO = re.compile(r"(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_FRAC = re.compile(r"(\d+)?\s*\\frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))")
_DECIMAL_COMMA = re.compile(r"([-+]?(?:0(?=,)|\d{1,15}(?!,\d{3}$))),(\d{1,15})")
_SIGN_AND_BODY = re.compile(r"([-+]?)\s*(.*?)\s*(%|\\degree)?", re.DOTALL)


def read_number(normalised):
    """Reads a whole normalised answer as one number; None if it is anything else."""
    if len(normalised) > 2 * DIGITS_CAP + 32:
        return None
    sign, body, suffix = _SIGN_AND_BODY.fullmatch(normalised).groups()
    number = _read_unsigned(body)
    if number is None:
        return None
    value, places = number
    return Exact(-value if sign == "-" else value, places, suffix == "%")


def _read_unsigned(body):
    if match := _PLAIN.fullmatch(body):
        return read_decimal(match.group(1), int(match.group(2) or 0), scientific=match.group(2) is not None)
    if match := _POWER_OF_TEN.fullmatch(body):
        return read_decimal(match.group(1), int(match.group(2) or match.group(3)))
    if match := _RATIO.fullmatch(body):
        return _read_mixed(*match.groups())
    if match := _FRAC.fullmatch(body):
        whole, *parts = match.groups()
        return _read_mixed(whole, parts[0] or parts[1], parts[2] or parts[3])
    return None


def read_decimal(digits, exponent=0, scientific=False):
    """(value, places) of digits * 10**exponent, None beyond the cap. `digits` may hold thousands commas."""
    digits = digits.replace(",", "")
    if len(digits) > DIGITS_CAP or abs(exponent) > DIGITS_CAP:
        return None
    whole, point, decimals = digits.partition(".")
    value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals)) * Fraction(10) ** exponent
    is_decimal = (bool(point) and bool(decimals)) or scientific
    return value, (len(decimals) - exponent if is_decimal else None)


def _read_mixed(whole, numerator, denominator):
    """A fraction, or a mixed number if a whole part stands before a proper one; None if it is neither."""
    if max(len(numerator), len(denominator), len(whole or "")) > DIGITS_CAP or int(denominator) == 0:
        return None
    part = Fraction(int(numerator), int(denominator))
    if whole is None:
        return part, None
    return (int(whole) + part, None) if 0 <= part < 1 else None


def numbers_equal(left, right, tolerance=TOLERANCE):
    """True if two `Exact` numbers are the same answer.

    A percent sign on one side only is read both ways, since a problem may ask for "the percentage" or "the share":
    25% matches 25 and 1/4. Up to TOLERANCE, `tolerance` is for decimals only, and they must also agree to one unit of the
    coarser last place, and exactly if both are written to the same place, or if one is not rounded at all: 204.0001 is not
    204. A larger one comes with a problem set whose golds are rounded, and holds for any two numbers. 0.5% is not 0.5: below
    1, nobody leaves the sign out.
    """
    if left.percent == right.percent:
        return _values_equal(left, right, tolerance)
    bare = min(abs(left.value), abs(right.value)) >= 1 and _values_equal(left, right, tolerance)
    return bare or _values_equal(_as_share(left), _as_share(right), tolerance)


def _as_share(number):
    if not number.percent:
        return number
    return Exact(number.value / 100, None if number.places is None else number.places + 2)


def differ_by_comma(left, right):
    """True if `left` is the decimal `right` with a decimal comma: 3,14 for 3.14. "1,000" is a thousand and never 1.000."""
    match = _DECIMAL_COMMA.fullmatch(left)
    return match is not None and right == f"{match.group(1)}.{match.group(2)}"


def _values_equal(left, right, tolerance):
    gap = abs(left.value - right.value)
    if gap == 0:
        return True
    within = gap <= _as_fraction(tolerance) * max(abs(left.value), abs(right.value))
    if tolerance > TOLERANCE:
        return within
    places = [side.places for side in (left, right) if side.places is not None]
    if len(places) == 2 and places[0] == places[1]:  # 306956.63 is not 306956.64
        return False
    return within and bool(places) and gap < Fraction(10) ** -min(places)


@functools.lru_cache(maxsize=256)
def _as_fraction(tolerance):
    """As it is written, so that 1e-06 is one millionth, and no float ever meets a number of 300 digits."""
    return Fraction(repr(float(tolerance))) * (_ROUNDING if tolerance > TOLERANCE else 1)
