"""Where problems come from (generated, JSON lines, TFDS), and the endless shuffled stream that a run reads."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dgpo_jax.data.generated import GeneratedProblems
from dgpo_jax.types import Problem


def load_problems(
    source: str,
    *,
    size: int = 10_000,
    seed: int = 0,
    low: int | None = None,
    high: int | None = None,
    operations: str = "",
    slips: float = 0.0,
    unmarked: float = 0.0,
    problem_field: str = "problem",
    answer_field: str = "answer",
    data_dir: str | None = None,
    manual_dir: str | None = None,
) -> Sequence[Problem]:
    """Loads one source of problems.

    Args:
        source: `generated:KIND/SPLIT` such as `generated:words/test`, `PATH.jsonl`, or `tfds:NAME/SPLIT` such as
            `tfds:gsm8k/train`; without /SPLIT it is train.
        size, seed, low, high, operations, slips, unmarked: of generated problems, see `GeneratedProblems`.
        problem_field, answer_field: names in a JSONL file.
        data_dir, manual_dir: of TFDS; where built sets are kept, and where files fetched by hand lie.
    Returns:
        an indexable sequence of Problem, never empty.
    Raises:
        ValueError: what is wrong with the source, where, and what to do.
    """
    if source.endswith(".jsonl"):
        return read_jsonl(source, problem_field, answer_field)
    scheme, _, rest = source.partition(":")
    name, _, split = rest.partition("/")
    if scheme == "generated":
        return GeneratedProblems(
            name, size, seed, split=split or "train", low=low, high=high, operations=operations, slips=slips,
            unmarked=unmarked,
        )  # fmt: skip
    if scheme == "tfds":
        from dgpo_jax.data import tfds_builders  # a second of import that other sources need not pay

        return tfds_builders.load(name, split or "train", data_dir=data_dir, manual_dir=manual_dir)
    raise ValueError(f"source {source!r} is not generated:KIND/SPLIT, a path to a .jsonl file, or tfds:NAME/SPLIT.")


def read_jsonl(path, problem_field: str = "problem", answer_field: str = "answer") -> list[Problem]:
    """Reads one JSON object a line; `id`, `source` and `solution` are optional, blank lines are skipped.

    Raises:
        ValueError: with file and line, for anything that would otherwise surface as a wrong reward.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.glob("*.jsonl")], n=1)
        raise ValueError(f"{path}: no such file{f'; perhaps {path.parent / near[0]}' if near else ''}.")
    problems, line_of_id = [], {}
    # A byte-order mark at the start is what Windows editors write; it is no part of the first object.
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        problem = _parse_row(where, _parse_line(where, raw), path.stem, number, problem_field, answer_field)
        if problem.id in line_of_id:
            first = line_of_id[problem.id]
            raise ValueError(f"{where}: id {problem.id!r} was used on line {first} already; ids must be unique.")
        line_of_id[problem.id] = number
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path}: the file holds no problem; write one JSON object a line.")
    return problems


def _parse_line(where, raw):
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        value = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{where}: {value} is not UTF-8; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON at column {error.colno} ({error.msg}); one object a line.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {_shorten(row)} is not an object; write {{\"problem\": ..., \"answer\": ...}}.")
    return row


def _parse_row(where, row, stem, number, problem_field, answer_field):
    return Problem(
        id=_take_text(where, row, "id", f"{stem}-{number}"),
        problem=_take_text(where, row, problem_field),
        answer=_take_text(where, row, answer_field),
        source=_take_text(where, row, "source", stem),
        solution=_take_text(where, row, "solution", ""),
    )


def _take_text(where, row, field, default=None):
    """The field as text; without a default it must be there and not blank. Numbers count as text, as 18 for "18"."""
    if field not in row:
        if default is not None:
            return default
        near = difflib.get_close_matches(field, row, n=1)
        hint = f"perhaps it is {near[0]!r}: set the field's name" if near else "add it or set the field's name"
        raise ValueError(f"{where}: no field {field!r} among {', '.join(map(repr, row)) or 'none'}; {hint}.")
    value = row[field]
    not_finite = isinstance(value, float) and not math.isfinite(value)  # Python's JSON takes NaN for a number
    if isinstance(value, bool) or not_finite or not isinstance(value, (str, int, float)):
        if value is None and default is not None:
            return default
        raise ValueError(f"{where}: {field} is {_shorten(value)}; it must be text or a number.")
    text = str(value)
    if default is None and not text.strip():
        raise ValueError(f"{where}: {field} is {_shorten(value)}; it must not be empty, fill it in or delete the line.")
    return text


def _shorten(value):
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"\s+", " ", text[:60]) + ("..." if len(text) > 60 else "")


class ProblemStream:
    """Problems in shuffled order without end; all it takes to continue is one integer, the position.

    Epoch e is a permutation that depends on (seed, e) alone, so a stream opened anew at a position goes on exactly
    as one that was never closed.
    """

    def __init__(self, problems: Sequence[Problem], seed: int):
        if len(problems) < 1:
            raise ValueError("a stream needs at least one problem; the source is empty.")
        if seed < 0:
            raise ValueError(f"seed {seed} is negative; use 0 or more.")
        self.problems, self.seed = problems, seed
        self._epoch, self._order = None, None  # the last permutation, kept for speed only

    def take(self, position: int, count: int) -> list[Problem]:
        """Problems number position, ..., position + count - 1 of the stream, across as many epochs as that spans."""
        if position < 0 or count < 0:
            raise ValueError(f"take({position}, {count}): neither may be negative.")
        return [self.problems[self._index(place)] for place in range(position, position + count)]

    def _index(self, place):
        epoch, offset = divmod(place, len(self.problems))
        if epoch != self._epoch:
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            self._epoch, self._order = epoch, random.permutation(len(self.problems))
        return int(self._order[offset])
