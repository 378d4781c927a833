"""Parquet, Arrow and JSON files, and Hugging Face dataset folders. The reason stands beside each case."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpo_jax.data.problems import load_problems
from dgpo_jax.data.tables import read_rows

TOM = {"problem": "2 + 2?", "answer": "4"}
VERL = {
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"}],
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "dotted.name": "5",
}
VERL_FIELDS = {"problem_field": "prompt.1.content", "answer_field": "reward_model.ground_truth"}


def write(path, rows):
    """The rows in the format that the path names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def problems(*numbers):
    return [{"problem": f"{n}?", "answer": str(n)} for n in numbers]


def answers(source, **fields):
    return [int(problem.answer) for problem in load_problems(str(source), **fields)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_every_format_gives_the_same_problems(tmp_path, suffix):
    rows = [
        {**TOM, "id": "a", "tolerance": 0.5, "checker": "math"},
        {"problem": "half?", "answer": "0.5", "id": None, "tolerance": None, "checker": None},
        {"problem": "é?", "answer": "1", "id": None, "tolerance": None, "checker": None},
    ]
    read = load_problems(str(write(tmp_path / f"set.{suffix}", rows)))
    assert [(p.id, p.problem, p.answer, p.tolerance) for p in read] == [
        ("a", "2 + 2?", "4", 0.5), ("set-2", "half?", "0.5", 1e-6), ("set-3", "é?", "1", 1e-6),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_dotted_names_reach_into_nested_fields(tmp_path, suffix):
    path = str(write(tmp_path / f"verl.{suffix}", [VERL]))
    assert load_problems(path, **VERL_FIELDS)[0][:3] == ("verl-1", "2 + 2?", "4")
    assert load_problems(path, problem_field="prompt.0.content", answer_field="dotted.name")[0][1:3] == ("Think.", "5")


# (names of the fields, what is said)
MISNAMED = [
    ({"problem_field": "question"}, "row 1: no field 'question' among 'prompt', 'reward_model', 'dotted.name'; add it or set"),
    ({"problem_field": "promt"}, "perhaps it is 'prompt': set the field's name"),
    # a chat: its last user message is the likely one, not the system message before it
    ({"problem_field": "prompt"}, "these are chat messages, name the text of one, prompt.1.content"),
    ({"problem_field": "prompt.2.content"}, "no '2' in field 'prompt', which holds [{"),
    ({"problem_field": "prompt.1"}, 'prompt.1 is {"role": "user", "content": "2 + 2?"}; it must be text'),
    ({"answer_field": "reward_model.truth"}, "no 'truth' in field 'reward_model', which holds 'style', 'ground_truth'"),
    ({"answer_field": "dotted.name.x"}, "no field 'dotted' among"),
]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize("fields, message", MISNAMED)
def test_a_field_that_is_not_there_is_refused_with_what_is(tmp_path, suffix, fields, message):
    path = write(tmp_path / f"verl.{suffix}", [VERL])
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_problems(str(path), **{**VERL_FIELDS, **fields})
    assert str(refusal.value).startswith(f"{path}: row 1: ")


def test_the_last_of_several_user_messages_is_the_one_that_is_proposed(tmp_path):
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    path = write(tmp_path / "set.jsonl", [{"problem": talk, "answer": "1"}])
    with pytest.raises(ValueError, match=r"name the text of one, problem.2.content"):
        load_problems(str(path))


def test_a_list_of_answers_is_refused_with_how_to_name_one(tmp_path):
    path = str(write(tmp_path / "set.parquet", [{"problem": "x?", "answer": ["1", "2"]}]))
    with pytest.raises(ValueError, match=r'answer is \["1", "2"\]; it must be text or a number: name one element, such as answer.0'):
        load_problems(path)
    assert answers(path, answer_field="answer.0") == [1]


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    rows = [{**TOM, "id": "a", "junk": "x", **VERL}]
    for suffix in ("parquet", "arrow"):
        path = write(tmp_path / f"set.{suffix}", rows)
        (row,) = read_rows(path, ("problem", "reward_model.ground_truth"), ("id", "tests"))
        assert list(row.values) == ["problem", "id", "reward_model"]
        (row,) = read_rows(path, ("problem", "nowhere"), ("id",))  # all, for the error that follows
        assert list(row.values) == list(rows[0])


def test_a_file_of_many_rows_is_read_in_parts(tmp_path):
    path = write(tmp_path / "set.parquet", problems(*range(3000)))  # batches of 1024, row groups of 2
    assert answers(path) == list(range(3000))


def test_json_may_be_an_array_or_a_line_each(tmp_path):
    array, lines = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(problems(1, 2)).encode())
    write(lines.with_suffix(".jsonl"), problems(1, 2)).rename(lines)
    assert answers(array) == answers(lines) == [1, 2]


# (file, its bytes, what is said)
UNSOUND = [
    ("a.parquet", b"PAR1 and nothing more PAR1", "a.parquet: not sound Parquet after row 0"),
    ("a.arrow", b"", "a.arrow: not sound Arrow after row 0"),
    ("a.arrow", b"\xff" * 64, "a.arrow: not sound Arrow after row 0"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.parquet: only a Git LFS pointer"),
    ("a.json", b'[{"problem": "a"},\n oops]', "a.json:2: not JSON at column 2"),
    ("a.json", b'[{"problem": "a"},\n "\xe9"]', "a.json:2: byte 0xe9 at column 3 is not UTF-8"),
    ("a.json", b'[{"problem": "a", "answer": 1}, 7]', "a.json: row 2: 7 is not an object"),
    ("a.json", b'{\n"problem": "a"}', "a.json:1: not JSON at column 2"),
    ("a.json", b"[]", "a.json: it holds no problem"),
    ("a.csv", b"problem,answer\n", "a.csv' is not generated:KIND/SPLIT"),
]


@pytest.mark.parametrize("name, content, message", UNSOUND)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(str(tmp_path / name))


def test_a_parquet_file_cut_off_is_refused(tmp_path):
    path = write(tmp_path / "set.parquet", problems(*range(100)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not sound Parquet"):
        load_problems(str(path))


# Folders


def save_to_disk(folder, splits):
    """What datasets.save_to_disk leaves: two shards a split, and what says so."""
    for split, rows in splits.items():
        names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
        for name, part in zip(names, (rows[:1], rows[1:]), strict=True):
            write(folder / split / name, part)
        state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": split}
        (folder / split / "state.json").write_text(json.dumps(state))
        (folder / split / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def test_what_save_to_disk_wrote_is_read_by_split(tmp_path):
    folder = save_to_disk(tmp_path / "mine", {"train": problems(1, 2, 3), "extra": problems(4, 5)})
    assert answers(folder) == [1, 2, 3]  # train, where nothing is said
    assert answers(f"{folder}:extra") == answers(folder / "extra") == [4, 5]
    assert [p.id for p in load_problems(f"{folder}:train")] == ["mine-train-1", "mine-train-2", "mine-train-3"]
    with pytest.raises(ValueError, match=r"no split 'test'; write .*mine:SPLIT with one of train, extra"):
        load_problems(f"{folder}:test")
    with pytest.raises(ValueError, match="leave 'train' out"):
        load_problems(f"{folder / 'extra'}:train")
    with pytest.raises(ValueError, match=r"several data sets by save_to_disk; name one of .*mine/extra"):
        load_problems(str(tmp_path))  # the folder above


def test_a_saved_folder_that_cannot_be_trusted_is_refused(tmp_path):
    folder = save_to_disk(tmp_path / "mine", {"train": problems(1, 2)})
    state = folder / "train" / "state.json"
    sound = json.loads(state.read_text())
    for change, message in [
        ({"_data_files": [{"filename": "../../outside.arrow"}]}, "'../../outside.arrow' leads out of the folder"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow: no such file"),
        ({"_data_files": []}, "state.json: lists no data files"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "rows were chosen by an index file"),
    ]:
        state.write_text(json.dumps({**sound, **change}))
        with pytest.raises(ValueError, match=re.escape(message)):
            load_problems(str(folder))
    state.unlink()
    with pytest.raises(ValueError, match=r"state.json: cannot be read"):
        load_problems(str(folder))
    for splits in ({}, {"splits": []}, {"splits": 7}):
        (folder / "dataset_dict.json").write_text(json.dumps(splits))
        with pytest.raises(ValueError, match=r"dataset_dict.json: lists no splits"):
            load_problems(str(folder))


# (files and their answers, source after the folder, expected)
BY_NAME = [
    ({"data/train-00000-of-00002.parquet": [1], "data/train-00001-of-00002-0f3a.parquet": [2], "data/test-00000-of-00001.parquet": [3]}, "", [1, 2]),
    ({"data/train-00000-of-00001.parquet": [1], "data/test-00000-of-00001.parquet": [3]}, ":test", [3]),
    ({"data/hard-00000-of-00001.parquet": [1], "data/easy-00000-of-00001.parquet": [2]}, ":hard", [1]),  # not a usual word
    ({"train.jsonl": [1], "test.jsonl": [2]}, ":test", [2]),
    ({"gsm_train.json": [1], "gsm-eval.json": [2]}, ":test", [2]),  # a word of the name; eval is test
    ({"validation/part.jsonl": [1], "train/part.jsonl": [2]}, ":validation", [1]),  # the folder's name
    ({"mine.jsonl": [1]}, "", [1]),  # the only file is train
    ({"train.jsonl": [1], "train.parquet": [2]}, "", [2]),  # one format; Parquet is what the hub itself prefers
    ({"mine.json": [1], ".cache/train.json": [2], "dataset_infos.json": [3]}, "", [1]),  # what the hub's tools leave is no data
    ({"main/train.jsonl": [1], "main/test.jsonl": [2], "other/train.jsonl": [3]}, ":main/test", [2]),  # a folder per config
]


@pytest.mark.parametrize("files, source, expected", BY_NAME)
def test_a_hub_clone_without_a_card_is_read_by_the_names_of_its_files(tmp_path, files, source, expected):
    for name, numbers in files.items():
        write(tmp_path / name, problems(*numbers))
    assert answers(f"{tmp_path}{source}") == expected


CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: [main/a-*, main/b.jsonl]
  - split: test
    path: "main/held_out.parquet"
- config_name: socratic
  data_dir: socratic
- config_name: flat
  data_files: flat/*.jsonl
- config_name: escape
  data_files: ../*.jsonl
- config_name: gone
  data_files: nowhere/*.jsonl
---
# A card

configs: [not this]
"""


def hub_clone(folder, card=CARD):
    names = "main/a-1.parquet main/a-2.parquet main/b.jsonl main/held_out.parquet socratic/train.jsonl socratic/test.jsonl flat/x.jsonl flat/y.jsonl"
    for number, name in enumerate(names.split(), start=1):
        write(folder / name, problems(number))
    write(folder.parent / "outside.jsonl", problems(99))
    (folder / "README.md").write_text(card)
    return folder


# (source after the folder, expected)
BY_CARD = [
    ("", [1, 2, 3]), (":test", [4]), (":main/test", [4]), (":socratic/test", [6]), (":socratic/", [5]),
    (":flat/", [7, 8]),  # one pattern is train
]  # fmt: skip


@pytest.mark.parametrize("source, expected", BY_CARD)
def test_the_card_of_a_hub_clone_says_which_files_are_which(tmp_path, source, expected):
    folder = hub_clone(tmp_path / "gsm")
    assert answers(f"{folder}{source}") == expected
    if source == ":main/test":
        assert load_problems(f"{folder}{source}")[0].id == "gsm-main-test-1"


# (source after the folder, what is said)
REFUSED_BY_CARD = [
    (":dev", "no split 'dev'; write"), (":dev/test", "no config 'dev'; write"), (":escape/", "'../*.jsonl' leads out of the folder"),
    (":gone/", "no file is 'nowhere/*.jsonl', which README.md names"),
]  # fmt: skip


@pytest.mark.parametrize("source, message", REFUSED_BY_CARD)
def test_what_a_card_does_not_offer_is_refused_with_what_it_does(tmp_path, source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(f"{hub_clone(tmp_path / 'gsm')}{source}")


def test_configs_without_a_default_must_be_chosen(tmp_path):
    folder = hub_clone(tmp_path / "gsm", CARD.replace("  default: true\n", ""))
    with pytest.raises(ValueError, match=r"which config is meant is not said; write .*gsm:CONFIG/SPLIT with one of main, socratic, flat"):
        load_problems(str(folder))


def test_a_card_that_is_no_yaml_is_refused_and_one_without_front_matter_ignored(tmp_path):
    folder = tmp_path / "set"
    write(folder / "train.jsonl", problems(1))
    (folder / "README.md").write_text("# Only text\n")
    assert answers(folder) == [1]
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"README.md: its front matter is not YAML"):
        load_problems(str(folder))


# (files, what is said)
UNCLEAR = [
    (["one.jsonl", "two.jsonl"], "nothing says which of its files are which split (one.jsonl, two.jsonl); name one of the files"),
    (["validation.jsonl", "test.jsonl"], "which split is meant is not said; write"),
    (["notes.csv"], "there is no .jsonl, .json, .parquet, .arrow file in it"),
]


@pytest.mark.parametrize("files, message", UNCLEAR)
def test_a_folder_that_does_not_tell_is_refused_and_not_guessed_at(tmp_path, files, message):
    for name in files:
        write(tmp_path / name, problems(1))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(str(tmp_path))


def test_ids_go_on_over_the_shards_of_a_split_and_are_unique_among_them(tmp_path):
    first, second = (tmp_path / f"train-0000{i}-of-00002.jsonl" for i in range(2))
    first.write_text('{"problem": "a", "answer": 1}\n\n{"problem": "b", "answer": 2}\n')  # the blank line counts
    second.write_text('{"problem": "c", "answer": 3}\n')
    name = tmp_path.name
    assert [p.id for p in load_problems(str(tmp_path))] == [f"{name}-train-1", f"{name}-train-3", f"{name}-train-4"]
    second.write_text(json.dumps({**TOM, "id": f"{name}-train-3"}))
    with pytest.raises(ValueError, match=r"00001-of-00002.jsonl:1: id .* was used at .*00000-of-00002.jsonl:3 already"):
        load_problems(str(tmp_path))


def test_an_arrow_file_with_a_damaged_offset_is_refused_where_it_would_end_the_process(tmp_path):
    table = pa.table({"problem": ["2 + 2?", "3 + 3?"], "answer": ["4", "6"]})
    with pa.ipc.new_file(tmp_path / "set.arrow", table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "set.arrow").read_bytes()
    offsets = np.array([0, 6, 12], np.int32).tobytes()  # of the two problems in the text that follows
    assert content.count(offsets) == 1
    (tmp_path / "set.arrow").write_bytes(content.replace(offsets, np.array([0, 6, 2**30], np.int32).tobytes()))
    with pytest.raises(ValueError, match=r"set\.arrow: not sound Arrow after row 0 .*; fetch the file again"):
        load_problems(str(tmp_path / "set.arrow"))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    columns = [pa.array(["2 + 2?"]), pa.array(["4"]), pa.array(["5"])]
    table = pa.Table.from_arrays(columns, names=["problem", "answer", "answer"])
    pq.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(ValueError, match='column "answer" is there twice'):
        load_problems(str(tmp_path / "set.parquet"))


def test_text_that_is_none_and_times_beyond_the_calendar_are_refused_by_file(tmp_path):
    no_text = pa.Array.from_buffers(pa.string(), 1, [None, *map(pa.py_buffer, (bytes(4) + b"\1\0\0\0", b"\xff"))])
    late = pa.array([2**62]).view(pa.timestamp("us"))
    for name, column in (("text", no_text), ("times", late)):
        table = pa.table({"problem": ["2 + 2?"], "answer": ["4"], "id": column})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=f"{name}.parquet: not sound Parquet after row 0"):
            load_problems(str(tmp_path / f"{name}.parquet"))


def test_a_row_of_many_fields_is_refused_in_one_readable_line(tmp_path):
    row = {f"field {number}": 1 for number in range(1000)} | {"x" * 5000: 1}
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="'field 19' and 981 more") as error:
        load_problems(str(tmp_path / "set.jsonl"))
    assert len(str(error.value)) < 600
