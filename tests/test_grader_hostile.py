"""Text made to hang, exhaust, confuse or take over the grader, through the pool that training uses.

Of every string: an answer within two seconds of work, the right one where there is a right one, by a worker that lives on, and
with less than a GiB of memory; and nothing in it is ever carried out.
"""

import json
import os
import time
from pathlib import Path

import pytest

from dgpo_jax.rewards.pool import VerifierPool

HOSTILE = Path(__file__).resolve().parents[2] / "shared/verify/hostile.jsonl"
GOLDS = ("5", r"\sqrt{2}", "x+1", r"\{1,2\}", "(1,5)")
LIMIT_S = 2.0  # of processor time, this process and the worker together: on a busy machine the wall clock says little
BUSY_S = 60.0  # the pool's deadline here
GIB_IN_KB = 2**20
JUDGED = {"correct", "wrong", "unparsable", "no_answer"}


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """A pool of one worker for each rule of extraction, in a folder where anything carried out would leave a file."""
    folder, before = tmp_path_factory.mktemp("hostile"), os.getcwd()
    os.chdir(folder)
    opened = {rule: VerifierPool(workers=1, deadline_s=BUSY_S, memory_mb=1024, extract=rule) for rule in ("boxed", "marked", "last")}
    for pool in opened.values():
        assert pool.wait_started(60)
    yield opened
    for pool in opened.values():
        pool.close()
    os.chdir(before)


def judge(pool, gold, response):
    """The status; asserts all that must hold of any string."""
    pids = pool.worker_pids()
    started = seconds_used(*pids)
    verdict = pool.submit(gold, response).result()
    about = f"gold {gold!r}, {len(response)} characters, {response[:80]!r}"
    assert verdict.status in JUDGED, f"{verdict.status}: {about}"
    assert pool.worker_pids() == pids, f"the worker died: {about}"
    assert seconds_used(*pids) - started < LIMIT_S, f"slow: {about}"
    assert memory_kb(*pids) < GIB_IN_KB, f"memory: {about}"
    assert os.listdir() == [], f"carried out: {about}"
    assert len(verdict.extracted or "") <= 512
    return verdict.status


def seconds_used(pid):
    """Processor time so far of this process and, where the system tells it, of the worker."""
    stat = Path(f"/proc/{pid}/stat")
    ticks = sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) if stat.exists() else 0
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def memory_kb(pid):
    """The most that the process ever held, 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) if status.exists() else 0


def boxed(text):
    return f"\\boxed{{{text}}}"


def nested(opening, closing, times):
    return opening * times + "5" + closing * times


# Nothing in these lists is equal to any of GOLDS.
TOWERS = [
    "9^{9^{9^9}}", "9^9^9", "9**9**9", "(9^9)^{9^9}", "2^{-9^{9^9}}", "10^{10^{10}}", "10^{-10^{100}}",
    "0.5^{10^{12}}", r"\pi^{10^9}", "2^{3000000}-2^{2999999}",
    r"\left(10^{10^8}\right)^{-1}", "1.0000001^{10^{15}}", "(1+10^{-9})^{10^9}", r"e^{10^{10}}", "e^{e^{e^e}}",
    "e^{e^{e^{e^{e^{e}}}}}", r"\exp(\exp(\exp(\exp(9))))",
    r"\ln(\ln(\ln(10^{10^{10}})))", r"\sin(9^{9^9})", r"\tan(10^{300}\pi)", r"\cosh(10^9)", "x^{x^{x^{x^x}}}",
    "x^{9^{9^9}}", "2^{x^{99999}}", "1e300^{1e300}", "1e999", "1e-999999",
    r"\sqrt[10^{100}]{7}", r"\sqrt[999983]{2}", "i^{i^{i^{i}}}+9^{9^9}", r"(1+i)^{1000000}",
    r"\log_{10^{-100}}{10^{100000}}", r"7^{7^{7^7}} \bmod 10", "^".join("9" * 200),
]  # fmt: skip
FACTORIALS = [
    "1000000000!", "((9!)!)!", "9!!!!!!", "(100!)!", "(10^9)!/(10^9-1)!-1", r"\binom{10^9}{10^8}",
    r"\binom{1000000}{500000}", r"\binom{\binom{90}{45}}{\binom{80}{40}}", r"\binom{n}{10^9}",
    r"\binom{-5}{10^9}", r"\binom{0.5}{100000}", "(x!)!", "(-1)!", "0.5!!", "9" + "!" * 500,
    r"\gcd(2^{99999},3^{99999})", r"\binom{10^{300}}{10^{299}}", "170!-169!",
]  # fmt: skip
ALGEBRA = [
    "(x+1)^{99999}", "(x+y+z)^{200}", "(a+b+c+d+f)^{60}-(a+b+c+d)^{60}", "(((x+1)^9+1)^9+1)^9", "(x^{99999}-1)/(x-1)",
    r"(\sqrt{x}+1)^{2000}", "x^{1/999983}", "(x+1/x)^{500}",
    "+".join(rf"\sin({k}x)" for k in range(1, 50)), "*".join(rf"\cos {k}" for k in range(2, 50)),
    r"\sin^{50}(x)\cos^{50}(x)+\tan^{30}(x)", r"\sin(\sin(\sin(\sin(\sin(\sin(x))))))",
    r"\tan(a+b+c+d+f+g)", r"\cos(10000x)-\cos(9999x)",
    "+".join(rf"\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)),
    "1/(" + "+".join(rf"\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11, 13, 17, 19, 23)) + ")",
    r"\sqrt[3]{2+\sqrt3}+\sqrt[5]{7-\sqrt[7]{11}}+\sqrt[11]{13+\sqrt[13]{17}}",
    r"\sqrt{2+" * 30 + "3" + "}" * 30, "+".join(f"1/(x+{k})" for k in range(2, 40)),
    "*".join(f"({a}-{b})" for a in "abcdfg" for b in "hjklmn"), "1/(1+" * 40 + "x" + ")" * 40,
    r"\sqrt{" + "9" * 400 + "}", "|x+|y+|z+|w||||", "x^7+x^3+\\sin x=e^{x}", "x^{10}+y^{10}+x^3y^3=\\sin(xy)",
    "x^{100}+y^{100}=z^{100}",
]  # fmt: skip
CALCULUS = [
    r"\int_0^\infty e^{-x^2}\,dx", r"\int x^x dx", r"\lim_{n\to\infty}(1+1/n)^n", r"\sum_{k=1}^{10^9} k^k",
    r"\sum_{k=1}^{9^{9^9}} 1", r"\prod_{k=1}^{10^8} k", r"\sum_{k=-\infty}^{\infty}\frac1k",
    r"\sum_{a=1}^{999}\sum_{b=1}^{999}\sum_{c=1}^{999} abc", r"\frac{d}{dx}x^{x^x}", r"\int" * 80, r"\sum" * 120,
    r"\prod_{k=1}^{50}(x+k)", r"\oint \nabla \partial",
]  # fmt: skip
WIDE = [
    r"\begin{pmatrix}" + r"\\".join("&".join("1" * 100) for _ in range(100)) + r"\end{pmatrix}",
    r"\begin{vmatrix}" + r"\\".join("&".join("abcdfghk") for _ in range(8)) + r"\end{vmatrix}",
    r"\begin{vmatrix}" + r"\\".join("&".join("abcdfghk"[i - j] for j in range(8)) for i in range(8)) + r"\end{vmatrix}", r"\begin{pmatrix}a&b\\c&d\end{pmatrix}^{1000}", r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^9}",
    r"\begin{pmatrix}1&2\\3\end{pmatrix}", r"\begin{foo}1\end{bar}", r"\begin{pmatrix}", r"\end{pmatrix}",
    r"\begin{pmatrix}" * 20, r"\{" + ",".join(map(str, range(10**4))) + r"\}",
    r"\{" + ",".join(map(str, range(150))) + r"\}", r"\{" + ",".join(rf"\sqrt{{{k}}}" for k in range(50)) + r"\}",
    r"\cup".join(f"({k},{k + 1})" for k in range(50)), "1," * 250 + "1", "(" + "(1,2)," * 70 + "3)",
    r"\{x\mid x\in\mathbb{R}\}", r"3 \text{ or } " * 30 + "4", r"\pm" * 120 + "3", r"(\pm1\pm2)" * 40,
    "0." + "3" * 100_000, "9" * 1_000_000, "a" * 1_000_000, "1+" * 500_000 + "1", r"\frac12" * 10_000,
]  # fmt: skip
WORDS = [
    "NaN", r"\text{NaN}", "-inf", "oo", "zoo", "None", "null", "True", "undefined", "infinity", "%s", "{{7*7}}",
    "the reference answer", "\x00", "\x00\x00", "\ud800", "\udfff\ud800", "\x1b[31m", "\u2028",
    "\ufdfa", "\U0001f600", "e\u0301" * 100, "\u0301" * 400, "\u200b" * 500, "", r"\,", ".", "..", "-", "--", "=",
    "==", "|", "||", "^", "_", "&", "~", "#", "\\", "\\\\", "{}", "()", "[]", r"\{\}", ",", ";", ":", "!", "%", "'",
    '"', "`", "²", "¼½",
]  # fmt: skip
INJECTIONS = [
    "__import__('os').system('touch canary')", "open('canary','w').write('x')", "open('canary','w')+5",
    "[open('canary','w')]", "(open('canary','w'),5)", "{open('canary','w')}", "'',open('canary','w')",
    "eval('open(\"canary\",\"w\")')", "exec('import os;os.mknod(\"canary\")')", "os.system('touch canary')",
    "(lambda:open('canary','w'))()", "[open('canary','w') for x in (1,)]", "5 if open('canary','w') else 5",
    "5; open('canary','w')", "5\nopen('canary','w')", "f'{open(\"canary\",\"w\")}'",
    r"f('\157\160\145\156\50\47\143\141\156\141\162\171\47\54\47\167\47\51')",
    r"ln('\157\160\145\156\50\47\143\141\156\141\162\171\47\54\47\167\47\51')",
    "sympify('open(\"canary\",\"w\")')", "x.__class__.__mod__.__globals__['__builtins__']['open']('canary','w')",
    "().__class__.__base__.__subclasses__()", r"\frac{open('canary','w')}{1}", r"\sqrt{open('canary','w')}+0*\pi",
    r"\text{open('canary','w')}", r"\input{canary}", r"\write18{touch canary}", r"\immediate\openout1=canary",
    "$(touch canary)", "`touch canary`", "; touch canary", "{% include 'canary' %}", "getattr(x,'__class__')",
    "Symbol('x')", "Lambda(x,open('canary','w'))",
]  # fmt: skip


@pytest.mark.parametrize("texts", [TOWERS, FACTORIALS, ALGEBRA, CALCULUS, WIDE, WORDS, INJECTIONS], ids=["towers", "factorials", "algebra", "calculus", "wide", "words", "injections"])
def test_no_hostile_answer_is_right_slow_or_carried_out(pools, texts):
    for text in texts:
        for gold in GOLDS:
            assert judge(pools["boxed"], gold, boxed(text)) != "correct", f"{text[:80]!r} is not {gold}"


@pytest.mark.parametrize("texts", [TOWERS, FACTORIALS, ALGEBRA, CALCULUS, WIDE], ids=["towers", "factorials", "algebra", "calculus", "wide"])
def test_no_hostile_reference_answer_is_slow(pools, texts):
    for text in texts:
        assert judge(pools["boxed"], text, r"\boxed{\sqrt{2}}") != "correct"
        judge(pools["boxed"], text, boxed(f" 0 + {text}"))  # the same on both sides, by value


BRACKETS = [
    ("(", ")"), ("[", "]"), (r"\{", r"\}"), ("{", "}"), ("|", "|"), (r"\left(", r"\right)"), (r"\left|", r"\right|"), (r"\lfloor ", r"\rfloor "), (r"\sqrt{", "}"), (r"\frac{", "}{2}"), (r"\frac{1}{", "}"), ("2^{", "}"), ("x_{", "}"), (r"\binom{", "}{2}"),
    (r"\text{", "}"), (r"\overline{", "}"), (r"\sin(", ")"), (r"\ln ", ""), ("-(", ")"), ("1+(", ")"), (r"\begin{pmatrix}", r"\end{pmatrix}"), (r"\max(1,", ")"), ("(1,", ")"), (r"\boxed{", "}"), (r"\sqrt[3]{", "}"), ("e^{", "}"), (r"\pm(", ")"), ("-", ""), ("+", ""),
]  # fmt: skip


@pytest.mark.parametrize("times", [10, 30, 62, 100, 3000, 100_000])
def test_nesting_of_any_depth_is_answered(pools, times):
    for opening, closing in BRACKETS:
        judge(pools["boxed"], "5", boxed(nested(opening, closing, times)))
        judge(pools["boxed"], "5", boxed(opening * times))
        judge(pools["boxed"], "5", boxed(closing * times))


TRIGGERS = [
    r"\( ", r"\[ ", "$", "$$", "answer ", "answer is ", "answer is: ", "answer    is", "Answer: 5. ", "answer is $", "####", "#### ", "#### 1 ", "1 ", "1", "1,", "1.", "1/", "1,000", "1,00", "-.", "-", "1e", "%", r"\boxed", r"\boxed ", r"\boxed{", r"\boxed{1} ", r"\fbox{", "</think>",
    "<think>", "</think", "{", "}", "{}", "}{", "^", "_", "|", "(", ")", r"\frac", r"\frac{", r"\text", r"\text{", r"\text{a}", r"\left", r"\left(", r"\right)", r"\phantom{", r"{\choose", r"\choose", ",", "²", "½", "\\", "\\\\", " ", "\n", "\t", "\r", "\u2028", "\xa0", "*", "**", "~", r"\,", r"\!", r"1,\!", "1{,}",
    r"\quad", "\u200b", "\u202e", "\x00", "\ud800", "\u0301", "\ufdfa", "５", "a", "ab ", "(1+2)*", "and ", r"\begin{pmatrix}", "&",
]  # fmt: skip


@pytest.mark.parametrize("rule", ["boxed", "marked", "last"])
def test_a_hundred_thousand_repeats_of_what_a_scanner_looks_for_are_scanned_once(pools, rule):
    for trigger in TRIGGERS:
        many = trigger * 100_000
        for response in (many, boxed(many), *([f"answer is {many}", f"#### {many}"] if rule == "marked" else [])):
            assert judge(pools[rule], r"\sqrt{2}", response) != "correct"
        if trigger != "<think>":  # then the thinking never ended
            assert judge(pools[rule], "5", f"{many} </think> so \\boxed{{5}}") == "correct"


@pytest.mark.parametrize("gold, text, expected", [
    (r"\infty", "∞", "correct"),
    ("5", "5\u200b", "correct"),  # an invisible blank
    ("5", "\u202e5\u202c", "unparsable"),  # marks that turn the writing round: what is seen is not what is there
    (r"2\pi", "2π", "correct"),
    ("x^2", "x²", "correct"),
    ("90", "90°", "correct"),
    (r"x \le 5", "x ≤ 5", "correct"),
    ("-5", "−5", "correct"),
    ("5", "5\x00", "unparsable"),
    ("10^{300}", "1e300", "correct"),  # large but within what is computed
    ("0", "2^{1000}-2^{1000}", "correct"),
    ("2^{1000}", "4^{500}", "correct"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", "unparsable"),  # out of bounds, and so never right
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", "wrong"),
    ("99", r"\frac{100!}{99!} - 1", "correct"),
    ("(x+1)^{12}", "(1+x)^{12}", "correct"),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", "correct"),
])
def test_what_looks_hostile_but_has_a_verdict_gets_it(pools, gold, text, expected):
    assert judge(pools["boxed"], gold, boxed(text)) == expected


@pytest.mark.skipif(not HOSTILE.exists(), reason="the shared hostile strings are not here")
def test_the_shared_hostile_strings_get_their_verdicts(pools):
    for line in HOSTILE.read_text().splitlines():
        case = json.loads(line)
        found = judge(pools["boxed"], case["gold"], "".join(part * times for part, times in case["prediction_parts"]))
        if case["expect"] is not None:
            assert (found == "correct") == case["expect"], f"{case['id']} ({case['why']}): {found}"
