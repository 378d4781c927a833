"""The checkers under attack: hostile answers by seed, workers that misbehave in every way, trainers that are killed.

`benchmarks/attack.py` sends the same families of answers by the ten thousand while a training goes on.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # as it is for a script there

import attack  # noqa: E402
import hostile  # noqa: E402

from dgpo_jax.rewards.math import quick_status  # noqa: E402
from dgpo_jax.rewards.pool import VerifierPool  # noqa: E402
from dgpo_jax.rewards.sandbox import probe  # noqa: E402
from dgpo_jax.rewards.workers import REPLY_CAP, Workers  # noqa: E402

ANSWERS = 400
GONE_S = 2.0  # in which a killed trainer's workers must be gone
START_S = 30.0  # in which Python has started on a busy machine


def bubblewrap_works():
    try:
        probe("bubblewrap")
    except ValueError:
        return False
    return True


@pytest.fixture
def make_workers(tmp_path, monkeypatch):
    """The function (source of a worker's program, deadline_s, count) -> Workers that answer "yes" or "no"."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(source, deadline_s=20.0, count=1):
        (tmp_path / "misbehaving.py").write_text(source)
        return Workers("misbehaving", count=count, deadline_s=deadline_s, memory_mb=1024, is_reply=("yes", "no").__contains__)

    return make


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


def ask(workers, request):
    return workers.submit([request], read=str).result(timeout=60)


# ---- hostile answers


def test_hostile_answers_in_a_stream_are_judged_in_order_and_leave_nothing(tmp_path, monkeypatch):
    """With a worker stopped on the way, as an endless loop would look from outside."""
    monkeypatch.chdir(tmp_path)  # a relative path in an answer leads here
    descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    watch = attack.Watch()
    watch.start()
    with attack.Timed() as timed, VerifierPool(workers=2, deadline_s=attack.DEADLINE_S, memory_mb=attack.MEMORY_MB) as pool:
        assert pool.wait_started(60)
        found = attack.attack(pool, timed, 0, tmp_path / "canary", lambda sent: sent == ANSWERS)
        pids = pool.worker_pids()
    watch.stop()
    assert found.statuses.total() == ANSWERS == found.answers
    assert found.unexpected == []  # ordinary answers got the verdicts that they must get, and no hostile one was right
    assert found.stopped == 1 and found.unjudged <= 2  # of the stopped worker; and one to spare on a busy machine
    assert sum(count for (_, status), count in found.statuses.items() if status == "timed_out") >= 1
    assert timed.asked > ANSWERS / 3
    assert timed.longest <= 2 * attack.DEADLINE_S + watch.longest_pause  # of a busy machine
    assert 1 <= watch.most <= 2 and not watch.foreign
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert list(tmp_path.iterdir()) == []  # no canary
    assert len(os.listdir("/proc/self/fd")) == descriptors and set(threading.enumerate()) <= threads


def test_hostile_answers_are_the_same_for_a_seed_and_of_every_family():
    one, again, other = ([*hostile.pairs(1000, seed, "canary")] for seed in (1, 1, 2))
    assert one == again != other
    assert {pair.family for pair in one} == {*hostile.FAMILIES, "ordinary", "huge"}
    assert len({(pair.answer, pair.response) for pair in one}) > 850  # each draw is another attack


def test_a_response_of_megabytes_does_not_hold_up_the_thread_that_submits_it():
    sizes = []
    with VerifierPool(workers=1) as pool:
        for pair in hostile.pairs(3000, 5, "canary"):
            if pair.family == "huge":
                began = time.thread_time()  # a busy machine does not count
                pool.submit(pair.answer, pair.response)
                assert time.thread_time() - began < 0.5, repr(pair.response[:80])
                sizes.append(len(pair.response))
    assert max(sizes) >= 2_000_000 and len(sizes) > 30


@pytest.mark.parametrize("depth, power", [(8, 9), (16, 5), (28, 4), (18, 3)])
def test_a_tower_of_polynomials_is_judged_and_not_expanded(depth, power):
    """SymPy would look for the sign of one among the roots of its derivative."""
    tower = "(" * depth + "x" + f"^{power}+1)" * depth + "^9"
    with VerifierPool(workers=1, deadline_s=20.0) as pool:
        assert pool.score([("x+1", f"\\boxed{{{tower}}}")])[0].status in ("wrong", "unparsable")


@pytest.mark.parametrize("unit", ["\\\\ ", "\\\\", "\\"])
def test_a_reference_answer_of_a_million_backslashes_does_not_hang_the_trainer(unit):
    began = time.thread_time()  # its own thread reads it, before any worker does
    assert quick_status(unit * (10**6 // len(unit)) + "x", "y") == "unparsable"
    assert time.thread_time() - began < 30.0  # a minute for each 50,000, when it took the square of them


# ---- workers that misbehave

SAYS = """
import json, os, signal, sys, time
print('"ready"', flush=True)
for line in sys.stdin:
    number, (request,) = json.loads(line)
    if request == "good":
        print(json.dumps([number, "yes"]), flush=True)
        continue
    {answer}
"""


@pytest.mark.parametrize("answer", [
    "os.write(1, b'\\n')",
    "os.write(1, b'\\xff\\xfe\\n')",  # no text
    "os.write(1, b'\"yes\"\\n')",  # no number
    "os.write(1, b'[1, \"maybe\"]\\n')",  # no reply that there is
    "os.write(1, b'[0, \"yes\"]\\n')",  # to another request
    "os.write(1, b'[1, \"yes\", 0]\\n')",
    "os.write(1, b'[1, \"yes\"]\\n[2, \"yes\"]\\n')",  # more than was asked
    "os.write(1, b'{\"1\": \"yes\"}\\n')",
    "os.write(1, b'[1, [\"yes\"]]\\n')",
    "os.write(1, b'9' * 6000 + b'\\n')",  # more digits than Python reads
    "os.write(1, b'[' * 20000 + b'\\n')",  # deeper than Python reads
    "os.close(1); time.sleep(60)",  # alive, but nothing will come
    "os.close(0); os.close(1)",
    "os._exit(3)",
    "os.kill(os.getpid(), signal.SIGSEGV)",
    "os.system('kill -9 ' + str(os.getpid()))",
])  # fmt: skip
def test_a_worker_that_talks_nonsense_or_dies_costs_its_answer_and_no_other(make_workers, answer):
    began = time.monotonic()
    with make_workers(SAYS.format(answer=answer)) as workers:
        assert ask(workers, "bad") == "crashed"  # said by two workers
        assert ask(workers, "good") == "yes"
    assert time.monotonic() - began < 15.0  # and not the deadline of 20


def test_a_worker_that_never_ends_its_line_does_not_fill_the_memory(make_workers):
    received = f"while True: os.write(1, b'9' * {REPLY_CAP // 4})"
    with make_workers(SAYS.format(answer=received)) as workers:
        assert ask(workers, "bad") == "crashed"  # without a cap it would go on until the deadline
        assert ask(workers, "good") == "yes"


def test_a_second_reply_is_not_taken_for_that_to_the_next_request(make_workers):
    twice = "print(json.dumps([number, 'no']), flush=True); time.sleep(0.2); print(json.dumps([number, 'no']), flush=True)"
    with make_workers(SAYS.format(answer=twice)) as workers:
        for _ in range(2):
            assert ask(workers, "bad") == "no"
            time.sleep(0.4)  # the second one is in the pipe
            assert ask(workers, "good") == "yes"


def test_a_worker_that_ignores_signals_is_late_and_gone(make_workers):
    deaf = "[signal.signal(number, signal.SIG_IGN) for number in (1, 2, 13, 15)]\n    while True: pass"
    with make_workers(SAYS.format(answer=deaf), deadline_s=0.5) as workers:
        assert ask(workers, "good") == "yes"
        (pid,) = workers.pids()
        assert ask(workers, "bad") == "timed_out"
        assert not Path(f"/proc/{pid}").exists()  # reaped
        assert ask(workers, "good") == "yes"
        ticket = workers.submit(["bad"], read=str)
        time.sleep(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 15.0  # closed in the middle of it, which would go on for ever
    assert isinstance(ticket.exception(timeout=1), RuntimeError) or ticket.result() == "timed_out"


def test_two_hundred_kills_by_deadline_leave_no_process_and_no_open_file(make_workers):
    descriptors, most = len(os.listdir("/proc/self/fd")), 0
    with make_workers(SAYS.format(answer="time.sleep(60)"), deadline_s=0.02, count=2) as workers:
        tickets = [workers.submit(["bad"], read=str) for _ in range(200)]
        for ticket in tickets:
            assert ticket.result(timeout=60) == "timed_out"
            most = max(most, len(attack.descendants(os.getpid())))
        open_files = len(os.listdir("/proc/self/fd"))
    assert most <= 2 and open_files <= descriptors + 2 * 3  # two pipes and a selector for each worker
    assert attack.descendants(os.getpid()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


# ---- trainers that are killed

BUSY = """
import sys
from dgpo_jax.rewards.workers import serve

def answer(request):
    while True:
        {work}

serve(answer, int(sys.argv[1]), int(sys.argv[2]), warm_up=lambda: None)
"""
TRAINER = """
import time
from dgpo_jax.rewards.workers import Workers
workers = Workers("busy", count=2, deadline_s=60.0, memory_mb=1024, is_reply=bool)
tickets = [workers.submit(["x"], read=str) for _ in range(20)]
assert workers.wait_started(60)
time.sleep(0.2)
print(*workers.pids(), flush=True)
time.sleep(60)
"""


def kill_trainer(script, environment, is_ready=lambda pid: True):
    """Starts a trainer, waits for its line and until it is ready, kills it; (that line, its processes at that moment)."""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as trainer:
        try:
            line = trainer.stdout.readline()
            assert wait_until(lambda: is_ready(trainer.pid), 60)
            time.sleep(0.1)
            children = living_descendants(trainer.pid)
        finally:
            trainer.kill()
    return line, children


def living_descendants(pid):
    return [child for child in attack.descendants(pid) if is_alive(child)]


def assert_gone(children, seconds):
    wait_until(lambda: not any(map(is_alive, children)), seconds)
    left = [pid for pid in children if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)  # not to be left by a test that fails either
    assert not left


@pytest.mark.parametrize("work", ["pass", "__import__('time').sleep(60)", "pow(7, 7 ** 12)"], ids=["computing", "waiting", "in one long call"])
def test_no_worker_is_left_two_seconds_after_a_trainer_was_killed_that_kept_them_busy(tmp_path, work):
    (tmp_path / "busy.py").write_text(BUSY.format(work=work))
    line, children = kill_trainer(TRAINER, {"PYTHONPATH": str(tmp_path)})
    assert len(children) == 2 and {*map(int, line.split())} == {*children}
    assert_gone(children, GONE_S)


def test_workers_that_were_just_being_started_end_too(tmp_path):
    """They tie themselves to the trainer once Python runs, and find that it is gone."""
    (tmp_path / "busy.py").write_text(BUSY.format(work="pass"))
    at_once = TRAINER.replace("assert workers.wait_started(60)\ntime.sleep(0.2)", "while len(workers.pids()) < 2: pass")
    _, children = kill_trainer(at_once, {"PYTHONPATH": str(tmp_path)})
    assert len(children) == 2
    assert_gone(children, START_S)


@pytest.mark.parametrize("kind, processes", [
    pytest.param("bubblewrap", 3, marks=pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap does not work here")),
    ("rlimits", 2),
])  # fmt: skip
@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"], ids=["computing", "waiting"])
def test_no_tested_program_is_left_two_seconds_after_a_trainer_was_killed(tmp_path, kind, processes, program):
    """`processes` for each program: bubblewrap, the runner, and the one that runs the program."""
    tests = json.dumps({"inputs": ["", ""], "outputs": ["no", "no"]})
    responses = [f"```python\n{program}  # {number}\n```" for number in range(2)]
    trainer = (
        "import time\nfrom dgpo_jax.rewards.code import CodePool\n"
        f"pool = CodePool(workers=2, sandbox={kind!r}, test_s=20.0)\nprint('probed', flush=True)\n"
        f"tickets = [pool.submit({tests!r}, response) for response in {responses!r}]\ntime.sleep(60)"
    )

    def all_run(pid):  # for some time: before, a process that compiles the program takes the place of the one that runs it
        before = living_descendants(pid)
        time.sleep(0.3)
        return len(before) == 2 * processes and living_descendants(pid) == before

    line, children = kill_trainer(trainer, {"TMPDIR": str(tmp_path)}, all_run)
    assert line == "probed\n" and len(children) == 2 * processes
    assert_gone(children, GONE_S)
