"""A recursive-descent parser from tokens to a small syntax tree. Model text never reaches eval or a parser of SymPy's.

The tree is described in nodes.py.
"""

from fractions import Fraction

from dgpo_jax.rewards import primaries
from dgpo_jax.rewards.nodes import matrix_add, matrix_mul, scalar, size, terms
from dgpo_jax.rewards.tokens import TooLargeError, UnparsableError, tokenize

NODES_CAP = 500
DEPTH_CAP = 64
_RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", "approx", "in"))
_SET_OPS = {"cup": "union", "cap": "intersection", "setminus": "difference"}
_ORDER = frozenset(("<", ">", "<=", ">=", "!="))
_SEPARATORS = frozenset((",", ";", "and", "or"))
_OPENERS = frozenset(
    ("(", "[", "{", "\\{", "lvert", "lfloor", "lceil", "frac", "sqrt", "binom", "pi", "infty", "begin", "sum", "prod", *primaries.ACCENTS)
)


def parse(normalised):
    """Parses a normalised answer; "\\pm" is read once with each sign and gives a list.

    Raises:
        UnparsableError: not an answer this grammar knows; TooLargeError: beyond the bounds.
    """
    tokens = tokenize(normalised)
    if not any(token.kind == "op" and token.value in ("pm", "mp") for token in tokens):
        return Parser(tokens).answer()
    upper, lower = Parser(tokens, "+").answer(), Parser(tokens, "-").answer()
    if upper[0] == lower[0] == "set":
        return ("set", upper[1] + lower[1])
    return ("list", _items(upper) + _items(lower))


def _items(node):
    return node[1] if node[0] == "list" else (node,)


class Parser:
    """One pass over one list of tokens. `sign` is what "\\pm" stands for in this pass."""

    def __init__(self, tokens, sign="+"):
        self.tokens = list(tokens)
        self.position = 0
        self.nodes = 0
        self.depth = 0
        self.chain = 0  # divisions and factorials, which nest to the left without any bracket
        self.bound = 0  # sums and products that the parser is inside of
        self.bars = 0  # open "|", so that the next one in operator position closes
        self.trigonometric = 0  # inside an argument of sin, cos ..: there degrees are pi / 180, elsewhere a unit
        self.plus_minus = {"pm": sign, "mp": "-" if sign == "+" else "+"}

    # Tokens

    def peek(self, offset=0):
        index = self.position + offset
        return self.tokens[index] if index < len(self.tokens) else None

    def at(self, *values):
        token = self.peek()
        return token is not None and token.kind == "op" and token.value in values

    def accept(self, *values):
        if self.at(*values):
            self.position += 1
            return self.tokens[self.position - 1].value
        return None

    def expect(self, *values):
        if not self.accept(*values):
            raise UnparsableError(f"expected {values[0]!r}, got {self.peek()}")

    def node(self, *parts):
        self.nodes += 1
        if self.nodes > NODES_CAP:
            raise TooLargeError(f"more than {NODES_CAP} nodes")
        return parts

    def count_nodes(self, trees):
        """Pays for trees that were made out of one that had been paid for."""
        self.nodes += sum(map(size, trees))
        if self.nodes > NODES_CAP:
            raise TooLargeError(f"more than {NODES_CAP} nodes")

    def count_link(self):
        self.chain += 1
        if self.chain > DEPTH_CAP:
            raise TooLargeError(f"more than {DEPTH_CAP} divisions and postfix signs")

    # Whole answers

    def answer(self):
        if not self.tokens:
            raise UnparsableError("empty")
        items = self.items()
        if self.position < len(self.tokens):
            raise UnparsableError(f"left over: {self.peek()}")
        if len(items) == 1:
            return items[0]
        words = {token.value for token in self.tokens if token.kind == "op"}
        if "and" in words and "or" not in words and all(item[0] == "relation" and _ORDER.issuperset(item[2]) for item in items):
            return self.all_of(items)
        return self.node("list", items)

    def all_of(self, conditions):
        """Inequalities that hold together: "x > 3 and x < 5" is an interval, not two answers."""
        together = conditions[0]
        for condition in conditions[1:]:
            together = self.node("intersection", together, condition)
        return together

    def items(self):
        """Comma-separated items, as a tuple of nodes; "a, b, and c" has three."""
        items = [self.item()]
        while self.accept(*_SEPARATORS):
            while self.accept(*_SEPARATORS):
                pass
            items.append(self.item())
        return tuple(items)

    def item(self):
        self.depth += 1
        if self.depth > DEPTH_CAP:
            raise TooLargeError(f"nested deeper than {DEPTH_CAP}")
        self.accept("=", "approx")  # "= 5" and "\\approx 8.24" say what they say without their left side
        sides, ops = [self.set_expression()], []
        while self.at(*_RELATIONS):
            ops.append(self.accept(*_RELATIONS))
            sides.append(self.set_expression())
        self.depth -= 1
        node = sides[0] if not ops else sides[1] if ops == ["in"] else self.node("relation", tuple(sides), tuple(ops))
        return self.congruence(node)

    def congruence(self, node):
        """node, or node modulo a number where "\\pmod{7}" or "(mod 7)" follows."""
        following = self.peek(1)
        if self.accept("pmod"):
            return self.node("congruence", node, scalar(self.primary()))
        if self.at("(") and following is not None and following.value == "mod":
            self.position += 2
            node = self.node("congruence", node, scalar(self.sum()))
            self.expect(")")
        return node

    def set_expression(self):
        left = self.sum()
        if self.accept("mod"):
            left = self.node("call", "mod", scalar(left), scalar(self.sum()))
        while self.at(*_SET_OPS):
            head = _SET_OPS[self.accept(*_SET_OPS)]
            left = self.node(head, left, self.sum())
        if self.accept(":"):
            left = self.node("group", ":", (left, self.sum()), ":")
        return left

    # Arithmetic

    def sum(self):
        left = self.term()
        while self.at("+", "-", "pm", "mp"):
            op = self.accept("+", "-", "pm", "mp")
            right = self.term()
            left = self.add(left, right if self.plus_minus.get(op, op) == "+" else self.negate(right))
        return left

    def term(self):
        """Factors joined by * and /, or standing side by side. A leading sign is weaker than a power: -x^2."""
        if op := self.accept("+", "-", "pm", "mp"):
            inner = self.nested(self.term)
            return inner if self.plus_minus.get(op, op) == "+" else self.negate(inner)
        left = self.power()
        while True:
            if self.accept("*"):
                left = self.mul(left, self.signed_power())
            elif self.accept("/"):
                left = self.div(left, self.signed_power())
            elif self.starts_factor():
                left = self.mul(left, self.power())
            else:
                return left

    def signed_power(self):
        if op := self.accept("+", "-"):
            inner = self.nested(self.signed_power)
            return inner if op == "+" else self.negate(inner)
        return self.power()

    def nested(self, rule, *arguments):
        self.depth += 1
        if self.depth > DEPTH_CAP:
            raise TooLargeError(f"nested deeper than {DEPTH_CAP}")
        result = rule(*arguments)
        self.depth -= 1
        return result

    def starts_factor(self):
        token = self.peek()
        if token is None or token.kind == "text":
            return False
        if self.peek(-1).kind == "text" or self.peek(-1).value == "%":  # "3 hours 20 minutes" is not 60
            return False
        if token.kind == "number":  # "5 6" is not 30; "x2" and "\pi 2" are products
            return self.peek(-1).kind != "number"
        if token.kind == "op":
            following = self.peek(1)
            if token.value == "(" and following is not None and following.value == "mod":
                return False
            return token.value in _OPENERS or (token.value == "|" and not self.bars)
        return True

    def power(self):
        base = self.postfix(self.primary())
        if self.accept("^"):
            exponent = self.nested(self.exponent)
            base = self.postfix(self.node("pow", scalar(base), exponent))
        return base

    def exponent(self):
        if self.accept("-"):
            return self.negate(self.nested(self.exponent))
        self.accept("+")
        return scalar(self.power())

    def postfix(self, base):
        while True:
            if self.accept("!"):
                self.count_link()
                base = self.node("call", "factorial", scalar(base))
            elif self.accept("%"):
                self.count_link()
                base = self.node("percent", scalar(base))
            elif self.accept("degree"):
                base = self.degrees(base)
            elif self.peek() is not None and self.peek().kind == "text":
                self.units()
            else:
                return base

    def degrees(self, base):
        if not self.trigonometric:
            return base
        return self.mul(base, self.node("div", ("constant", "pi"), ("number", Fraction(180), None)))

    def units(self):
        """Drops words and units after a value, with their powers: "12 cm^2", "60 miles/hour"."""
        while self.peek() is not None and self.peek().kind == "text":
            self.position += 1
            if self.accept("^"):
                braced = self.accept("{")
                self.accept("-")
                self.position += 1
                if braced:
                    self.expect("}")
            following = self.peek(1)
            if self.at("/", "*") and following is not None and following.kind == "text":
                self.position += 1

    # What a factor can be: the rest of the grammar

    def primary(self):
        token = self.peek()
        if token is None:
            raise UnparsableError("ends too early")
        self.position += 1
        return self.nested(primaries.rule(token), self, token)

    def negate(self, node):
        return self.mul(("number", Fraction(-1), None), node)

    def add(self, left, right):
        if left[0] == "matrix" or right[0] == "matrix":
            return matrix_add(self, left, right)
        return self.node("add", *terms(left, "add"), *terms(right, "add"))

    def mul(self, left, right):
        if left[0] == "matrix" or right[0] == "matrix":
            return matrix_mul(self, left, right)
        return self.node("mul", *terms(left, "mul"), *terms(right, "mul"))

    def div(self, left, right):
        self.count_link()
        return self.node("div", scalar(left), scalar(right))
