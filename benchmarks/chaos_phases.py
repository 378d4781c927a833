"""Runs a module as `python -m` does, and keeps a file that says what it is doing.

    python benchmarks/chaos_phases.py FILE dgpo_jax.train --config=configs/smoke.py

The program itself is as it is: a thread beside it writes down what the watchdog would say. From this file, and from the
checkpoints that are there, `look` tells in which phase a run is; phases need not be long enough to be met by chance.
"""

import contextlib
import os
import re
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

LOOK_S = 0.002
WIDTH = 200  # bytes of the file: always written over whole, so that nobody reads a half
IMPORTS = "imports"
NOTHING = "nothing that has a name"  # as `activity` says it

PHASES = {  # the part of a run, in the order of a run; and of an iteration, where they belong to one
    "imports": 0, "compilation": 0, "weights": 0, "reading": 0,
    "warm start": 1, "warm start's save": 1,
    "rollout": 2, "update": 2, "evaluation": 2, "save": 2,
}  # fmt: skip
WORDS = {  # what `activity` says: the phase. Reading, of a checkpoint and older metrics, goes on without a name until work begins
    r"imports": "imports",
    r"(after )?compiling ": "compilation",
    r"reading or making": "weights",
    r"(after )?reading ": "reading",
    r"warm start": "warm start",
    r"iteration \d+, iteration, (rollout|verify)": "rollout",
    r"iteration \d+, iteration, update": "update",
    r"iteration \d+, eval": "evaluation",
}
BETWEEN = "between two"  # metrics and responses are written, a save begins


class Place(NamedTuple):
    """A phase of a run, and which one of its kind."""

    phase: str
    number: int = 0  # of the iteration; in a warm start, of the updates done; of a save what it is named after

    def __str__(self):
        return f"{self.phase} {self.number}" if PHASES.get(self.phase) else self.phase


def look(workdir: Path, saves: set[tuple[str, int]]) -> list[Place]:
    """What a run is doing: its phase, then the saves that are under way besides.

    Args:
        saves: checkpoints that were unfinished before it was started.
    """
    words = read_words(workdir)
    phase = next((phase for pattern, phase in WORDS.items() if re.match(pattern, words)), BETWEEN)
    found = re.match(r"(?:warm start .update|iteration) (\d+)", words)
    return [Place(phase, int(found[1]) if found else 0), *(as_save(name) for name, _ in sorted(unfinished(workdir) - saves))]


def words_file(workdir: Path) -> Path:
    """Where a run of this workdir says what it is doing."""
    return Path(f"{workdir}.doing")


def read_words(workdir: Path) -> str:
    """What it says."""
    return words_file(workdir).read_text(errors="replace").strip() or IMPORTS


def as_save(name: str) -> Place:
    """Of the name of a checkpoint in the workdir; iteration_000004.2 is the second one of its iteration."""
    return Place("warm start's save" if name.startswith("sft/") else "save", int(re.search(r"iteration_(\d+)", name)[1]))


def unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Name and inode of checkpoints that are being saved, or were when a process died."""
    found = set()
    for path in [*workdir.glob("checkpoints/iteration_*[0-9]"), *workdir.glob("sft/checkpoints/iteration_*[0-9]")]:
        with contextlib.suppress(FileNotFoundError):  # being deleted
            if not (path / "manifest.json").exists():
                found.add((str(path.relative_to(workdir)), path.stat().st_ino))
    return found


def say_what_is_done(path: str) -> None:
    """From now on the file says what this process is doing, or did last."""
    from dgpo_jax import activity

    def watch() -> None:
        file, last, iteration = os.open(path, os.O_WRONLY), IMPORTS, "0"
        while True:
            words = activity.describe()
            if words == NOTHING:
                words = last if last == IMPORTS or last.startswith("after ") else f"after {last}"
            if words.startswith("eval"):  # nothing says of which iteration it is: of the last one, or of one of a process before
                words = f"iteration {iteration}, {words}"
            if words != last:
                os.pwrite(file, words.encode()[:WIDTH].ljust(WIDTH), 0)
                found = re.match(r"iteration (\d+)", words)
                last, iteration = words, found[1] if found else iteration
            time.sleep(LOOK_S)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    path, module = sys.argv[1:3]
    sys.argv[:] = [module, *sys.argv[3:]]
    sys.path[0] = os.getcwd()  # as under `python -m`
    say_what_is_done(path)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
