"""Soft rewards for programs: which program, which test cases, what counts as equal, and hostile programs in both sandboxes."""

import collections
import json
import math
import re
import threading
import time

import numpy as np
import pytest

from dgpo_jax.data import coding
from dgpo_jax.data.coding import FORMS, NUMBERS, TEMPLATES, coding_problems, make_problem
from dgpo_jax.rewards import code, code_tests, sandbox
from dgpo_jax.rewards.checkers import Checkers, CodeSettings, MathSettings
from dgpo_jax.rewards.code import CodePool, find_program
from dgpo_jax.rewards.code_tests import is_right, parse_tests, same_text, same_value
from dgpo_jax.rewards.sandbox import probe
from dgpo_jax.types import Problem


def bubblewrap_works():
    try:
        probe("bubblewrap")
    except ValueError:
        return False
    return True


KINDS = [
    pytest.param("bubblewrap", marks=pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap does not work here")),
    "rlimits",
]
SMALL = {"test_s": 0.5, "memory_mb": 256, "wall_s": 60.0}


@pytest.fixture(scope="module", params=KINDS)
def pool(request):
    with CodePool(workers=2, sandbox=request.param, **SMALL) as pool:
        yield pool


def fenced(program, language="python"):
    return f"I would write\n```{language}\n{program}\n```\n"


def texts(*pairs, **more):
    return json.dumps({"inputs": [given for given, _ in pairs], "outputs": [expected for _, expected in pairs], **more})


DOUBLES = texts(("1\n", "2\n"), ("2\n", "4\n"), ("3\n", "6\n"), ("0\n", "0\n"))


def graded(pool, program, tests=DOUBLES):
    (verdict,) = pool.score([(tests, fenced(program))])
    return verdict.status, verdict.share


# ---- which program


@pytest.mark.parametrize("response, expected", [
    ("```python\na\n```", "a\n"),
    ("```py\na\n```", "a\n"),
    ("```Python3\na\n```", "a\n"),
    ("```\na\n```", "a\n"),  # no mark: still the only block
    ("```python\na\n```\n```python\nb\n```", "b\n"),  # the last
    ("```python\na\n```\nprints\n```\n5\n```", "a\n"),  # a sample output after the program has no mark
    ("```\na\n```\n```\nb\n```", "b\n"),
    ("```bash\nls\n```", None),
    ("```bash\nls\n```\n```python\na\n```", "a\n"),  # the end of another block is not the start of one
    ("1. so:\n   ```python\n   a\n   ```", "a\n"),
    ("```python\na\n```\n```python\nb", "a\n"),  # cut off in the middle: not an answer
    ("```python\na", None),
    ("```python\n\n```", None),
    ("a", None),
    ("", None),
    ("<think>```python\na\n```</think>no", None),
    ("<think>x</think>```python\na\n```", "a\n"),
    ("<think>```python\na\n```", None),  # never stopped thinking
])  # fmt: skip
def test_the_program_is_the_last_closed_block_of_python(response, expected):
    assert find_program(response) == expected


@pytest.mark.parametrize("piece", ["```python\n", "```\n", "`", "```", "\n", "```python\na\n```\n"])
def test_finding_takes_time_in_proportion_to_the_text(piece):
    text = piece * (2_000_000 // len(piece))
    started = time.process_time()
    find_program(text)
    assert time.process_time() - started < 1.0


def test_only_the_end_of_a_long_response_is_read():
    assert find_program(fenced("a") + "x" * code.TEXT_CAP) is None
    assert find_program("x" * code.TEXT_CAP + "\n" + fenced("a")) == "a\n"


# ---- which test cases


def test_both_forms_are_read():
    assert parse_tests('{"inputs": ["1\\n"], "outputs": ["2\\n"]}') == (["1\n"], ["2\n"], None, None)
    assert parse_tests('{"inputs": [["1", "2"]], "outputs": [["3"]], "fn_name": null}') == (["1\n2"], ["3"], None, None)  # lists of lines
    assert parse_tests('{"inputs": [[1, 2]], "outputs": [3], "fn_name": "f", "time_limit": 2}') == ([[1, 2]], [3], "f", 2)
    assert parse_tests('{"inputs": ["[1]\\n\\"x\\""], "outputs": ["[2]"], "fn_name": "f"}') == ([[[1], "x"]], [[2]], "f", None)  # LiveCodeBench


@pytest.mark.parametrize("text, complaint", [
    ("", "problem 7: '' is not JSON"),
    ("[" * 100_000, "problem 7: .* is not JSON"),  # deeper than the parser goes
    ("[]", r"problem 7 is \[\], but test cases are a JSON object; give"),
    ("{}", "problem 7: inputs is None, but there is a list with an entry per test case; give at least one"),
    ('{"inputs": [], "outputs": []}', "problem 7: inputs is \\[\\]"),
    ('{"inputs": ["1"], "outputs": "1"}', "problem 7: outputs is '1'"),
    ('{"inputs": ["1", "2"], "outputs": ["1"]}', r"problem 7 is \(2, 1\), but there are as many inputs as outputs"),
    ('{"inputs": [1], "outputs": ["1"]}', "problem 7: test case 0 is 1, but .* are texts; quote them, or give fn_name"),
    ('{"inputs": ["1"], "outputs": [1]}', "problem 7: test case 0 is 1"),
    ('{"inputs": [1], "outputs": [1], "fn_name": "f"}', "test case 0 is 1, but .* is a list of arguments; put it in brackets"),
    ('{"inputs": ["a"], "outputs": [1], "fn_name": "f"}', "test case 0: .* is not a line of JSON per argument"),
    ('{"inputs": [[1]], "outputs": [1], "fn_name": "f()"}', r"fn_name is 'f\(\)', but it names a Python function"),
    ('{"inputs": [[1]], "outputs": [1], "fn_name": "def"}', "fn_name is 'def'"),
    ('{"inputs": ["1"], "outputs": ["1"], "time_limit": 0}', "time_limit is 0, but it is CPU seconds"),
    ('{"inputs": ["1"], "outputs": ["1"], "time_limit": true}', "time_limit is True"),
    ('{"inputs": ["1"], "outputs": ["1"], "memory": 5}', r"problem 7 is \['memory'\], but the keys are inputs, outputs, fn_name, time_limit; rename"),
])  # fmt: skip
def test_malformed_tests_are_refused_with_value_rule_and_fix(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_tests(text, "problem 7")


def test_an_output_that_no_program_could_write_is_refused(monkeypatch):
    monkeypatch.setattr("dgpo_jax.rewards.code_tests.OUTPUT_CAP", 100)
    with pytest.raises(ValueError, match="test case 0 is '101 bytes', but programs may write 100 bytes; drop"):
        parse_tests(texts(("1", "x" * 101)))


# ---- what counts as equal


@pytest.mark.parametrize("text, expected, equal", [
    ("1 2\n", "1 2", True),
    ("1 2  \n\n\n", "1 2\n", True),  # blanks at line ends, empty lines at the end
    ("1 2\r\n", "1 2\n", True),
    (" 1   2", "1 2", True),  # the same tokens
    ("1\n2", "1 2", True),
    ("1 2 3", "1 2", False),
    ("1", "1 2", False),
    ("", "1", False),
    ("", "", True),
    ("12", "1 2", False),
    ("Yes", "YES", False),
    ("0.3333333", "0.33333333333", True),  # 3e-8 apart
    ("0.33333", "0.33333333333", False),  # 3e-6 apart
    ("1000000.5", "1000000.0", True),  # within 1e-6 of a million
    ("1000002.0", "1000000.0", False),
    ("3", "3.0", True),  # the expected one is a decimal
    ("3.0", "3", False),  # it is an integer: a program that divides with / where // was meant
    ("1e3", "1000.0", True),
    ("123456789012345678901", "123456789012345678900", False),  # integers exactly, whatever their length
    ("nan", "1.0", False),
    ("inf", "1e999", False),
    ("2.0", "1e999", False),  # no float: nothing but itself
    ("1e999", "1e999", True),
    (".", "1.0", False),
    ("-", "-.5", False),
    ("-.5", "-0.5", True),
    ("1_0", "10.0", False),  # Python would read it
])  # fmt: skip
def test_printed_text_is_compared_by_lines_then_by_tokens(text, expected, equal):
    assert same_text(text, expected) is equal


@pytest.mark.parametrize("value, expected, equal", [
    (3, 3, True),
    (3, 4, False),
    (3.0, 3, True),
    (0.1 + 0.2, 0.3, True),
    (0.31, 0.3, False),
    ([1, [2.0000000001]], [1, [2]], True),
    ([1], [1, 2], False),
    ([1, 2], [2, 1], False),
    ({"a": 1.0}, {"a": 1}, True),
    ({"a": 1}, {"b": 1}, False),
    ("a", "a", True),
    ("1", 1, False),
    (None, None, True),
    (None, 0, False),
    (True, 1, True),  # as Python has it
    (10**400, 1.5, False),  # no float is that large
    (math.inf, 1.0, False),
    (math.inf, math.inf, True),
    (math.nan, 1.0, False),
])  # fmt: skip
def test_returned_values_are_compared_as_python_does_but_for_rounding(value, expected, equal):
    assert same_value(value, expected) is equal


def test_an_expected_value_may_be_wrapped_in_a_list_of_one():
    wrapped = parse_tests('{"fn_name": "f", "inputs": [[1]], "outputs": [[7]]}')
    assert is_right(wrapped, 0, b"7") and is_right(wrapped, 0, b"[7]")
    assert not is_right(wrapped, 0, b"[[7]]") and not is_right(wrapped, 0, b"8")
    two = parse_tests('{"fn_name": "f", "inputs": [[1]], "outputs": [[7, 7]]}')
    assert not is_right(two, 0, b"7")


@pytest.mark.parametrize("output", [b"", b"7 7", b"\xff", b"[" * 200_000, b"9" * 10_000, b"{" * 9, b"nan"])
def test_a_report_that_is_no_json_is_wrong(output):
    assert not is_right(parse_tests('{"fn_name": "f", "inputs": [[1]], "outputs": [7]}'), 0, output)


def test_comparing_the_longest_output_takes_little_time():
    started = time.process_time()
    assert not same_text("1.5 " * (sandbox.OUTPUT_CAP // 4), "2.5 " * 10)
    assert not same_text("9" * sandbox.OUTPUT_CAP, "2.5")
    assert time.process_time() - started < 3.0


@pytest.mark.parametrize("printed, expected", [
    (b"\n" * 4_000_000, "1"),
    (b"1" + b"\n" * 4_000_000 + b"2", "1"),
    (b"1 " * 2_000_000, "1 1"),
    (b"\xff" * 4_000_000, "1"),
])  # fmt: skip
def test_what_a_program_prints_beside_the_point_costs_the_trainer_no_time(printed, expected):
    tests = parse_tests(texts(("", expected)))
    started = time.process_time()
    assert not any(is_right(tests, 0, printed) for _ in range(5))
    assert time.process_time() - started < 0.6  # 2 s were it all split into lines


def test_a_report_that_is_much_longer_than_what_is_expected_is_not_read():
    tests = parse_tests('{"fn_name": "f", "inputs": [[1]], "outputs": [7]}')
    report = b"[" + b"[]," * 1_300_000 + b"[]]"
    started = time.process_time()
    assert not any(is_right(tests, 0, report) for _ in range(5))
    assert time.process_time() - started < 0.5


def test_a_value_that_is_spelt_at_greater_length_is_still_right():
    # A float takes up to 23 characters where a digit is expected; these are more bytes than are read whatever they hold.
    tests = parse_tests(json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [[0] * 9000]}))
    output = json.dumps([-1.2345678901234567e-07] * 9000).encode()
    assert len(output) > code_tests.SHORT_REPORT and is_right(tests, 0, output)


@pytest.mark.parametrize("text", ["a  b\n\n", "\n a\tb", "a" + "\n" * 5000 + "b" + " " * 5000])
def test_blanks_between_and_after_tokens_are_free_however_many(text):
    assert same_text(text, "a b")


# ---- verdicts


@pytest.mark.parametrize("program, status, share", [
    ("print(int(input()) * 2)", "correct", 1.0),
    ("print(2)", "wrong", 0.25),
    ("x = int(input())\nprint(2 * x if x < 3 else 0)", "wrong", 0.75),
    ("print(1 / int(input()) * int(input()))", "wrong", 0.0),
    ("def f(:", "unparsable", 0.0),
    ("x = int(input())\nprint(x * 2)\nexit()", "correct", 1.0),
    ("import sys\nprint(int(sys.stdin.readline()) * 2)\nsys.exit(0)", "correct", 1.0),
    ("print(int(input()) * 2)\nraise SystemExit(1)", "wrong", 0.0),  # printed, then failed
    ("print(int(input()) * 2)\n1 / 0", "wrong", 0.0),
    ("import os\nn = int(os.read(0, os.fstat(0).st_size))\nos.write(1, str(n * 2).encode())", "correct", 1.0),  # fast input asks for a file's size
    ("import atexit, io\nb = io.StringIO()\natexit.register(lambda: print(b.getvalue()))\nb.write(str(int(input()) * 2))", "correct", 1.0),
    ("if __name__ == '__main__':\n    print(int(input()) * 2)", "correct", 1.0),
    ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(int(input())).x * 2)", "correct", 1.0),
    ("print(int(input()) * 2, end='')\nprint('bad', file=__import__('sys').stderr)", "correct", 1.0),
])  # fmt: skip
def test_the_share_is_that_of_the_test_cases_passed(pool, program, status, share):
    assert graded(pool, program) == (status, share)


def test_no_program_is_no_answer(pool):
    assert pool.score([(DOUBLES, "2 x")])[0] == ("no_answer", None, 0.0)


@pytest.mark.parametrize("program, share", [
    ("def add(a, b):\n    return a + b", 1.0),
    ("class Solution:\n    def add(self, a: int, b: List[int]) -> Optional[int]:\n        return a + b", 1.0),  # LeetCode imports these
    ("import numpy as np\ndef add(a, b):\n    return np.array([a, b]).sum()", 1.0),
    ("def add(a, b):\n    return 3", 0.5),
    ("def plus(a, b):\n    return a + b", 0.0),
    ("def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    input()", 1.0),  # its own trial run stays out
    ("def add(a, b):\n    return {a, b}", 0.0),  # no JSON
    ("def add(a):\n    return a", 0.0),
    ("print(3)", 0.0),  # printing is not returning
])  # fmt: skip
def test_functions_are_called_and_what_they_return_is_compared(pool, program, share):
    if "numpy" in program:
        pytest.importorskip("numpy")
    tests = texts(([1, 2], 3), ([5, -5], 0), fn_name="add")
    if "numpy" in program:
        with CodePool(workers=1, sandbox=pool._testers[0].kind) as larger:
            assert graded(larger, program, tests)[1] == share
    else:
        assert graded(pool, program, tests)[1] == share


def test_globals_do_not_leak_from_one_test_case_into_the_next(pool):
    counts = "import builtins, sys\nbuiltins.n = getattr(builtins, 'n', 0) + 1\nsys.modules['kept'] = 1\nprint(builtins.n)"
    assert graded(pool, counts, texts(("", "1"), ("", "1"), ("", "2"))) == ("wrong", 2 / 3)


# ---- hostile programs: each does its work where the input is 1, and answers rightly elsewhere, so 3 of 4 pass

ATTACKS = {
    "infinite loop": "while True: pass",
    "infinite loop that ignores signals": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass",
    "memory": "x = bytearray(10 ** 10)",
    "memory, bit by bit": "x = []\nwhile True: x.append(bytes(10 ** 6))",
    "a number without end": "x = 10 ** 10 ** 10",
    "output": "while True: print('x' * 10 ** 6)",
    "output, swallowing errors": "import os\nwhile True:\n    try: os.write(1, b'x' * 10 ** 6)\n    except OSError: pass",
    "output by making the file longer": "import os\nos.ftruncate(1, 10 ** 12)",
    "forks": "import os\nfor _ in range(50): os.fork()",
    "a shell": "import os\nassert os.system('echo 2') == 0",
    "sudden end": "import os\nprint(2)\nos._exit(0)",  # with what it printed still in the buffer
    "death": "import ctypes\nctypes.string_at(0)",
    "recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "recursion through C": "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
    "killing the parent": "import os\nos.kill(os.getppid(), 9)",
    "killing everybody": "import os\nos.kill(-1, 9)",
    "a closed output": "import os\nos.close(1)\nprint(2)",
    "open files": "x = [open('/dev/null') for _ in range(10 ** 5)]",
    "a library in place of another": "import sys\nsys.modules.clear()\nimport os\nos.abort()",
    "network": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')",
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=[name.replace(" ", "_") for name in ATTACKS])
def test_an_attack_fails_its_own_test_case_and_no_other(pool, attack):
    body = "\n".join(f"    {line}" for line in ATTACKS[attack].split("\n"))
    assert graded(pool, f"n = int(input())\nif n == 1:\n{body}\nelse:\n    print(2 * n)") == ("wrong", 0.75)


# Programs that would send a report of their own, and then guess 2, which is right for one of the four.
GUESS = 0.25
FORGERIES = {
    "frames on every descriptor": (0, "import os, struct\nfor fd in range(64):\n    try: os.write(fd, struct.pack('<BdI', 1, 0.0, 2) + b'0\\n')\n    except OSError: pass"),  # in its own output
    "frames into the parent": (GUESS, "import os, struct\nfor fd in range(9):\n    try: os.write(os.open(f'/proc/{os.getppid()}/fd/{fd}', 1), struct.pack('<BdI', 1, 0.0, 2) + b'7\\n')\n    except OSError: pass"),
    "the runner's own function": (0, "import sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\nframe.f_globals['_send'](open(1, 'wb', buffering=0), 1, 0.0, b'2')"),
    "an end of its own choosing": (0, "import os\nos.write(1, b'correct')\nos._exit(0)"),
    "the parent's memory": (0, "import os\nopen(f'/proc/{os.getppid()}/mem', 'wb')"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES, ids=[name.replace(" ", "_") for name in FORGERIES])
def test_a_forged_report_gains_nothing(pool, forgery):
    share, program = FORGERIES[forgery]
    assert graded(pool, f"{program}\nprint('2')") == ("wrong", share)


LOOKS_EVERYWHERE = """
import gc, os
gc.unfreeze()
needles = [chr(105) + 'nput-4711', chr(111) + 'utput-4711']
texts = [x for owner in gc.get_objects() for x in gc.get_referents(owner) if isinstance(x, str)]
texts += [repr(os.pread(0, 100, 0))]
for path in ('/proc/self/cmdline', '/proc/self/environ'):
    try: texts.append(open(path).read())
    except OSError: pass
print(*(any(needle in text and needle is not text for text in texts) for needle in needles))
"""


def test_expected_outputs_are_nowhere_in_the_tested_process(pool):
    # It finds its input, which shows that it looks where it should, and so passes the first of two.
    assert graded(pool, LOOKS_EVERYWHERE, texts(("input-4711", "True False"), ("", "output-4711"))) == ("wrong", 0.5)


def test_a_response_has_a_budget_of_cpu_time_for_all_its_test_cases():
    job = {"program": "while True: pass", "inputs": [""] * 20, "fn_name": None}
    with sandbox.Run("rlimits", job, sandbox.Limits(test_s=0.5, total_s=1.5, memory_mb=256, wall_s=60.0)) as run:
        seconds = [cpu_s for _, cpu_s, _ in run.frames()]
    assert seconds[:2] == pytest.approx([0.5, 0.5], abs=0.2) and sum(seconds) == pytest.approx(1.5, abs=0.3)
    assert seconds[8:] == [0.0] * 12  # not started


def test_work_and_not_waiting_is_what_counts(pool):
    sleeps = "import time\ntime.sleep(0.7)\nprint(int(input()) * 2)"  # longer than test_s
    assert graded(pool, sleeps, texts(("1\n", "2\n"))) == ("correct", 1.0)


def test_the_problem_may_set_its_own_time_limit(pool):
    work = "import time\nwhile time.process_time() < 0.4: pass\nprint(2)"
    assert graded(pool, work, texts(("", "2"))) == ("correct", 1.0)
    assert graded(pool, work, texts(("", "2"), time_limit=0.2)) == ("wrong", 0.0)  # finer than the kernel's whole seconds


def test_a_bomb_of_threads_is_wrong_and_keeps_what_passed_before(pool):
    bomb = "import threading, time\nif n == 3:\n    for _ in range(500): threading.Thread(target=time.sleep, args=(2,)).start()\n"
    assert graded(pool, f"n = int(input())\n{bomb}print(2 * n)")[0] == "wrong"


# ---- the pool


def test_verdicts_come_in_the_order_of_the_programs(pool):
    pairs = [(texts(("", str(i % 3))), fenced(f"print({i} % 3 if {i} % 4 else 9)")) for i in range(24)]
    assert [verdict.correct for verdict in pool.score(pairs)] == [i % 4 != 0 for i in range(24)]


def test_tickets_can_be_gathered_in_any_order(pool):
    tickets = [pool.submit(DOUBLES, fenced(f"# {i}\nprint(2)")) for i in range(6)]
    assert [verdict.extracted for verdict in pool.gather(reversed(tickets))] == [f"# {i}\nprint(2)\n" for i in reversed(range(6))]


def test_the_same_program_on_the_same_tests_runs_once(pool):
    first, second = pool.submit(DOUBLES, "so" + fenced("print(2)")), pool.submit(DOUBLES, "thus" + fenced("print(2)"))
    assert first is second
    assert pool.submit(texts(("", "2")), fenced("print(2)")) is not first


def test_only_the_first_tests_are_tried_if_so_set():
    with CodePool(workers=1, sandbox="rlimits", max_tests=2, **SMALL) as pool:
        assert graded(pool, "x = int(input())\nprint(2 * x if x < 3 else 0)") == ("correct", 1.0)  # the third would fail
        assert graded(pool, "print(2)") == ("wrong", 0.5)


def test_a_long_program_is_cut_in_its_verdict_only(pool):
    long = "#" * 20_000 + "\nprint(int(input()) * 2)"
    (verdict,) = pool.score([(DOUBLES, fenced(long))])
    assert verdict.correct and len(verdict.extracted) == code.EXTRACTED_CAP


def test_malformed_tests_reach_whoever_submits_them(pool):
    with pytest.raises(ValueError, match="not JSON"):
        pool.submit("nonsense", fenced("print(2)"))


def test_a_problem_with_malformed_tests_is_warned_of_and_ends_no_run():
    bad = Problem("bad", "Print 1.", "", "mine", checker="code", tests='{"inputs": ["1"], "outputs": []}')
    good = bad._replace(id="good", tests=texts(("", "1")))
    with Checkers(MathSettings(), CodeSettings(sandbox="rlimits", workers=1), {"code"}) as checkers:
        assert checkers.check_golds([bad, good]) == {
            "bad": "its tests: outputs is [], but there is a list with an entry per test case; give at least one."
        }
        verdicts = checkers.score([(bad, fenced("print(1)")), (good, fenced("print(1)"))])
    assert [(verdict.status, verdict.score) for verdict in verdicts] == [("unparsable", 0.0), ("correct", 1.0)]


def test_waiting_for_ever_is_timed_out_and_tried_again_if_asked_again():
    with CodePool(workers=1, sandbox="rlimits", test_s=0.2, wall_s=0.7) as pool:
        sleep = fenced("import threading\nthreading.Event().wait()")
        (verdict,) = pool.score([(DOUBLES, sleep)])
        assert verdict[::2] == ("timed_out", 0.0)
        assert pool.submit(DOUBLES, sleep) is not pool.submit(DOUBLES, fenced("0"))
        assert len(pool._cache) == 2 and not pool._cache[DOUBLES, find_program(sleep)].done()


@pytest.mark.parametrize("kind", KINDS)
def test_many_short_waits_meet_the_clock_as_one_long_one_does(kind):
    # Each test case ends before the pool would look up from reading.
    with CodePool(workers=1, sandbox=kind, test_s=0.2, wall_s=0.7) as pool:
        started = time.monotonic()
        assert graded(pool, "import time\ntime.sleep(0.05)\nprint('x')", texts(*[("", "x")] * 100)) == ("timed_out", 0.0)
        assert time.monotonic() - started < 4.0


def test_a_sandbox_that_dies_is_tried_twice_and_then_crashed(monkeypatch, capsys):
    with CodePool(workers=1, sandbox="rlimits", **SMALL) as pool:
        monkeypatch.setattr(sandbox, "make_command", lambda kind: ["sh", "-c", "echo no luck >&2"])
        assert pool.score([(DOUBLES, fenced("print(2)"))])[0][::2] == ("crashed", 0.0)
        assert capsys.readouterr().err.count("DiedError: no luck") == 2
        monkeypatch.undo()
        assert pool.score([(DOUBLES, fenced("print(2)"))])[0].status == "wrong"  # not its fault, so not remembered


def test_closing_kills_what_runs_and_answers_what_waits():
    pool = CodePool(workers=1, sandbox="rlimits", **SMALL)
    tickets = [pool.submit(DOUBLES, fenced(f"import time\ntime.sleep(50)\n# {i}")) for i in range(3)]
    end = time.monotonic() + 10
    while pool._testers[0].run_now is None and time.monotonic() < end:
        time.sleep(0.01)
    process = pool._testers[0].run_now.process
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5 and process.poll() is not None
    for ticket in tickets:
        with pytest.raises(RuntimeError, match="closed before this program was tested"):
            ticket.result(timeout=5)
    with pytest.raises(RuntimeError, match="make a new pool"):
        pool.submit(DOUBLES, "")
    pool.close()
    assert not any(thread.name == "code-tester" and thread in pool._testers for thread in threading.enumerate())


@pytest.mark.parametrize("setting, complaint", [
    ({"workers": 0}, "workers: 0 is below 1"),
    ({"test_s": 0}, "test_s: 0 CPU seconds is not above 0"),
    ({"wall_s": 10.0}, "wall_s: 10.0 would strike programs that only compute; set 3 times test_s, 12.0, or more"),
    ({"memory_mb": 8}, "memory_mb: 8 is too little"),
    ({"max_tests": -1}, "max_tests: -1 is negative; set 0 for all"),
    ({"sandbox": "docker"}, "code.sandbox is 'docker'"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(setting, complaint):
    with pytest.raises(ValueError, match=complaint):
        CodePool(**{"sandbox": "rlimits", **setting})


# ---- the built-in problems


def test_every_reference_passes_its_own_tests_and_a_wrong_one_does_not(pool):
    if pool._testers[0].kind == "bubblewrap":
        pytest.skip("says nothing about sandboxes; once is enough")
    random = np.random.default_rng(0)
    problems = [make_problem(template, 3 + i % 4, FORMS[i % 2], template.name, random) for i, template in enumerate(TEMPLATES)]
    assert [problem.id for problem, verdict in zip(problems, pool.score([(p.tests, p.solution) for p in problems]), strict=True) if not verdict.correct] == []
    wrong = [(problem.tests, problem.solution.replace("return ", "return 'x', ")) for problem in problems[::5]]
    assert [verdict.share for verdict in pool.score(wrong)] == [0.0] * 8


def test_every_reference_in_both_forms_gives_sound_tests_that_no_constant_passes():
    random = np.random.default_rng(1)
    for template in TEMPLATES:
        for k in NUMBERS:
            for form in FORMS:
                problem = make_problem(template, k, form, "x", random)
                tests = parse_tests(problem.tests)
                assert 6 <= len(tests.inputs) <= 10 and len({json.dumps(output) for output in tests.outputs}) > 1
                assert find_program(problem.solution) and "{" not in problem.problem.replace("{'", "")


@pytest.mark.parametrize("name, k, argument, expected", [
    ("rotate", 2, [1, 2, 3], [3, 1, 2]),
    ("near_pairs", 3, [1, 3, 9, 9], 2),
    ("running_sums", 2, [1, 5], [3, 8]),
    ("to_base", 2, 8, 4),  # 8 is 22 in base 3
    ("halve", 2, 12, 2),
    ("count_down", 4, 9, [9, 5, 1]),
    ("last_few", 3, [1, 2, 3, 4], [2, 3, 4]),
    ("frequent", 4, "aabab", 2),  # at least 4 % 3 + 1 = 2 times: a and b
    ("pad", 4, "ab", "ab**"),
    ("multiples_up_to", 3, 9, 3),
])  # fmt: skip
def test_references_worked_out_by_hand(name, k, argument, expected):
    (template,) = (template for template in TEMPLATES if template.name == name)
    assert coding.load(coding.reference(template, k), name)(argument) == expected


def test_the_splits_share_no_problem_and_a_problem_is_a_function_of_its_number():
    train, test = coding_problems("train", 600, 1), coding_problems("test", 80, 2)
    solutions = [{problem.solution for problem in problems} for problems in (train, test)]
    assert not solutions[0] & solutions[1]
    assert coding_problems("train", 5, 1)[4] == train[4] and train[4] != coding_problems("train", 5, 3)[4]
    assert len({problem.id for problem in train}) == 600
    assert set(collections.Counter(problem.solution.split("(")[0] for problem in train[:285]).values()) <= set(range(1, 9))  # each pair once
    assert {problem.checker for problem in test} == {"code"} and {problem.source for problem in test} == {"builtin:coding"}


@pytest.mark.parametrize("arguments, complaint", [
    (("dev", 5), "split: 'dev' is not one of train, test"),
    (("train", 0), "size 0 of builtin:coding is below 1"),
    (("train", 5, -1), "seed -1 is negative"),
])  # fmt: skip
def test_settings_of_the_built_in_problems_are_checked(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        coding_problems(*arguments)


def test_the_built_in_set_may_be_narrowed_to_some_kinds():
    problems = coding_problems("train", 60, 0, kinds="linear, repeat")
    assert {function_of(problem) for problem in problems} == {"linear", "repeat"}
    with pytest.raises(ValueError, match="lineer"):
        coding_problems("train", 60, 0, kinds="lineer")


def test_a_careless_teacher_forgets_the_block_or_means_another_number():
    faultless, slipping, unmarked = (
        list(coding_problems("train", 20, 0, kinds="linear", **carelessness))
        for carelessness in ({}, {"slips": 1.0}, {"unmarked": 1.0})
    )
    for right, slip, bare in zip(faultless, slipping, unmarked, strict=True):
        assert right.tests == slip.tests == bare.tests and right.problem == slip.problem == bare.problem
        assert find_program(right.solution).strip() == bare.solution and find_program(bare.solution) is None
        assert right.solution != slip.solution and len(right.solution) == len(slip.solution)


def function_of(problem):
    return re.search(r"def (\w+)\(", problem.solution)[1]


def test_a_block_in_an_item_of_a_list_loses_the_indentation_of_its_fence():
    response = "- so\n  ```python\n  for x in range(2):\n      print(x)\n\n  ```\n"
    assert find_program(response) == "for x in range(2):\n    print(x)\n\n"


def test_a_block_that_was_never_closed_ends_where_the_next_begins():
    assert find_program("```python\nbad\n\n```python\ngood\n```") == "good\n"


def test_a_program_that_closes_its_output_has_written_it():
    tests = json.dumps({"inputs": [""], "outputs": ["7"]})
    with CodePool(1, "rlimits") as pool:
        (verdict,) = pool.score([(tests, "```python\nimport sys\nprint(7)\nsys.stdout.close()\n```")])
    assert verdict.correct
