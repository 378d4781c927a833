"""Checkpoints that are whole or are not read: Orbax writes the arrays, a manifest of our own says what must be there.

    checkpoints/iteration_000120/
        details.json     iteration, score, `extra`, and the dtype and shape of every array
        state/           what Orbax wrote
        host.npz         arrays of the host, such as responses not yet learned from; only where there are any
        manifest.json    size and checksum of every other file; written last, so a folder without it was never finished

Why a manifest when Orbax commits atomically: Orbax reads a flipped byte without noticing, casts float32 to bfloat16 when
the target says so, and `save` over a bad folder of the same number writes nothing. Here a folder is checked before it is
read, refused if its dtypes differ, and never written twice: a second save of iteration 120 goes to
`iteration_000120.2`, and the first is deleted when the second is complete.

A write that fails (a full disk, a folder that is gone) does not end the run: the log says so, what was complete stays,
and the next save tries again. Only `wait(required=True)`, after the last save, insists. One that hangs is given up after
ten minutes and what a slow disk takes (`meetings.patience`).

Several processes need one shared folder; process 0 names, checks and deletes, Orbax has every process write its shards.
Whatever goes wrong on process 0 is told to the others: they would wait for it in vain.
"""

import json
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dgpo_jax import activity, hosts
from dgpo_jax.checkpoint.arrays import by_name, describe, read_host_arrays, require_same_arrays
from dgpo_jax.checkpoint.folders import (
    ARRAYS,
    HOST_ARRAYS,
    Entry,
    claim,
    delete_superseded,
    find_sound,
    finished_by_iteration,
    in_words,
    list_flaws,
    newest_finished,
    read_details,
    read_score,
    remove_busy,
    require_parts,
    set_aside,
    writable,
)
from dgpo_jax.checkpoint.meetings import TOO_SLOW, Meetings, patience
from dgpo_jax.checkpoint.storage import checkpoint_bytes
from dgpo_jax.manifest import write_manifest
from dgpo_jax.types import TrainState

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a checkpoint held."""

    iteration: int
    state: TrainState
    extra: dict
    host_arrays: dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save.

    Attributes:
        failure: why the last save came to nothing, in words; None after one that is complete. On several processes each
            knows of its own part only, until `wait(required=True)`.

    Args:
        directory: created if need be; a path of a mounted file system (a bucket must be mounted).
        keep: newest finished checkpoints to keep, at least 1.
        keep_best: to keep besides, of those saved with a score: the best; they may be among the newest.
    Raises:
        ValueError: `directory` cannot be written, `keep` < 1, or `keep_best` < 0.
    """

    def __init__(self, directory: str | Path, keep: int = 2, keep_best: int = 0):
        if keep < 1:
            raise ValueError(f"keep is {keep}, but a run needs a checkpoint to come back to; give at least 1.")
        if keep_best < 0:
            raise ValueError(f"keep_best is {keep_best}, but it counts checkpoints; give 0 for none.")
        self.directory = writable(directory)
        self.keep, self.keep_best = keep, keep_best
        self.failure: str | None = None
        self._meetings = Meetings()
        self._thread: threading.Thread | None = None
        self._score_in_flight: float | None = None
        self._unsound: list[tuple[Entry, str]] = []  # newer than what was restored, and still under their names
        self._not_deleted: set[Path] = set()  # told once each
        logging.getLogger("absl").addFilter(_is_news)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def save(
        self, iteration: int, state: TrainState, extra: dict, host_arrays: Mapping[str, np.ndarray] | None = None,
        score: float | None = None,
    ) -> None:  # fmt: skip
        """Copies `state` off the devices and returns; files are written, checked and made durable in the background.

        Waits for the save before it, so at most one is in flight. `state` may be donated as soon as this returns. A write
        that fails, here or in the background, is logged and told by `failure`; nothing that was complete is lost by it.

        Args:
            extra: anything JSON can hold; tuples come back as lists and keys as strings.
            host_arrays: numpy arrays that every process holds whole; written before this returns.
            score: higher is better; one that is not finite counts as none.
        Raises:
            TypeError: `extra` is not JSON.
            ValueError: a finished checkpoint of a later iteration is there.
        """
        self.wait()
        arrays = by_name(state)
        score = float(score) if score is not None and math.isfinite(score) else None
        described = {name: describe(array) for name, array in arrays.items()}
        details = json.dumps({"iteration": iteration, "score": score, "extra": extra, "arrays": described})
        with activity.doing(f"beginning to write a checkpoint to {self.directory}", gauge=activity.traffic):
            entry = self._claim(iteration, details, host_arrays or {})
            checkpointer = None if entry is None else self._begin(entry, arrays)
        if checkpointer is None:
            return
        self._score_in_flight = score
        parts = (ARRAYS, HOST_ARRAYS) if host_arrays else (ARRAYS,)
        self._thread = threading.Thread(target=self._finish, args=(checkpointer, entry, parts), name=f"finish {entry.path.name}")
        self._thread.start()

    def wait(self, required: bool = False) -> None:
        """Returns when no save is in flight.

        Args:
            required: for the last save of a run, which nobody tries again; all processes must call it.
        Raises:
            RuntimeError: `required`, and the last save came to nothing, on this process or on another one.
        """
        if self._thread is not None:
            with activity.doing(f"writing a checkpoint to {self.directory}", gauge=activity.traffic):
                self._thread.join()
            self._thread, self._score_in_flight = None, None
        failures = hosts.gather(self.failure) if required else []
        if any(failures):
            why = self.failure or next(f"process {process}: {failure}" for process, failure in enumerate(failures) if failure)
            raise RuntimeError(f"the last checkpoint was not written to {self.directory}: {why}{self._what_is_left()}")

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()

    def best_score(self) -> float | None:
        """The best of the checkpoints that are there and of the one being written; None if none has a score."""
        scores = hosts.from_first(self._scores)
        return max((score for score in [*scores, self._score_in_flight] if score is not None), default=None)

    def _scores(self) -> list[float | None]:
        try:
            return [read_score(entry.path) for entry in finished_by_iteration(self.directory).values()]
        except OSError as error:
            log.warning("the scores of the checkpoints in %s cannot be read: %s", self.directory, in_words(error))
            return []

    def restore(self, abstract_state: TrainState) -> Restored | None:
        """Reads the newest sound checkpoint; sets aside those that are not, as NAME.bad.

        Args:
            abstract_state: a `jax.ShapeDtypeStruct` with a sharding for every array; any mesh will do.
        Returns:
            None where there is none, or none but what the very first save left when it was cut off.
        Raises:
            ValueError: there were some and none is sound, in which case nothing is renamed; or the newest sound one has
                other arrays, shapes or dtypes than `abstract_state`.
        """
        self.wait()
        target = by_name(abstract_state)
        without = [name for name, leaf in target.items() if getattr(leaf, "sharding", None) is None]
        if without:
            raise ValueError(f"abstract_state has no sharding for {without[0]} ({len(without)} in all); give it one.")
        entry = self._newest_sound()
        if entry is None:
            return None
        details = read_details(entry.path)
        require_same_arrays(entry.path, details["arrays"], target)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                arrays = checkpointer.restore(entry.path / ARRAYS, target)
            host_arrays = read_host_arrays(entry.path / HOST_ARRAYS)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{entry.path} is as it was written and yet cannot be read: {in_words(error)}; use the versions of JAX and"
                " Orbax that wrote it."
            ) from error
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in target])
        return Restored(entry.iteration, state, details["extra"], host_arrays)

    def _claim(self, iteration: int, details: str, host_arrays: Mapping[str, np.ndarray]) -> Entry | None:
        """Makes the folder that this save alone will write to; None where process 0 could not."""
        attempt, later, why = 0, -1, "process 0 could not begin it, and its log says why"
        if jax.process_index() == 0:
            try:
                self._set_aside_unsound()
                latest = next(iter(finished_by_iteration(self.directory)), -1)
                later = latest if latest > iteration else -1
                attempt = 0 if later >= 0 else claim(self.directory, iteration, details, host_arrays).attempt
            except OSError as error:
                why = in_words(error)
        attempt, later = hosts.from_first(lambda: (attempt, later))
        if later >= 0:
            raise ValueError(
                f"{self.directory} already holds iteration {later}, so iteration {iteration} would be"
                " ignored on resume; call restore() first or use another directory."
            )
        if not attempt:
            self._give_up(iteration, why)
            return None
        return Entry.of(self.directory, iteration, attempt)

    def _set_aside_unsound(self) -> None:
        """What could not be renamed when it was passed over counts as the newest: it must go before anything is saved."""
        while self._unsound:
            set_aside(*self._unsound[0])
            self._unsound.pop(0)

    def _begin(self, entry: Entry, arrays: dict[str, jax.Array]) -> ocp.StandardCheckpointer | None:
        """Copies the arrays off the devices and has Orbax begin to write them; None where it could not."""
        seconds = patience(checkpoint_bytes(arrays))
        self._meetings.begin(entry.path.name, seconds)
        checkpointer = ocp.StandardCheckpointer(
            async_options=ocp.AsyncOptions(timeout_secs=seconds, barrier_sync_fn=self._meetings.meet)
        )
        try:
            with jax.transfer_guard("allow"):  # Orbax copies with np.asarray, which the guard takes for an accident
                checkpointer.save(entry.path / ARRAYS, arrays)
        except (OSError, ValueError) as error:  # ValueError is TensorStore's; a device that fails raises a RuntimeError
            self._give_up(entry.iteration, in_words(error), entry)
            return None
        return checkpointer

    def _finish(self, checkpointer: ocp.StandardCheckpointer, entry: Entry, parts: tuple[str, ...]) -> None:
        """Runs in the background: waits for Orbax, writes the manifest, then deletes what is no longer needed."""
        try:
            with checkpointer:
                checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                require_parts(entry.path, parts)
                write_manifest(entry.path)
        except BaseException as error:  # a thread has nobody to raise to
            self._give_up(entry.iteration, _reason(error), entry)
            return
        self.failure = None
        if jax.process_index() == 0:
            self._delete_superseded()

    def _give_up(self, iteration: int, why: str, entry: Entry | None = None) -> None:
        """Says that this save came to nothing, and deletes what it wrote: it is as large as a checkpoint."""
        if entry is not None:
            self._meetings.fail(why)
        if entry is not None and jax.process_index() == 0:
            try:
                remove_busy(entry.path)
            except OSError as error:
                why = f"{why}; nor could its half be deleted: {in_words(error)}"
        self.failure = f"iteration {iteration}: {why}"
        log.warning(
            "the checkpoint of iteration %d was not written to %s: %s%s; the next save tries again",
            iteration, self.directory, why, self._what_is_left(),
        )  # fmt: skip

    def _what_is_left(self) -> str:
        intact = newest_finished(self.directory)
        return "; there is no other one" if intact is None else f"; the one of iteration {intact} is intact"

    def _delete_superseded(self) -> None:
        try:
            left = delete_superseded(self.directory, self.keep, self.keep_best)
        except OSError as error:
            left = [(self.directory, error)]
        for path, error in left:
            if path not in self._not_deleted:
                log.warning("%s is no longer needed and cannot be deleted: %s", path, in_words(error))
        self._not_deleted = {path for path, _ in left}

    def _newest_sound(self) -> Entry | None:
        """Process 0 checks and renames; all agree on what it found."""

        def look() -> Entry | None:
            try:
                entry, self._unsound = find_sound(self.directory)
            except OSError as error:
                raise ValueError(f"{self.directory} cannot be read: {in_words(error)}; make it readable.") from error
            try:
                self._set_aside_unsound()
            except OSError as error:
                log.warning("checkpoints are not used, nor can they be renamed (%s): %s", in_words(error), list_flaws(self._unsound))
            return entry

        return hosts.from_first(look)


def _reason(error: BaseException) -> str:
    """In words; Orbax's own deadlines speak of futures and keys."""
    out_of_time = (isinstance(error, TimeoutError) and error.errno is None) or "DEADLINE_EXCEEDED" in str(error)
    return f"not in time; {TOO_SLOW}" if out_of_time else in_words(error)


def _is_news(record: logging.LogRecord) -> bool:
    """Of a write that failed Orbax logs three tracebacks, a screen each; our own line says what failed."""
    return not any(text in str(record.msg) for text in ("_SignalingThread.run() raised", "Handler Commit operations or the Commit callback"))
