"""Where problems come from, one line of text each, and the endless shuffled stream that a run reads."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dgpo_jax.data.folders import find_files
from dgpo_jax.data.generated import GeneratedProblems
from dgpo_jax.data.rows import OPTIONAL, LazyProblems, shorten, to_problem
from dgpo_jax.data.tables import SUFFIXES, read_rows
from dgpo_jax.types import Problem

FORMS = (
    "generated:KIND/SPLIT, builtin:coding/SPLIT, gym:NAME/SPLIT, tfds:NAME/SPLIT, a path to a .jsonl, .json, .parquet or .arrow"
    " file, a Hugging Face dataset FOLDER, FOLDER:SPLIT or FOLDER:CONFIG/SPLIT, or several of these joined by ' + '"
)

MADE = ("generated", "builtin", "gym", "tfds")  # what stands before the colon of a source that is no path


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
    """Loads one source of problems, or several.

    Args:
        source: one of FORMS, such as `generated:words/test` or `mine.jsonl + tfds:gsm8k/train`; without a split it
            is train.
        size, seed: of problems that are made: generated, builtin and gym.
        low, high, operations, slips, unmarked: of generated problems, see `GeneratedProblems`; the last three also of
            built-in coding problems, see `CodingProblems`.
        problem_field, answer_field: names in files and folders; `prompt.0.content` reaches into nested ones.
        data_dir, manual_dir: of TFDS; where built sets are kept, and where files fetched by hand lie.
    Returns:
        an indexable sequence of Problem, never empty.
    Raises:
        ValueError: what is wrong with the source, where, and what to do.
    """

    numbers = {"low": low, "high": high, "operations": operations, "slips": slips, "unmarked": unmarked}
    sources = [part.strip() for part in source.split(" + ")]
    parts = []
    for part in sources:
        scheme, _, rest = part.partition(":")
        if not part:  # which as a path would be the folder that the command was started in
            raise ValueError(f"source {shorten(source)} names nothing, or nothing beside a '+'; it must be {FORMS}.")
        if scheme in ("generated", "builtin", "gym"):
            parts.append(_make(part, scheme, *_name_and_split(rest), size, seed, numbers))
        elif scheme == "tfds":
            from dgpo_jax.data import tfds_builders  # a second of import that other sources need not pay

            parts.append(tfds_builders.load(*_name_and_split(rest), data_dir=data_dir, manual_dir=manual_dir))
        else:
            try:
                parts.append(read_path(part, problem_field, answer_field))
            except OSError as error:  # a name too long, a folder that may not be entered
                raise ValueError(f"source {shorten(part)} cannot be read ({error.strerror}); name another file or folder.") from None
    return parts[0] if len(parts) == 1 else JoinedProblems(sources, parts)


def _name_and_split(text):
    """`NAME/SPLIT`, or `NAME` for its train split."""
    name, slash, split = text.rpartition("/")
    if not slash or ")" in split:  # a gym set may have a slash among its settings
        return text, "train"
    return name, split or "train"


def _make(source, scheme, name, split, size, seed, numbers):
    """Problems that are made and not read."""
    if scheme == "generated":
        return GeneratedProblems(name, size, seed, split=split, **numbers)
    if scheme == "gym":
        from dgpo_jax.data.gym import gym_problems

        return list(gym_problems(name, split, size, seed))  # each is read many times, and slow to make
    if name != "coding":
        raise ValueError(f"{source}: no built-in set {name!r}; the only one is coding.")
    from dgpo_jax.data.coding import coding_problems

    return coding_problems(split, size, seed, numbers["operations"], numbers["slips"], numbers["unmarked"])


def read_path(source: str, problem_field: str = "problem", answer_field: str = "answer") -> list[Problem]:
    """Reads a file, or one split of a Hugging Face dataset folder."""
    name, files = _resolve(source)
    problems, places, number = [], {}, 0
    for file in files:
        before = number  # so that the numbers in ids go on from file to file
        for row in read_rows(file, (problem_field, answer_field), OPTIONAL):
            number = before + row.number
            problem = to_problem(
                row.where, row.values, number, stem=name, source=name, problem_field=problem_field, answer_field=answer_field
            )
            if problem.id in places:
                raise ValueError(f"{row.where}: id {problem.id!r} was used at {places[problem.id]} already; ids must be unique.")
            places[problem.id] = row.where
            problems.append(problem)
    if not problems:
        raise ValueError(f"{source}: it holds no problem; write one JSON object a line, or name another split.")
    return problems


def _resolve(source):
    """(what to call it, its files) of a file or of one split of a folder."""
    path, folder, split = Path(source), *source.rpartition(":")[::2]
    if path.is_dir():
        return find_files(path)
    if folder and Path(folder).is_dir():
        return find_files(folder, split)
    if path.suffix in SUFFIXES:
        return path.stem, [path]
    raise ValueError(f"source {source!r} is not {FORMS}.")


def source_files(source: str) -> list[Path]:
    """The files that the user gave which `load_problems` would read; none of what is made, nor of TFDS.

    Raises:
        ValueError: a path that is no source, or a folder that does not say which of its files are meant.
    """
    parts = (part.strip() for part in source.split(" + "))
    paths = [part for part in parts if part and part.partition(":")[0] not in MADE]
    try:
        return [file for path in paths for file in _resolve(path)[1]]
    except OSError as error:
        raise ValueError(f"source {shorten(source)} cannot be read ({error.strerror}); name another file or folder.") from None


class JoinedProblems(LazyProblems):
    """Several sources one after the other; their ids are checked to be unique among all."""

    def __init__(self, names: Sequence[str], parts: Sequence[Sequence[Problem]]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])
        source_of_id: dict[str, str] = {}
        for name, part in zip(names, parts, strict=True):
            for problem in part:
                if problem.id in source_of_id:
                    raise ValueError(f"id {problem.id!r} is in {source_of_id[problem.id]} and in {name}; ids must be unique, change one.")
                source_of_id[problem.id] = name

    def __len__(self):
        return int(self.ends[-1])

    def read(self, index):
        """The problem of the part that the index falls into."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - int(self.ends[part])]  # counted from the part's end


def fingerprint(problems: Sequence[Problem], solutions: bool = False) -> str:
    """SHA-256, in hex, of what a score depends on: id, problem, answer, tests, checker and tolerance of every problem,
    in order.

    Args:
        solutions: whether the worked solutions count too, as where they are learned from.
    """
    digest = hashlib.sha256()
    for one in problems:
        row = [one.id, one.problem, one.answer, one.tests, one.checker, one.tolerance]
        row += [one.solution] * solutions
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


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
