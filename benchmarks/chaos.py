"""Kills a run again and again, and proves that it ends as a run that nothing happened to.

    python benchmarks/chaos.py --kills=20
    python benchmarks/chaos.py --kills=30 --config=tests/tiny_config.py --signals=KILL,TERM,INT --seed=1

First an undisturbed run, then one that gets a signal at a random moment and is started again by the same command, until all
signals are used up; then it may end. Moments are drawn over the start of a process (imports, compilation: each of the two
runs begins with an empty cache of compiled programs) and over the work that it should do for signals and work to end together:
warm start, rollouts, updates, evaluations. Saves are short, so some signals wait for one to begin. Should a run end before its
signal came, another one is begun, and compared as well.

Compared are every line of metrics.jsonl (less times, speeds and memory) and every byte of the responses in rollouts/ and eval/;
every point of TensorBoard, which must be the lines of metrics.jsonl and nothing twice; the last checkpoint's weights,
optimizer moments, place in the data and groups that wait, bit for bit; and, where all signals were KILL, which checkpoints are kept.
Any difference is an exit code of 1 and a line that names the first.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # as it is for `python -m` there

from chaos_phases import group, has_started, name_phase, unfinished  # noqa: E402
from same_runs import count_compared, differences, saved_places  # noqa: E402

from dgpo_jax.config import Config, load  # noqa: E402
from dgpo_jax.metrics import read_metrics  # noqa: E402
from dgpo_jax.processes import STOPPED_EARLY  # noqa: E402

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
# Before a process has Python's handlers it dies of the signal; before anything has begun, Ctrl-C is only Python's.
CODES = {"KILL": (-signal.SIGKILL,), "TERM": (STOPPED_EARLY, -signal.SIGTERM), "INT": (STOPPED_EARLY, -signal.SIGINT, 130)}
AT_START = 0.4  # share of the signals that come before a process gets to work
AIMED = 0.4  # share of the others that wait for a save to begin
LATEST = 0.9  # share of the work that should be done when the last signal comes
LONGEST_SAVE_S = 0.1
POLL_S = 0.005


class Kill(NamedTuple):
    """One signal and what it met."""

    signal: str
    seconds: float  # since the process was started
    phase: str


class Survived(NamedTuple):
    """A run that was disturbed and yet came to its end."""

    workdir: Path
    kills: list[Kill]
    set_aside: int  # checkpoints that a later start found unfinished or damaged


class Clock(NamedTuple):
    """How long things take when nothing is wrong."""

    cold_start: float  # seconds from the start of a process to the end of its compilation, nothing being compiled before
    start: float  # the same of the last process that came so far
    total: float  # seconds of a whole run
    done: Mapping[tuple[str, int], float]  # (folder, number) of the lines of metrics -> seconds into the run

    def reached(self, folder: str, number: int) -> float:
        """Seconds into the run when about so much was done."""
        return max((when for (where, line), when in self.done.items() if where == folder and line <= number), default=0.0)


class Plan(NamedTuple):
    """When a signal is sent."""

    at_start: bool  # counted from the start of the process; else from the end of its compilation
    seconds: float
    aimed: bool  # wait then for a save to begin


def start_run(config: str, workdir: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """The command; what it says is added to WORKDIR.log."""
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dgpo_jax.train", f"--config={Path(config).absolute()}", f"--workdir={workdir}"],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def said(workdir: Path, since: int = 0) -> str:
    """What the run has said, from this byte on."""
    return Path(f"{workdir}.log").read_bytes()[since:].decode("utf-8", errors="replace")


def run_undisturbed(config: str, workdir: Path, environment: Mapping[str, str]) -> Clock:
    """Runs it to its end, and looks at the clock meanwhile."""
    process, began, start = start_run(config, workdir, environment), time.time(), None
    while process.poll() is None:
        if start is None and has_started(said(workdir)):
            start = time.time() - began
        time.sleep(0.05)
    if process.returncode != 0:
        raise SystemExit(f"the undisturbed run ended with exit code {process.returncode}: {said(workdir)[-2000:]}")
    done = {
        (folder, row["update" if folder else "iteration"]): row["time/clock"] - began
        for folder in ("sft", "") if (workdir / folder / "metrics.jsonl").exists()
        for row in read_metrics(workdir / folder / "metrics.jsonl")
    }  # fmt: skip
    total = time.time() - began
    start = start or total
    return Clock(start, start, total, done)


def run_disturbed(
    config: str, workdir: Path, environment: Mapping[str, str], signals: list[str], clock: Clock, rng: random.Random,
    tell: Callable[[Kill], object] = lambda kill: None,
) -> Survived:  # fmt: skip
    """Sends the signals, one to each process that the command starts, and lets the last process come to its end.

    Returns:
        Fewer kills than signals if the run ended on its own before.
    Raises:
        SystemExit: it failed, or took a signal otherwise than it should.
    """
    kills: list[Kill] = []
    while True:
        left, saves = signals[len(kills) :], set(unfinished(workdir))
        process, began, since = start_run(config, workdir, environment), time.monotonic(), log_size(workdir)
        if left:
            plan = draw_plan(workdir, clock, (len(kills) + 1) / len(signals), rng)
            start = wait_for(plan, process, workdir, since, LATEST * clock.total / len(signals) + 1, rng)
            clock = clock._replace(start=start or clock.start)
        else:
            process.wait(timeout=patience(clock))
        if process.poll() is not None:
            require(process.returncode == 0, "ended by itself", process.returncode, workdir, since)
            return Survived(workdir, kills, said(workdir).count(" is not used and was renamed to "))
        phase, seconds = name_phase(config, workdir, said(workdir, since), saves), time.monotonic() - began
        process.send_signal(SIGNALS[left[0]])
        code = process.wait(timeout=patience(clock))
        if code == 0:  # the signal came after the last save
            continue
        kills.append(Kill(left[0], seconds, phase))
        require(code in CODES[left[0]], f"got SIG{left[0]} {seconds:.1f} s after its start, in {phase}", code, workdir, since)
        tell(kills[-1])


def require(fine: bool, what: str, code: int, workdir: Path, since: int) -> None:
    """Ends the benchmark where a process ended as none should."""
    if not fine:
        raise SystemExit(f"a process that {what} had exit code {code}; {workdir}.log ends:\n{said(workdir, since)[-2000:]}")


def patience(clock: Clock) -> float:
    """Seconds, on a busy machine, after which a process will not end any more."""
    return max(300, 20 * clock.total)


def log_size(workdir: Path) -> int:
    """Bytes said by the processes before the one that was started just now."""
    return Path(f"{workdir}.log").stat().st_size


def draw_plan(workdir: Path, clock: Clock, share: float, rng: random.Random) -> Plan:
    """When to send the next signal.

    Args:
        share: of the signals that will have been sent by then. The run should be as far by then; the longer it is behind,
            the longer it is left alone.
    """
    if rng.random() < AT_START:
        return Plan(True, rng.uniform(0, clock.start), False)
    work = LATEST * (clock.total - clock.cold_start)
    saved = max([clock.cold_start, *(clock.reached(*place) for place in saved_places(workdir))]) - clock.cold_start
    latest = max(min(2 * (share * work - saved), work - saved), 0.05 * work)
    return Plan(False, rng.uniform(0, latest), rng.random() < AIMED)


def wait_for(plan: Plan, process: subprocess.Popen, workdir: Path, since: int, patience_s: float, rng: random.Random) -> float | None:
    """Returns when the plan says so, or when the process has ended.

    Args:
        patience_s: how long an aimed signal waits for a save.
    Returns:
        Seconds that the process took to start; None if it has not.
    """
    began, start, saves = time.monotonic(), None, None
    while process.poll() is None:
        now = time.monotonic()
        if start is None and has_started(said(workdir, since)):
            start = now - began
        passed = now - began if plan.at_start else now - began - start if start is not None else -1.0
        if passed >= plan.seconds:
            if not plan.aimed or passed > plan.seconds + patience_s:
                break
            saves = unfinished(workdir) if saves is None else saves
            if unfinished(workdir) - saves:
                time.sleep(rng.uniform(0, LONGEST_SAVE_S))
                break
        time.sleep(POLL_S)
    return start


def survive(
    config: str, folder: Path, environment: Mapping[str, str], signals: list[str], clock: Clock, seed: int,
    tell: Callable[[Kill], object] = lambda kill: None,
) -> list[Survived]:  # fmt: skip
    """Runs, in folders of their own, until all signals are used up."""
    rng, runs = random.Random(seed), []
    while signals:
        runs.append(run_disturbed(config, folder / f"disturbed_{len(runs) + 1}", environment, signals, clock, rng, tell))
        signals = signals[len(runs[-1].kills) :]
    return runs


def first_difference(run: Survived, undisturbed: Path, settings: Config) -> str | None:
    """In words; None if there is none."""
    same_saves = all(kill.signal == "KILL" for kill in run.kills)  # the others save before they end
    return next(differences(run.workdir, undisturbed, settings, same_saves), None)


def own_cache(folder: Path) -> dict[str, str]:
    """Environment of a run whose compiled programs are kept in this folder, all of them."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip


def main(config: str, kills: int, names: list[str], seed: int, folder: Path) -> int:
    """Runs, kills, compares and prints; gives the exit code."""
    settings, undisturbed, rng = load([f"--config={config}"]), folder / "undisturbed", random.Random(seed)
    clock = run_undisturbed(config, undisturbed, own_cache(folder / "compiled undisturbed"))
    print(f"undisturbed: {clock.total:.1f} s, {clock.start:.1f} s of them until all was compiled", flush=True)

    def tell(kill: Kill) -> None:
        print(f"SIG{kill.signal} after {kill.seconds:5.1f} s, in {kill.phase}", flush=True)

    signals = [rng.choice(names) for _ in range(kills)]
    runs = survive(config, folder, own_cache(folder / "compiled"), signals, clock, seed, tell)
    found = [first_difference(run, undisturbed, settings) for run in runs]
    for number, (run, difference) in enumerate(zip(runs, found, strict=True), start=1):
        print(f"run {number}: {len(run.kills)} signals, {run.set_aside} checkpoints set aside; {difference or 'the same to the bit'}")
    phases = collections.Counter(group(kill.phase) for run in runs for kill in run.kills)
    print("signals met: " + ", ".join(f"{name} {count}" for name, count in phases.most_common()))
    print(f"compared: {count_compared(undisturbed, settings)}, in each of {len(runs)} disturbed runs")
    print(f"{'NOT the same' if any(found) else 'bit-identical'} after {kills} signals")
    return int(any(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="signals to send")
    parser.add_argument("--config", default=str(ROOT / "configs/smoke.py"), help="file of the run's settings")
    parser.add_argument("--signals", default="KILL", help="by commas, of KILL, TERM, INT; each time one of them at random")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    unknown = set(chosen.signals.split(",")) - set(SIGNALS)
    if unknown:
        sys.exit(f"--signals: no signal {sorted(unknown)}; there are {', '.join(SIGNALS)}")
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(chosen.config, chosen.kills, chosen.signals.split(","), chosen.seed, Path(temporary)))
