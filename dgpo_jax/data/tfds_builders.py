"""Published problem sets by TFDS: downloaded once, kept as ArrayRecord files, read by index, TensorFlow never imported.

Which sets there are is in `problem_sets.SETS`. A build belongs to the file that it was made from: its folder is
DATA_DIR/SET_SPLIT_KEY/VERSION, the key from the file's checksum, so that another file is another build.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import tensorflow_datasets as tfds

from dgpo_jax.data.problem_sets import SETS, Origin
from dgpo_jax.data.rows import LazyProblems, to_problem
from dgpo_jax.data.tables import Row, read_rows
from dgpo_jax.types import Problem

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """The file that a build is made from."""

    path: Path | None  # None = to be downloaded
    own: bool  # True = converted by the user, with our names for the fields; False = as its authors wrote it
    key: str  # changes with the file's content


class ProblemsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One file to one split of records with the fields of Problem."""

    VERSION = tfds.core.Version("2.0.0")  # of what a build holds; raised when a `parse` or the fields change
    # TFDS looks for a checksum file beside the code, by way of importlib_resources, which it does not install on
    # Python 3.11. None says there is no such file; checksums are in SETS.
    code_path = None

    def __init__(self, name: str, split: str, source: Source, **arguments):
        self.set_name, self.split, self.source = name, split, source
        self.name = f"{name}_{split}_{source.key}"  # TFDS names the folder by it
        super().__init__(file_format="array_record", **arguments)

    def _info(self):
        problem_set = SETS[self.set_name]
        return tfds.core.DatasetInfo(
            builder=self,
            # The tolerance is text too: a float64 feature would be stored in 32 bits.
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in Problem._fields}),
            homepage=problem_set.homepage,
            license=problem_set.licence,
            citation=problem_set.citation,
            disable_shuffling=True,  # the order of the origin, so that "the first 100" means the same to everyone
        )

    def _split_generators(self, dl_manager):
        path, origin = self.source.path, SETS[self.set_name].origins[self.split]
        if path is None:
            # Without a network TFDS would retry for three minutes.
            urlopen(Request(origin.url, method="HEAD"), timeout=10).close()
            path = Path(dl_manager.download(origin.url))
            check_sum(path, file_sum(path), origin, "delete it, so that it is downloaded again")
        return {self.split: self._generate_examples(path)}

    def _generate_examples(self, path):
        read = read_own if self.source.own else read_origin
        for number, problem in enumerate(read(self.set_name, self.split, path)):
            yield number, {field: str(value) for field, value in problem._asdict().items()}


def read_origin(name: str, split: str, path) -> Iterator[Problem]:
    """Yields the problems of a file as its authors wrote it.

    Of a training set, rows without an answer and repeats of a problem are left out; what is left out is counted in a
    warning. An evaluation set is whole or refused.
    """
    problem_set = SETS[name]
    answers: dict[str, str] = {}  # of the problems so far, blanks aside
    left_out = dict.fromkeys(("without an answer", "repeats of a problem", "repeats with another answer", "not checkable here"), 0)
    for index, row in enumerate(read_rows(path, suffix=Path(problem_set.origins[split].url).suffix)):
        fields = parse_origin(name, split, row)
        words = " ".join(fields["problem"].split()) if fields else ""
        if not fields:
            left_out["not checkable here"] += 1
        elif not fields["answer"].strip() and "tests" not in fields:
            left_out["without an answer"] += 1
        elif words in answers and split == "train":
            same = fields["answer"] == answers[words]
            left_out["repeats of a problem" if same else "repeats with another answer"] += 1
        else:
            answers[words] = fields["answer"]
            yield Problem(
                id=f"{name}-{split}-{index:04d}", source=f"tfds:{name}/{split}",
                tolerance=problem_set.tolerance(row.values, fields["answer"]), **fields,
            )  # fmt: skip
    if any(left_out.values()):
        counts = ", ".join(f"{count} {why}" for why, count in left_out.items() if count)
        log.warning("tfds:%s/%s: rows were left out (%s); %d problems remain.", name, split, counts, len(answers))


def parse_origin(name: str, split: str, row: Row) -> dict[str, str] | None:
    """The fields of a row as the authors wrote it; refused, with its place, if it is something else."""
    try:
        fields = SETS[name].parse(row.values)
        if split != "train" and not (fields and fields["answer"].strip()):
            raise ValueError("it has no answer.")
        return fields
    except ValueError as error:
        there = ", ".join(map(repr, row.values)) or "none"
        raise ValueError(
            f"{row.where}: not a row of {name} as its authors wrote it: {error} Its fields are {there}. Fetch the file again; or"
            f" convert it to fields `problem` and `answer`, and put it into manual_dir as {name}_{split}.jsonl."
        ) from None


def read_own(name: str, split: str, path) -> Iterator[Problem]:
    """Yields the problems of a file that the user converted; the set's tolerance is that of rows that have none."""
    places: dict[str, str] = {}
    for row in read_rows(path):
        tolerance = SETS[name].tolerance(row.values, str(row.values.get("answer", "")))
        problem = to_problem(
            row.where, row.values, row.number, stem=f"{name}-{split}", source=f"tfds:{name}/{split}", tolerance=tolerance
        )
        if problem.id in places:
            raise ValueError(f"{row.where}: id {problem.id!r} was used at {places[problem.id]} already; ids must be unique.")
        places[problem.id] = row.where
        yield problem


def find_source(name: str, split: str, manual_dir: str | None) -> Source:
    """Where the split's file is: in manual_dir, converted or as published, or yet to be downloaded."""
    origin = SETS[name].origins[split]
    if not manual_dir:
        return Source(None, False, make_key(origin.sha256 or origin.url, own=False))
    folder, published = Path(manual_dir), origin.url.rpartition("/")[2]
    own = [f"{name}_{split}.jsonl", *([f"{name}.jsonl"] if len(SETS[name].origins) == 1 else [])]
    for path in (folder / entry for entry in (*own, f"{name}/{published}", published)):
        if path.is_file():
            found = file_sum(path)
            if path.name not in own:
                check_sum(path, found, origin, f"if it belongs to another set, put this set's into {folder / name}/")
            return Source(path, path.name in own, make_key(found, own=path.name in own))
    raise ValueError(
        f"{folder}: no such file as {', '.join(own)} (with fields `problem` and `answer`), {name}/{published} or {published};"
        f" fetch it from {origin.url} or leave manual_dir empty to download."
    )


def check_sum(path, found: str, origin: Origin, fix: str):
    """Refuses a file that is not the one that was parsed when the set was written down."""
    if origin.sha256 not in (None, found):
        raise ValueError(
            f"{path}: its SHA-256 is {found}, but that of {origin.url} is {origin.sha256}; fetch it from there, or {fix}."
        )


def file_sum(path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_key(content: str, *, own: bool) -> str:
    """A short name for a file: the same bytes read in the two ways are two builds."""
    return hashlib.sha256(f"{content} {own}".encode()).hexdigest()[:12]


class BuiltProblems(LazyProblems):
    """Problems of one built split, read by index from disk."""

    def __init__(self, data_source):
        self.data_source = data_source

    def __len__(self):
        return len(self.data_source)

    def read(self, index):
        """One record, decoded."""
        record = self.data_source[index]
        problem = Problem(*(record[field].decode("utf-8") for field in Problem._fields))
        return problem._replace(tolerance=float(problem.tolerance))


def load(name: str, split: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> Sequence[Problem]:
    """Builds the split if need be, then opens it.

    Args:
        data_dir: where built sets are kept; None means TFDS's own, ~/tensorflow_datasets.
        manual_dir: folder with the files of the set, fetched by hand; None means download.
    Raises:
        ValueError: no such set or split, a file missing or wrong in manual_dir, or no network.
    """
    if name not in SETS:
        raise ValueError(f"tfds:{name}: no such set; choose one of {', '.join(SETS)}.")
    if split not in SETS[name].origins:
        raise ValueError(f"tfds:{name}/{split}: no such split; choose one of {', '.join(SETS[name].origins)}.")
    tfds.disable_progress_bar()  # a set is built in a second or two, and its bars are four lines
    builder = ProblemsBuilder(name, split, find_source(name, split, manual_dir), data_dir=data_dir)
    # No look-up in Google's bucket of prepared sets: it has none of these, and the look-up needs a network.
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=settings)
    except (OSError, tfds.download.DownloadError) as error:
        raise ValueError(
            f"tfds:{name}/{split} cannot be built ({error}); put the file {SETS[name].origins[split].url} into a folder and"
            " name it manual_dir."
        ) from error
    return BuiltProblems(builder.as_data_source(split))
