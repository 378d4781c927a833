"""The folder of a run: claimed for its settings and problems, and refused to others.

What a run is about stands in config.json and problems.json, and in every checkpoint besides (`run_record`): a checkpoint that
was moved, or whose neighbours were edited, still knows what it belongs to.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jaxlib

from dgpo_jax import hosts
from dgpo_jax.build import Parts, abstract_state
from dgpo_jax.checkpoint import peek
from dgpo_jax.checkpoint.storage import Storage, checkpoint_bytes, forecast, require_room
from dgpo_jax.config import Config, fixed_settings, flatten, to_json
from dgpo_jax.data.problems import fingerprint
from dgpo_jax.files import alone_in, write_whole
from dgpo_jax.session import say
from dgpo_jax.types import Problem

PROBLEMS = "problems"  # what checkpoint.accept_changes calls an edited data set


def claim(stack: ExitStack, config: Config, workdir: Path) -> tuple[int, dict] | None:
    """Takes the workdir for this run alone; returns what `peek` finds in its checkpoints.

    Raises:
        ValueError: another process is at work there, or the run there has other settings.
    """

    def on_first() -> tuple[int, dict] | None:
        stack.enter_context(alone_in(workdir))
        claim_workdir(config, workdir)
        return peek(workdir / "checkpoints")

    return hosts.from_first(on_first)


def claim_sets(config: Config, workdir: Path, parts: Parts, found: tuple[int, dict] | None) -> dict:
    """Takes the workdir for these problems; returns what checkpoints keep of the run.

    Args:
        found: the newest checkpoint, as from `peek`; its run must be this one.
    Raises:
        ValueError: the run there has other settings or problems.
    """
    sets = {"training": parts.stream.problems, "held_out": parts.held_out} | parts.benchmarks
    record = run_record(config, sets)
    hosts.from_first(lambda: claim_problems(config, workdir, sets))
    machine = check_record(config, found[1].get("run", {}), record, workdir) if found else ""
    if machine:
        say(f"note: goes on with other machinery, so the same to rounding but not to the bit: {machine}")
    return record


def forecast_storage(config: Config, parts: Parts, workdir: Path) -> Storage:
    """What the run's checkpoints will take."""
    settings = config.checkpoint
    return forecast(workdir / "checkpoints", checkpoint_bytes(abstract_state(parts)), settings.keep, settings.keep_best)


def check_disk(config: Config, parts: Parts, workdir: Path) -> None:
    """Warns if the disk will not hold all checkpoints.

    Raises:
        ValueError: it does not hold one.
    """
    warning = hosts.from_first(lambda: require_room(workdir / "checkpoints", forecast_storage(config, parts, workdir)))
    if warning:
        say(f"warning: {warning}")


def claim_workdir(config: Config, workdir: Path) -> None:
    """Creates the workdir and its config.json.

    Raises:
        ValueError: it cannot be written, or holds a run with other settings.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        record = workdir / "config.json"
        if record.exists() and has_results(workdir):
            refuse_changes(config, flatten(read_record(record)), workdir)
        write_whole(record, to_json(config))
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be written: {error.strerror}; choose another.") from None


def claim_problems(config: Config, workdir: Path, sets: Mapping[str, Sequence[Problem]]) -> None:
    """Records which problems the run is about, in problems.json.

    Raises:
        ValueError: the run in the workdir was started with others under the same names: a file was edited meanwhile.
    """
    record = workdir / "problems.json"
    before = read_record(record) if record.exists() and has_results(workdir) else {}
    prints = fingerprints(sets)
    refuse_problems(config, before, prints, workdir)
    write_whole(record, json.dumps(before | prints, indent=2) + "\n")


def has_results(workdir: Path) -> bool:
    """Whether anything was computed there: a run refused for its data or weights leaves a workdir that can be used."""
    records = [*workdir.glob("metrics.jsonl"), *workdir.glob("sft/metrics.jsonl")]
    return any(record.stat().st_size for record in records) or any(workdir.glob("**/checkpoints/iteration_*"))


def read_record(path: Path) -> dict:
    """A JSON object that an earlier start wrote.

    Raises:
        ValueError: it is not one any more.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); put back what was there, or start in another --workdir.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a {type(record).__name__} where settings by name should be; put back what was there, or start in another --workdir.")
    return record


def run_record(config: Config, sets: Mapping[str, Sequence[Problem]]) -> dict[str, Any]:
    """What a checkpoint keeps of the run it belongs to; JSON."""
    return {"settings": fixed_settings(config), "problems": fingerprints(sets), "environment": environment()}


def fingerprints(sets: Mapping[str, Sequence[Problem]]) -> dict[str, dict]:
    """Number and checksum of the problems of each set."""
    return {name: {"problems": len(problems), "sha256": fingerprint(problems)} for name, problems in sets.items()}


def environment() -> dict[str, Any]:
    """What the bits of a result depend on besides settings and problems."""
    device = jax.devices()[0]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "jax": jax.__version__, "jaxlib": jaxlib.__version__, "device": device.device_kind, "devices": jax.device_count(),
        "processes": hosts.count(), "threads": threads if device.platform == "cpu" else None,
    }  # fmt: skip


def check_record(config: Config, record: Mapping[str, Any], ours: Mapping[str, Any], where: Path) -> str:
    """Compares a checkpoint's record with this run's, both from `run_record`.

    Returns:
        What is different about the machine, in words; "" if results will be the same to the bit.
    Raises:
        ValueError: other settings or problems, and not by checkpoint.accept_changes.
    """
    refuse_changes(config, record.get("settings", {}), where)
    refuse_problems(config, record.get("problems", {}), ours["problems"], where)
    before, now = record.get("environment", {}), ours["environment"]
    return "; ".join(f"{name} was {before[name]} and is {now[name]}" for name in now if name in before and before[name] != now[name])


def refuse_changes(config: Config, before: Mapping[str, Any], where: Path) -> None:
    """Raises ValueError if a run was started with other settings than these, by dotted name.

    A setting that did not exist then is no change; its default does what was done before it.
    """
    changed = [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in fixed_settings(config).items()
        if name in before and before[name] != value and not accepted(config, name)
    ]
    if changed:
        names = ",".join(change.split(" ", 1)[0] for change in changed)
        raise ValueError(
            f"{where} holds a run with other settings: {'; '.join(changed)}. Use another --workdir, or the settings it was"
            f" started with, or, to change them on purpose, --config.checkpoint.accept_changes={names}"
        )


def refuse_problems(config: Config, before: Mapping[str, dict], now: Mapping[str, dict], where: Path) -> None:
    """Raises ValueError if a run was started with other problems under the same names; arguments as `fingerprints` gives them."""
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if changed and not accepted(config, PROBLEMS):
        was, is_now = before[changed[0]], now[changed[0]]["problems"]
        was = was.get("problems") if isinstance(was, dict) else was
        raise ValueError(
            f"{where} holds a run with other {changed[0]} problems: they were {was} and are {is_now}, or their texts have changed."
            f" Put them back, or use another --workdir, or, on purpose, --config.checkpoint.accept_changes={PROBLEMS}"
        )


def accepted(config: Config, name: str) -> bool:
    """Whether checkpoint.accept_changes names this setting, its group, or all."""
    allowed = {part.strip() for part in config.checkpoint.accept_changes.split(",")}
    return bool(allowed & {name, name.split(".")[0], "all"})
