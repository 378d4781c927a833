"""Checkpoints that are whole or are not read: Orbax writes the arrays, a manifest of our own says what must be there.

    checkpoints/iteration_000120/
        details.json     iteration, `extra`, and the dtype and shape of every array
        state/           what Orbax wrote
        host.npz         arrays of the host, such as responses not yet learned from; only where there are any
        manifest.json    size and checksum of every other file; written last, so a folder without it was never finished

Why a manifest when Orbax commits atomically: Orbax reads a flipped byte without noticing, casts float32 to bfloat16 when
the target says so, and `save` over a bad folder of the same number writes nothing. Here a folder is checked before it is
read, refused if its dtypes differ, and never written twice: a second save of iteration 120 goes to
`iteration_000120.2`, and the first is deleted when the second is complete.

Several processes need one shared folder; process 0 names, checks and deletes, Orbax has every process write its shards.
"""

import json
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dgpo_jax.manifest import MANIFEST, find_flaw, write_manifest
from dgpo_jax.types import TrainState

log = logging.getLogger(__name__)

DETAILS, ARRAYS, HOST_ARRAYS = "details.json", "state", "host.npz"
NAME = re.compile(r"iteration_(\d+)(?:\.(\d+))?")


class Restored(NamedTuple):
    """What a checkpoint held."""

    iteration: int
    state: TrainState
    extra: dict
    host_arrays: dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one run, newest `keep` kept. Use as a context manager: leaving it waits for the last save.

    Args:
        directory: created if need be; a path of a mounted file system (a bucket must be mounted).
        keep: finished checkpoints to keep, at least 1.
    Raises:
        ValueError: `directory` cannot be written, or `keep` < 1.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}, but a run needs a checkpoint to come back to; give at least 1.")
        self.directory = _writable(directory)
        self.keep = keep
        self._checkpointer = ocp.StandardCheckpointer()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def save(
        self, iteration: int, state: TrainState, extra: dict, host_arrays: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Copies `state` off the devices and returns; files are written, checked and made durable in the background.

        Waits for the save before it, so at most one is in flight. `state` may be donated as soon as this returns.

        Args:
            extra: anything JSON can hold; tuples come back as lists and keys as strings.
            host_arrays: numpy arrays that every process holds whole; written before this returns.
        Raises:
            TypeError: `extra` is not JSON.
            ValueError: a finished checkpoint of a later iteration is there.
            RuntimeError: the save before this one failed; what was complete before it still is.
        """
        self.wait()
        arrays = _by_name(state)
        details = json.dumps(
            {"iteration": iteration, "extra": extra, "arrays": {name: _describe(a) for name, a in arrays.items()}}
        )
        finished = [entry for entry in _entries(self.directory) if entry.finished]
        if finished and finished[0].iteration > iteration:
            raise ValueError(
                f"{self.directory} already holds iteration {finished[0].iteration}, so iteration {iteration} would be"
                " ignored on resume; call restore() first or use another directory."
            )
        entry = self._claim(iteration, details, host_arrays or {})
        with jax.transfer_guard("allow"):  # Orbax copies with np.asarray, which the guard takes for an accident
            self._checkpointer.save(entry.path / ARRAYS, arrays)
        self._thread = threading.Thread(target=self._finish, args=(entry,), name=f"finish {entry.path.name}")
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is in flight. Raises RuntimeError if the last one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(f"a checkpoint was not written, the one before it is intact: {error}") from error

    def close(self) -> None:
        """Waits and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def restore(self, abstract_state: TrainState) -> Restored | None:
        """Reads the newest sound checkpoint; sets aside those that are not, as NAME.bad.

        Args:
            abstract_state: a `jax.ShapeDtypeStruct` with a sharding for every array; any mesh will do.
        Returns:
            None where there is none.
        Raises:
            ValueError: the newest sound checkpoint has other arrays, shapes or dtypes than `abstract_state`.
        """
        self.wait()
        target = _by_name(abstract_state)
        without = [name for name, leaf in target.items() if getattr(leaf, "sharding", None) is None]
        if without:
            raise ValueError(f"abstract_state has no sharding for {without[0]} ({len(without)} in all); give it one.")
        entry = self._newest_sound()
        if entry is None:
            return None
        details = _read(entry.path / DETAILS)
        _require_same_arrays(entry.path, details["arrays"], target)
        arrays = self._checkpointer.restore(entry.path / ARRAYS, target)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in target])
        return Restored(entry.iteration, state, details["extra"], _read_arrays(entry.path / HOST_ARRAYS))

    def _claim(self, iteration: int, details: str, host_arrays: Mapping[str, np.ndarray]) -> "Entry":
        """Makes the folder that this save alone will write to."""
        taken = [entry.attempt for entry in _entries(self.directory) if entry.iteration == iteration]
        entry = Entry.of(self.directory, iteration, int(_from_process_0(max(taken, default=0) + 1)))
        if jax.process_index() == 0:
            entry.path.mkdir()
            (entry.path / DETAILS).write_text(details)
            if host_arrays:
                np.savez(entry.path / HOST_ARRAYS, **host_arrays)
        return entry  # the others meet process 0 at the barrier with which Orbax's save begins

    def _finish(self, entry: "Entry") -> None:
        """Runs in the background: waits for Orbax, writes the manifest, then deletes what is no longer needed."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(entry.path)
                _delete_superseded(self.directory, self.keep)
        except BaseException as error:  # a thread has nobody to raise to: wait() raises it
            self._error = error

    def _newest_sound(self) -> "Entry | None":
        """Process 0 checks and renames; all agree on what it found."""
        found = (0, 0)
        for entry in _entries(self.directory) if jax.process_index() == 0 else []:
            flaw = find_flaw(entry.path)
            if flaw is None:
                found = entry.iteration, entry.attempt
                break
            _set_aside(entry.path, flaw)
        iteration, attempt = _from_process_0(found)
        return Entry.of(self.directory, int(iteration), int(attempt)) if attempt else None


def peek(directory: str | Path) -> tuple[int, dict] | None:
    """The newest finished checkpoint's (iteration, extra), without reading arrays; changes nothing.

    Checks the sizes of all files but the checksum of details.json only, so `restore` may still fall back to an
    older one: resume from the iteration that `restore` returns.
    """
    for entry in _entries(Path(directory)):
        if find_flaw(entry.path, read_only=(DETAILS,)) is None:
            return entry.iteration, _read(entry.path / DETAILS)["extra"]
    return None


def locate(path: str | Path) -> Path:
    """The folder of the newest sound checkpoint of a run, or the one that `path` itself is. Changes nothing.

    Args:
        path: a run's workdir, its checkpoints folder, or one iteration_... in there.
    Raises:
        ValueError: there is none, or the one that was named is not sound.
    """
    path = Path(path)
    if NAME.fullmatch(path.name):
        flaw = find_flaw(path)
        if flaw is not None:
            raise ValueError(f"checkpoint {path} is not used: {flaw}; name another one, or the run's workdir.")
        return path.absolute()
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for entry in _entries(folder):
        if find_flaw(entry.path) is None:
            return entry.path.absolute()
    raise ValueError(f"--checkpoint {path}: no finished checkpoint there; name the workdir of a run, or an iteration_... folder.")


def read_params(folder: Path, abstract_params: Any) -> tuple[int, Any]:
    """The weights of a checkpoint, without the optimizer's state.

    Args:
        folder: from `locate`.
        abstract_params: a `jax.ShapeDtypeStruct` with a sharding for every array; any mesh will do.
    Returns:
        (iteration, params).
    Raises:
        ValueError: its weights have other names, shapes or dtypes.
    """
    details = _read(folder / DETAILS)
    target = {f"params/{name}": leaf for name, leaf in _by_name(abstract_params).items()}
    saved = {name: what for name, what in details["arrays"].items() if name.startswith("params/")}
    _require_same_arrays(folder, saved, target)
    settings = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder / ARRAYS, args=settings)
    return details["iteration"], jax.tree.unflatten(jax.tree.structure(abstract_params), [arrays[name] for name in target])


class Entry(NamedTuple):
    """A folder that a save has claimed."""

    iteration: int
    attempt: int  # 1, or more where the same iteration was saved again
    path: Path

    @classmethod
    def of(cls, directory: Path, iteration: int, attempt: int) -> "Entry":
        suffix = f".{attempt}" if attempt > 1 else ""
        return cls(iteration, attempt, directory / f"iteration_{iteration:06d}{suffix}")

    @property
    def finished(self) -> bool:
        return (self.path / MANIFEST).exists()


def _entries(directory: Path) -> list[Entry]:
    """All of them, finished or not, newest first."""
    matches = [NAME.fullmatch(path.name) for path in directory.iterdir()] if directory.is_dir() else []
    entries = [Entry.of(directory, int(match[1]), int(match[2] or 1)) for match in matches if match]
    return sorted(entries, reverse=True)


def _by_name(tree: Any) -> dict[str, Any]:
    """Flattens to {"params/layers/wq": leaf}: Orbax then meets one plain dict, whatever optax nests its state in."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two arrays of the state have the same path once joined by '/'; rename one.")
    return named


def _describe(leaf: Any) -> str:
    """`float32[8, 64]`."""
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _require_same_arrays(path: Path, saved: dict[str, str], target: dict[str, Any]) -> None:
    """Raises ValueError unless names, dtypes and shapes agree; Orbax would cast or pad."""
    wanted = {name: _describe(leaf) for name, leaf in target.items()}
    different = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if different:
        name = different[0]
        others = f" ({len(different) - 1} other arrays differ too)" if len(different) > 1 else ""
        raise ValueError(
            f"{path} does not fit this run: {name} is {saved.get(name, 'absent')} in the checkpoint and"
            f" {wanted.get(name, 'absent')} here{others}; use the settings that made it, or another directory."
        )


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _delete_superseded(directory: Path, keep: int) -> None:
    """Deletes all but the newest finished attempt of the newest `keep` iterations, and all but one set aside.

    One that was set aside is kept for a look; more would fill the disk after a few crashes.
    """
    newest: dict[int, Path] = {}
    for entry in _entries(directory):
        if entry.finished and len(newest) < keep:
            newest.setdefault(entry.iteration, entry.path)
    bad = sorted(directory.glob("iteration_*.bad"), reverse=True)
    for path in [entry.path for entry in _entries(directory) if entry.path not in newest.values()] + bad[1:]:
        (path / MANIFEST).unlink(missing_ok=True)  # first: killed here, a half-deleted one counts as unfinished
        shutil.rmtree(path)


def _set_aside(path: Path, flaw: str) -> None:
    """Renames the folder to NAME.bad, which frees its name and keeps it from ever being read."""
    bad = path.with_name(f"{path.name}.bad")
    if bad.exists():
        shutil.rmtree(bad)
    path.rename(bad)
    log.warning("checkpoint %s is not used and was renamed to %s: %s", path, bad.name, flaw)


def _from_process_0(value: Any) -> Any:
    """What process 0 passed, on every process: an int or a tuple of ints."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32))


def _writable(directory: str | Path) -> Path:
    """Creates the folder and proves that it can be written to."""
    if "://" in str(directory):
        raise ValueError(f"checkpoint directory {directory} is an address; mount the bucket and give its path.")
    path = Path(directory).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"checkpoint directory {path} cannot be written: {error.strerror}; choose another.") from error
    return path
