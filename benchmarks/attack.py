"""The pool of checkers under attack, while a training goes on in the same process.

    python benchmarks/attack.py
    python benchmarks/attack.py --answers=20000 --seed=1

Trains the tests' tiny run: once so that everything is compiled, once undisturbed, and then again and again while a thread sends
hostile answers (`hostile.py`) through VerifierPool(workers=2, deadline_s=2.0), as fast as it takes them, until at least --answers
were sent and the last of these trainings is over. Now and then a worker is stopped in the middle of its work, as an endless
loop would look from outside. Prints PASS or FAIL for each promise, and what the attack cost the trainings; the exit code is 1
if one failed. Linux only: it looks at processes in /proc.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import hostile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # as it is for `python -m` there

from dgpo_jax import train  # noqa: E402
from dgpo_jax.config import load  # noqa: E402
from dgpo_jax.rewards import workers as workers_module  # noqa: E402
from dgpo_jax.rewards.pool import VerifierPool  # noqa: E402
from dgpo_jax.session import use_compilation_cache  # noqa: E402

WORKERS, DEADLINE_S = 2, 2.0
MEMORY_MB = 2047  # the attacked pool's workers are known by it; the training's own have another
OUTSTANDING = 256  # tickets, as many as responses of an iteration
TICKET_S = 600.0  # for a verdict to arrive, the queue before it included; beyond it, it never will
STOP_EVERY = 500  # answers from one stopped worker to the next
WATCH_S = 0.05
RSS_RATIO = 1.25  # the trainer's memory after the attack over that before it; the pool remembers pairs, some 32 MiB at most
OF_THE_CLOCK = ("time", "speed", "memory")  # groups of metrics that no two runs share
MODULE = "dgpo_jax.rewards.worker"


class Promise(NamedTuple):
    """What must hold, and what was found."""

    text: str
    holds: bool
    figure: str


class Attacked(NamedTuple):
    """What came of the answers."""

    answers: int
    seconds: float
    statuses: collections.Counter  # (family, status) -> answers
    unexpected: list[str]  # whose status cannot be
    unjudged: int  # ordinary answers that were late or crashed
    stopped: int  # workers that were stopped on purpose


class Trained(NamedTuple):
    """What a training left."""

    seconds: float  # of its iterations
    lines: list[dict]  # of metrics, without what depends on the clock


class Timed:
    """Measures every answer from when a worker got it to its verdict, starts of replacements aside, while it is entered."""

    def __init__(self):
        self.longest, self.asked = 0.0, 0
        self.ready = set()  # pids of workers that were ready at some time
        self._starting = threading.local()

    def __enter__(self):
        feeder = workers_module._Feeder
        self._ask, self._ensure = feeder._ask, feeder._ensure_process
        feeder._ask, feeder._ensure_process = (lambda feeder, request: self._timed(feeder, request)), (lambda feeder: self._start(feeder))
        return self

    def __exit__(self, *error):
        workers_module._Feeder._ask, workers_module._Feeder._ensure_process = self._ask, self._ensure

    def _start(self, feeder):
        began = time.monotonic()
        self._ensure(feeder)
        self._starting.seconds = getattr(self._starting, "seconds", 0.0) + time.monotonic() - began
        self.ready.add(feeder.process.pid)

    def _timed(self, feeder, request):
        self._starting.seconds, began = 0.0, time.monotonic()
        reply = self._ask(feeder, request)
        self.longest = max(self.longest, time.monotonic() - began - self._starting.seconds)
        self.asked += 1
        return reply


class Watch(threading.Thread):
    """Looks at this process's children again and again: how many workers of the attacked pool there are, and what else."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.foreign, self.looks = 0, set(), 0
        self.longest_pause = 0.0  # seconds between two looks: for so long the compiler, or a busy machine, let no thread of ours run
        self._over = threading.Event()

    def run(self):
        last = time.monotonic()
        while not self._over.wait(WATCH_S):
            self.longest_pause, last = max(self.longest_pause, time.monotonic() - last), time.monotonic()
            found = [(pid, command_line(pid)) for pid in descendants(os.getpid())]
            self.most = max(self.most, sum(is_worker(command, MEMORY_MB) for _, command in found))
            self.foreign |= {command for _, command in found if not is_ours(command)}
            self.looks += 1

    def stop(self):
        self._over.set()
        self.join()


def descendants(pid: int) -> list[int]:
    """Processes below this one, those that ended but were not reaped included."""
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:  # it ended meanwhile
        return []
    return children + [other for child in children for other in descendants(child)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def is_worker(command: str, memory_mb: int | str = "") -> bool:
    return f"-m {MODULE} {memory_mb}" in command


def is_ours(command: str) -> bool:
    """True for a worker, one that ended (no command line), and one about to become another program (still this one's)."""
    return not command or is_worker(command) or command == command_line(os.getpid())


def attack(pool: VerifierPool, timed: Timed, seed: int, canary: Path, is_over: Callable[[int], bool]) -> Attacked:
    """Streams hostile answers through the pool until is_over(how many were sent)."""
    statuses, unexpected, waiting = collections.Counter(), [], collections.deque()
    draw, began, unjudged, stopped, sent = random.Random(seed), time.monotonic(), 0, 0, 0
    endless = itertools.chain.from_iterable(hostile.pairs(1000, seed + round_, canary) for round_ in itertools.count())
    for pair in endless:
        if is_over(sent):
            break
        waiting.append((pair, pool.submit(pair.answer, pair.response)))
        sent += 1
        if sent % STOP_EVERY == STOP_EVERY // 2:
            stopped += stop_one([pid for pid in pool.worker_pids() if pid in timed.ready], draw)
        while len(waiting) > OUTSTANDING:
            unjudged += judge(*waiting.popleft(), statuses, unexpected)
    while waiting:
        unjudged += judge(*waiting.popleft(), statuses, unexpected)
    return Attacked(sent, time.monotonic() - began, statuses, unexpected, unjudged, stopped)


def stop_one(pids: list[int], draw: random.Random) -> bool:
    """Stops a worker, not one that is being started; False if there is none, or it has just ended."""
    with contextlib.suppress(ProcessLookupError):
        if pids:
            os.kill(draw.choice(pids), signal.SIGSTOP)
            return True
    return False


def judge(pair: hostile.Attack, ticket: Future, statuses: collections.Counter, unexpected: list[str]) -> bool:
    """Counts a verdict; True if it is of an ordinary answer and none was reached."""
    try:
        status = ticket.result(timeout=TICKET_S).status
    except Exception as error:  # that of a checker, or of a ticket that never came
        status = f"{type(error).__name__}: {error}"
    statuses[pair.family, status] += 1
    late = pair.family == "ordinary" and status in hostile.UNJUDGED
    if status not in pair.allowed and not late:
        unexpected.append(f"{pair.family}: {pair.answer[:60]!r}, {pair.response[:120]!r} is {status}")
    return late


def train_once(workdir: Path, iterations: int) -> Trained:
    """Runs the tiny configuration to its end."""
    config = load([f"--config={ROOT / 'tests/tiny_config.py'}", f"--config.iterations={iterations}"])
    train.train(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line.get("time/iteration", 0.0) for line in lines)
    return Trained(seconds, [{key: value for key, value in line.items() if key.split("/")[0] not in OF_THE_CLOCK} for line in lines])


def train_attacked(folder: Path, iterations: int, answers: int, seed: int, canary: Path) -> tuple[list[Trained], Attacked, Timed, list[int]]:
    """Trainings under attack, the attack, how long its answers took, and the workers' pids at its end."""
    trained, result, enough = [], [], threading.Event()
    with Timed() as timed, VerifierPool(workers=WORKERS, deadline_s=DEADLINE_S, memory_mb=MEMORY_MB) as pool:
        pool.wait_started(120)
        over = threading.Event()

        def is_over(sent):
            if sent >= answers:
                enough.set()
            return over.is_set()

        attacker = threading.Thread(target=lambda: result.append(attack(pool, timed, seed, canary, is_over)))
        attacker.start()
        try:
            while not enough.is_set() and attacker.is_alive():
                trained.append(train_once(folder / f"attacked{len(trained)}", iterations))
        finally:
            over.set()
            attacker.join()
        pids = pool.worker_pids()
    if not result:
        raise SystemExit("the attack did not come to its end: see the traceback above")
    return trained, result[0], timed, pids


def resources() -> dict[str, int]:
    """Of this process: KiB of memory, open files, threads."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"memory": int(fields["VmRSS"].split()[0]), "open files": len(os.listdir("/proc/self/fd")), "threads": int(fields["Threads"])}


def promises(same, attacked, timed, pids, watch, before, after, canary) -> Iterator[Promise]:
    """What must hold, one after the other."""
    known = sum(count for (family, _), count in attacked.statuses.items() if family == "ordinary")
    judged = sum(count for (_, status), count in attacked.statuses.items() if status in hostile.ANYTHING)
    yield Promise("every answer got a verdict", judged == attacked.answers, f"{judged} of {attacked.answers}")
    yield Promise(
        "in order: known answers got their verdicts, no hostile one was right", not attacked.unexpected,
        f"{known} known, {attacked.answers - known} hostile; unexpected {len(attacked.unexpected)} {attacked.unexpected[:3] or ''}",
    )  # fmt: skip
    yield Promise(
        "only stopped workers left known answers without a verdict", attacked.unjudged <= attacked.stopped,
        f"{attacked.unjudged} unjudged, {attacked.stopped} workers stopped",
    )  # fmt: skip
    yield Promise(
        "no answer took more than twice the deadline, and what the trainer held up all its threads",
        timed.longest <= 2 * DEADLINE_S + watch.longest_pause,
        f"longest {timed.longest:.2f} s of {timed.asked} that reached a worker, deadline {DEADLINE_S} s;"
        f" all threads held up for {watch.longest_pause:.2f} s at most",
    )  # fmt: skip
    yield Promise(f"never more than {WORKERS} workers", 0 < watch.most <= WORKERS, f"{watch.most} at most in {watch.looks} looks")
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()] + descendants(os.getpid())
    yield Promise("no process is left", not left, f"{len(left)} left")
    yield Promise("no other process was started", not watch.foreign, f"{len(watch.foreign)} {sorted(watch.foreign)[:3] or ''}")
    yield Promise("nothing was carried out", not canary.exists() and not any(canary.parent.glob("canary*")), "no canary")
    for name in ("open files", "threads"):
        yield Promise(f"no {name} leaked", after[name] <= before[name], f"{before[name]} before, {after[name]} after")
    ratio = after["memory"] / before["memory"]
    figure = f"{before['memory'] / 1024:.0f} MiB before, {after['memory'] / 1024:.0f} after: ratio {ratio:.3f}, {RSS_RATIO} allowed"
    yield Promise("the trainer's memory did not grow", ratio <= RSS_RATIO, figure)
    figure = f"{sum(same)} of {len(same)} trainings"
    yield Promise("a training's metrics are those of an undisturbed run", all(same) and len(same) > 0, figure)


def show(attacked: Attacked, trained: list[Trained], undisturbed: Trained, seed: int) -> None:
    """Prints the figures that are no promises."""
    print(f"\n{attacked.answers} answers in {attacked.seconds:.1f} s, {attacked.answers / attacked.seconds:.0f} a second; seed {seed}")
    totals = collections.Counter()
    for (_, status), count in attacked.statuses.items():
        totals[status] += count
    print("verdicts: " + ", ".join(f"{count} {status}" for status, count in totals.most_common()))
    late = ", ".join(f"{count} {family}" for (family, status), count in sorted(attacked.statuses.items()) if status in hostile.UNJUDGED)
    print(f"timed out or crashed, by family: {late or 'none'}")
    seconds = statistics.median(one.seconds for one in trained)
    print(
        f"seconds of a training's {len(undisturbed.lines) - 1} iterations: {seconds:.1f} under attack, {undisturbed.seconds:.1f} undisturbed:"
        f" ratio {seconds / undisturbed.seconds:.2f}\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=10_000, help="at least as many are judged")
    parser.add_argument("--iterations", type=int, default=100, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    use_compilation_cache()
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        folder = Path(name)
        canary = folder / "here" / "canary"
        canary.parent.mkdir()
        with contextlib.chdir(canary.parent):  # a relative path would lead here too
            train_once(folder / "warm", options.iterations)  # compiles, and fills every table of the libraries
            undisturbed = train_once(folder / "undisturbed", options.iterations)
            before, watch = resources(), Watch()
            watch.start()
            trained, attacked, timed, pids = train_attacked(folder, options.iterations, options.answers, options.seed, canary)
            watch.stop()
            same = [one.lines == undisturbed.lines for one in trained]
            found = list(promises(same, attacked, timed, pids, watch, before, resources(), canary))
    show(attacked, trained, undisturbed, options.seed)
    for promise in found:
        print(f"{'PASS' if promise.holds else 'FAIL'}  {promise.text}: {promise.figure}")
    return 0 if all(promise.holds for promise in found) else 1


if __name__ == "__main__":
    sys.exit(main())
