"""What a run's checkpoints will take of the disk, known before the first iteration instead of after the hundredth."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dgpo_jax.checkpoint.folders import entries

GIB = 2**30


class Storage(NamedTuple):
    """All in bytes."""

    each: int  # one checkpoint
    most_at_once: int  # all that will be kept, and the one being written: nothing is deleted before it is complete
    held: int  # by checkpoints of this run that are there, also cut off or set aside: part of the above
    free: int | None  # what this user may still write to that disk; None where the file system does not say


def checkpoint_bytes(abstract_state: Any) -> int:
    """Of the arrays of a state. Orbax compresses, so that less is written: of float32 weights a tenth less.

    Args:
        abstract_state: anything with a shape and a dtype as leaves; of arrays split over devices the whole.
    """
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(abstract_state))


def forecast(directory: str | Path, bytes_each: int, keep: int, keep_best: int) -> Storage:
    """What the checkpoints in `directory` will take; it need not exist yet.

    A quota of the user on a network disk is often not told by the file system, and then not known here either.

    Args:
        bytes_each: from `checkpoint_bytes`.
        keep, keep_best: as of `Checkpoints`.
    """
    directory = Path(directory).absolute()
    return Storage(bytes_each, bytes_each * (keep + keep_best + 1), _held(directory), _free(directory))


def require_room(directory: str | Path, storage: Storage) -> str | None:
    """None where all fits; a warning in words where not all will.

    Raises:
        ValueError: not even one more checkpoint fits.
    """
    if storage.free is None:
        return None
    if storage.free < storage.each:
        raise ValueError(
            f"{directory}: {_size(storage.free)} of disk are free, but one checkpoint takes {_size(storage.each)};"
            " free some, or choose a --workdir on another disk."
        )
    missing = storage.most_at_once - storage.held - storage.free
    if missing <= 0:
        return None
    return (
        f"{directory}: checkpoints will take up to {_size(storage.most_at_once)} at once, and the disk is"
        f" {_size(missing)} too small for that; free some, or lower checkpoint.keep or checkpoint.keep_best"
    )


def describe_storage(storage: Storage) -> str:
    """A line for the plan: `1.2 GiB each, at most 4 at once: 4.8 GiB; 100.0 GiB of disk are free`."""
    count = storage.most_at_once // storage.each if storage.each else 0
    there = f", {_size(storage.held)} of it there already" if storage.held else ""
    free = "the disk does not say what is free" if storage.free is None else f"{_size(storage.free)} of disk are free"
    return f"{_size(storage.each)} each, at most {count} at once: {_size(storage.most_at_once)}{there}; {free}"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _held(directory: Path) -> int:
    """Bytes of files in the folders of checkpoints."""
    folders = [*(entry.path for entry in entries(directory)), *directory.glob("iteration_*.bad")]
    total = 0
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(path, name)).st_size
                except FileNotFoundError:  # a run that is alive has deleted it by now
                    continue
    return total


def _free(directory: Path) -> int | None:
    """Of the disk of `directory`, or of the nearest folder above it that exists."""
    while not directory.exists():
        directory = directory.parent
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else None  # mounted buckets tell of a disk without blocks
