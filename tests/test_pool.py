"""The pool of checker processes: order, deadlines, deaths, and nothing left behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dgpo_jax.rewards import workers as workers_module
from dgpo_jax.rewards.pool import VerifierPool, settled
from dgpo_jax.types import Problem

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SLOW = ("x+1", r"\boxed{1+x}")  # needs the parser, so it goes to a worker


def ready_pool():
    pool = VerifierPool(workers=2, deadline_s=2.0)
    assert pool.wait_started(60)
    return pool


@pytest.fixture
def pool():
    with ready_pool() as pool:
        yield pool


@pytest.fixture(scope="module")
def shared_pool():
    """For tests that leave the workers alone: starting one takes half a second of CPU."""
    with ready_pool() as pool:
        yield pool


def is_alive(pid):
    """False for a process that ended, even where nobody has reaped it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_verdicts_come_in_the_order_of_the_answers(shared_pool):
    pairs = [("1/2", r"\boxed{0.5}"), ("1/2", r"\boxed{0.6}"), ("1/2", "none"), SLOW, ("x", r"\boxed{\frac{}{}}")]
    assert [verdict.status for verdict in shared_pool.score(pairs)] == ["correct", "wrong", "no_answer", "correct", "unparsable"]


def test_a_thousand_answers_keep_their_order(shared_pool):
    pairs = [(f"x+{i}", f"\\boxed{{{i if i % 3 else i + 1}+x}}") for i in range(1000)]  # each third is off by one
    assert [verdict.correct for verdict in shared_pool.score(pairs)] == [i % 3 != 0 for i in range(1000)]


def test_tickets_can_be_gathered_in_any_order_while_others_are_checked(shared_pool):
    tickets = [shared_pool.submit(f"x+{i}", f"\\boxed{{x+{i}.0}}") for i in range(50)]
    assert [verdict.extracted for verdict in shared_pool.gather(reversed(tickets))] == [f"x+{i}.0" for i in reversed(range(50))]


def test_the_same_pair_is_checked_once(shared_pool):
    first, second = shared_pool.submit("x+7", r"a \boxed{7+x}"), shared_pool.submit("x+7", r"b \boxed{7+x}")
    assert first is second and first.result().correct


def test_what_needs_no_worker_leaves_nothing_behind(pool):
    pool.score([("5", "\\boxed{" + "9" * length + "}") for length in range(600, 1600)])  # kept, long boxes would fill the memory
    assert not pool._cache


def test_the_extraction_rule_of_the_pool_is_used():
    with VerifierPool(workers=1, extract="last") as pool:
        assert pool.score([("72", "it is 72")])[0].correct


def test_a_worker_that_hangs_is_killed_and_replaced():
    with VerifierPool(workers=1, deadline_s=0.5) as pool:
        pool.score([SLOW])
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)  # as an endless loop would look from outside
        started = time.monotonic()
        assert pool.score([("z+1", r"\boxed{1+z}")])[0].status == "timed_out"
        assert 0.4 < time.monotonic() - started < 5.0
        assert not is_alive(pid)
        assert pool.score([("z+2", r"\boxed{2+z}")])[0].status == "correct"
        assert pool.worker_pids() != [pid]
        assert pool.score([("z+1", r"\boxed{1+z}")])[0].status == "correct"  # it was the worker's fault: asked again


def test_a_hanging_worker_does_not_hold_up_the_other(pool):
    os.kill(pool.worker_pids()[0], signal.SIGSTOP)
    statuses = [verdict.status for verdict in pool.score([(f"z+{i}", f"\\boxed{{{i}+z}}") for i in range(40)])]
    assert statuses.count("timed_out") == 1 and statuses.count("correct") == 39


def test_a_request_that_no_pipe_holds_does_not_hang_on_a_worker_that_does_not_read():
    with VerifierPool(workers=1, deadline_s=2.0) as pool:
        pool.score([SLOW])
        os.kill(pool.worker_pids()[0], signal.SIGSTOP)
        tickets = [pool._workers.submit([letter * 2**20, "y", 1e-6], read=str) for letter in "xz"]
        assert [ticket.result(timeout=20) for ticket in tickets] == ["timed_out", "unparsable"]  # its successor reads all of it


def test_an_answer_whose_worker_is_killed_gets_a_second_worker():
    with VerifierPool(workers=1, deadline_s=5.0) as pool:
        pool.score([SLOW])
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGSTOP)  # so that it dies in the middle of the answer
        ticket = pool.submit("z+1", r"\boxed{1+z}")
        time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        assert ticket.result(timeout=10).status == "correct"


def test_an_answer_that_kills_two_workers_is_crashed(monkeypatch):
    start = workers_module._Feeder._ensure_process
    deaths = []

    def start_then_die(feeder):
        start(feeder)
        if len(deaths) < 2:
            deaths.append(feeder.process.pid)
            feeder.process.kill()
            feeder.process.wait()

    with VerifierPool(workers=1) as pool:
        pool.score([SLOW])
        monkeypatch.setattr(workers_module._Feeder, "_ensure_process", start_then_die)
        verdicts = pool.score([("z+1", r"\boxed{1+z}"), ("z+2", r"\boxed{2+z}")])
    assert [verdict.status for verdict in verdicts] == ["crashed", "correct"]  # and the pool goes on


def test_a_worker_that_could_not_be_started_is_started_for_the_first_answer(monkeypatch):
    start, calls = subprocess.Popen, []

    def out_of_processes_at_first(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(*arguments, **options)

    monkeypatch.setattr(workers_module.subprocess, "Popen", out_of_processes_at_first)
    with VerifierPool(workers=1) as pool:
        assert pool.submit(*SLOW).result(timeout=30).correct


def test_workers_that_never_start_are_an_error_and_no_hang(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('welcome')")  # in place of "ready"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with VerifierPool(workers=1) as pool, pytest.raises(RuntimeError, match="a worker ended, or printed something else"):
        pool.submit(*SLOW).result(timeout=30)


def test_a_successor_that_dies_while_it_starts_is_crashed_and_the_pool_goes_on(monkeypatch):
    start, calls = subprocess.Popen, []

    def second_dies(*arguments, **options):
        calls.append(start(*arguments, **options))
        if len(calls) == 2:
            calls[1].kill()
        return calls[-1]

    monkeypatch.setattr(workers_module.subprocess, "Popen", second_dies)
    with VerifierPool(workers=1) as pool:
        assert pool.wait_started(60)
        os.kill(pool.worker_pids()[0], signal.SIGKILL)  # as the kernel does when memory is short
        assert pool.submit(*SLOW).result(timeout=30).status == "crashed"
        assert pool.submit(*SLOW).result(timeout=30).correct
    assert len(calls) == 3


def test_workers_that_start_no_longer_are_an_error_and_not_all_crashed(monkeypatch):
    with VerifierPool(workers=1) as pool:
        assert pool.wait_started(60)
        monkeypatch.setattr(pool._workers._feeders[0], "command", ["false"])
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        assert pool.submit(*SLOW).result(timeout=30).status == "crashed"  # one start failed, which may be chance
        with pytest.raises(RuntimeError, match="a worker ended, or printed something else, before it was ready; to see why, run false"):
            pool.submit(*SLOW).result(timeout=30)


def test_a_trainer_may_have_more_than_a_thousand_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with VerifierPool(workers=1) as pool:
            assert pool.submit(*SLOW).result(timeout=30).correct
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lower_memory_limit_of_the_shell_is_kept():
    script = (
        "import os, resource; from dgpo_jax.rewards import workers\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "workers.restrict(2048, os.getppid()); print(resource.getrlimit(resource.RLIMIT_AS)[0])"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(output) == 2**30


def test_a_worker_refuses_memory_beyond_its_limit():
    worker = subprocess.run(
        [sys.executable, "-c", "import os; from dgpo_jax.rewards import workers; workers.restrict(256, os.getppid()); bytearray(2**30)"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert worker.returncode == 1 and "MemoryError" in worker.stderr


def test_an_answer_out_of_memory_is_crashed():
    def exhausted(answer, extracted):
        raise MemoryError

    assert workers_module.attempt(exhausted, ["1", "2"]) == "crashed"


def test_no_process_thread_or_file_descriptor_is_left_after_close():
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = set(threading.enumerate())
    for _ in range(3):
        with VerifierPool(workers=2) as pool:
            pool.score([SLOW])
            wait_until(lambda pool=pool: len(pool.worker_pids()) == 2)
            pids = pool.worker_pids()
        pool.close()  # a second time does no harm
        assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)  # reaped, not merely dead
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(threading.enumerate()) <= threads


def test_an_exception_in_the_trainer_closes_the_pool_at_once():
    started = time.monotonic()
    with pytest.raises(KeyError), VerifierPool(workers=1, deadline_s=60.0) as pool:
        pool.score([SLOW])
        os.kill(pool.worker_pids()[0], signal.SIGSTOP)
        tickets = [pool.submit(f"z+{i}", f"\\boxed{{{i}+z}}") for i in range(3)]
        raise KeyError
    assert time.monotonic() - started < 10.0
    for ticket in tickets:
        with pytest.raises(RuntimeError, match="closed before this answer was checked"):
            ticket.result(timeout=1)
    with pytest.raises(RuntimeError, match="after close"):
        pool.submit("1", r"\boxed{1}")


@pytest.mark.parametrize("stop_first", [False, True])  # idle, and (as good as) in the middle of an answer
def test_workers_die_with_a_trainer_that_is_killed(stop_first):
    script = (
        "import time; from dgpo_jax.rewards.pool import VerifierPool\n"
        "pools = [VerifierPool(workers=1), VerifierPool(workers=1)]\n"
        "for pool in pools: pool.score([('x+1', '\\\\boxed{1+x}')])\n"  # so each worker is past its start, and tied
        "print(*pools[0].worker_pids(), *pools[1].worker_pids(), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    if stop_first:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2 and wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_ctrl_c_does_not_reach_the_workers(pool):
    for pid in pool.worker_pids():
        os.kill(pid, signal.SIGINT)
    assert pool.score([("z+1", r"\boxed{1+z}")])[0].correct


def test_ctrl_c_in_the_terminal_does_not_reach_a_worker_that_is_still_starting():
    with VerifierPool(workers=1) as pool:
        assert wait_until(pool.worker_pids)
        assert os.getpgid(pool.worker_pids()[0]) != os.getpgrp()  # the terminal signals the group of the trainer
        assert pool.submit(*SLOW).result(timeout=30).correct


def test_golds_that_cannot_match_themselves_are_reported(shared_pool):
    answers = [r"\frac12", "18", "Tuesday", "{5", "October 30th, or else the day after it", "as many as there are of the others"]
    seen = []
    flaws = shared_pool.check_golds([Problem(f"p{i}", "?", answer, "test") for i, answer in enumerate(answers)], seen.append)
    assert list(flaws) == ["p5", "p3", "p4"] and sum(seen) == 6
    assert flaws["p3"] == "its answer cannot be read as mathematics within the bounds: '{5'"
    assert flaws["p5"] == "its answer is 8 words of prose: 'as many as there are of the others'"


def test_a_gold_that_took_too_long_once_gets_a_second_chance(shared_pool, monkeypatch):
    """What a busy machine does must not change which problems are kept."""
    asked = []

    def submit(request, read):
        asked.append(request[0])
        return settled("timed_out" if len(asked) == 1 or request[0] == "y^2" else "correct")

    monkeypatch.setattr(shared_pool._workers, "submit", submit)
    flaws = shared_pool.check_golds([Problem("p0", "?", "x^2", "test"), Problem("p1", "?", "y^2", "test")])
    assert flaws == {"p1": "its answer takes too long to compare (reward.deadline_s): 'y^2'"}


@pytest.mark.parametrize("setting, message", [
    ({"workers": 0}, "workers: 0"),
    ({"deadline_s": 0}, "deadline_s: 0"),
    ({"extract": "box"}, "'box' is not a rule"),
    ({"memory_mb": 1}, "memory_mb: 1"),
])
def test_a_setting_out_of_range_is_refused_before_any_process_starts(setting, message):
    with pytest.raises(ValueError, match=message):
        VerifierPool(**setting)


@pytest.mark.skipif(not (SHARED / "verify/hostile.jsonl").exists(), reason="the shared hostile set is not here")
def test_the_shared_hostile_set_is_safe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # before the workers start, so that what they would write shows up here
    with ready_pool() as pool:
        for line in (SHARED / "verify/hostile.jsonl").read_text().rstrip("\n").split("\n"):
            case = json.loads(line)
            started = time.monotonic()
            (verdict,) = pool.score([(case["gold"], "".join(part * repeat for part, repeat in case["prediction_parts"]))])
            assert time.monotonic() - started < case["limit_s"], case["id"]
            assert case["expect"] is None or verdict.correct == case["expect"], case["id"]
            assert verdict.status not in ("timed_out", "crashed"), case["id"]
    assert list(tmp_path.iterdir()) == []  # none of the canaries was touched


@pytest.mark.skipif(not (SHARED / "data/math_train.jsonl").exists(), reason="the shared problem sets are not here")
def test_every_reference_answer_matches_itself(shared_pool):
    for name in ("gsm8k_test", "gsm8k_train", "math_train", "math500", "aime24", "aime25", "amc23", "hmmt25"):
        # Not splitlines(): a problem may hold U+2028.
        rows = [json.loads(line) for line in (SHARED / f"data/{name}.jsonl").read_text().rstrip("\n").split("\n")]
        flaws = shared_pool.check_golds([Problem(row["id"], row["problem"], row["answer"], row["source"]) for row in rows])
        assert flaws.keys() <= {"math-train-4702", "math-train-4865", "math-train-5112"}, name  # a time, a date, the digit A
