"""What a run is doing, told from outside: by what it has said and which files are there."""

import contextlib
import re
from pathlib import Path

from dgpo_jax.config import load

STAGES = {  # how the first line of each begins
    "dgpo_jax: ": "reading settings and problems",
    "to compile, ": "compilation",
    "compiled ": "reading weights",  # and without a warm start the first evaluation
    "supervised warm start: ": "warm start",
    "going on after iteration ": "iterations",
    "iteration  ": "iterations",
}
ROW = re.compile(r"^ {3,8}(\d+)  ", re.MULTILINE)  # of the console's table


def stage(text: str) -> str:
    """What a process that has said this is about."""
    lines = text.splitlines()
    return next((name for begin, name in reversed(STAGES.items()) if any(line.startswith(begin) for line in lines)), "imports")


def has_started(text: str) -> bool:
    """Whether compilation is over and weights are there."""
    return stage(text) in ("warm start", "iterations")


def name_phase(config: str, workdir: Path, text: str, saves: set) -> str:
    """What a process is doing, by what it has said and which files are there.

    Args:
        saves: checkpoints that were unfinished before it began.
    """
    found = stage(text)
    saving = "".join(f", amid the save of {name}" for name, _ in sorted(unfinished(workdir) - saves)[:1])
    if found == "warm start":
        return f"warm start after update {(ROW.findall(text) or ['0'])[-1]}{saving}"
    if found != "iterations":
        return found + saving
    rows = ROW.findall(text.partition("\niteration  ")[2])
    restored = re.search(r"^going on after iteration (\d+)", text, re.MULTILINE)
    done = int(rows[-1]) if rows else int(restored[1])
    if not rows and not done:
        return f"evaluation before iteration 1{saving}"
    settings = load([f"--config={config}"])
    if done >= settings.iterations:
        return f"end{saving}"
    if not (workdir / f"rollouts/iteration_{done + 1:06d}.jsonl").exists():
        return f"rollout of iteration {done + 1}{saving}"
    evaluated = done + 1 == settings.iterations or (settings.eval.every and (done + 1) % settings.eval.every == 0)
    return f"update {'or evaluation ' if evaluated else ''}of iteration {done + 1}{saving}"


def group(phase: str) -> str:
    """A phase without its number; all that met a save are one."""
    return "save" if "amid the save" in phase else re.sub(r" (of iteration|after update) \d+", "", phase)


def unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Name and inode of checkpoints that are being saved, or were when a process died."""
    found = set()
    for path in [*workdir.glob("checkpoints/iteration_*[0-9]"), *workdir.glob("sft/checkpoints/iteration_*[0-9]")]:
        with contextlib.suppress(FileNotFoundError):  # being deleted
            if not (path / "manifest.json").exists():
                found.add((str(path.relative_to(workdir)), path.stat().st_ino))
    return found
