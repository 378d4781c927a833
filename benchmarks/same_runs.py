"""Whether two runs came to the same end: metrics, responses, TensorBoard's points and checkpoints."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from dgpo_jax.build import abstract_state, build_parts
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.config import Config
from dgpo_jax.metrics import read_metrics
from dgpo_jax.sharding import to_host

OF_THE_CLOCK = ("time", "speed", "memory")  # groups of metrics that no two runs share


def differences(workdir: Path, other: Path, config: Config, same_saves: bool = True) -> Iterator[str]:
    """What is not the same in two runs that came to their end, in words.

    Args:
        config: of both.
        same_saves: whether they saved at the same iterations, and so must keep the same checkpoints.
    """
    for name in ("metrics.jsonl", "sft/metrics.jsonl"):
        yield from differing_lines(name, recorded(workdir / name), recorded(other / name))
    for folder in ("rollouts", "eval", "nonfinite"):
        ours, theirs = ({path.name: path.read_bytes() for path in (run / folder).glob("*")} for run in (workdir, other))
        if ours.keys() != theirs.keys():
            yield f"{folder}: only one of the runs has {', '.join(sorted(ours.keys() ^ theirs.keys()))}"
        yield from (f"{folder}/{name}: other bytes" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name])
    for folder in ("", "sft"):
        yield from differing_points(workdir / folder)
    if same_saves:
        kept, wanted = (sorted(place for place in saved_places(run)) for run in (workdir, other))
        if kept != wanted:
            yield f"checkpoints: {kept} are kept instead of {wanted}"
    yield from differing_checkpoints(workdir, other, config)


def recorded(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl without what depends on the clock; none where there is no such file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key.split("/")[0] not in OF_THE_CLOCK} for line in lines]


def differing_lines(name: str, ours: list[dict], theirs: list[dict]) -> Iterator[str]:
    """The first value that two lists of metrics do not share."""
    if len(ours) != len(theirs):
        yield f"{name}: {len(ours)} lines instead of {len(theirs)}"
    for number, (line, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        for key in {**other, **line}:
            if line.get(key) != other.get(key):
                yield f"{name}, line {number}: {key} is {line.get(key)!r} instead of {other.get(key)!r}"
                return


def read_points(folder: Path) -> list[tuple[int, str, float]]:
    """Every (step, tag, value) of TensorBoard's files in the folder, in order; value as the float32 that it is stored as."""
    from tensorboardX.proto.event_pb2 import Event

    points = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, start = path.read_bytes(), 0
        while start < len(content):  # a record: length u64, its checksum u32, the event, its checksum u32
            length = int.from_bytes(content[start : start + 8], "little")
            event = Event.FromString(content[start + 12 : start + 12 + length])
            points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            start += 16 + length
    return points


def differing_points(folder: Path) -> Iterator[str]:
    """Where TensorBoard does not show the lines of metrics.jsonl, each once and in order."""
    if not (folder / "metrics.jsonl").exists():
        return
    rows = read_metrics(folder / "metrics.jsonl")
    wanted = [
        (row.get("iteration", row.get("update")), key, float(np.float32(value))) for row in rows for key, value in row.items()
        if isinstance(value, int | float) and key not in ("iteration", "update", "time/clock")
    ]  # fmt: skip
    found = read_points(folder / "tensorboard")
    if not np.array_equal([point[2] for point in found], [point[2] for point in wanted], equal_nan=True) or (
        [point[:2] for point in found] != [point[:2] for point in wanted]
    ):
        yield f"{folder.name}/tensorboard: {len(found)} points that are not the {len(wanted)} of metrics.jsonl"


def differing_checkpoints(workdir: Path, other: Path, config: Config) -> Iterator[str]:
    """What is not the same in the newest checkpoints, to the bit."""
    ours, theirs = (read_checkpoint(run, config) for run in (workdir, other))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"last checkpoint: {name} differs, {shown(ours.get(name))} and {shown(theirs.get(name))}"


def shown(value: object) -> str:
    """An array by a few of its bytes, all else as it is."""
    return f"{value[:2]} {value[2][:8].hex()}..." if isinstance(value, tuple) else repr(value)


def read_checkpoint(workdir: Path, config: Config) -> dict[str, object]:
    """All that the newest checkpoint holds of the run, arrays as (dtype, shape, bytes)."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        restored = checkpoints.restore(abstract_state(build_parts(config)))
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(to_host(restored.state))}
    held = {name: np.asarray(array) for name, array in (arrays | restored.host_arrays).items()}
    extra = {name: value for name, value in restored.extra.items() if name != "run"}
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in held.items()} | extra | {"iteration": restored.iteration}


def saved_places(workdir: Path) -> Iterator[tuple[str, int]]:
    """Folder and number of the finished checkpoints."""
    for folder in ("sft", ""):
        for path in (workdir / folder / "checkpoints").glob("iteration_*/manifest.json"):
            yield folder, int(re.match(r"iteration_(\d+)", path.parent.name)[1])


def count_compared(workdir: Path, config: Config) -> str:
    """How much of a run is looked at, in words."""
    lines = [len(recorded(workdir / name)) for name in ("metrics.jsonl", "sft/metrics.jsonl")]
    files = [path for folder in ("rollouts", "eval") for path in (workdir / folder).glob("*")]
    points = sum(len(read_points(workdir / folder / "tensorboard")) for folder in ("", "sft"))
    arrays = [value for value in read_checkpoint(workdir, config).values() if isinstance(value, tuple)]
    size = sum(len(value[2]) for value in arrays)
    return f"{lines[0]} + {lines[1]} lines of metrics, {len(files)} files of responses, {points} points, {len(arrays)} arrays of {size} bytes"
