"""Problem sets as TFDS builders: downloaded once, kept as ArrayRecord files, read by index, TensorFlow never imported.

Another set is one more subclass of `ProblemsBuilder` and one more entry in BUILDERS.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.request import Request, urlopen

import tensorflow_datasets as tfds

from dgpo_jax.types import Problem

FIELDS = Problem._fields


class ProblemsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """JSON lines, one file per split, to records with the fields of Problem.

    Subclasses give VERSION, HOMEPAGE, LICENSE, URLS (split -> address) and `parse`. On a machine without network the
    files are read from `files`, a folder where they lie under the last part of their address.
    """

    HOMEPAGE: str
    LICENSE: str
    URLS: dict[str, str]
    # TFDS looks for a checksum file beside the code, by way of importlib_resources, which it does not install on
    # Python 3.11. None says there is no such file; addresses name a commit instead.
    code_path = None

    def __init__(self, *, files: str | None = None, **arguments):
        self.files = files
        super().__init__(**arguments)

    @staticmethod
    def parse(row: dict) -> dict[str, str]:
        """One row of the origin -> problem, answer, solution."""
        raise NotImplementedError

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in FIELDS}),
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            disable_shuffling=True,  # the order of the origin, so that "the first 100" means the same to everyone
        )

    def _split_generators(self, dl_manager):
        if self.files:
            paths = {split: find_by_hand(self.files, url) for split, url in self.URLS.items()}
        else:
            for url in self.URLS.values():  # without a network TFDS would retry for three minutes
                urlopen(Request(url, method="HEAD"), timeout=20).close()
            paths = dl_manager.download(self.URLS)
        return {split: self._generate_examples(split, path) for split, path in paths.items()}

    def _generate_examples(self, split, path):
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                try:
                    parsed = self.parse(json.loads(line))
                except (ValueError, KeyError) as error:
                    raise ValueError(f"{path}:{number + 1}: no row of {self.name} ({error}); fetch it again.") from None
                row_id = f"{self.name}-{split}-{number:04d}"
                yield number, {"id": row_id, "source": f"tfds:{self.name}/{split}", **parsed}


GSM8K = (
    "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
    "/grade_school_math/data/"
)


class Gsm8k(ProblemsBuilder, skip_registration=True):
    """Grade-school word problems of OpenAI, 7473 to train on and 1319 to test on."""

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = "https://github.com/openai/grade-school-math"
    LICENSE = "MIT (c) 2021 OpenAI"
    URLS = {"train": GSM8K + "train.jsonl", "test": GSM8K + "test.jsonl"}  # noqa: RUF012 - read only

    @staticmethod
    def parse(row):
        """The answer is what follows the last `####`, without the commas of thousands."""
        _, mark, answer = row["answer"].rpartition("####")
        if not mark or not answer.strip():
            raise ValueError("no answer after ####")
        return {"problem": row["question"], "answer": answer.strip().replace(",", ""), "solution": row["answer"]}


BUILDERS = {"gsm8k": Gsm8k}


class DataSourceProblems(Sequence):
    """Problems of one built split, read by index from disk."""

    def __init__(self, data_source):
        self.data_source = data_source

    def __len__(self):
        return len(self.data_source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        record = self.data_source[index % len(self)]
        return Problem(**{field: record[field].decode("utf-8") for field in FIELDS})


def load(name: str, split: str, *, data_dir: str | None = None, manual_dir: str | None = None) -> Sequence[Problem]:
    """Builds the set if need be, then opens one split.

    Args:
        data_dir: where built sets are kept; None means TFDS's own, ~/tensorflow_datasets.
        manual_dir: folder with the files of the set, fetched by hand; None means download.
    Raises:
        ValueError: no such set or split, a file missing in manual_dir, or no network.
    """
    if name not in BUILDERS:
        raise ValueError(f"tfds:{name}: no such set; choose one of {', '.join(BUILDERS)}.")
    if split not in BUILDERS[name].URLS:
        raise ValueError(f"tfds:{name}/{split}: no such split; choose one of {', '.join(BUILDERS[name].URLS)}.")
    builder = BUILDERS[name](data_dir=data_dir, files=manual_dir, file_format="array_record")
    # No look-up in Google's bucket of prepared sets: it has none of these, and the look-up needs a network.
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=settings)
    except (OSError, tfds.download.DownloadError) as error:
        files = ", ".join(BUILDERS[name].URLS.values())
        raise ValueError(
            f"tfds:{name} cannot be built ({error}); put {files} into a folder and name it manual_dir."
        ) from error
    return DataSourceProblems(builder.as_data_source(split))


def find_by_hand(folder, url) -> Path:
    """The file that a download of the address would have given."""
    path = Path(folder) / url.rpartition("/")[2]
    if not path.is_file():
        raise ValueError(f"{path}: no such file; fetch it from {url} or leave manual_dir empty to download.")
    return path
