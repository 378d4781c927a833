"""Two programs measured against each other: each in a process of its own, one round at a time in turns.

Whatever else the machine does then slows both alike, and a ratio is that of two rounds that ran one after the other.
Imports nothing but the standard library, so that a side can run under any interpreter.

A side is a script that calls `serve`. It is asked, in JSON lines on stdin, to get ready for a case (build, compile and run
twice, none of it timed) and then for rounds.
"""

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
import venv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
WARM_UP = 2  # rounds before the first that counts; the first compiles


class Case(NamedTuple):
    """One measurement that every side can make."""

    name: str
    kind: str  # "sample" = prompts to responses; "iteration" = those, rewards, and one optimizer step
    prompts: int  # Q
    samples: int  # G, responses to each
    prompt_tokens: int  # P
    new_tokens: int  # R, at most
    stop: float = 0.0  # chance of the stop token at every token; 0 = never, all responses have R tokens
    cache: int = 0  # slots of tunix's cache of keys and values; 0 = P + R, its best
    target: float | None = None  # ratio asked for

    @property
    def responses(self) -> int:
        """B."""
        return self.prompts * self.samples


class Round(NamedTuple):
    """What one side took for one round."""

    seconds: float
    tokens: int  # of all responses, stop tokens included
    processor: float = 0.0  # seconds of all its threads together; other work on the machine hardly changes them

    @property
    def speed(self) -> float:
        """Response tokens per second."""
        return self.tokens / self.seconds


class Side:
    """A worker process; a context manager."""

    def __init__(self, name: str, python: str, script: str, environment: dict[str, str] | None = None):
        self.name, self.ready_seconds = name, {}
        self.process = subprocess.Popen(
            [python, str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def prepare(self, case: Case, folder: Path) -> None:
        """Builds, compiles, and warms up.

        Raises:
            RuntimeError: the worker failed; its traceback is on stderr.
        """
        self.ready_seconds[case.name] = self._ask(do="prepare", case=case._asdict(), folder=str(folder))["seconds"]

    def round(self, case: Case, seed: int) -> Round:
        """One timed round."""
        return Round(**self._ask(do="round", name=case.name, seed=seed))

    def forget(self, case: Case) -> None:
        """Frees what was built for a case."""
        self._ask(do="forget", name=case.name)

    def _ask(self, **command) -> dict:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"it ended with code {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}; its own messages are above.")
        return answer


def serve(prepare: Callable[[Case, str], Callable[[Any], int]], make_input: Callable[[Case, int], Any]) -> None:
    """The worker's side: answers commands on stdin until it is closed.

    Args:
        prepare: (case, folder of the model) -> function that takes an input, does one round, and returns the number of
            response tokens; everything is done when it returns.
        make_input: (case, seed) -> what a round starts from; not timed.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout; it belongs to the answers
    rounds: dict[str, tuple[Case, Callable]] = {}

    def timed(name: str, seed: int) -> dict:
        case, run = rounds[name]
        given = make_input(case, seed)
        began, used = time.perf_counter(), time.process_time()
        tokens = run(given)
        return {"seconds": time.perf_counter() - began, "tokens": tokens, "processor": time.process_time() - used}

    def answer(command: dict) -> dict:
        if command["do"] == "round":
            return timed(command["name"], command["seed"])
        if command["do"] == "forget":
            close = getattr(rounds.pop(command["name"])[1], "close", None)
            return {"closed": close() if close else None}
        case, began = Case(**command["case"]), time.perf_counter()
        rounds[case.name] = (case, prepare(case, command["folder"]))
        for warm_up in range(WARM_UP):
            timed(case.name, 10_000 + warm_up)
        return {"seconds": time.perf_counter() - began}

    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # told to the driver, which stops everything
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


class HeldLoop:
    """A peer's own training loop, which knows no rounds: in a thread, let go for one round at a time.

    The loop takes what a round starts from out of `given`, where None tells it to end, puts None into `done` when the round is
    over, and leaves the number of its response tokens in `tokens`.
    """

    def hold(self, loop: Callable[[], object]) -> None:
        """Starts the thread; an error ends the round that met it."""

        def run() -> None:
            try:
                loop()
                self.done.put(RuntimeError("training ended"))
            except Exception as error:
                self.done.put(error)

        self.given, self.done, self.tokens = queue.Queue(), queue.Queue(), 0
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def __call__(self, given) -> int:
        """One round."""
        self.given.put(given)
        error = self.done.get()
        if error is not None:
            raise error
        return self.tokens

    def close(self) -> None:
        """Ends the loop."""
        self.given.put(None)
        self.thread.join(60)


def take_turns(sides: Sequence[Side], case: Case, rounds: int) -> list[list[Round]]:
    """Rounds of every side, side by side; who goes first changes every time."""
    results: list[list[Round]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for place in order:
            results[place].append(sides[place].round(case, number))
    return results


def compare(ours: Side, peer: Side, cases: Iterable[tuple[Case, Path]], rounds: int) -> None:
    """Measures all cases and prints a Markdown table, a line as soon as it is known."""
    print(f"| case | ours, tokens/s (s) | {peer.name}, tokens/s (s) | ratio, median (lowest to highest) | ratio by processor time | target |\n|---|---|---|---|---|---|", flush=True)
    for case, folder in cases:
        for side in (ours, peer):
            side.prepare(case, folder)
        print(row(case, *take_turns((ours, peer), case, rounds)), flush=True)
        for side in (ours, peer):
            side.forget(case)
    waited = {side.name: sum(side.ready_seconds.values()) for side in (ours, peer)}
    print(
        f"\n{rounds} rounds each, in turns. tokens/s: response tokens, median; in brackets the median seconds of a round."
        " Processor time adds up all threads of a side. Before the first round, building, compiling and two rounds to warm up took, over all cases, "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in waited.items()) + "."
    )  # fmt: skip


def row(case: Case, ours: Sequence[Round], peer: Sequence[Round]) -> str:
    """One line of the table; ratios are taken round by round, over 1 = ours is faster.

    By processor time: of tokens per second that the process kept a core busy, its threads added up. On a machine with other work
    to do it is the steadier figure; it says nothing about how well a side keeps all cores busy.
    """
    ratios = [own.speed / other.speed for own, other in zip(ours, peer, strict=True)]
    work = [(own.tokens / own.processor) / (other.tokens / other.processor) for own, other in zip(ours, peer, strict=True)]
    target = f"{case.target:g}" if case.target else "-"
    return f"| {case.name} | {_figures(ours)} | {_figures(peer)} | {spread(ratios)} | {spread(work)} | {target} |"


def _figures(rounds: Sequence[Round]) -> str:
    return f"{statistics.median(one.speed for one in rounds):.0f} ({statistics.median(one.seconds for one in rounds):.2f})"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def environment(name: str, packages: Sequence[str]) -> str:
    """The interpreter of a virtual environment with these packages, made on first use in the user's cache folder.

    Raises:
        subprocess.CalledProcessError: pip failed; its own message is above.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "dgpo_jax" / "benchmarks" / name
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():  # also after an installation that was cut short
        print(f"installing {' '.join(packages)} into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, stdout=sys.stderr)
        complete.write_text(" ".join(packages) + "\n")
    return str(python)
