"""Turns scalar trees into SymPy expressions, by constructors only and with the size of every step checked first.

No string of an answer reaches SymPy, not even a variable's name: variables are called v0, v1, .. in the order of theirs.
SymPy's constructors can be slow too: asked for the square root of a polynomial, SymPy factors it to learn its sign. So it only
ever sees sums, products and rational powers of numbers, pi, e, i and symbols. Anything else is named by a symbol of its own,
u0, u1, .., the same for the same thing: \\sqrt{x + 1}, n!, |x - 5|, \\ln 2, e^{ix}. What can be said about these is said here:

    powers with variables in the exponent, and trigonometric functions of variables, by exponentials: 4^n is (e^{n ln 2})^2
    logarithms of products are split, e^{\\ln x} is x, (n + 2)! is (n + 2)(n + 1) n!, \\binom{n}{k} is n! / (k! (n - k)!)
    \\sin and the like at multiples of pi, their inverses, and nested square roots of numbers, by SymPy

All variables are positive. Powers, factorials and binomials of plain numbers are left to arithmetic.py, within its bounds.
"""

from fractions import Fraction

import sympy
from sympy import I, Rational, S
from sympy.simplify.sqrtdenest import sqrtdenest

from dgpo_jax.rewards import arithmetic
from dgpo_jax.rewards.tokens import TooLargeError

DEGREE_CAP = 10_000  # exponent of a symbol, e or pi
EXPONENT_CAP = 200  # of anything else
BITS_CAP = arithmetic.BITS_CAP
PRIME_CAP = 10**6  # integers above are not split into primes
SHIFT_CAP = 20  # (n + 20)! is still written with n!
EXPANSION_CAP = 20  # nodes of an exponent that is multiplied out, of numbers whose root or arcsine SymPy looks for
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": I}
_POSITIVE = frozenset((sympy.pi, sympy.E))
_INVERSE = {
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "arccot": sympy.acot, "arcsec": sympy.asec,
    "arccsc": sympy.acsc,
}  # fmt: skip
_DIRECT = {"sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc}
_TEN = sympy.Integer(10)
_UNORDERED = frozenset(("min", "max", "gcd", "lcm"))
_UNDEFINED = frozenset((S.NaN, S.ComplexInfinity, S.Infinity, S.NegativeInfinity))
# By u = e^{ix} and v = e^{-ix}; hyperbolic ones by u = e^x and v = e^{-x}.
_BY_EXPONENTIALS = {
    "sin": lambda u, v: (u - v) / (2 * I),
    "cos": lambda u, v: (u + v) / 2,
    "tan": lambda u, v: (u - v) / (I * (u + v)),
    "cot": lambda u, v: I * (u + v) / (u - v),
    "sec": lambda u, v: 2 / (u + v),
    "csc": lambda u, v: 2 * I / (u - v),
    "sinh": lambda u, v: (u - v) / 2,
    "cosh": lambda u, v: (u + v) / 2,
    "tanh": lambda u, v: (u - v) / (u + v),
    "coth": lambda u, v: (u + v) / (u - v),
    "sech": lambda u, v: 2 / (u + v),
    "csch": lambda u, v: 2 / (u - v),
}


class UndecidedError(Exception):
    """SymPy is not asked: the expression is beyond the bounds, undefined, or of a kind that is not translated."""


class Translator:
    """Translates the trees of one comparison, so that the same symbol stands for the same thing in all of them."""

    def __init__(self, names):
        self.variables = {name: sympy.Symbol(f"v{index}", positive=True) for index, name in enumerate(sorted(names))}
        self.named = {}  # (what, *arguments) -> the symbol that stands for it
        self.root_bases = {}  # symbol whose roots occur -> the expression that it stands for
        self.real_exponents = {}  # symbol that stands for e^x -> x, where x is real
        self.log_arguments = {}  # symbol that stands for a logarithm -> its argument: a prime, a variable or pi

    def translate(self, node, constant=False):
        """The SymPy expression of a scalar tree; `constant` is True inside a part whose size has been checked.

        Raises:
            UndecidedError; UnparsableError (TooLargeError, UndefinedError) from arithmetic.
        """
        head = node[0]
        if head == "symbol":
            return self.variables[node[1]]
        if head == "constant":
            return _CONSTANTS[node[1]]
        if head == "infinity":
            raise UndecidedError("infinity")
        if not constant and not arithmetic.symbols(node):
            exact = arithmetic.rational(node)
            if exact is not None:
                return Rational(exact.numerator, exact.denominator)
            arithmetic.numeric(node, {})  # raises unless each of its parts has a value, and not too large a one
            constant = True
        if head == "number":
            return Rational(node[1].numerator, node[1].denominator)
        values = [self.translate(child, constant) for child in node[1:] if isinstance(child, tuple)]
        result = self.operation(node[1] if head == "call" else head, values)
        if result in _UNDEFINED:
            raise UndecidedError("no finite value")
        if bits(result) > BITS_CAP:
            raise TooLargeError("coefficient of too many digits")
        return result

    def operation(self, name, values):
        if all(value.is_Rational for value in values):
            exact = arithmetic.exact_operation(name, *(Fraction(value.p, value.q) for value in values))
            if exact is not None:
                return Rational(exact.numerator, exact.denominator)
        builders = {
            "add": sympy.Add, "mul": sympy.Mul, "div": self.divide, "pow": self.power, "root": self.root,
            "percent": lambda value: value / 100, "exp": self.exponential, "ln": self.logarithm, "log": self.log_to_base,
            "abs": self.absolute, "factorial": self.factorial, "binomial": self.binomial,
        }  # fmt: skip
        if name in builders:
            return builders[name](*values)
        if name in _BY_EXPONENTIALS:
            return self.trigonometric(name, *values)
        if name in _INVERSE:
            return self.special_value(name, _INVERSE[name], *values)
        return self.name(name, *(sorted(values, key=sympy.default_sort_key) if name in _UNORDERED else values))

    def name(self, what, *arguments):
        """The symbol that stands for a thing that SymPy is told nothing about."""
        return self.named.setdefault((what, *arguments), sympy.Symbol(f"u{len(self.named)}"))

    # Powers and logarithms

    def divide(self, above, below):
        return above * self.power(below, S.NegativeOne)

    def root(self, value, degree):
        return self.power(value, self.power(degree, S.NegativeOne))

    def power(self, base, exponent):
        if not exponent.is_Rational:
            logarithm = self.logarithm(base)
            whole = logarithm.free_symbols <= self.real_symbols() and not logarithm.has(I)
            return self.exponential(exponent * logarithm) if whole else self.name("pow", base, exponent)
        if abs(exponent) > (DEGREE_CAP if base.is_Symbol or base in _POSITIVE else EXPONENT_CAP) or bits(base) * abs(exponent) > BITS_CAP:
            raise TooLargeError("power of too many digits")
        if base == 0:
            if exponent <= 0:
                raise UndecidedError("zero to a power not above zero")
            return S.Zero
        if exponent.is_Integer or base.is_Rational:
            return self.rational_power(base, exponent)
        return self.real_or_principal_root(base, exponent)

    def rational_power(self, base, exponent):
        """With arithmetic.py's branch: an odd root of a negative number is negative."""
        if exponent.q % 2 and exponent.q > 1 and base < 0:
            return sympy.Pow(-base, exponent) * (-1 if exponent.p % 2 else 1)
        return sympy.Pow(base, exponent)

    def real_or_principal_root(self, base, exponent):
        coefficient, rest = base.as_coeff_Mul()
        if coefficient < 0:
            coefficient, rest = S.One, base
        simple, others = [sympy.Pow(coefficient, exponent)], []
        for factor in sympy.Mul.make_args(rest):
            inner, inner_exponent = factor.as_base_exp()
            positive = inner in _POSITIVE or inner in self.variables.values() or (inner.is_Integer and inner > 0)
            if positive and inner_exponent.is_Rational:
                simple.append(sympy.Pow(inner, inner_exponent * exponent))
            else:
                others.append(factor)
        if others:
            simple.append(self.root_of_other(sympy.Mul(*others), exponent))
        return sympy.Mul(*simple)

    def root_of_other(self, base, exponent):
        if exponent.q % 2 and not self.is_positive(base):
            raise UndecidedError("odd root of a number of unknown sign")
        if exponent.q == 2 and is_real_number(base) and size(base) <= EXPANSION_CAP:
            root = sqrtdenest(sympy.sqrt(base))
            if not any(part.exp.q > 1 and part.base.is_Add for part in root.atoms(sympy.Pow)):
                return sympy.Pow(root, exponent.p)
        symbol = self.name("base", base)
        self.root_bases[symbol] = base
        return sympy.Pow(symbol, exponent)

    def is_positive(self, value):
        """By its looks: SymPy would go to any length to find out."""
        if value.is_Rational:
            return value > 0
        if value.is_Add or value.is_Mul:
            return all(map(self.is_positive, value.args))
        base, exponent = value.as_base_exp()
        if exponent is not S.One:
            return exponent.is_Rational and self.is_positive(base)
        return value in _POSITIVE or value in self.real_exponents or value in self.variables.values()

    def real_symbols(self):
        return {*self.variables.values(), *self.log_arguments}

    def exponential(self, value):
        """e to a sum, as a product with one factor for each term."""
        if size(value) > EXPANSION_CAP:
            return self.name("exp", value)
        factors = []
        for term in sympy.Add.make_args(sympy.expand_mul(value)):
            coefficient, core = term.as_coeff_Mul()
            if core is S.One:
                factors.append(self.power(sympy.E, coefficient))
            elif core in self.log_arguments:
                factors.append(self.power(self.log_arguments[core], coefficient))
            elif core == I * sympy.pi:
                angle = sympy.pi * coefficient
                factors.append(self.trigonometric("cos", angle) + I * self.trigonometric("sin", angle))
            else:
                symbol = self.name("exp", core)
                if not core.has(I) and core.free_symbols <= self.real_symbols():
                    self.real_exponents[symbol] = core
                factors.append(sympy.Pow(symbol, coefficient))
        return sympy.Mul(*factors)

    def logarithm(self, value):
        """Natural; of a positive product, split into logarithms of primes, of variables and of what is left."""
        coefficient, rest = value.as_coeff_Mul()
        if not coefficient > 0:
            coefficient, rest = S.One, value
        terms, others = [self.log_of_integer(coefficient.p), -self.log_of_integer(coefficient.q)], []
        for factor in sympy.Mul.make_args(rest):
            base, exponent = factor.as_base_exp()
            inner = self.log_of_factor(base)
            if inner is None or not exponent.is_Rational:
                others.append(factor)
            else:
                terms.append(exponent * inner)
        if others:
            terms.append(self.name("log", sympy.Mul(*others)))
        return sympy.Add(*terms)

    def log_of_factor(self, base):
        if base in self.real_exponents:
            return self.real_exponents[base]
        if base in (S.One, sympy.E):
            return S.One if base is sympy.E else S.Zero
        if base.is_Integer and base > 0:
            return self.log_of_integer(int(base))
        return self.log_symbol(base) if base is sympy.pi or base in self.variables.values() else None

    def log_of_integer(self, value):
        if value == 1 or value > PRIME_CAP:
            return S.Zero if value == 1 else self.log_symbol(sympy.Integer(value))
        return sympy.Add(*(times * self.log_symbol(sympy.Integer(prime)) for prime, times in sorted(sympy.factorint(value).items())))

    def log_symbol(self, argument):
        symbol = self.name("log", argument)
        self.log_arguments[symbol] = argument
        return symbol

    def log_to_base(self, value, base=_TEN):
        return self.divide(self.logarithm(value), self.logarithm(base))

    # Other functions

    def absolute(self, value):
        if self.is_positive(value):
            return value
        if self.is_positive(-value):
            return -value
        return self.name("abs", -value if value.could_extract_minus_sign() else value)

    def factorial(self, value):
        """Of n + a whole number: by n!, so that (n + 1)! / n! is seen to be n + 1."""
        shift, rest = value.as_coeff_Add()
        whole = int(shift // 1)
        if rest == 0 or abs(whole) > SHIFT_CAP:
            return self.name("factorial", value)
        start = value - whole
        steps = [start + step for step in range(1, whole + 1)] or [1 / (start - step) for step in range(-whole)]
        return self.name("factorial", start) * sympy.Mul(*steps)

    def binomial(self, n, k):
        above, *below = (self.operation("factorial", [value]) for value in (n, k, n - k))
        return self.divide(above, sympy.Mul(*below))

    def trigonometric(self, name, angle):
        if name in _DIRECT and not angle.free_symbols:
            return self.special_value(name, _DIRECT[name], angle, known=(angle / sympy.pi).is_Rational)
        angle = angle if name not in _DIRECT else I * angle
        return _BY_EXPONENTIALS[name](self.exponential(angle), self.exponential(-angle))

    def special_value(self, name, function, argument, known=None):
        """What SymPy knows of \\sin(\\pi/12) or \\arctan(\\sqrt3); its name where SymPy knows nothing."""
        if known is None:
            known = is_real_number(argument) and size(argument) <= EXPANSION_CAP
        value = function(argument) if known else None
        return self.name(name, argument) if value is None or value.has(sympy.Function) else value


def is_real_number(value):
    """True for a SymPy value without symbols and without the imaginary unit."""
    return not value.free_symbols and not value.has(I)


def bits(value):
    """Size of the largest number in an expression."""
    return max((max(abs(number.p), number.q).bit_length() for number in value.atoms(Rational)), default=0)


def size(value):
    """Nodes of a SymPy value."""
    return sum(1 for _ in sympy.preorder_traversal(value))
