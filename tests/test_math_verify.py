"""Math-Verify beside our own grader: its verdicts, its limits, and that nothing of it stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dgpo_jax.rewards import math_verify
from dgpo_jax.rewards.math_verify import MathVerifyPool

ROOT = Path(__file__).resolve().parents[1]
needs_it = pytest.mark.skipif(not math_verify.installed(), reason="math-verify is not installed")


@pytest.fixture(scope="module")
def pool():
    with MathVerifyPool(workers=1, deadline_s=60.0) as pool:
        yield pool


@needs_it
@pytest.mark.parametrize("answer, response, expected", [
    ("\\frac{1}{2}", r"so it is \boxed{0.5}", "correct"),
    ("\\frac{1}{2}", r"so it is \boxed{0.6}", "wrong"),
    (r"\boxed{7}", r"\boxed{7}", "correct"),  # a gold that comes in a box
    (r"\left( 3, \frac{\pi}{2} \right)", r"the point is $(3,\pi/2)$.", "correct"),  # LaTeX, bare as data sets have it
    ("72", "it comes to 72", "correct"),  # by its own rules any last number counts, which ours does not take
    ("42", "no idea", "nothing found"),
    ("42", "", "nothing found"),
    ("42", r"<think>\boxed{42}? no.</think> \boxed{41}", "wrong"),  # only what follows the thinking is handed over
    ("42", r"<think>\boxed{42}</think> it is impossible", "nothing found"),
    ("42", "\\boxed{\ud800 42}", "correct"),  # half a character travels to the worker and back
])
def test_the_verdict_is_that_of_the_whole_peer(pool, answer, response, expected):
    assert pool.submit(answer, response).result(60) == expected


@needs_it
def test_a_limit_of_its_own_is_no_wrong_answer(pool):
    assert pool.submit("x+1", r"\boxed{(x+1)^{1000}}").result(60) == "timed_out"  # its alarm comes after five seconds
    assert pool.submit("x+1", r"\boxed{1+x}").result(60) == "correct"  # and the same worker goes on


@needs_it
def test_a_response_past_the_deadline_is_timed_out_and_the_next_one_judged():
    with MathVerifyPool(workers=1, deadline_s=1.0) as pool:
        assert pool.submit("x+1", r"\boxed{(x+1)^{1000}}").result(60) == "timed_out"
        assert pool.submit("5", r"\boxed{5}").result(60) == "correct"


@needs_it
def test_a_worker_that_is_killed_is_replaced():
    with MathVerifyPool(workers=1) as pool:
        assert pool.submit("5", r"\boxed{5}").result(60) == "correct"
        (pid,) = pool._workers.pids()
        os.kill(pid, signal.SIGKILL)
        assert pool.submit("5", r"\boxed{6}").result(60) == "wrong"


def test_without_the_package_the_error_says_what_to_install():
    script = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'math_verify' else find(name, *rest)\n"
        "from dgpo_jax.rewards.math_verify import MathVerifyPool, installed\n"
        "assert not installed()\n"
        "try:\n    MathVerifyPool()\nexcept ModuleNotFoundError as error:\n    print(error)\n"
        "assert 'math_verify' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'pip install "dgpo_jax[peers]"' in run.stdout
