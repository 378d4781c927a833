"""What SymPy proves, what it refutes, and that it never takes long over either."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgpo_jax.rewards import expressions, symbolic
from dgpo_jax.rewards.math import check, slow_status
from dgpo_jax.rewards.normalise import normalise
from dgpo_jax.rewards.parser import parse

IDENTITIES = [
    ("(x+1)^2", "x^2+2x+1"), (r"\frac{x^2-1}{x-1}", "x+1"), ("(a+b)(a-b)(a^2+b^2)", "a^4-b^4"),
    (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"), ("(a+b+c)^8", "(a+b+c)^7(a+b+c)"), ("x^{1/3} x^{2/3}", "x"),
    # roots: nested, in the denominator, of expressions
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), (r"\frac{1}{1+\sqrt2+\sqrt3}", r"\frac{2+\sqrt2-\sqrt6}{4}"), (r"\sqrt[3]{2}\sqrt[3]{4}", "2"),
    (r"\frac{1}{\sqrt{x+1}-1}", r"\frac{\sqrt{x+1}+1}{x}"), (r"\sqrt{12}+\sqrt{\frac13}", r"\frac{7\sqrt3}{3}"), ("(-8)^{1/3}", "-2"),
    # trigonometry
    (r"\sin\frac{\pi}{12}", r"\frac{\sqrt6-\sqrt2}{4}"), (r"\sin 2x", r"2\sin x\cos x"), (r"\sin 3x", r"3\sin x-4\sin^3 x"),
    (r"\tan^2 y+1", r"\sec^2 y"), (r"\sin(a+b)", r"\sin a\cos b+\cos a\sin b"), (r"\tanh x", r"\frac{e^{2x}-1}{e^{2x}+1}"),
    (r"\cos(x+\frac{\pi}{2})", r"-\sin x"), (r"\arctan\sqrt3", r"\frac{\pi}{3}"), (r"e^{i\pi/3}", r"\frac{1+i\sqrt3}{2}"),
    # exponentials and logarithms
    ("2^{n+2}", r"4\cdot 2^n"), ("4^n", "2^{2n}"), (r"\ln(ab)", r"\ln a+\ln b"), (r"\log_2 8x", r"3+\frac{\ln x}{\ln 2}"),
    (r"e^{2\ln x}", "x^2"), (r"\ln e^{3x}", "3x"), (r"\ln 12", r"2\ln 2+\ln 3"), (r"\log_4 8", r"\frac32"),
    # counting
    ("(n+1)!", "(n+1)n!"), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"), (r"\binom{2n}{n}", r"\frac{(2n)!}{n!^2}"),
    (r"\gcd(a,b)", r"\gcd(b,a)"),
]  # fmt: skip

NEAR_MISSES = [
    (r"\sqrt2", r"\sqrt2+10^{-60}"), (r"\sqrt2+\sqrt3", r"\sqrt{5+2\sqrt6}+10^{-400}"), (r"\pi", r"\pi+10^{-500}"), ("x", "x+10^{-90}y"),
    (r"\sqrt{2}", r"\frac{1414213562373095048801688724209698078569671875376948073176679737990732478462}{10^{75}}"),
    ("(x+1)^{20}", "(x+1)^{20}+10^{-70}x"), (r"\frac{x^2-1}{x-1}", r"x+1+\frac{1}{10^{60}x}"), (r"e", "e+10^{-100}"),
]  # fmt: skip

OPEN = [
    (r"\cos\frac{\pi}{7}-\cos\frac{2\pi}{7}+\cos\frac{3\pi}{7}", r"\frac12"),  # roots of unity are not reduced
    (r"\sqrt[3]{2+\sqrt5}-\sqrt[3]{\sqrt5-2}", "1"),  # nor are nested cube roots
    (r"\lfloor\pi\rfloor", "3"), (r"|1-\sqrt2|", r"\sqrt2-1"),
]  # fmt: skip


def trees(pair):
    return [parse(normalise(text)) for text in pair]


@pytest.mark.parametrize("pair", IDENTITIES, ids=str)
def test_identities_are_proved(pair):
    assert symbolic.equal(*trees(pair)) is True
    assert slow_status(*pair) == "correct"


@pytest.mark.parametrize("pair", NEAR_MISSES, ids=str)
def test_differences_beyond_the_digits_of_any_float_are_proved(pair):
    assert symbolic.equal(*trees(pair)) is False
    assert slow_status(*pair) == "wrong" and slow_status(*reversed(pair)) == "wrong"


@pytest.mark.parametrize("pair", OPEN, ids=str)
def test_what_sympy_leaves_open_is_decided_by_digits(pair):
    assert symbolic.equal(*trees(pair)) is None
    assert slow_status(*pair) == "correct"
    assert slow_status(pair[0], pair[1] + "+10^{-80}") == "wrong"


def test_tiny_numbers_are_never_taken_for_each_other():
    assert not check(r"\frac{1}{2004!}", r"\boxed{\frac{1}{2006!}}").correct  # beyond the factorials that are computed
    assert check(r"\frac{1}{100!}", r"\boxed{\frac{1}{102!}}").status == "wrong"
    assert check(r"\frac{1}{100!}", r"\boxed{\frac{102\cdot 101}{102!}}").status == "correct"


@pytest.mark.parametrize("left, right, expected", [
    ("2x+4y-6", "x+2y-3", True),
    (r"\frac{x^2-1}{x-1}", "3x+3", True),
    ("2x+4y-6", "x+2y-3+10^{-60}", False),
    (r"\sqrt2 x-2", r"x-\sqrt2", None),  # a multiple, but not a rational one
])
def test_equations_that_are_multiples_are_told_from_those_that_nearly_are(left, right, expected):
    assert symbolic.proportional(*trees((left, right))) is expected


def test_a_principal_root_is_not_confused_with_the_real_one():
    assert symbolic.equal(*trees((r"(x-5)^{1/3}", r"-(5-x)^{1/3}"))) is None  # SymPy alone would say they differ
    assert slow_status(r"(x-5)^{1/3}", r"-(5-x)^{1/3}") == "correct"


def test_no_text_of_an_answer_reaches_sympy(monkeypatch):
    names, symbol = [], expressions.sympy.Symbol
    monkeypatch.setattr(expressions.sympy, "Symbol", lambda name, **assumptions: names.append(name) or symbol(name, **assumptions))
    pair = trees((r"x_{os y} + \sqrt{\theta''+1}", r"\ln 1011_2"))
    symbolic.equal(*pair)
    assert len(names) >= 3 and all(name[0] in "uv" and name[1:].isdigit() for name in names)


SLOW = {
    "a polynomial whose sign SymPy would factor to find": r"\sqrt{x-\binom{x^{12}}{10}}^2",
    "a complex number whose digits SymPy would compute": r"|\sqrt{\tanh(i)}|+x-x",
    "a gamma function at a complex number": r"\lfloor|\frac{1}{\tanh(1)+i!}|\rfloor+x-x",
    "many square roots": r"\frac{1}{" + "+".join(f"\\sqrt{{{n}}}" for n in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)) + "}",
    "many factors": "".join(f"(1+{letter})" for letter in "abcdfghjklmnop"),
    "many sines": "+".join(f"\\sin({k}x)" for k in range(40)),
    "many fractions": "+".join(f"\\frac{{1}}{{x+{k}}}" for k in range(1, 40)),
    "nested roots": r"\sqrt{x+" * 20 + "x" + "}" * 20,
    "a high power of a long sum": r"(a+b+\sqrt{c}+d)^{150}",
    "a tower of powers": "((((2^{x+1})^{200})^{200})^{200})^{200}",
    "a number from an exponential": r"e^{10^9 \ln 2}",
    "a number from two powers": "2^x 2^{10^9-x}",
    "an angle with a large denominator": r"\cos\frac{\pi}{99991}",
    "a large number to factor": r"\sqrt{" + "7" * 300 + "}",
}


@pytest.mark.parametrize("text", SLOW.values(), ids=SLOW.keys())
@pytest.mark.parametrize("other", ["({})+0", r"\frac{{({})^2}}{{{}}}", "({})+10^{{-60}}"])
def test_inputs_made_to_be_slow_are_not(text, other):
    started = time.process_time()
    slow_status(text, other.format(text, text))
    assert time.process_time() - started < 1.0  # 0.2 s at most, measured on a busy machine


def test_proofs_do_not_depend_on_the_hash_seed():
    script = "import tests.test_symbolic as t; print([t.symbolic.equal(*t.trees(pair)) for pair in t.IDENTITIES + t.NEAR_MISSES + t.OPEN])"
    outputs = {
        subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True, cwd=Path(__file__).parents[1],
                       env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("0", "7")
    }  # fmt: skip
    assert len(outputs) == 1
