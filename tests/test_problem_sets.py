"""Published sets: how a row of each reads, which files are accepted, what is built from them, and what happens without a network."""

import hashlib
import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpo_jax.data import tfds_builders
from dgpo_jax.data.problem_sets import DAPO_AFTER, DAPO_BEFORE, SETS
from dgpo_jax.data.problems import fingerprint, load_problems
from dgpo_jax.data.tfds_builders import read_origin, read_own
from dgpo_jax.types import Problem

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TOM = {"problem": "2 + 2?", "answer": "4"}


def write_origin(folder, name, split, rows):
    """Rows in the format of the set's own file, under its own name."""
    path = folder / SETS[name].origins[split].url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name in ("math_train", "deepscaler"):  # arrays; the other .json files have a row a line
        path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(text, truth):
    return {"prompt": [{"content": text, "role": "user"}], "reward_model": {"ground_truth": truth, "style": "rule"}, "ability": "x"}


CODE = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"], "timeout": 3, "max_test_cases": 16})

# (set, split, a row as its authors write it, what is read of it)
ROWS = [
    ("gsm8k", "test", {"question": "How much?", "answer": "1000+200=1,200\n#### 1,200"},
     {"problem": "How much?", "answer": "1200", "solution": "1000+200=1,200\n#### 1,200"}),
    ("math500", "test", {**TOM, "solution": "It is $\\boxed{4}$.", "subject": "Algebra", "level": 2, "unique_id": "test/1.json"},
     {**TOM, "solution": "It is $\\boxed{4}$."}),
    ("math_train", "train", {**TOM, "difficulty": 5.0, "type": "Algebra"}, TOM),
    ("aime24", "test", {"messages": [{"role": "user", "content": "2 + 2?"}], "meta": {**TOM, "answer": "004", "solution": "4"}}, {**TOM, "answer": "004"}),
    ("aime25", "test", {"meta": {"problem": "2 + 2?", "solution": "4", "Year": 2025}, "messages": []}, TOM),
    ("hmmt25", "test", {"id": 9, "messages": [{"role": "user", "content": "2 + 2?"}], "solution": "\\boxed{4}", "answer": "4"}, TOM),
    ("amc23", "test", {"id": 0, **TOM, "answer": 27.0, "question": "2 + 2?"}, {**TOM, "answer": "27"}),
    ("amc23", "test", {**TOM, "answer": 2.5}, {**TOM, "answer": "2.5"}),
    # the last box, with braces in it; rounded, hence the tolerance
    ("minerva", "test", {"problem": "How fast?", "solution": "\\boxed{1} and then \\boxed{ \\frac{1}{2} } m/s", "type": "Physics"},
     {"problem": "How fast?", "answer": "\\frac{1}{2}", "solution": "\\boxed{1} and then \\boxed{ \\frac{1}{2} } m/s", "tolerance": 1e-4}),
    ("olympiadbench", "test", {"question": "Which?", "final_answer": ["$123$,$456$"], "solution": ["So."], "error": None},
     {"problem": "Which?", "answer": "123, 456", "solution": "So."}),  # two answers, and not 123456
    ("olympiadbench", "test", {"question": "How much?", "final_answer": ["$4.2$"], "error": "1e-1"},
     {"problem": "How much?", "answer": "4.2", "tolerance": 0.1 / 4.2}),
    ("olympiadbench", "test", {"question": "How much?", "final_answer": ["$x+1$"], "error": "1e-1"},
     {"problem": "How much?", "answer": "x+1"}),  # no plain number, nothing to be relative to
    ("olympiadbench", "test", {"question": "How much?", "final_answer": ["0"], "error": "1e-1"}, {"problem": "How much?", "answer": "0"}),
    ("olympiadbench", "test", {"question": "How much?", "final_answer": ["0.05"], "error": "1e-1"},
     {"problem": "How much?", "answer": "0.05"}),  # an error above the answer would pass anything
    ("deepscaler", "train", {**TOM, "solution": "So 4."}, {**TOM, "solution": "So 4."}),
    ("dapo_math_17k", "train", chat(f"{DAPO_BEFORE}2 + 2?{DAPO_AFTER}", "4"), TOM),
    ("klear_math", "train", chat("2 + 2?", "4"), TOM),
    ("klear_code", "train", chat("Add one.", CODE),
     {"problem": "Add one.", "answer": "", "checker": "code", "tests": '{"inputs": ["1\\n"], "outputs": ["2\\n"], "time_limit": 3}'}),
]  # fmt: skip


@pytest.mark.parametrize("name, split, row, expected", ROWS)
def test_a_row_of_every_set_reads_as_its_authors_meant_it(tmp_path, name, split, row, expected):
    (problem,) = read_origin(name, split, write_origin(tmp_path, name, split, [row]))
    assert problem == Problem(**{"id": f"{name}-{split}-0000", "source": f"tfds:{name}/{split}", **expected})


def test_every_set_has_a_case_above_and_says_where_it_is_from():
    assert {(name, split) for name, split, *_ in ROWS} | {("gsm8k", "train")} == {
        (name, split) for name, problem_set in SETS.items() for split in problem_set.origins
    }
    for problem_set in SETS.values():
        assert problem_set.licence and problem_set.citation and problem_set.homepage.startswith("https://")
        for origin in problem_set.origins.values():
            assert re.fullmatch(r"https://(raw\.githubusercontent\.com|huggingface\.co/datasets)/.+\.(jsonl|json|parquet)", origin.url)
            assert origin.sha256 is None or re.fullmatch("[0-9a-f]{64}", origin.sha256)
            # a checksum holds for a fixed revision only
            assert origin.sha256 is None or re.search("/[0-9a-f]{40}/", origin.url)


# (set, split, row, what is said)
REFUSED = [
    ("gsm8k", "test", {"question": "How much?", "answer": "12"}, 'answer is "12"; it must end in #### and the answer.'),
    ("gsm8k", "train", {"problem": "x", "answer": "#### 1"}, "no field 'question' among 'problem', 'answer'"),
    ("math500", "test", {**TOM, "answer": ""}, "it has no answer."),  # a training set would leave it out
    ("aime24", "test", TOM, "no field 'meta' among 'problem', 'answer'"),
    ("minerva", "test", {"problem": "x", "solution": "\\boxed{1"}, "it must hold a \\boxed{answer}"),
    ("minerva", "test", {"problem": "x", "solution": "12"}, "it must hold a \\boxed{answer}"),
    ("olympiadbench", "test", {"question": "x", "final_answer": None}, "no '0' in field 'final_answer', which holds null"),
    ("dapo_math_17k", "train", chat("2 + 2?", "4"), "it must begin and end in the instructions of DAPO-Math-17k"),
    ("klear_math", "train", {"prompt": "2 + 2?", "answer": "4"}, "no '0' in field 'prompt', which holds \"2 + 2?\""),
    ("klear_code", "train", chat("x", "print(1)"), 'reward_model.ground_truth is "print(1)", which is not JSON'),
    ("klear_code", "train", chat("x", "[1]"), "reward_model.ground_truth holds [1]; it must be an object"),
    ("klear_code", "train", chat("x", '{"inputs": []}'), "has inputs; it must have inputs and outputs"),
]


@pytest.mark.parametrize("name, split, row, message", REFUSED)
def test_a_row_of_another_shape_is_refused_with_its_place_its_fields_and_what_to_do(tmp_path, name, split, row, message):
    sound = next(sound for set_name, _, sound, _ in ROWS if set_name == name)
    rows = [row, row] if name == "dapo_math_17k" else [sound, row]  # the second row is at fault
    path = write_origin(tmp_path, name, split, rows)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        list(read_origin(name, split, path))
    said = str(refusal.value)
    assert re.match(re.escape(str(path)) + "(:|: row )[12]: not a row of", said)
    assert ", ".join(map(repr, row)) in said and f"as {name}_{split}.jsonl" in said


def test_what_is_left_out_of_a_training_set_is_counted(tmp_path, caplog):
    truths = ["4", "4", "5", "", "4"]
    texts = ["2 + 2?", "2 +  2?\n", "2 + 2?", "3 + 3?", "2+2?"]  # blanks do not make another problem; none at all may
    path = write_origin(tmp_path, "klear_math", "train", [chat(text, truth) for text, truth in zip(texts, truths, strict=True)])
    with caplog.at_level(logging.WARNING):
        problems = list(read_origin("klear_math", "train", path))
    assert [p.id for p in problems] == ["klear_math-train-0000", "klear_math-train-0004"]  # rows of the origin, counted from 0
    expected = "1 without an answer, 1 repeats of a problem, 1 repeats with another answer); 2 problems remain."
    assert caplog.messages == [f"tfds:klear_math/train: rows were left out ({expected}"]


def test_programs_whose_tests_are_programs_are_left_out_and_counted(tmp_path, caplog):
    rows = [chat("a", CODE), chat("b", '{"functional": "assert f(1)"}'), chat("c", '{"pytest": "..."}')]
    with caplog.at_level(logging.WARNING):
        assert len(list(read_origin("klear_code", "train", write_origin(tmp_path, "klear_code", "train", rows)))) == 1
    assert "(2 not checkable here); 1 problems remain" in caplog.text


def test_rows_the_user_converted_have_the_tolerance_of_their_set_unless_they_say(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", TOM, {**TOM, "id": "mine", "tolerance": 0.5, "source": "here"})
    assert list(read_own("minerva", "test", path)) == [
        Problem("minerva-test-1", "2 + 2?", "4", "tfds:minerva/test", tolerance=1e-4),
        Problem("mine", "2 + 2?", "4", "here", tolerance=0.5),
    ]
    write_lines(path, {**TOM, "answer": "8", "error": "1e-1"}, {**TOM, "error": None})
    assert [p.tolerance for p in read_own("olympiadbench", "test", path)] == [0.0125, 1e-6]
    write_lines(path, {**TOM, "id": "a"}, {**TOM, "id": "a"})
    with pytest.raises(ValueError, match=r"own.jsonl:2: id 'a' was used at .*own.jsonl:1 already"):
        list(read_own("minerva", "test", path))


TFDS_SCRIPT = """
import sys
from dgpo_jax.data.problems import load_problems
problems = load_problems("tfds:gsm8k/test", data_dir=sys.argv[1], manual_dir=sys.argv[2])
assert [problem.answer for problem in problems[:]] == ["1200", "-3"], problems[:]
assert problems[1].problem == "Café?" and problems[-1].id == "gsm8k-test-2"
assert problems[1].tolerance == 1e-6 and problems[0].tolerance == 0.1  # to the last bit
for module in ("tensorflow", "jax", "flax", "torch"):
    assert module not in sys.modules, module
"""


def test_a_set_is_built_from_a_file_converted_by_hand_without_tensorflow(tmp_path):
    rows = [{"problem": "How much?", "answer": 1200, "tolerance": 0.1}, {"problem": "Café?", "answer": "-3"}]
    write_lines(tmp_path / "gsm8k_test.jsonl", *rows)  # no train: each split is built by itself
    command = [sys.executable, "-c", TFDS_SCRIPT, str(tmp_path / "built"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def load(tmp_path, source, manual_dir):
    return load_problems(source, data_dir=str(tmp_path / "built"), manual_dir=str(manual_dir))


def test_another_file_is_another_build_and_the_same_file_the_same(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(tfds_builders, "read_own", lambda *arguments: read.append(arguments) or read_own(*arguments))
    path = write_lines(tmp_path / "aime24.jsonl", TOM)
    assert [p.answer for p in load(tmp_path, "tfds:aime24/test", tmp_path)] == ["4"]
    write_lines(path, {**TOM, "answer": "5"})
    assert [p.answer for p in load(tmp_path, "tfds:aime24/test", tmp_path)] == ["5"]  # the first build is not taken for it
    write_lines(path, TOM)
    assert [p.answer for p in load(tmp_path, "tfds:aime24/test", tmp_path)] == ["4"] and len(read) == 2
    (tmp_path / "aime24_test.jsonl").write_bytes(path.read_bytes())
    path.unlink()
    assert [p.answer for p in load(tmp_path, "tfds:aime24/test", tmp_path)] == ["4"] and len(read) == 2  # the name is no matter


def with_checksum(monkeypatch, name, split, path):
    """As if the file were the published one."""
    origin = SETS[name].origins[split]._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(SETS, name, SETS[name]._replace(origins={split: origin}))


def test_a_published_file_is_taken_from_manual_dir_and_its_checksum_compared(tmp_path, monkeypatch):
    row = next(row for name, _, row, _ in ROWS if name == "minerva")
    wrong = write_origin(tmp_path, "minerva", "test", [row])  # as test.jsonl, which is what five sets call their file
    given, published = hashlib.sha256(wrong.read_bytes()).hexdigest(), SETS["minerva"].origins["test"].sha256
    with pytest.raises(ValueError, match=rf"test.jsonl: its SHA-256 is {given}, but that of https.* is {published}; .*/minerva/"):
        load(tmp_path, "tfds:minerva/test", tmp_path)
    right = write_origin(tmp_path / "minerva", "minerva", "test", [row, row])  # a folder of its own goes first
    with_checksum(monkeypatch, "minerva", "test", right)
    assert [p.id for p in load(tmp_path, "tfds:minerva/test", tmp_path)] == ["minerva-test-0000", "minerva-test-0001"]
    write_lines(tmp_path / "minerva.jsonl", TOM)  # and what the user converted before both, and unchecked
    assert [p.id for p in load(tmp_path, "tfds:minerva/test", tmp_path)] == ["minerva-test-1"]


# (source, what is said)
MISSING = [
    ("tfds:gsm8", "tfds:gsm8: no such set; choose one of gsm8k, math500, "),
    ("tfds:gsm8k/validation", "no such split; choose one of train, test"),
    ("tfds:aime24", "tfds:aime24/train: no such split; choose one of test"),
    ("tfds:gsm8k/train", "no such file as gsm8k_train.jsonl (with fields `problem` and `answer`), gsm8k/train.jsonl or train.jsonl; fetch"),
    ("tfds:aime24/test", "no such file as aime24_test.jsonl, aime24.jsonl (with"),
]


@pytest.mark.parametrize("source, message", MISSING)
def test_a_tfds_source_that_cannot_be_read_is_refused(tmp_path, source, message):
    write_lines(tmp_path / "gsm8k.jsonl", TOM)  # does not say which split it is
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, source, tmp_path)


def test_a_faulty_row_stops_the_build_with_its_place_and_leaves_no_build(tmp_path):
    path = write_lines(tmp_path / "aime24.jsonl", TOM, {"problem": "x"})
    with pytest.raises(ValueError, match=r"aime24.jsonl:2: no field 'answer' among 'problem'"):
        load(tmp_path, "tfds:aime24/test", tmp_path)
    with pytest.raises(ValueError, match=r"aime24.jsonl:2: no field 'answer'"):
        load(tmp_path, "tfds:aime24/test", tmp_path)
    write_lines(path, TOM)
    assert len(load(tmp_path, "tfds:aime24/test", tmp_path)) == 1


def test_a_missing_network_is_reported_at_once(tmp_path, monkeypatch):
    asked = []

    def unreachable(request, timeout):
        asked.append((request.full_url, request.get_method(), timeout))
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(tfds_builders, "urlopen", unreachable)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"tfds:gsm8k/test cannot be built \(.*name resolution.*; put the file https://raw.*test.jsonl"):
        load_problems("tfds:gsm8k/test", data_dir=str(tmp_path))
    assert time.monotonic() - start < 5  # TFDS alone tries for three minutes
    assert asked == [(SETS["gsm8k"].origins["test"].url, "HEAD", 10)]


class Reached:
    def close(self):
        pass


def test_a_download_is_checked_built_once_and_then_needs_no_network(tmp_path, monkeypatch):
    row = next(row for name, _, row, _ in ROWS if name == "hmmt25")
    path = write_origin(tmp_path, "hmmt25", "test", [row])
    monkeypatch.setattr(tfds_builders, "urlopen", lambda *_, **__: Reached())
    monkeypatch.setattr(tfds_builders.tfds.download.DownloadManager, "download", lambda self, url: path)
    with pytest.raises(ValueError, match=r"its SHA-256 is [0-9a-f]{64}, but that of https.*; fetch it from there, or delete it"):
        load_problems("tfds:hmmt25/test", data_dir=str(tmp_path / "built"))
    with_checksum(monkeypatch, "hmmt25", "test", path)
    assert load_problems("tfds:hmmt25/test", data_dir=str(tmp_path / "built"))[0].answer == "4"
    path.unlink()
    assert load_problems("tfds:hmmt25/test", data_dir=str(tmp_path / "built"))[0].answer == "4"


# (set, split, rows, tolerances other than the default)
PUBLIC = [
    ("gsm8k", "train", 7473, {}), ("gsm8k", "test", 1319, {}), ("math500", "test", 500, {}), ("math_train", "train", 7468, {}),
    ("aime24", "test", 30, {}), ("aime25", "test", 30, {}), ("hmmt25", "test", 30, {}), ("amc23", "test", 40, {}),
    ("minerva", "test", 272, {1e-4: 272}),
    ("olympiadbench", "test", 675, {0.1 / 4.2: 1}),  # one row has an error, 1e-1 of 4.2
]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if not SHARED.is_dir():
        pytest.skip("the files of the public sets are not here")
    return tmp_path_factory.mktemp("built")


@pytest.mark.parametrize("name, split, rows, tolerances", PUBLIC)
def test_the_public_sets_are_built_from_files_put_there_by_hand(built, name, split, rows, tolerances):
    problems = load_problems(f"tfds:{name}/{split}", data_dir=str(built), manual_dir=str(SHARED))
    assert len(problems) == rows
    found = [p.tolerance for p in problems]
    assert {t: found.count(t) for t in set(found) - {1e-6}} == tolerances
    file = next(path for path in (SHARED / f"{name}_{split}.jsonl", SHARED / f"{name}.jsonl") if path.is_file())
    given = [p._replace(tolerance=q.tolerance) for p, q in zip(load_problems(str(file)), problems, strict=True)]
    assert fingerprint(problems) == fingerprint(given)  # but for the set's tolerance, what is built is what was given
