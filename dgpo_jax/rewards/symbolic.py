"""What SymPy can prove about two scalar trees: that they are equal, that they differ, or neither. The work is bounded.

The difference of the two expressions (see expressions.py) is put over one denominator, as polynomials of SymPy's sparse
rings. Every product is paid for before it is computed; `simplify`, `expand` and factorisation, whose cost nobody can
tell in advance, are not used. The generators of the ring are roots of primes, of variables, of pi and e, and of the symbols
that expressions.py gives to everything else. Roots are reduced by g^q = base.

A numerator of 0 proves equality. One that is not 0 proves difference only if the generators are known to be independent:
roots of primes, variables, one of pi and e. Variables are positive here, so an equality is proved for positive values; the
caller tests points with negative ones.
"""

import math

import sympy
from sympy import QQ, QQ_I, I
from sympy.polys.rings import ring

from dgpo_jax.rewards import arithmetic
from dgpo_jax.rewards.expressions import BITS_CAP, PRIME_CAP, Translator, UndecidedError
from dgpo_jax.rewards.tokens import UnparsableError

NODES_CAP = 250  # of both trees together
GENERATORS_CAP = 12
WORK_CAP = 40_000  # products of two terms with short coefficients, at about 4 us each
DEGREE_CAP = 20_000
_NUMBERS = frozenset((sympy.pi, sympy.E))


def equal(left, right):
    """True or False if SymPy proves that two scalar trees are equal or that they differ; None if it does neither."""
    try:
        left, right, root_bases = _expressions(left, right)
        outline = Outline(root_bases)
        tree = outline.of(left - right)
        field = Field(outline)
        numerator = field.reduced(field.fraction(tree)[0])
    except (UndecidedError, UnparsableError):
        return None
    if not numerator:
        return True
    return False if outline.independent else None


def proportional(left, right):
    """True or False if SymPy proves that one tree is, or is not, a rational number times the other; else None."""
    try:
        *sides, root_bases = _expressions(left, right)
        outline = Outline(root_bases)
        trees = [outline.of(side) for side in sides]
        field = Field(outline)
        (left, left_below), (right, right_below) = map(field.fraction, trees)
        left, right = (field.reduced(field.times(*pair)) for pair in ((left, right_below), (right, left_below)))
        if not left or not right:
            return None
        if field.times(left, field.constant(right.LC)) == field.times(right, field.constant(left.LC)):
            return True
    except (UndecidedError, UnparsableError):
        return None
    return False if outline.independent and all(key.is_Symbol for key in outline.orders) else None


def _expressions(left, right):
    if _nodes(left) + _nodes(right) > NODES_CAP:
        raise UndecidedError(f"more than {NODES_CAP} nodes")
    translator = Translator(arithmetic.symbols(left) | arithmetic.symbols(right))
    return translator.translate(left), translator.translate(right), translator.root_bases


def _nodes(node):
    return 1 + sum(_nodes(child) for child in node if isinstance(child, tuple) and child)


class Outline:
    """A SymPy expression as sums, products and powers of generators, and which generators that takes.

    An outline is a tuple: ("number", Rational), ("i",), ("generator", key, exponent), ("add", outlines),
    ("mul", outlines), ("power", outline, int).
    """

    def __init__(self, root_bases):
        self.root_bases = root_bases  # Translator's
        self.orders = {}  # key -> q: the generator is key ** (1/q)
        self.bases = {}  # key -> its outline, where g ** q is to be replaced
        self.independent = True
        self.complex = False

    def of(self, value):
        if value.is_Rational:
            return ("number", value)
        if value is I:
            self.complex = True
            return ("i",)
        if value.is_Add or value.is_Mul:
            return ("add" if value.is_Add else "mul", [self.of(part) for part in value.args])
        base, exponent = value.as_base_exp()
        if base.is_Symbol or base in _NUMBERS:
            if base in self.root_bases and base not in self.bases:
                self.bases[base] = self.of(self.root_bases[base])  # before `base` itself: its own roots are replaced later
            return self.generator(base, exponent, independent=base in _NUMBERS or bool(base.is_positive))
        return self.of_power(base, exponent)

    def generator(self, key, exponent, independent):
        self.independent = self.independent and independent
        self.orders[key] = math.lcm(self.orders.get(key, 1), int(exponent.q))
        if len(self.orders) > GENERATORS_CAP:
            raise UndecidedError(f"more than {GENERATORS_CAP} generators")
        if self.orders.keys() >= _NUMBERS:  # nobody knows whether pi and e are algebraically independent
            self.independent = False
        return ("generator", key, exponent)

    def of_power(self, base, exponent):
        if base.is_Integer and 1 < base <= PRIME_CAP:
            return ("mul", [self.of_prime(prime, exponent * times) for prime, times in sorted(sympy.factorint(base).items())])
        whole, part = divmod(exponent, 1)
        outline = self.of(base)
        if part == 0:
            return ("power", outline, int(whole))
        self.bases[base] = outline
        return ("mul", [("power", outline, int(whole)), self.generator(base, part, independent=False)])

    def of_prime(self, prime, exponent):
        prime = sympy.Integer(prime)
        whole, part = divmod(exponent, 1)
        if part == 0:
            return ("power", ("number", prime), int(whole))
        self.bases[prime] = ("number", prime)
        return ("mul", [("power", ("number", prime), int(whole)), self.generator(prime, part, independent=True)])


class Field:
    """Fractions of polynomials in the generators of an outline, with a purse that pays for every product."""

    def __init__(self, outline):
        self.outline = outline
        self.keys = list(outline.orders)
        self.domain = QQ_I if outline.complex else QQ
        self.ring, *self.generators = ring([f"g{index}" for index in range(max(1, len(self.keys)))], self.domain)
        self.work_left = WORK_CAP

    def constant(self, value):
        return self.ring.ground_new(value)

    def times(self, left, right):
        length = max(self.bits(left), self.bits(right), 500)
        self.work_left -= len(left) * len(right) * (length // 500) ** 2 + len(left) + len(right)
        if self.work_left < 0 or length > BITS_CAP:
            raise UndecidedError("too much work")
        product = left * right
        if product and max(product.degrees()) > DEGREE_CAP:
            raise UndecidedError("degree too high")
        return product

    def bits(self, polynomial):
        parts = polynomial.values() if self.domain is QQ else (part for c in polynomial.values() for part in (c.x, c.y))
        return max((max(abs(part.numerator), part.denominator).bit_length() for part in parts), default=0)

    def power(self, polynomial, exponent):
        if len(polynomial) == 1 and exponent:
            ((monomial, coefficient),) = polynomial.items()
            self.work_left -= exponent.bit_length()
            if max(monomial, default=0) * exponent > DEGREE_CAP or self.bits(polynomial) * exponent > BITS_CAP:
                raise UndecidedError("power too high")
            return self.ring.from_dict({tuple(part * exponent for part in monomial): coefficient**exponent})
        result = self.ring.one
        for _ in range(exponent):
            result = self.times(result, polynomial)
        return result

    def fraction(self, tree):
        """(numerator, denominator) of an outline."""
        head, *arguments = tree
        one = self.ring.one
        if head == "number":
            return self.constant(self.domain.convert(QQ(arguments[0].p, arguments[0].q), QQ)), one
        if head == "i":
            return self.constant(QQ_I(0, 1)), one
        if head == "generator":
            key, exponent = arguments
            steps = int(exponent * self.outline.orders[key])
            power = self.power(self.generators[self.keys.index(key)], abs(steps))
            return (power, one) if steps >= 0 else (one, power)
        if head == "power":
            above, below = self.fraction(arguments[0])
            above, below = self.power(above, abs(arguments[1])), self.power(below, abs(arguments[1]))
            return (above, below) if arguments[1] >= 0 else (below, self.not_zero(above))
        above, below = self.fraction(arguments[0][0])
        for part in arguments[0][1:]:
            next_above, next_below = self.fraction(part)
            if head == "mul":
                above, below = self.times(above, next_above), self.times(below, next_below)
            elif below == next_below:
                above = above + next_above
            else:
                above = self.times(above, next_below) + self.times(next_above, below)
                below = self.times(below, next_below)
        return above, below

    def not_zero(self, polynomial):
        if not self.reduced(polynomial):
            raise UndecidedError("division by zero")
        return polynomial

    def reduced(self, polynomial):
        """Times some denominator, with g ** q replaced by the generator's base; outer roots before those inside them."""
        for key, base in reversed(self.outline.bases.items()):
            index, order = self.keys.index(key), self.outline.orders[key]
            shares = {}  # e -> what is multiplied by (g ** q) ** e
            for monomial, coefficient in polynomial.items():
                times, rest = divmod(monomial[index], order)
                share = shares.setdefault(times, self.ring.zero.copy())
                share[(*monomial[:index], rest, *monomial[index + 1:])] = coefficient
            top = max(shares, default=0)
            if top:
                above, below = self.fraction(base)
                terms = [self.times(share, self.times(self.power(above, times), self.power(below, top - times))) for times, share in shares.items()]
                polynomial = sum(terms, self.ring.zero)
        return polynomial
