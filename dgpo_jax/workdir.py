"""The folder of a run: claimed for its settings, problems and model, and refused to others.

What a run is about stands in config.json and problems.json, and in every checkpoint besides, those of the warm start too
(`run_record`): a checkpoint that was moved, or whose neighbours were edited, still knows what it belongs to.

Where something was computed already, `claim` and `claim_sets` only look; `settle` writes, once the run goes on. So a start that
was refused, or failed on its way, leaves the records of the run as they were.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jaxlib

from dgpo_jax import hosts
from dgpo_jax.build import Parts, abstract_state
from dgpo_jax.checkpoint import peek
from dgpo_jax.checkpoint.storage import Storage, checkpoint_bytes, forecast, require_room
from dgpo_jax.config import (
    ANY_CHANGE,
    MODEL_FILES,
    PROBLEMS,
    Config,
    changed_settings,
    fixed_settings,
    flatten,
    is_among,
    rounding_settings,
    to_json,
)
from dgpo_jax.data.problems import ProblemStream, fingerprint
from dgpo_jax.files import alone_in, read_regular, write_whole
from dgpo_jax.models.files import fingerprint_folder
from dgpo_jax.session import say
from dgpo_jax.types import Problem

FOLDERS = ("rollouts", "eval", "nonfinite", "tensorboard")  # in a workdir, made when there is something to put there
FILES = ("config.json", "problems.json", "metrics.jsonl", "curves.png")
WARM_START = "sft"  # the set of problems that the warm start learns from, and the folder of its files
# What the weights of a warm start depend on besides its problems, by setting or group. In all else the runs that share one, as those
# of a comparison do, may differ.
MAKES_WARM_START = (
    "seed", "model", "sft", "data.tokenizer", "data.template", "data.system", "data.instruction", "update.tokens_per_row",
    "update.logprob_chunk", "optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.weight_decay", "optimizer.decay",
    "optimizer.clip_norm",
)  # fmt: skip


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


def claim_sets(
    config: Config, workdir: Path, parts: Parts, found: tuple[int, dict] | None, solved: ProblemStream | None = None
) -> dict:
    """Takes the workdir for these problems and this model; returns what checkpoints keep of the run.

    Args:
        found: the newest checkpoint, as from `peek`; its run must be this one.
        solved: what the warm start learns from; None = there is none.
    Raises:
        ValueError: the run there has other settings or problems, or started from another model.
    """
    sets = {"training": parts.stream.problems, "held_out": parts.held_out} | parts.benchmarks
    if solved is not None:
        sets[WARM_START] = solved.problems
    files = hosts.from_first(lambda: fingerprint_folder(parts.folder)) if parts.folder else {}
    record = run_record(config, sets, files)
    hosts.from_first(lambda: claim_problems(config, workdir, record["problems"]))
    machine = check_checkpoints(config, workdir, found, record)
    if machine:
        say(f"note: goes on with other machinery, so the same to rounding but not to the bit: {machine}")
    return record


def settle(config: Config, workdir: Path, record: Mapping[str, Any]) -> None:
    """Writes down what the run is about from now on, changes that were accepted included; for when nothing can refuse them any more.

    Args:
        record: from `claim_sets`.
    """

    def on_first() -> None:
        write_config(config, workdir)
        write_problems(workdir, record["problems"])

    hosts.from_first(on_first)


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
    """Creates the workdir, and its config.json where nothing was computed yet.

    Raises:
        ValueError: it cannot be written, or holds a run with other settings.
    """
    refuse_misplaced(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        record = workdir / "config.json"
        if not has_results(workdir):
            write_config(config, workdir)
        elif record.exists():
            refuse_changes(config, flatten(read_record(record)), workdir)
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be written: {error.strerror}; choose another.") from None


def refuse_misplaced(workdir: Path) -> None:
    """Raises ValueError for a file where a run writes a folder, and the other way round: it would be found after hours."""
    for name in FOLDERS:
        path = workdir / name
        if os.path.lexists(path) and not path.is_dir():
            raise ValueError(f"{path} is not a folder, and a run has one there; move it away, or use another --workdir.")
    for name in FILES:
        path = workdir / name
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a regular file, and a run has one there; move it away, or use another --workdir.")


def write_config(config: Config, workdir: Path) -> None:
    """config.json, as of this start."""
    write_whole(workdir / "config.json", to_json(config))


def claim_problems(config: Config, workdir: Path, prints: Mapping[str, dict]) -> None:
    """Looks whether the run in the workdir is about these problems; where nothing was computed yet, writes them down.

    Args:
        prints: as from `fingerprints`.
    Raises:
        ValueError: it was started with others under the same names: a file was edited meanwhile.
    """
    refuse_problems(config, recorded_problems(workdir), prints, workdir)
    if not has_results(workdir):
        write_problems(workdir, prints)


def write_problems(workdir: Path, prints: Mapping[str, dict]) -> None:
    """problems.json, with the sets that only an earlier start had."""
    write_whole(workdir / "problems.json", json.dumps(recorded_problems(workdir) | prints, indent=2) + "\n")


def recorded_problems(workdir: Path) -> dict[str, dict]:
    """What problems.json says of the run there; nothing where nothing was computed."""
    record = workdir / "problems.json"
    return read_record(record) if record.exists() and has_results(workdir) else {}


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
        record = json.loads(read_regular(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); put back what was there, or start in another --workdir.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); put back what was there, or start in another --workdir.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a {type(record).__name__} where settings by name should be; put back what was there, or start in another --workdir.")
    return record


def run_record(config: Config, sets: Mapping[str, Sequence[Problem]], model_files: Mapping[str, dict] = MappingProxyType({})) -> dict[str, Any]:
    """What a checkpoint keeps of the run it belongs to; JSON.

    Args:
        model_files: of model.path, as from `fingerprint_folder`.
    """
    return {
        "settings": fixed_settings(config), "problems": fingerprints(sets), "model_files": dict(model_files),
        "environment": environment(config),
    }  # fmt: skip


def fingerprints(sets: Mapping[str, Sequence[Problem]]) -> dict[str, dict]:
    """Number and checksum of the problems of each set."""
    return {
        name: {"problems": len(problems), "sha256": fingerprint(problems, solutions=name == WARM_START)} for name, problems in sets.items()
    }


def environment(config: Config) -> dict[str, Any]:
    """What the bits of a result depend on besides problems, model and the settings that may not change."""
    device = jax.devices()[0]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "jax": jax.__version__, "jaxlib": jaxlib.__version__, "device": device.device_kind, "devices": jax.device_count(),
        "processes": hosts.count(), "threads": threads if device.platform == "cpu" else None,
    } | rounding_settings(config)  # fmt: skip


def check_checkpoints(config: Config, workdir: Path, found: tuple[int, dict] | None, ours: Mapping[str, Any]) -> str:
    """`check_record` of the checkpoint that the run would go on from: its own newest, or else that of its warm start."""
    if found is not None:
        return check_record(config, found[1].get("run", {}), ours, workdir)
    folder = workdir / WARM_START
    begun = hosts.from_first(lambda: peek(folder / "checkpoints")) if config.sft.updates else None
    if begun is None:
        return ""
    machine = check_record(config, of_warm_start(begun[1].get("run", {})), ours, folder)
    return machine if begun[0] < config.sft.updates else ""  # nothing of it is computed any more


def of_warm_start(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's record that the weights of its warm start depend on."""
    settings, problems = record.get("settings", {}), record.get("problems", {})
    return dict(record) | {
        "settings": {name: value for name, value in settings.items() if is_among(name, MAKES_WARM_START)},
        "problems": {name: value for name, value in problems.items() if name == WARM_START},
    }


def check_record(config: Config, record: Mapping[str, Any], ours: Mapping[str, Any], where: Path) -> str:
    """Compares a checkpoint's record with this run's, both from `run_record`.

    Returns:
        What is different about the machine, in words; "" if results will be the same to the bit.
    Raises:
        ValueError: other settings, problems or files of the model, and not by checkpoint.accept_changes.
    """
    refuse_changes(config, record.get("settings", {}), where)
    refuse_problems(config, record.get("problems", {}), ours["problems"], where)
    refuse_model_files(config, record.get("model_files", {}), ours["model_files"], where)
    before, now = record.get("environment", {}), ours["environment"]
    return "; ".join(f"{name} was {before[name]} and is {now[name]}" for name in now if name in before and before[name] != now[name])


def refuse_changes(config: Config, before: Mapping[str, Any], where: Path) -> None:
    """Raises ValueError if a run was started with other settings than these, by dotted name."""
    names = [name for name in changed_settings(config, before) if not accepted(config, name)]
    if names:
        now = fixed_settings(config)
        changes = "; ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
        raise ValueError(
            f"{where} holds a run with other settings: {changes}. Use another --workdir, or the settings it was"
            f" started with, or, to change them on purpose, --config.checkpoint.accept_changes={','.join(names)}"
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


def refuse_model_files(config: Config, before: Mapping[str, dict], now: Mapping[str, dict], where: Path) -> None:
    """Raises ValueError if model.path has other files than when the run was started; arguments as `fingerprint_folder` gives them.

    A run without them, or from before they were recorded, is not looked at: that model.path is another is for `refuse_changes`.
    """
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if before and now and changed and not accepted(config, MODEL_FILES):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{where} holds a run that started from other files in model.path {config.model.path}: {', '.join(changed[:3])}{more}"
            " changed, came or went. The weights that a KL is taken to and the prompts would be others. Put them back, or use another"
            f" --workdir, or, on purpose, --config.checkpoint.accept_changes={MODEL_FILES}"
        )


def accepted(config: Config, name: str) -> bool:
    """Whether checkpoint.accept_changes names this setting, its group, or all."""
    allowed = {part.strip() for part in config.checkpoint.accept_changes.split(",")}
    return bool(allowed & {name, name.split(".")[0], ANY_CHANGE})
