"""The folders that checkpoints are in: their names, which of them are sound, which are kept, and how one goes. No JAX.

`saving.py` says what is in one. Here all is done by one process, whatever the number that train.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dgpo_jax.files import read_regular
from dgpo_jax.manifest import MANIFEST, find_flaw

log = logging.getLogger(__name__)

DETAILS, ARRAYS, HOST_ARRAYS = "details.json", "state", "host.npz"
NAME = re.compile(r"iteration_(\d+)(?:\.(\d+))?")
SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")  # how TensorStore ends the text of an error of the file system


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
        """Raises OSError where the disk does not say: what may be finished must not be deleted as a leftover."""
        try:
            os.stat(self.path / MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def entries(directory: Path) -> list[Entry]:
    """All of them, finished or not, newest first; none where there is no such folder."""
    try:
        matches = [NAME.fullmatch(path.name) for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((Entry.of(directory, int(match[1]), int(match[2] or 1)) for match in matches if match), reverse=True)


def newest_finished(directory: Path) -> int | None:
    """Its iteration, whether sound or not; None if there is none, or the disk does not say."""
    try:
        return next((entry.iteration for entry in entries(directory) if entry.finished), None)
    except OSError:
        return None


def flaw_of(path: Path, read_only: tuple[str, ...] | None = None) -> str | None:
    """Why this checkpoint must not be used; None if it is sound. `read_only` as in `find_flaw`."""
    flaw = find_flaw(path, read_only, must_list=(DETAILS,))
    if flaw is None and (iteration := read_details(path).get("iteration")) != int(NAME.fullmatch(path.name)[1]):
        return f"it is not of this iteration: {DETAILS} says {iteration}, the folder was renamed or copied"
    return flaw


def read_details(path: Path) -> dict:
    """What `details.json` of the folder holds."""
    return json.loads(read_regular(path / DETAILS))


def read_score(path: Path) -> float | None:
    """The score that it was saved with, a finite number; None without one, or with details that nobody can read."""
    try:
        score = read_details(path)["score"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return None
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
    return score if is_number and -math.inf < score < math.inf else None  # an edited one must not end every save after it


def finished_by_iteration(directory: Path) -> dict[int, Entry]:
    """The newest finished attempt of each iteration, newest first."""
    found: dict[int, Entry] = {}
    for entry in entries(directory):
        if entry.finished:
            found.setdefault(entry.iteration, entry)
    return found


def claim(directory: Path, iteration: int, details: str, host_arrays: Mapping[str, np.ndarray]) -> Entry:
    """Makes the folder that this save alone will write to, and writes what the host has.

    A lost `directory` is made again, but not the folder it was in: where that is gone too, a disk was unmounted, and
    checkpoints would fill the one below it.

    Raises:
        OSError: it cannot; what was begun is deleted again.
    """
    directory.mkdir(exist_ok=True)
    taken = [entry.attempt for entry in entries(directory) if entry.iteration == iteration]
    entry = Entry.of(directory, iteration, max(taken, default=0) + 1)
    entry.path.mkdir()
    try:
        (entry.path / DETAILS).write_text(details)
        if host_arrays:
            np.savez(entry.path / HOST_ARRAYS, **host_arrays)
    except BaseException:
        shutil.rmtree(entry.path, ignore_errors=True)
        raise
    return entry


def require_parts(path: Path, names: Iterable[str]) -> None:
    """Before a manifest is made, which would not miss what is lost by then.

    Raises:
        FileNotFoundError: one of them is gone.
    """
    for name in (DETAILS, *names):
        os.stat(path / name)


def find_sound(directory: Path) -> tuple[Entry | None, list[tuple[Entry, str]]]:
    """The newest sound checkpoint, and the newer ones with what is wrong with each. Changes nothing.

    Raises:
        ValueError: none is sound, and not merely because the first save was cut off.
    """
    unsound = []
    for entry in entries(directory):
        flaw = flaw_of(entry.path)
        if flaw is None:
            return entry, unsound
        unsound.append((entry, flaw))
    if any(entry.finished or not entry.path.is_dir() for entry, _ in unsound):
        raise ValueError(
            f"no checkpoint in {directory} is sound, and the run would begin anew: {list_flaws(unsound)};"
            f" put a sound one there, or delete or move {directory} to begin anew on purpose."
        )
    return None, unsound


def list_flaws(unsound: list[tuple[Entry, str]]) -> str:
    """`iteration_000002 (details.json is damaged ...), iteration_000001 (...)`."""
    return ", ".join(f"{entry.path.name} ({flaw})" for entry, flaw in unsound)


def peek(directory: str | Path) -> tuple[int, dict] | None:
    """The newest finished checkpoint's (iteration, extra), without reading arrays; changes nothing.

    Checks the sizes of all files but the checksum of details.json only, so `restore` may still fall back to an
    older one: resume from the iteration that `restore` returns.

    Raises:
        ValueError: the folder is there and cannot be read.
    """
    try:
        found = entries(Path(directory))
    except OSError as error:
        raise ValueError(f"{directory} cannot be read: {in_words(error)}; make it readable, or use another --workdir.") from error
    for entry in found:
        if flaw_of(entry.path, read_only=(DETAILS,)) is None:
            try:
                return entry.iteration, read_details(entry.path)["extra"]
            except OSError:  # a run that is alive has deleted it by now
                continue
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
        flaw = flaw_of(path)
        if flaw is not None:
            raise ValueError(f"checkpoint {path} is not used: {flaw}; name another one, or the run's workdir.")
        return path.absolute()
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    try:
        sound, unsound = find_sound(folder)
    except ValueError as error:
        raise ValueError(f"--checkpoint {path}: {error}") from error
    if sound is None:
        raise ValueError(f"--checkpoint {path}: no finished checkpoint there; name the workdir of a run, or an iteration_... folder.")
    if unsound:
        log.warning("%s is used, for newer ones are not sound: %s", sound.path, list_flaws(unsound))
    return sound.path.absolute()


def set_aside(entry: Entry, flaw: str) -> None:
    """Renames the folder to NAME.bad, which frees its name and keeps it from ever being read.

    Raises:
        OSError: it cannot be renamed.
    """
    bad = entry.path.with_name(f"{entry.path.name}.bad")
    if os.path.lexists(bad):
        remove(bad)
    entry.path.rename(bad)
    log.warning("checkpoint %s is not used and was renamed to %s: %s", entry.path, bad.name, flaw)


def superseded(directory: Path, keep: int, keep_best: int) -> list[Path]:
    """What can go: all but the newest finished attempt of the iterations that are kept, and all but one set aside.

    Kept are the newest `keep` iterations, and the `keep_best` with the best scores; of two alike the newer. One that was
    set aside is kept for a look; more would fill the disk after a few crashes.
    """
    finished = finished_by_iteration(directory)
    scores = {iteration: read_score(entry.path) for iteration, entry in finished.items()} if keep_best else {}
    scored = sorted((iteration for iteration in scores if scores[iteration] is not None), key=lambda n: (scores[n], n))
    kept = {*list(finished)[:keep], *(scored[-keep_best:] if keep_best else ())}
    keep_paths = {finished[iteration].path for iteration in kept}
    bad = sorted(directory.glob("iteration_*.bad"), reverse=True)
    return [entry.path for entry in entries(directory) if entry.path not in keep_paths] + bad[1:]


def delete_superseded(directory: Path, keep: int, keep_best: int) -> list[tuple[Path, OSError]]:
    """Deletes them; returns those that could not be deleted, each with the reason."""
    kept_against_our_will = []
    for path in superseded(directory, keep, keep_best):
        try:
            remove(path)
        except OSError as error:
            kept_against_our_will.append((path, error))
    return kept_against_our_will


def remove(path: Path) -> None:
    """Deletes a folder, its manifest first: killed in between, a half-deleted one counts as unfinished."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def remove_busy(path: Path) -> None:
    """As `remove`, of a save that failed: Orbax's other threads may still be writing there, for a moment."""
    for pause_s in (0.1, 0.3, 1.0, 3.0):
        try:
            return remove(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
        time.sleep(pause_s)
    remove(path)


def in_words(error: BaseException) -> str:
    """An error of writing in a line, such as `No space left on device`, and what to do about that one."""
    found = SYSTEM_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(found[1]) if found else None
    if number is None:
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        return f"{kind}{str(error)[:500]}"
    where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    advice = " (free some, and the run keeps its checkpoints again)" if number in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{os.strerror(number)}{where}{advice}"


def writable(directory: str | Path) -> Path:
    """Creates the folder and proves that it can be written to.

    Raises:
        ValueError: it cannot.
    """
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
