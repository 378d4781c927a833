"""Answers nobody wrote: random text, random well-formed answers, damaged answers, and values known by construction.

2,000 examples, the same ones each time. The long run, in a quarter to half an hour on one core:

    DGPO_JAX_FUZZ=100000 python -m pytest tests/test_grader_fuzz.py

The limit of two seconds is of processor time and for one comparison: it catches what hangs and says nothing about speed.
"""

import math
import os
import re
import time
from fractions import Fraction
from pathlib import Path

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dgpo_jax.rewards.extract import RULES
from dgpo_jax.rewards.math import check, quick_status, slow_status

EXAMPLES = int(os.environ.get("DGPO_JAX_FUZZ", "2000"))
HANG_S = 2.0
COMPARED = {"correct", "wrong", "unparsable"}


def examples(share):
    """Settings for this share, in percent, of all examples."""
    return settings(
        max_examples=max(1, EXAMPLES * share // 100), derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )  # fmt: skip


def within_limit(function, *arguments):
    started = time.process_time()
    result = function(*arguments)
    assert time.process_time() - started < HANG_S, f"{function.__name__} hangs on {arguments!r}"
    return result


def status(answer, prediction):
    return within_limit(quick_status, answer, prediction) or within_limit(slow_status, answer, prediction)


# Random text

PIECES = re.split(" ", (
    r"0 1 2 7 10 99 1000 1e9 .5 0.3 1,000 9{9} a b x y z n e i \pi \theta \infty + - * / ^ _ = < > ! % & | ' . , ; : ( ) [ ] { } \{ \} \( \) "
    r"\[ \] $ \$ \% \\ \, \! \; ~ \left( \right) \left[ \right) \left| \right| \left. \bigl( \frac \dfrac12 \frac{ }{ \sqrt \sqrt[3]{ "
    r"\binom \sin \cos^2 \log_2 \ln \max \gcd \cup \cap \setminus \in \pm \mp \times \cdot \div \le \ge \ne \neq \approx \equiv \to \sum "
    r"\sum_{k=1}^{ \prod \int \lim \lfloor \rfloor \lceil \rceil \overline{ \mathbb{R} \emptyset \begin{pmatrix} \end{pmatrix} \begin{cases} "
    r"\end{cases} \text{ \text{and} \text{or} \text{cm} \mathrm{e} \text{(B)} \boxed{ \fbox{ ^{2} ^\circ ° ² ⁻¹ ½ √ π ∞ ∪ ≤ − × and or mod cm "
    r"degrees dollars True NaN inf __import__ open( lambda east Tuesday \phantom{ {2\choose3} </think> <think> ####"
))
RAW = st.text(st.characters(codec=None), max_size=40)  # any code point, halves of a surrogate pair included
TEXT = st.lists(st.sampled_from([*PIECES, " ", "answer is ", "\n", "\x00"]), max_size=24).map("".join) | RAW


# Well-formed answers

def braced(command, *parts):
    return st.tuples(*parts).map(lambda texts: command + "".join(f"{{{text}}}" for text in texts))


NUMBERS = st.sampled_from(["0", "1", "2", "3", "5", "12", "100", "1024", "0.5", "2.75", ".25", "1,000", "10^6", "3.2e5", r"\pi", "e", "i"]) | st.integers(0, 10**12).map(str)
LETTERS = st.sampled_from(["x", "y", "n", "a", "t", r"\theta", r"\alpha", "x_1", "x^2"])


def larger(inner):
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs.map("+".join), pairs.map(" - ".join), pairs.map(r" \cdot ".join), pairs.map("/".join),
        pairs.map(lambda pair: f"({pair[0]})({pair[1]})"),
        braced(r"\frac", inner, inner), braced(r"\sqrt", inner), inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
        inner.map(lambda text: f"|{text}|"),
        st.tuples(inner, st.integers(-3, 12)).map(lambda pair: f"({pair[0]})^{{{pair[1]}}}"),
        pairs.map(lambda pair: f"{{{pair[0]}}}^{{{pair[1]}}}"),
        st.tuples(st.integers(2, 7), inner).map(lambda pair: rf"\sqrt[{pair[0]}]{{{pair[1]}}}"),
        st.tuples(st.sampled_from([r"\sin", r"\cos", r"\tan", r"\ln", r"\log_2", r"\arctan", r"\lfloor", r"\sin^2"]), inner)
        .map(lambda pair: f"{pair[0]} {pair[1]} \\rfloor" if pair[0] == r"\lfloor" else f"{pair[0]}({pair[1]})"),
        braced(r"\binom", inner, inner), inner.map(lambda text: f"({text})!"),
        pairs.map(lambda pair: rf"\max({pair[0]},{pair[1]})"),
    )  # fmt: skip


EXPRESSIONS = st.recursive(NUMBERS | LETTERS, larger, max_leaves=6)
ITEMS = st.lists(EXPRESSIONS, min_size=1, max_size=4)
INTERVALS = st.tuples(st.sampled_from("(["), EXPRESSIONS | st.just(r"-\infty"), EXPRESSIONS | st.just(r"\infty"), st.sampled_from(")]")).map(lambda parts: "{}{},{}{}".format(*parts))
MATRICES = st.tuples(st.sampled_from(["pmatrix", "bmatrix", "vmatrix"]), st.integers(1, 3), st.integers(1, 3), st.lists(EXPRESSIONS, min_size=9, max_size=9)).map(
    lambda parts: rf"\begin{{{parts[0]}}}" + r"\\".join("&".join(parts[3][3 * row : 3 * row + parts[2]]) for row in range(parts[1])) + rf"\end{{{parts[0]}}}"
)
ANSWERS = st.one_of(
    EXPRESSIONS, ITEMS.map(", ".join), ITEMS.map(lambda items: f"({', '.join(items)})"), ITEMS.map(lambda items: rf"\{{{', '.join(items)}\}}"),
    INTERVALS, st.lists(INTERVALS, min_size=2, max_size=3).map(r" \cup ".join), MATRICES,
    st.tuples(EXPRESSIONS, st.sampled_from(["=", "<", r"\le ", r"\ge ", r"\ne "]), EXPRESSIONS).map("".join),
    st.tuples(EXPRESSIONS, st.sampled_from([r"\pm ", r" \text{ or } ", " and "]), EXPRESSIONS).map("".join),
    st.tuples(NUMBERS, st.sampled_from([r"\%", r"^\circ", r"\text{ cm}^2", " dollars", r"\text{ square meters}", r"\ \mathrm{km/h}"])).map("".join),
    st.sampled_from([r"\text{(B)}", "C", r"\text{east}", "Tuesday", r"\emptyset", r"\mathbb{R}", "11:30", "1011_2", r"3\frac{1}{2}", "yes", r"\infty", r"y = 2x - 3"]),
)  # fmt: skip

# Damaged answers

GOLDS = [
    r"\left( 3, \frac{\pi}{2} \right)", "p - q", r"\frac{14}{3}", r"\text{Evelyn}", r"3\sqrt{13}", r"\frac{3}{56}", "6 - 5i", "x^3+3x-6", r"\frac{\sqrt{3}}{3}", r"11\sqrt2",
    "10,-14", r"(-\infty,-2)\cup[1,\infty)", r"\begin{pmatrix} -2 & 1 \\ 0 & 5 \end{pmatrix}", r"1 \pm \sqrt{19}", "2516_8", r"5.4 \text{ cents}", r"3 \le x < 7", "y=2x+1", r"\{1,\sqrt{2},x\}",
    r"90^\circ", r"\frac{270}7\text{ degrees}", r"6+9i", r"(6,31,-1)", r"x \in [-2,7]", r"\dfrac{9}{7}", r"-\frac{35}{9}", r"(3,4]", r"4 \sin^2 \theta", r"2\cos x - \log_2 y", "11,\\! 111", r"\$32,348", "12\\%",
]  # fmt: skip
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+|.", re.DOTALL)


@st.composite
def damaged(draw):
    """(gold, the gold with up to three tokens dropped, doubled, swapped or put in)."""
    gold = draw(st.sampled_from(GOLDS) | ANSWERS)
    tokens = _TOKEN.findall(gold)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(tokens) - 1)))
        action = draw(st.sampled_from(["drop", "double", "swap", "put in"]))
        if action == "put in" or not tokens:
            tokens.insert(at, draw(st.sampled_from(PIECES)))
        elif action == "drop":
            del tokens[at]
        elif action == "double":
            tokens.insert(at, tokens[at])
        else:
            other = draw(st.integers(0, len(tokens) - 1))
            tokens[at], tokens[other] = tokens[other], tokens[at]
    return gold, "".join(tokens)


@examples(20)
@given(st.sampled_from(GOLDS) | ANSWERS | TEXT, TEXT)
def test_no_text_raises_or_hangs(answer, text):
    assert within_limit(quick_status, answer, text) in COMPARED | {None}
    assert within_limit(slow_status, answer, text) in COMPARED
    for rule in RULES:
        assert within_limit(check, answer, text, rule).status in COMPARED | {"no_answer"}
    assert within_limit(check, answer, f"thus \\boxed{{{text}}}.").status in COMPARED | {"no_answer"}


@examples(20)
@given(damaged())
def test_no_damaged_answer_raises_or_hangs_and_equality_has_no_direction(pair):
    gold, prediction = pair
    there, back = status(gold, prediction), status(prediction, gold)
    assert there in COMPARED and back in COMPARED
    if "unparsable" not in (there, back) and has_direction(gold) == has_direction(prediction):
        assert there == back


@examples(10)
@given(ANSWERS, ANSWERS)
def test_equality_of_well_formed_answers_has_no_direction(left, right):
    there, back = status(left, right), status(right, left)
    if "unparsable" not in (there, back) and has_direction(left) == has_direction(right):
        assert there == back


def has_direction(text):
    """A gold in base 8 may be answered without its base, a gold without a relation by one, and only an answer has a decimal comma."""
    return "_" in text or r"\approx" in text or bool(re.search(r"\d,\d", text))


SECOND_THOUGHTS = ["or 7", "and 7", "or seven", "dozen", "squared", "half", "or more", "at least", "incorrect", "thirds", "factorial", "k"]


@examples(4)
@given(st.sampled_from(GOLDS) | ANSWERS, st.sampled_from(SECOND_THOUGHTS), st.sampled_from(["text", "mbox", "textbf", "mathrm"]))
def test_words_that_change_a_value_or_add_another_are_never_dropped(gold, words, command):
    assume(not re.search(r"\text|[a-zA-Z]$", gold) and status(gold, gold) == "correct" and status(gold, f"0({gold})") != "correct")
    assume(len(words) > 1 or status(gold, gold + "z") != "correct")  # 0 = 0 is 0 = 0 k
    for text in (rf"{gold}\{command}{{ {words}}}", rf"{gold} \{command}{{{words}}}"):
        assert status(gold, text) != "correct" and status(text, gold) != "correct"


@examples(10)
@given(ANSWERS | damaged().map(lambda pair: pair[1]))
def test_what_can_be_read_equals_itself_by_its_value_too(answer):
    assert within_limit(slow_status, answer, answer) != "wrong"  # without the look at the strings


SPELLINGS = [
    lambda text, blank: re.sub(r"(?<![\\\d.,{])(?=[-+*/=<>(){}|\[\]])", blank, text),
    lambda text, blank: text.replace(r"\frac{", r"\dfrac{"),
    lambda text, blank: text.replace(r"\frac{", r"\tfrac{"),
    lambda text, blank: re.sub(r"(?<![\\a-z])\(", r"\\left(", text).replace(")", r"\right)") if text.count("(") == text.count(")") and r"\max" not in text else text,
    lambda text, blank: f"${text}$",
    lambda text, blank: f" {text}.",
    lambda text, blank: rf"\displaystyle {text}",
    lambda text, blank: rf"\!{text}\,",
    lambda text, blank: text.replace(r" \cdot ", r"\times "),
    lambda text, blank: text.replace(r"\le ", r"\leq ").replace(r"\ge ", r"\geqslant "),
    lambda text, blank: text.replace(r"\pi", "π").replace(r"\infty", "∞").replace(r"\cup", "∪"),
    lambda text, blank: text.replace("pmatrix", "bmatrix"),
]  # fmt: skip


@st.composite
def respelt(draw):
    """(answer, the same with up to three changes that mean nothing)."""
    answer = text = draw(ANSWERS)
    blank = draw(st.sampled_from([" ", "  ", r"\,", "~"]))
    for change in draw(st.lists(st.sampled_from(SPELLINGS), min_size=1, max_size=3, unique=True)):
        text = change(text, blank)
    return answer, text


@examples(10)
@given(respelt())
def test_blanks_and_sizes_of_brackets_and_fractions_do_not_matter(pair):
    answer, text = pair
    if slow_status(answer, answer) == "correct":
        assert status(answer, text) == "correct"


# Values known by construction

def is_terminating(value):
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def decimal_text(value):
    places = next(n for n in range(80) if (value * 10**n).denominator == 1)
    digits = str(abs(value * 10**places).numerator).rjust(places + 1, "0")
    return ("-" if value < 0 else "") + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def fraction_spellings(value):
    """Texts that all mean this number."""
    top, bottom, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    whole, rest = divmod(top, bottom)
    yield from (f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"\frac{{{sign}{top}}}{{{bottom}}}", rf"{sign}\dfrac{{{3 * top}}}{{{3 * bottom}}}")
    yield from (rf"\left({sign}\frac{{{top}}}{{{bottom}}}\right)", rf"\frac{{{2 * value.numerator + 7 * bottom}}}{{{2 * bottom}}} - \frac{{7}}{{2}}")
    yield from (rf"{sign}{top} \cdot \frac{{1}}{{{bottom}}}", rf"{sign}{top} \div {bottom}", rf"x = {sign}\frac{{{top}}}{{{bottom}}}", rf"{sign}({top})({bottom})^{{-1}}")
    yield from (rf"{sign}\sqrt{{\frac{{{top**2}}}{{{bottom**2}}}}}", rf"{sign}\frac{{{top}}}{{{bottom}}}\text{{ cm}}", rf"{sign}\frac{{{top}\sqrt{{3}}}}{{{bottom}\sqrt{{3}}}}")
    if whole and rest:
        yield from (rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}", f"{sign}{whole} {rest}/{bottom}")
    if bottom == 1:
        yield from (f"{value}", f"{value}.", f"{value}.0", f"${value}$", f"{sign}{top:,}", f"{sign}{top:,}".replace(",", "{,}"), f"{sign}{top:,}".replace(",", r"\,"), rf"{value}\text{{ cm}}")
        yield from (f"{value} apples", rf"\text{{{value}}}", rf"\mathbf{{{value}}}", f"{int(value):+}", str(value).translate(str.maketrans("0123456789", "０１２３４５６７８９")))
    if is_terminating(value):
        yield from (decimal_text(value), decimal_text(value) + ("0" if "." in decimal_text(value) else ".00"), rf"{decimal_text(value * 100)} \times 10^{{-2}}", rf"{decimal_text(value / 1000)}\cdot 10^3")


RATIONALS = st.one_of(
    st.integers(-20, 20).map(Fraction), st.integers(-(10**9), 10**9).map(Fraction), st.fractions(-1000, 1000, max_denominator=400),
    st.integers(-9999, 9999).map(lambda number: Fraction(number, 100)),
)  # fmt: skip


def spelt(values):
    """(value, a text that means it)."""
    return values.flatmap(lambda value: st.tuples(st.just(value), st.sampled_from(list(fraction_spellings(value)))))


def others(value):
    near = [value + 1, value - 1, value - Fraction(1, 100), value + Fraction(1, 100)]  # one off in the last place, as a slip is
    return st.sampled_from([*near, value * 10, value / 10, -value, value * Fraction(8, 7), value * Fraction(1001, 1000), Fraction(42)])


@examples(10)
@given(RATIONALS.flatmap(lambda value: st.tuples(*[st.sampled_from(list(fraction_spellings(value)))] * 2)))
def test_one_number_in_two_spellings_is_one_answer(spellings):
    assert status(*spellings) == "correct"


@examples(9)
@given(RATIONALS.flatmap(lambda value: st.tuples(spelt(st.just(value)), spelt(others(value)))))
def test_two_numbers_are_never_one_answer(pair):
    (value, answer), (other, prediction) = pair
    assume(abs(value - other) > max(abs(value), abs(other)) / 10_000)  # a decimal may be rounded
    assert status(answer, prediction) != "correct"


@examples(2)
@given(st.integers(1, 10**60), st.sampled_from(["{}", "1/{}", r"\frac{{1}}{{{}}}", r"\sqrt{{{}}}", r"2^{{1/{}}}", "{}x", "({}, 1)", r"\pi + {}"]))
def test_the_last_digit_of_an_exact_number_counts(number, form):
    assert status(form.format(number), form.format(number + 1)) != "correct"


@st.composite
def arithmetic(draw, depth=3):
    """(value, LaTeX) of a random expression in whole numbers; a division by 0 is not drawn."""
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        number = draw(st.integers(0, 12))
        return Fraction(number), str(number)
    (left, left_text), (right, right_text) = draw(arithmetic(depth - 1)), draw(arithmetic(depth - 1))
    operation = draw(st.sampled_from("+-*/^n"))
    if operation == "^":
        exponent = draw(st.integers(0 if left == 0 else -2, 3))
        assume(left or exponent)
        return left**exponent, rf"\left({left_text}\right)^{{{exponent}}}"
    if operation == "n":
        return -left, f"-({left_text})"
    if operation == "/" and right:
        return left / right, rf"\frac{{{left_text}}}{{{right_text}}}"
    if operation == "*":
        return left * right, rf"({left_text}) \cdot ({right_text})"
    return (left - right, f"({left_text}) - ({right_text})") if operation == "-" else (left + right, f"{left_text} + {right_text}")


@examples(2)
@given(arithmetic(), st.sampled_from([Fraction(1), Fraction(-1, 2), Fraction(1, 3)]))
def test_arithmetic_has_the_value_that_fractions_give_it(sum_and_text, change):
    value, text = sum_and_text
    assert status(str(value), text) == "correct"
    assert status(str(value + change * (abs(value) if value else 1)), text) != "correct"


@examples(3)
@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=4), st.integers(1, 4), st.sampled_from(["x", r"\sin x", "e^t", r"\sqrt{y}"]), st.integers(0, 4),
    st.sampled_from([1, -1, 2]),
)
def test_a_product_of_factors_is_its_expansion_and_no_other(roots, leading, x, place, change):
    product = f"{leading}" + "".join(f"({x} {-root:+d})" for root in roots)
    coefficients = [leading]
    for root in roots:
        coefficients = [a - root * b for a, b in zip([*coefficients, 0], [0, *coefficients], strict=True)]

    def expansion(numbers):
        return " ".join(f"{number:+d}({x})^{{{len(numbers) - 1 - index}}}" for index, number in enumerate(numbers))

    assert status(product, expansion(coefficients)) == "correct"
    coefficients[place % len(coefficients)] += change
    assert status(product, expansion(coefficients)) != "correct"
    assert status(expansion(coefficients), product) != "correct"


def test_the_shares_make_up_the_whole():
    shares = re.findall(r"^@examples\((\d+)\)", Path(__file__).read_text(), re.MULTILINE)
    assert sum(map(int, shares)) == 100 and math.isclose(sum(EXAMPLES * int(share) // 100 for share in shares), EXAMPLES, rel_tol=0.01)
