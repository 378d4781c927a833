"""The files that make a model, and what tells two such folders apart without reading all of them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")  # settings, weights, tokenizer, chat template
WHOLE = 2**25  # bytes; a larger file is not read to its end
BLOCKS, BLOCK = 64, 2**14  # of a larger file, evenly spread from its first to its last byte; how many, and bytes of each


def fingerprint_folder(folder: str | Path) -> dict[str, dict]:
    """Size and SHA-256 of each file, by its name: {'config.json': {'bytes': 659, 'sha256': ...}, ...}.

    Of a file of more than WHOLE bytes the SHA-256 is that of its blocks and, of safetensors, of the header with names, types and
    places of all tensors: 1 MiB of each of the files that hold 100 GB of weights. It sees weights that were trained or converted,
    but not a change to so few numbers that it falls between the blocks. Folders inside, and files by other names, are not looked
    at: nothing is read from them.

    Raises:
        OSError: a file cannot be read.
    """
    files = {path for pattern in PATTERNS for path in Path(folder).glob(pattern) if path.is_file()}
    return {path.name: _fingerprint(path) for path in sorted(files)}


def _fingerprint(path: Path) -> dict:
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        for part in [file.read()] if size <= WHOLE else _parts(file, size, path.suffix == ".safetensors"):
            digest.update(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _parts(file: BinaryIO, size: int, has_header: bool) -> Iterator[bytes]:
    if has_header:
        length = int.from_bytes(file.read(8), "little")  # of what follows, JSON
        yield file.read(min(length, size))
    for number in range(BLOCKS):
        file.seek((size - BLOCK) * number // (BLOCKS - 1))
        yield file.read(BLOCK)
