"""Rows of a file, one at a time: JSON lines, a JSON array, Parquet, Arrow. Only the columns asked for are read."""

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dgpo_jax.data.rows import shorten

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
BATCH = 1024  # rows of a Parquet file that are Python objects at a time


class Row(NamedTuple):
    """One row and where it came from."""

    number: int  # line of a file with one object a line, else row; from 1
    where: str  # for errors
    values: dict


def read_rows(path, fields: Iterable[str] = (), optional: Iterable[str] = (), *, suffix: str = "") -> Iterator[Row]:
    """Reads a file row by row.

    Args:
        fields, optional: names that will be looked up, dotted ones too; the columns they begin with are all that is
            read of a Parquet or Arrow file. None given, or one of `fields` is no column: all are read, so that the
            error of a missing field can say what there is instead.
        suffix: one of SUFFIXES, where the file's own name does not tell.
    Raises:
        ValueError: no such file, or not what its name says, with file and line.
    """
    path = Path(path)
    suffix = suffix or path.suffix
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.glob("*" + suffix)], n=1)
        raise ValueError(f"{path}: no such file{f'; perhaps {path.parent / near[0]}' if near else ''}.")
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: {suffix!r} is not one of {', '.join(SUFFIXES)}; convert the file.")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: only a Git LFS pointer, the file itself was not fetched; run `git lfs pull` in its folder.")
    if suffix in (".parquet", ".arrow"):
        return _read_columns(path, suffix, list(fields), list(optional))
    if suffix == ".json" and start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _read_array(path)
    return _read_lines(path)


def _read_lines(path):
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            raw = raw.rstrip()  # an error at the end of the line would be placed on the next one
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # what Windows editors write; no part of the first object
            if raw:
                where = f"{path}:{number}"
                yield Row(number, where, _as_object(where, _parse(raw, path, number)))


def _read_array(path):
    for number, value in enumerate(_parse(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), path, 1), start=1):
        where = f"{path}: row {number}"
        yield Row(number, where, _as_object(where, value))


def _parse(raw, path, first_line):
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} at column {column} is not UTF-8; save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: not JSON at column {error.colno} ({error.msg}); write one object a line.") from None
    except RecursionError:
        raise ValueError(f"{path}:{first_line}: nested too deeply to be a problem; delete the line.") from None
    except ValueError as error:  # a number of more digits than Python reads, or a name given twice
        raise ValueError(f"{path}:{first_line}: {error}; correct or delete the line.") from None


def _without_repeats(pairs):
    """The object; of a name that is there twice Python would keep the last value without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shorten(next(name for name in names if names.count(name) > 1))} is there twice in one object")
    return values


def _as_object(where, value):
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {shorten(value)} is not an object; write {{\"problem\": ..., \"answer\": ...}}.")
    return value


def _read_columns(path, suffix, fields, optional):
    import pyarrow  # 0.1 s that JSON lines need not pay

    number, batches = 0, _parquet_batches if suffix == ".parquet" else _arrow_batches
    try:
        for batch in batches(path, fields, optional):
            batch.validate(full=True)  # else a damaged offset ends the process
            for values in batch.to_pylist():
                number += 1
                yield Row(number, f"{path}: row {number}", values)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        kind, line = suffix.removeprefix(".").capitalize(), " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not sound {kind} after row {number} ({line}); fetch the file again.") from error


def _parquet_batches(path, fields, optional):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(BATCH, columns=_columns(file.schema_arrow.names, fields, optional))


def _arrow_batches(path, fields, optional):
    """Either of Arrow's two layouts; `save_to_disk` writes the stream."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = reader = pyarrow.ipc.open_stream(file)
        columns = _columns(reader.schema.names, fields, optional)
        for batch in batches:
            yield batch if columns is None else batch.select(columns)


def _columns(names, fields, optional):
    """The columns that the fields begin with, in the file's order; None means all."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"column {shorten(twice)} is there twice")
    heads = [[field if field in names else field.partition(".")[0] for field in part] for part in (fields, optional)]
    if not fields or not set(heads[0]) <= set(names):
        return None
    return [name for name in names if name in heads[0] + heads[1]]
