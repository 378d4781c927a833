"""Files and folders that survive a kill and do not mix two runs. Standard library only."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """A kill leaves the old file or the new one, never half of it. Half a surrogate pair, which a model can emit and UTF-8
    cannot hold, becomes its escape."""
    temporary = path.with_name(f"{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def require_regular(path: Path) -> None:
    """Refuses what a read would wait for, such as a named pipe, and what is no file at all.

    Raises:
        OSError: with `strerror` in words; FileNotFoundError and the like where there is nothing.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_regular(path: Path, errors: str = "strict") -> str:
    """The text of a file, UTF-8; OSError for anything else, see `require_regular`."""
    require_regular(path)
    return path.read_text(encoding="utf-8", errors=errors)


def make_durable(*paths: Path) -> None:
    """A power cut then loses neither these files nor, of folders, the names in them."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            # What network file systems answer of a folder that keep names durable by themselves.
            if error.errno != errno.EINVAL or not path.is_dir():
                raise
        finally:
            os.close(handle)


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Two that do the same work would write into each other's files. Creates the folder.

    Raises:
        ValueError: somebody else is at work there, or it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if (workdir / "lock").exists():
            require_regular(workdir / "lock")
        lock = open(workdir / "lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be written: {error.strerror}; choose another.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however that ends
        except OSError:
            raise ValueError(f"{workdir} is being worked on by another process; wait for it, or stop it.") from None
        yield
