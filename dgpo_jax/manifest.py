"""A folder's manifest: the size and checksum of each of its files, written last. Standard library only.

Checksums are CRC-32: they find all damage within four bytes in a row and all but one in four billion of any other
accident, at twice the speed of SHA-256.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from dgpo_jax.files import make_durable, read_regular, require_regular, write_whole

MANIFEST = "manifest.json"
BLOCK_BYTES = 16 * 2**20  # read at a time: large enough that the checksum leaves Python free to train


def write_manifest(path: Path) -> None:
    """Records every file of the folder, makes them durable, and only then puts the manifest in place."""
    sums = checksums(sorted(file for file in path.rglob("*") if file.is_file()), durable=True)
    manifest = {str(file.relative_to(path)): (file.stat().st_size, checksum) for file, checksum in sums.items()}
    write_whole(path / MANIFEST, json.dumps(manifest, indent=1))
    make_durable(*(folder for folder in path.rglob("*") if folder.is_dir()), path, path.parent)


def find_flaw(path: Path, read_only: tuple[str, ...] | None = None, must_list: tuple[str, ...] = ()) -> str | None:
    """Why the folder `path` must not be used, in words; None if it is sound.

    Whatever the manifest holds, nothing outside the folder is read, and nothing that a read would wait for.

    Args:
        read_only: names of the files whose content is checked; of the others the size. None checks them all.
        must_list: names without which a manifest is not one of this kind of folder.
    """
    try:
        text = read_regular(path / MANIFEST)
    except FileNotFoundError:
        return f"it was never finished: there is no {MANIFEST}"
    except NotADirectoryError:
        return "it is a file, not a folder"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    try:
        files = {_inside(path, name): (size, checksum) for name, (size, checksum) in json.loads(text).items()}
        sizes = {file: _size(file) for file in files}
        sums = checksums([file for file in files if read_only is None or file.name in read_only])
    except OSError as error:
        return f"a file is missing or cannot be read: {error}"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is damaged: {error}"
    unlisted = [name for name in must_list if path / name not in files]
    if unlisted or not sums:
        return f"{MANIFEST} is damaged: it does not list {unlisted[0] if unlisted else 'a file that was to be read'}"
    for file, (size, checksum) in files.items():
        if sizes[file] != size:
            return f"{file.name} has {sizes[file]} bytes where {size} were written"
        if sums.get(file, checksum) != checksum:
            return f"{file.name} is damaged: its checksum is {sums[file]} where {checksum} was written"
    return None


def _inside(path: Path, name: str) -> Path:
    """The file of the folder; ValueError for a name that leads out of it."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"it names {name}, which is outside of the folder")
    return path / name


def _size(file: Path) -> int:
    """In bytes; OSError for what is not a file: a pipe in its place would be waited for."""
    require_regular(file)
    return file.stat().st_size


def checksums(files: list[Path], durable: bool = False) -> dict[Path, str]:
    """CRC-32 of each file, in hex; `durable` also flushes it to the disk."""

    def checksum(path: Path) -> str:
        value = 0
        with open(path, "rb") as file:
            if durable:
                os.fsync(file.fileno())
            while block := file.read(BLOCK_BYTES):
                value = zlib.crc32(block, value)
        return f"{value:08x}"

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(files, pool.map(checksum, files), strict=True))
