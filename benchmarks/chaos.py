"""Kills a run again and again, and proves that it ends as a run that nothing happened to.

    python benchmarks/chaos.py --kills=20
    python benchmarks/chaos.py --kills=30 --config=tests/tiny_config.py --signals=KILL,TERM,INT --seed=1

First an undisturbed run, whose phases are timed; then one that gets a signal at a random moment and is started again by the
same command, until all signals are used up; then it may end. Each signal gets a phase, all phases evenly often however short
they are: imports, compilation (each of the two runs begins with an empty cache of compiled programs), the making of weights,
reading of a checkpoint and older metrics, warm start, rollout, update, evaluation, a save in the warm start, a save between
iterations; then one of those that the undisturbed run had, such as the update of iteration 7; then a moment in it. Signals are sent
in the order of these, so that signals and work end together; those of imports and reading, which each start has, between any others.
Should a run end before its signal came, another one is begun, and compared as well.

Compared are every line of metrics.jsonl (less times, speeds and memory) and every byte of the responses in rollouts/ and eval/;
every point of TensorBoard, which must be the lines of metrics.jsonl and nothing twice; the last checkpoint's weights,
optimizer moments, place in the data and groups that wait, bit for bit; and, where all signals were KILL, which checkpoints are kept.
Any difference is an exit code of 1 and a line that names the first.
"""

import argparse
import collections
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # as it is for `python -m` there

from chaos_phases import BETWEEN, PHASES, Place, look, unfinished, words_file  # noqa: E402
from same_runs import count_compared, differences  # noqa: E402

from dgpo_jax.config import Config, load  # noqa: E402
from dgpo_jax.processes import STOPPED_EARLY  # noqa: E402

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
# Before a process has Python's handlers it dies of the signal; before anything has begun, Ctrl-C is only Python's.
CODES = {"KILL": (-signal.SIGKILL,), "TERM": (STOPPED_EARLY, -signal.SIGTERM), "INT": (STOPPED_EARLY, -signal.SIGINT, 130)}
ANYWHERE = ("imports", "reading")  # phases of every start: these signals go between any of the others
SHARE = 0.5  # of a phase, over which its moments are drawn: another time it may be shorter
COMPILED_S = 1.0  # of a compilation that finds most of its programs in the cache
POLL_S = 0.002
PATIENCE_S = 1200  # on a busy machine; after that a process will not end any more


class Moment(NamedTuple):
    """When a signal is sent, and which."""

    signal: str
    place: Place  # or a later one of the same phase
    seconds: float  # since this phase began


class Kill(NamedTuple):
    """One signal and what it met."""

    signal: str
    seconds: float  # since the process was started
    places: Sequence[Place]  # the phase, then the saves that were under way besides

    def __str__(self):
        return ", amid the ".join(str(place) for place in self.places)


class Survived(NamedTuple):
    """A run that was disturbed and yet came to its end."""

    workdir: Path
    kills: list[Kill]
    set_aside: int  # checkpoints that a later start found unfinished or damaged


def start_run(config: str, workdir: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """The command; what it says is added to WORKDIR.log."""
    words_file(workdir).write_text("")  # not those of the process before
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks/chaos_phases.py"), str(words_file(workdir)), "dgpo_jax.train",
             f"--config={Path(config).absolute()}", f"--workdir={workdir}"],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def said(workdir: Path, since: int = 0) -> str:
    """What the run has said, from this byte on."""
    return Path(f"{workdir}.log").read_bytes()[since:].decode("utf-8", errors="replace")


def run_undisturbed(config: str, workdir: Path, environment: Mapping[str, str]) -> dict[Place, float]:
    """Runs it to its end; gives the seconds that each phase took."""
    process, seconds, before = start_run(config, workdir, environment), collections.Counter(), time.monotonic()
    while process.poll() is None:
        time.sleep(POLL_S)
        now = time.monotonic()
        for place in look(workdir, set()):
            seconds[place] += now - before
        before = now
    require(process.returncode == 0, "nothing happened to", process.returncode, workdir)
    return dict(seconds)


def draw_moments(seconds: Mapping[Place, float], signals: Sequence[str], rng: random.Random) -> list[Moment]:
    """One for each signal, in the order in which a run comes to them.

    Args:
        seconds: that each phase took; those that the run does not have are not drawn.
    """
    phases = [phase for phase in PHASES if any(place.phase == phase for place in seconds)]
    phases = rng.sample(phases, len(phases))  # in another order: the first ones may have one signal more
    moments = []
    for name, phase in zip(signals, itertools.cycle(phases), strict=False):
        place = rng.choice(sorted(place for place in seconds if place.phase == phase))
        again = any(moment.place.phase == phase for moment in moments)
        length = min(seconds[place], COMPILED_S) if phase == "compilation" and again else SHARE * seconds[place]
        moments.append(Moment(name, place, rng.uniform(0, length)))
    ordered = sorted((moment for moment in moments if moment.place.phase not in ANYWHERE), key=order)
    for moment in moments:
        if moment.place.phase in ANYWHERE:
            ordered.insert(rng.randint(0, len(ordered)), moment)
    return ordered


def order(moment: Moment) -> tuple[int, int, int]:
    """By the part of the run, in it by the number of update or iteration, in this by the phase."""
    phase, number = moment.place
    return PHASES[phase], number, list(PHASES).index(phase)


def run_disturbed(
    config: str, workdir: Path, environment: Mapping[str, str], moments: Sequence[Moment],
    tell: Callable[[Kill], object] = lambda kill: None,
) -> Survived:  # fmt: skip
    """Sends the signals, one to each process that the command starts, and lets the last process come to its end.

    Returns:
        Fewer kills than moments if the run ended on its own before.
    Raises:
        SystemExit: it failed, did not end, or took a signal otherwise than it should.
    """
    kills: list[Kill] = []
    while True:
        saves = unfinished(workdir)
        process, began, since = start_run(config, workdir, environment), time.monotonic(), log_size(workdir)
        if len(kills) == len(moments):
            process.wait(timeout=PATIENCE_S)
        else:
            moment = moments[len(kills)]
            wait_for(moment, process, workdir, saves)
        if process.poll() is not None:
            require(process.returncode == 0, "ended by itself", process.returncode, workdir, since)
            return Survived(workdir, kills, said(workdir).count(" is not used and was renamed to "))
        kill = Kill(moment.signal, time.monotonic() - began, look(workdir, saves))
        process.send_signal(SIGNALS[kill.signal])
        code = process.wait(timeout=PATIENCE_S)
        if code == 0:  # the signal came after the last save
            continue
        kills.append(kill)
        require(code in CODES[kill.signal], f"got SIG{kill.signal} {kill.seconds:.1f} s after its start, in {kill}", code, workdir, since)
        tell(kill)


def wait_for(moment: Moment, process: subprocess.Popen, workdir: Path, saves: set[tuple[str, int]]) -> None:
    """Returns at the moment, or when the process has ended."""
    limit = time.monotonic() + PATIENCE_S
    while process.poll() is None and not any(has_come(place, moment.place) for place in look(workdir, saves)):
        if time.monotonic() > limit:
            process.kill()
            raise SystemExit(f"a process has not come to {moment.place} in {PATIENCE_S} s; see {workdir}.log")
        time.sleep(POLL_S)
    time.sleep(moment.seconds)


def has_come(place: Place, wanted: Place) -> bool:
    """Whether a run that is at `place` has come to the other one, or to a later one of the same phase."""
    return place.phase == wanted.phase and place.number >= wanted.number


def require(fine: bool, what: str, code: int, workdir: Path, since: int = 0) -> None:
    """Ends the benchmark where a process ended as none should."""
    if not fine:
        raise SystemExit(f"a process that {what} had exit code {code}; {workdir}.log ends:\n{said(workdir, since)[-2000:]}")


def log_size(workdir: Path) -> int:
    """Bytes said by the processes before the one that was started just now."""
    return Path(f"{workdir}.log").stat().st_size


def survive(
    config: str, folder: Path, environment: Mapping[str, str], moments: Sequence[Moment], tell: Callable[[Kill], object] = lambda kill: None
) -> list[Survived]:
    """Runs, in folders of their own, until all signals are used up."""
    runs = []
    while moments:
        runs.append(run_disturbed(config, folder / f"disturbed_{len(runs) + 1}", environment, moments, tell))
        moments = moments[len(runs[-1].kills) :]
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
    began = time.monotonic()
    seconds = run_undisturbed(config, undisturbed, own_cache(folder / "compiled undisturbed"))
    spent = ", ".join(f"{phase} {length:.2f}" for phase, length in by_phase(seconds).items())
    print(f"undisturbed: {time.monotonic() - began:.1f} s; {spent}", flush=True)

    def tell(kill: Kill) -> None:
        print(f"SIG{kill.signal} after {kill.seconds:5.1f} s, in {kill}", flush=True)

    moments = draw_moments(seconds, [rng.choice(names) for _ in range(kills)], rng)
    runs = survive(config, folder, own_cache(folder / "compiled"), moments, tell)
    found = [first_difference(run, undisturbed, settings) for run in runs]
    for number, (run, difference) in enumerate(zip(runs, found, strict=True), start=1):
        print(f"run {number}: {len(run.kills)} signals, {run.set_aside} checkpoints set aside; {difference or 'the same to the bit'}")
    met = collections.Counter(kill.places[-1].phase for run in runs for kill in run.kills)  # a save, if there was one
    print("signals met: " + ", ".join(f"{phase} {met[phase]}" for phase in (*PHASES, BETWEEN)))
    print(f"compared: {count_compared(undisturbed, settings)}, in each of {len(runs)} disturbed runs")
    print(f"{'NOT the same' if any(found) else 'bit-identical'} after {kills} signals")
    return int(any(found))


def by_phase(seconds: Mapping[Place, float]) -> dict[str, float]:
    """Seconds of all that are of one phase."""
    return {phase: sum(length for place, length in seconds.items() if place.phase == phase) for phase in (*PHASES, BETWEEN)}


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
