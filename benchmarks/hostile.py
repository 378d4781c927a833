"""Hostile answers by seed: text made to hang, exhaust, confuse or take over the checker of mathematical answers.

    pairs = hostile.pairs(10_000, seed=0, canary=folder / "canary")     # of Attack

Every family is a function of a random.Random that writes one text, so that each draw is another attack. Ordinary answers
whose verdicts are known stand among them: they show whether the order is kept and whether the checker still works.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

GOLDS = ("5", r"\sqrt{2}", "x+1", r"\{1,2\}", "(1,5)", r"\frac{3}{7}x^2")  # no text of a family is equal to one of these
JUDGED = frozenset(("correct", "wrong", "unparsable", "no_answer"))
UNJUDGED = frozenset(("timed_out", "crashed"))
ANYTHING = JUDGED | UNJUDGED
NOT_RIGHT = ANYTHING - {"correct"}
ORDINARY_SHARE = 0.3
HUGE_SHARE = 0.02  # of texts of a hundred kilobytes and more: these are slow to make, not to check


class Attack(NamedTuple):
    """One response, and what the pool may say of it."""

    family: str
    answer: str  # the reference answer
    response: str
    allowed: frozenset[str]  # statuses


def pairs(count: int, seed: int, canary) -> Iterator[Attack]:
    """Attacks by seed.

    Args:
        canary: a path that does not exist; injected code would make it.
    """
    draw = random.Random(seed)
    names = sorted(FAMILIES)
    for _ in range(count):
        kind = draw.random()
        if kind < ORDINARY_SHARE:
            yield ordinary(draw)
        elif kind < ORDINARY_SHARE + HUGE_SHARE:
            yield Attack("huge", draw.choice(GOLDS), huge(draw), NOT_RIGHT)
        else:
            name = draw.choice(names)
            yield attack(draw, name, FAMILIES[name](draw).replace("CANARY", str(canary)))


def attack(draw: random.Random, family: str, text: str) -> Attack:
    """The text as an answer; now and then as the reference answer too, or without an end to its box."""
    kind = draw.random()
    if kind < 0.8:
        return Attack(family, draw.choice(GOLDS), f"so \\boxed{{{text}}}", NOT_RIGHT)
    if kind < 0.9:
        return Attack(family, text, f"\\boxed{{ 0 + {text}}}", ANYTHING)  # the same value, if it has one
    return Attack(family, draw.choice(GOLDS), f"\\boxed{{{text}", ANYTHING)


# ---- ordinary answers


def ordinary(draw: random.Random) -> Attack:
    """An answer whose verdict is known; most of them need a worker, and are new to the pool's memory."""
    a, b, c = (draw.randint(2, 10**6) for _ in range(3))
    answer, response, status = draw.choice((
        (f"x+{a}", f"\\boxed{{{a}+x}}", "correct"),
        (f"x+{a}", f"\\boxed{{{a + 1}+x}}", "wrong"),
        (f"({a}, {b})", f"\\boxed{{({a},{b})}}", "correct"),
        (f"({a}, {b})", f"\\boxed{{({a},{b + 1})}}", "wrong"),
        (f"{a}y^2-{b}y", f"\\boxed{{y({a}y-{b})}}", "correct"),
        (f"{a}\\sqrt{{2}}", f"\\boxed{{\\sqrt{{{2 * a * a}}}}}", "correct"),
        (f"{a}\\sqrt{{2}}", f"\\boxed{{\\sqrt{{{2 * a * a + 1}}}}}", "wrong"),
        (str(a), f"\\boxed{{{a}.0}}", "correct"),
        (f"\\frac{{{a}}}{{{b}}}", f"\\boxed{{{a * c}/{b * c}}}", "correct"),
        (str(a), f"it is {a}, I think", "no_answer"),
        (f"x+{a}", f"\\boxed{{\\frac{{{a}+x}}}}", "unparsable"),
    ))  # fmt: skip
    return Attack("ordinary", answer, response, frozenset((status,)))


# ---- values without end


def big(draw):
    """A number too large to print, or close to what is computed at all."""
    return draw.choice((
        "9" * draw.randint(2, 310), f"10^{{{draw.randint(2, 10**12)}}}", f"-{draw.randint(2, 99)}^{{99999}}", "1e999", "0." + "3" * draw.randint(1, 300),
        f"10^{{-{draw.randint(2, 10**12)}}}", f"{draw.randint(2, 10**9)}!", f"{draw.randint(100, 999)}.{draw.randint(0, 9)}^{{0.{draw.randint(1, 99)}}}",
    ))  # fmt: skip


def tower(draw):
    sign = draw.choice(("^", "**"))
    base = draw.choice(("9", "x", "e", "i", r"\pi", "(1+i)", "0.5", "1.0000001", r"\left(10^{9}\right)", "n"))
    if sign == "**":
        return sign.join([base] * draw.randint(3, 60))
    depth = draw.randint(2, 62)
    return "^{".join([base] * depth) + "^{" + big(draw) + "}" * depth


def factorial(draw):
    return draw.choice((
        f"{draw.randint(3, 10**9)}" + "!" * draw.randint(1, 400),
        "(" * (depth := draw.randint(1, 60)) + str(draw.randint(3, 99)) + "!)" * depth + "!",
        rf"\binom{{{big(draw)}}}{{{big(draw)}}}",
        rf"\binom{{{draw.randint(10, 1000)}}}{{{draw.randint(5, 999)}}}",
        rf"\binom{{n}}{{{draw.randint(2, 2000)}}}",
        rf"\gcd({big(draw)},{big(draw)})",
        f"{draw.randint(160, 200)}!-{draw.randint(160, 200)}!",
    ))  # fmt: skip


def endless(draw):
    """Every operation of the grammar that repeats something, told to go on for ever."""
    n = big(draw)
    return draw.choice((
        rf"\sum_{{k=1}}^{{{n}}} k^k", rf"\sum_{{k={n}}}^{{{n}}} \frac1k", rf"\prod_{{k=1}}^{{{n}}} (x+k)", rf"\sum_{{k=-\infty}}^{{\infty}} {n}^k",
        r"\sum_{a=1}^{100}" * draw.randint(2, 8) + "a", rf"\int_0^{{{n}}} x^x\,dx", rf"\lim_{{n\to\infty}} n^{{{n}}}", rf"\log_{{{n}}}{{{n}}}",
        rf"\sqrt[{n}]{{{n}}}", rf"\lfloor {n} \rfloor", rf"\lceil {n}^{{{n}}} \rceil", rf"{n} \bmod {draw.randint(0, 9)}", rf"x \equiv {n} \pmod{{{n}}}",
        rf"0.\overline{{{'142857' * draw.randint(1, 60)}}}", f"1011_{{{n}}}", rf"\sin({n}\pi)", rf"\tan(\tan(\tan({n})))", rf"\ln(\ln(\ln({n})))",
        rf"\exp(\exp(\exp({n})))", rf"\max({n},{n},{n})", rf"\operatorname{{lcm}}({n},{n})", rf"|{n}-|{n}-|{n}|||", rf"\arcsin({n})+\cosh({n})",
        r"\pm" * draw.randint(1, 120) + n, rf"({n})^{{i}}", rf"{n}\%\%\%", rf"\frac{{{n}}}{{{n}-{n}}}", rf"{n}<x<{n}", rf"[{n},{n})\cup({n},{n}]",
        rf"\{{x \mid x^{{{draw.randint(2, 99)}}} > {n}\}}", rf"\begin{{pmatrix}}{n}&1\\1&{n}\end{{pmatrix}}^{{{n}}}", f"{n}={n}={n}", f"{n}:{n}:{n}",
    ))  # fmt: skip


# ---- algebra that needs work


def polynomial(draw):
    letters = "".join(draw.sample("abcdfghx", draw.randint(1, 6)))
    total = "+".join(letters)
    return draw.choice((
        f"({total}+1)^{{{draw.choice((7, 12, 60, 200, 999, 99999))}}}",
        "(" * (depth := draw.randint(2, 30)) + "x" + f"^{draw.randint(2, 9)}+1)" * depth + "^9",
        "*".join(f"({a}-{b}{draw.randint(2, 99)})" for a in letters for b in "jklmn"),
        "+".join(f"{draw.randint(2, 10**9)}x^{{{draw.randint(2, 10**6)}}}" for _ in range(draw.randint(2, 20))),
        f"\\frac{{x^{{{draw.randint(2, 99999)}}}-1}}{{x-1}}",
        "+".join(f"1/(x+{draw.randint(2, 10**6)})" for _ in range(draw.randint(2, 32))),
        f"x^{{1/{draw.randint(2, 999983)}}}+x^{{{draw.randint(2, 99999)}/7}}",
    ))  # fmt: skip


def simplification(draw):
    """Identities and near identities, which a simplifier without a limit on its work would never let go."""
    k, m = draw.randint(2, 40), draw.randint(2, 40)
    return draw.choice((
        rf"\sin^{{{k}}}(x)\cos^{{{m}}}(x)+\tan^{{{k}}}(x)", rf"\cos({k * 97}x)-\cos({m * 89}x)", r"\sin(" * k + "x" + ")" * k, r"\sqrt{2+" * k + "3" + "}" * k,
        "+".join(rf"\sqrt{{{p}}}" for p in draw.sample((2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37), 9)),
        "1/(" + "+".join(rf"\sqrt{{{p}}}" for p in draw.sample((2, 3, 5, 7, 11, 13, 17, 19, 23), 7)) + ")",
        rf"\sqrt[{k}]{{{m}+\sqrt[{m}]{{{k}}}}}+\sqrt[3]{{2+\sqrt{{3}}}}", "*".join(rf"\cos {j}" for j in range(2, k + 2)),
        "+".join(rf"\sin({j}x)" for j in range(2, k + 2)), "1/(1+" * k + "x" + ")" * k, rf"(\sin^2 x+\cos^2 x)^{{{k}}}+q^{m}",
        rf"e^{{i\pi/{k}}}+\ln({m}+\sqrt{{{k}}})^{{{m}}}", rf"|x+|y-{k}|+|z|+{m}|w|||", rf"\tan({k}a+{m}b)+\tan(a)\tan(b)",
    ))  # fmt: skip


def grammar(draw, depth=None):
    """An expression of everything, at random."""
    depth = draw.randint(1, 5) if depth is None else depth
    if depth == 0:
        return draw.choice(("x", "y", "n", "0", "1", "-1", "2", r"\pi", "e", "i", r"\infty", "0.5", "10^9", "999999999999", "a_1", r"\theta"))
    shape = draw.choice((
        "A+A", "A-A", "AA", r"\frac{A}{A}", "(A)^{A}", r"\sqrt{A}", r"\sqrt[A]{A}", "(A)!", r"\binom{A}{A}", r"\log_{A}(A)", r"\sin(A)", r"\arctan(A)",
        r"\ln(A)", "|A|", r"\lfloor A\rfloor", r"\sum_{k=1}^{A} A", "(A,A)", r"\{A,A\}", "[A,A]", "A=A", "A<A", r"\pm A", r"A\cup A", r"A\%", r"A^\circ",
        r"\begin{pmatrix}A&A\\A&A\end{pmatrix}", r"A \bmod A", r"\max(A,A)", r"\exp(A)", r"\sec(A)", r"\tanh(A)",
    ))  # fmt: skip
    return "".join(grammar(draw, depth - 1) if letter == "A" else letter for letter in shape)


# ---- shapes that break readers

BRACKETS = (
    ("(", ")"), ("[", "]"), (r"\{", r"\}"), ("{", "}"), ("|", "|"), (r"\left(", r"\right)"), (r"\lfloor ", r"\rfloor "), (r"\sqrt{", "}"), (r"\frac{", "}{2}"),
    (r"\frac{1}{", "}"), ("2^{", "}"), ("x_{", "}"), (r"\binom{", "}{2}"), (r"\text{", "}"), (r"\overline{", "}"), (r"\sin(", ")"), (r"\ln ", ""), ("-(", ")"),
    (r"\begin{pmatrix}", r"\end{pmatrix}"), (r"\boxed{", "}"), ("(1,", ")"), ("-", ""),
)  # fmt: skip
TRIGGERS = (
    r"\( ", r"\[ ", "$", "$$", "answer is ", "####", "1 ", "1,", "1,000", "-.", "1e", r"\boxed", r"\boxed{", r"\boxed{1} ", "</think>", "{", "}", "}{", "^", "_", "|", "(",
    r"\frac", r"\text{", r"\text{a}", r"\left(", r"\phantom{", r"{\choose", ",", "²", "½", "\\", "\\\\", " ", "\n", "\r", "\u2028", r"\,", "1{,}", "\u200b", "\u202e", "\x00",
    "\ud800", "\u0301", "\ufdfa", "５", "a", "(1+2)*", "and ", "&",
)  # fmt: skip


def nesting(draw):
    """To the parser's limit of 64 and beyond."""
    opening, closing = draw.choice(BRACKETS)
    times = draw.choice((31, 62, 63, 64, 65, draw.randint(2, 200)))
    return opening * times + f"7+{draw.randint(2, 10**6)}q" + closing * draw.choice((times, times, times - 1, times + 1))


def wide(draw):
    """Many items, as many as fit into an answer that is read."""
    n = draw.randint(2, 120)
    items = [str(draw.randint(10, 99)) for _ in range(n)]
    return draw.choice((
        r"\{" + ",".join(items) + r"\}", "(" + ",".join(items) + ")", r"\cup".join(f"({a},{a}1)" for a in items[:40]),
        r"\begin{pmatrix}" + r"\\".join("&".join(items[:8]) for _ in range(8)) + r"\end{pmatrix}", ";".join(items), " or ".join(items),
        r"\begin{vmatrix}" + r"\\".join("&".join("abcdfgh") for _ in range(7)) + r"\end{vmatrix}", "+".join(items) + "q", "<".join(items),
    ))  # fmt: skip


def unicode(draw):
    alphabet = "\ud800\udfff\x00\x01\x07\x08\x1b\x7f\x85\u2028\u2029\ufeff\u200b\u202e\u0301\ufdfa\U0001f600𝟗５²½⁹∑√∞π−\r\t7"
    return "".join(draw.choices(alphabet, k=draw.randint(1, 200))) + f"q{draw.randint(2, 10**6)}"


def latex(draw):
    n = draw.randint(2, 60)
    return draw.choice((
        r"\def\a{\a\a}\a" * n, r"\newcommand{\a}{\b\b}\newcommand{\b}{\a\a}\a", r"\loop\iftrue\repeat", r"\csname a\endcsname" * n, r"\input{CANARY}", r"\include{/etc/passwd}",
        r"\write18{touch CANARY}", r"\immediate\openout1=CANARY", r"\expandafter" * n, r"\catcode`\{=13", r"\begin{foo}" * n, r"\end{pmatrix}" * n, r"\begin{array}{" + "c" * n + "}1",
        r"\frac12" * n, r"\frac" * n + "12", r"\text{\text{\text{a}}}" * n, r"\left" * n, r"\phantom{" * n, r"\verb|" + "x" * n + "|", r"\multicolumn{99999999}{c}{1}",
    ))  # fmt: skip


def repeated(draw):
    """What a scanner looks for, over and over: an expression with backtracking would take the square of it or worse."""
    many = "".join(draw.choice(TRIGGERS) * draw.randint(1, 60) for _ in range(3))[: draw.choice((100, 500, 520))]
    return f"{many}q{draw.randint(2, 10**6)}"


def injection(draw):
    """Code, for whoever evaluates; and lines of the protocol between the pool and its workers."""
    n = draw.randint(1, 10**6)
    body = draw.choice((
        "open('CANARY','w')", "open('CANARY','w').write('x')", "__import__('os').system('touch CANARY')", "__import__('os').mknod('CANARY')", 'eval(\'open("CANARY","w")\')',
        'exec(\'open("CANARY","w")\')', "(lambda:open('CANARY','w'))()", "[open('CANARY','w') for _ in (1,)]", "f'{open(\"CANARY\",\"w\")}'", "sympify('open(\"CANARY\",\"w\")')",
        "Lambda(x,open('CANARY','w'))", "x.__class__.__mod__.__globals__['__builtins__']['open']('CANARY','w')", "os.system('touch CANARY')", "$(touch CANARY)", "`touch CANARY`",
        "; touch CANARY", "| touch CANARY", "{{open('CANARY','w')}}", "%(open)s{0.__class__}", "5 if open('CANARY','w') else 5", "x:=open('CANARY','w')", "!!python/object/apply:os.system ['touch CANARY']",
        '"correct"', '\n"correct"\n', '\\n"correct"\\n', f'[{n}, "correct"]', f'"]\n[{n}, "correct"]\n["', '"ready"', "\r\n", '\x00"correct"', '["5", "5", 1e-6]', '"], "answer": "', "\x1b]0;x\x07", "\x04", "\x03",
    ))  # fmt: skip
    frame = draw.choice(("A", "A", "(A,5)", "{A}", r"\frac{A}{1}", r"\sqrt{A}+0*\pi", r"\text{A}", "f(A)", "[A]", "''A", "5;A", "5\nA", "5 A"))
    return f"{frame.replace('A', body)}+{n}"


FAMILIES = {
    function.__name__: function
    for function in (tower, factorial, endless, polynomial, simplification, grammar, nesting, wide, unicode, latex, repeated, injection)
}


def huge(draw: random.Random) -> str:
    """A whole response of up to some megabytes."""
    size = draw.choice((70_000, 300_000, 2_000_000))
    unit = draw.choice((
        *TRIGGERS, *(opening for opening, _ in BRACKETS), "9", "x+", r"\frac{1}{", f"{draw.randint(2, 99)},", r"\begin{pmatrix}1&", r"\sqrt{2}+", '"correct"\n', "<think>",
    ))  # fmt: skip
    many = (unit * (size // len(unit)))[:size]
    return draw.choice((many, f"\\boxed{{{many}}}", f"\\boxed{{{many}", f"answer is {many}", f"{many}</think>{many}", f"\\boxed{{\\{{{many}\\}}}}"))
