"""Damaged and hostile input of every kind, made up by hypothesis: a short message that says where, never anything else.

Whatever is read may be accepted or refused. Accepted, it must be usable and complete; refused, it is a ValueError of one line
that names the file (or exit code 2, for a command line). Any other exception fails the test, and so does a kind of input of
which nothing is accepted or nothing refused: such a test would see nothing. The same inputs are tried every time; how many:

    python -m pytest -s tests/test_bad_input_fuzzed.py
"""

import contextlib
import io
import json
import logging
import math
import shutil
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from dgpo_jax.checkpoint import Checkpoints, locate, peek
from dgpo_jax.config import Config, ModelConfig, flatten, load, to_json
from dgpo_jax.data.benchmarks import parse_sets
from dgpo_jax.data.problems import load_problems
from dgpo_jax.data.prompts import Template, fit
from dgpo_jax.data.tokenizers import load_tokenizer
from dgpo_jax.metrics import MetricsWriter, read_metrics
from dgpo_jax.models import config_from_folder, load_parameters
from dgpo_jax.recipe import resolve
from dgpo_jax.types import Problem, TrainState
from dgpo_jax.workdir import claim_problems, claim_workdir, fingerprints, run_record, settle

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'tests/tiny_config.py'}"
LONGEST = 1000  # characters of a message, the long paths of temporary folders included

# What is put in the place of a value of a JSON file.
HOSTILE = st.sampled_from([
    None, True, False, 0, -1, 1.5, 1e308, math.nan, math.inf, 10**12, 10**400, "", " ", "3", "x", "a\nb", "\x00", "\x1b[31m", "\u2028",
    "é", "\ud83d", "x" * 100_000, "../x", "/etc/passwd", "[1]", "{", "code", "gym", "yarn", [], [1], [None], ["a"], [[[]]], {}, {"a": 1},
])  # fmt: skip
DAMAGED_FILES = st.sampled_from([
    b"", b"[]", b"null", b"3", b'"a"', b"{", b"{}", b"\xff\xfe", b"\x00" * 20, b"[" * 100_000, b'{"a":' + b"1" * 5000 + b"}", b'{"a": 1, "a": 2}',
])  # fmt: skip


def fuzz(examples):
    """Settings under which the same `examples` inputs are tried every time.

    A failing one is shown as it is: hypothesis would take minutes to look for a shorter one.
    """
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


class Tally:
    """What became of the inputs of one kind."""

    def __init__(self, kind):
        self.kind, self.accepted, self.refused = kind, 0, 0

    def attempt(self, call, *places):
        """The result of the call, or None where it is refused as it should be, with one of `places` in the message."""
        try:
            result = call()
        except ValueError as error:
            check_message(str(error), places)
            self.refused += 1
            return None
        self.accepted += 1
        return result

    def close(self):
        """Says how many there were, and fails where they cannot have tested anything."""
        print(f"\n{self.kind}: {self.accepted + self.refused} tried, {self.accepted} accepted, {self.refused} refused")
        assert min(self.accepted, self.refused) >= 5


def check_message(message, places):
    assert len(message.splitlines()) == 1 and len(message) <= LONGEST, message
    assert not places or any(str(place) in message for place in places), message


@st.composite
def changed(draw, value):
    """A JSON value with one of its parts replaced or removed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {name: item for name, item in value.items() if name != key}
        return rest if draw(st.integers(0, 5)) == 0 else rest | {key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(changed(value[place])), *value[place + 1 :]]
    return draw(HOSTILE)


@st.composite
def damaged(draw, content, start=2000):
    """Bytes with a few of them changed, inserted or cut off, as often near the start, where headers are, as anywhere."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, min(start, len(content)) - 1)) | st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["change", "change", "insert", "cut off"]))
        if how == "change" and content:
            content[place] = draw(st.integers(0, 255))
        elif how == "insert":
            content[place:place] = bytes(3)
        else:
            del content[place:]
    return bytes(content)


def dump(value):
    """JSON with whatever Python's reader might meet: NaN, numbers of any length, halves of characters."""
    return json.dumps(value).encode()


# Configs


def kinds_of(config, prefix=""):
    """{dotted name: its type as written} of every setting."""
    kinds = {}
    for field in fields(config):
        value = getattr(config, field.name)
        kinds |= kinds_of(value, f"{field.name}.") if is_dataclass(value) else {prefix + field.name: str(field.type)}
    return kinds


def with_setting(config, name, value):
    section, _, inner = name.rpartition(".")
    change = {section: replace(getattr(config, section), **{inner: value})} if section else {inner: value}
    return replace(config, **change)


KINDS = kinds_of(Config())
WILD = {"float": [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e-320, -1.0], "int": [10**30, -(10**30), 2**63, -1], "other": []}
WORDS = ["", "nan", "inf", "-inf", "-1", "0", "1", "1e400", "1" * 400, "0.5", "None", "True", "x", "a b", "\n", "{problem}", "'", "--", "[]", "é", "\ud83d", "\x00"]


def parse(arguments):
    """The config, or ValueError with what was printed if the command line was refused as such."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
            return load([TINY, *arguments])
    except SystemExit as stop:
        assert stop.code == 2
        message = errors.getvalue()
        assert message.strip() and "Traceback" not in message and len(message.splitlines()) <= 25
        raise ValueError(" ".join(message.split())[:LONGEST]) from None


def usable(config):
    """What every accepted config promises: numbers that devices can hold, and that it can be recorded and read again."""
    numbers = {name: value for name, value in flatten(config).items() if isinstance(value, (int, float))}
    assert all(value == 0 or 2**-126 < abs(value) < 2**127 for value in numbers.values()), numbers  # float32 holds them
    assert all(abs(value) < 2**31 for value in numbers.values() if isinstance(value, int)), numbers  # and so do counts int32
    assert json.loads(to_json(config)) == asdict(config)


def test_settings_on_the_command_line():
    tally = Tally("command lines")
    names = st.sampled_from(sorted(KINDS))
    values = st.sampled_from(WORDS) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=8)

    @fuzz(60)  # a quarter of a second each
    @given(st.lists(st.tuples(names, values), min_size=1, max_size=2))
    def attempt(overrides):
        config = tally.attempt(lambda: parse([f"--config.{name}={value}" for name, value in overrides]))
        if config is not None:
            usable(config)
            with contextlib.suppress(ValueError):  # it may still not go together with what its method was published with
                usable(resolve(config))

    attempt()
    for name in ("", "modle.width", "loss.", "data.train.x"):  # few: a second each, for the names that may be meant
        assert tally.attempt(lambda name=name: parse([f"--config.{name}=1"])) is None
    tally.close()


def test_numbers_that_no_setting_can_be():
    tally = Tally("numbers in settings")
    base = load([TINY])
    for name, kind in KINDS.items():
        for value in WILD["float" if "float" in kind else "int" if "int" in kind else "other"]:
            config = tally.attempt(lambda name=name, value=value: with_setting(base, name, value), *name.split("."))
            if config is not None:
                usable(config)
    tally.close()


class Unshowable:
    """What cannot even be put into a message."""

    def __repr__(self):
        raise ZeroDivisionError("a\nb")


# Values that a config file, which is Python, can give a setting; of every kind, so that each fits some of them.
FROM_FILES = [
    None, True, False, 0, 1, 3, -1, 2.5, 1.0, math.nan, 10**400, 10**5000, "", "x", "k2", "kl2", "3", "a\nb", "x" * 100_000, b"x", [], ["a.jsonl"],
    (), {}, {"layers": 2}, {1}, Path("x"), np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(True), np.ones(3), 1j, len, int, Config(), ModelConfig(), Unshowable(),
]  # fmt: skip


def test_values_of_every_kind_in_config_files():
    tally, base = Tally("values in config files"), load([TINY])
    for name in [*KINDS, *(field.name for field in fields(base) if is_dataclass(getattr(base, field.name)))]:
        for value in FROM_FILES:
            config = tally.attempt(lambda name=name, value=value: with_setting(base, name, value), *name.split("."))
            if config is not None:
                usable(config)
                fits = getattr(config, name) if "." not in name else getattr(getattr(config, name.split(".")[0]), name.split(".")[1])
                assert fits is value and type(value) in (type(None), bool, int, float, str, np.float64, ModelConfig)
    tally.close()


def test_lists_of_benchmarks_and_templates_of_ones_own():
    tally = Tally("lists of benchmarks, templates")
    part = st.sampled_from(["aime24", "all", "gsm8k", "=", ",", "(", ")", " ", "\n", "mine", "x.jsonl", "held_out", "chat", "{problem}", "{system}", "{", "\ud83d"])
    texts = st.lists(part, max_size=5).map("".join) | st.text(max_size=20)

    @fuzz(300)
    @given(texts)
    def attempt(text):
        tally.attempt(lambda: parse_sets(text))
        template = tally.attempt(lambda: Template(text))
        if template is not None and text != "chat":
            assert "9 + 8" in template.render("9 + 8", None)

    attempt()
    tally.close()


# Problems

TEXTS = st.sampled_from(["2 + 2?", "4", "café \U0001f600", "a\nb", "x" * 1000])
ROWS = st.builds(lambda problem, answer, more: {"problem": problem, "answer": answer} | more, TEXTS, TEXTS, st.sampled_from([
    {}, {}, {"id": "one"}, {"id": 2}, {"solution": "s", "level": [1]}, {"tolerance": 0.01}, {"checker": "code", "tests": {"a": 1}},
]))  # fmt: skip
BAD_LINES = st.sampled_from([b"3", b"null", b"[]", b"{}", b"\x00" * 20, b'{"problem": 1e999, "answer": 1}', b"{'problem': 1}", b'{"problem": "a", "problem": "b", "answer": "c"}',
    b'{"problem":' + b"[" * 900 + b"]" * 900 + b"}", b'{"problem":' + b"[" * 100_000, b'{"problem": ' + b"1" * 5000 + b', "answer": 1}', b'{"' + b"y" * 9999 + b'": 1}'])  # fmt: skip


@st.composite
def json_lines(draw):
    """(bytes of a file, how many problems it holds, or None where damage may have changed that)."""
    rows = draw(st.lists(ROWS, max_size=4))
    whole = draw(st.booleans())
    lines = [dump(row if whole else draw(st.just(row) | changed(row))) for row in rows]
    if not whole and draw(st.integers(0, 2)) == 0:
        lines.insert(draw(st.integers(0, len(lines))), draw(BAD_LINES))
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n  \n"]))
    content = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + end.join(lines) + draw(st.sampled_from([b"", b"\n"]))
    if whole:
        return content, len(rows)
    how = draw(st.sampled_from(["as it is", "as it is", "bytes", "utf-16", "latin-1"]))
    if how == "bytes":
        return draw(damaged(content)), None
    return (content if how == "as it is" else content.decode(errors="replace").encode(how, errors="replace")), None


def check_problems(problems):
    """What every set that was read promises."""
    assert len({problem.id for problem in problems}) == len(problems) > 0
    for problem in problems:
        for text in problem[:7]:
            assert isinstance(text, str) and text.encode("utf-8") is not None
        assert problem.problem.strip() and problem.id.isprintable() and 0 <= problem.tolerance < 1
        assert problem.answer.strip() if problem.checker == "math" else json.loads(problem.tests)


def test_files_of_json_lines(tmp_path):
    tally, path = Tally("files of JSON lines"), tmp_path / "set.jsonl"

    @fuzz(800)
    @given(json_lines())
    def attempt(file):
        content, count = file
        path.write_bytes(content)
        # Of one line or row where there is one; a file without any has none.
        problems = tally.attempt(lambda: load_problems(str(path)), f"{path}:", f"{path}: it holds no problem")
        if problems is not None:
            check_problems(problems)
            assert count is None or len(problems) == count  # nothing is left out in silence

    attempt()
    tally.close()


STRINGS, BYTES = pyarrow.array(["2 + 2?", "3 + 3?"]), pyarrow.array([b"a", b"\xff"])
NO_TEXT = pyarrow.Array.from_buffers(  # a column that says it is text, of bytes that are none
    pyarrow.string(), 2, [None, *(pyarrow.py_buffer(part) for part in (np.array([0, 1, 2], np.int32).tobytes(), b"\xff\xfe"))]
)
LATE = pyarrow.array([2**62, -5], pyarrow.int64())  # as times, far beyond any calendar
COLUMNS = [STRINGS, STRINGS, STRINGS, BYTES, NO_TEXT, LATE, *(LATE.view(kind) for kind in (pyarrow.timestamp("us"), pyarrow.timestamp("ns", "UTC"), pyarrow.duration("us"))),
    pyarrow.array([1.5, math.nan]), pyarrow.array([["a"], None]), pyarrow.array([{"a": "x"}, None]), pyarrow.array([True, None]), pyarrow.nulls(2), STRINGS.dictionary_encode()]  # fmt: skip


@pytest.fixture(scope="module")
def tables():
    """Columns under names -> the bytes of a .parquet file, of an .arrow file, of an Arrow stream."""

    def write(suffix, names, columns):
        table, file = pyarrow.Table.from_arrays(columns, names=names), io.BytesIO()
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            with (pyarrow.ipc.new_file if suffix == ".arrow" else pyarrow.ipc.new_stream)(file, table.schema) as writer:
                writer.write_table(table)
        return file.getvalue()

    return write


def test_files_of_columns(tmp_path, tables):
    tally = Tally("Parquet and Arrow files")
    names = st.lists(st.sampled_from(["id", "source", "checker", "tests", "tolerance", "solution", "problem", "answer", "other"]), max_size=2)

    @fuzz(600)
    @given(st.sampled_from([".parquet", ".arrow", ".stream"]), names, st.data())
    def attempt(suffix, more, data):
        columns = [data.draw(st.sampled_from(COLUMNS)) for _ in more]
        content = tables(suffix, ["problem", "answer", *more], [STRINGS, STRINGS, *columns])
        if data.draw(st.integers(0, 2)) == 0:
            content = data.draw(damaged(content, start=len(content)))
        path = tmp_path / ("set.parquet" if suffix == ".parquet" else "set.arrow")
        path.write_bytes(content)
        problems = tally.attempt(lambda: load_problems(str(path)), path)
        if problems is not None:
            check_problems(problems)

    attempt()
    tally.close()


def test_folders_of_data_sets(tmp_path):
    tally = Tally("data set folders and sources")
    card = st.sampled_from(["null", "0", "x", "[]", "{}", "[1]", "[[1]]", "'**x'", "'[a'", "'a\\0b'", "/etc", "../x", "'*'", "'test.jsonl'", "{a: 1}", "[{split: [1], path: 2}]", "[{split: train, path: test.jsonl}]",
                            "*a", "!!python/object/apply:os.getcwd []", f"'{'z' * 400}'", "http://x/y"])  # fmt: skip
    cards = st.builds(lambda name, key, value, default: f"configs:\n- config_name: {name}\n  {key}: {value}\n  default: {default}", card, st.sampled_from(["data_files", "data_dir"]), card, card)
    states = changed({"splits": ["train"], "_data_files": [{"filename": "train.jsonl"}]}).map(dump) | DAMAGED_FILES
    ends = st.sampled_from(["", "", "", ":train", ":test", ":x/train", ":default/", ":../x", ":/", ":'*'", ":" + "z" * 300])
    others = st.sampled_from(["", " + ", "generated:", "generated:arithmetic/x", "builtin:x", "tfds:x/y", "a\0b.jsonl", "x" * 5000, "x" * 300 + ".jsonl", "http://x/y.jsonl", "/dev/null", "x.jsonl/y.jsonl", "generated:arithmetic/train + "])

    @fuzz(500)
    @given(st.sets(st.sampled_from(["train.jsonl", "test.jsonl", "data/train-00000-of-00002.jsonl", "x.arrow", "state.json/x", "é.jsonl"]), max_size=3),
           st.sampled_from(["README.md", "README.md", "dataset_dict.json", "state.json"]), cards, states, ends, st.none() | others)  # fmt: skip
    def attempt(names, written, card, state, end, other):
        folder = tmp_path / "set"
        shutil.rmtree(folder, ignore_errors=True)
        for number, name in enumerate(sorted(names)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps({"problem": "2 + 2?", "answer": number}))
        folder.mkdir(exist_ok=True)
        if not (folder / written).exists():
            (folder / written).write_bytes(f"---\n{card}\n---\n".encode() if written == "README.md" else state)
        source = f"{folder}{end}" if other is None else other
        problems = tally.attempt(lambda: load_problems(source, size=5), *([folder, "source"] if other is None else []))
        if problems is not None:
            check_problems(problems)

    attempt()
    tally.close()


def test_problems_that_are_cut():
    tally = Tally("problems to cut")
    words = load_tokenizer("builtin:words")
    texts = st.lists(st.sampled_from(["apples", "12", "345.6", " ", " ", "\n", "é", "\U0001f600", "{problem}", "<|im_end|>", "?", "7" * 50]), min_size=1, max_size=30).map("".join)
    templates = st.sampled_from([Template(), Template("plain"), Template("Q: {problem} A:"), Template(system="Be brief.", instruction="Mark it.")])

    @fuzz(400)
    @given(texts.filter(str.strip), templates, st.integers(1, 60))
    def attempt(text, template, limit):
        problem = Problem("one", text, "1", "test")
        fitted = tally.attempt(lambda: fit([problem], words, template, limit, "cut"), "problem one: max_prompt")
        if fitted is not None:
            (kept,) = fitted.problems
            whole = len(template.encode(text, words)) <= limit
            assert kept.problem == text if whole else kept.problem and text.rstrip().endswith(kept.problem)
            assert fitted.cut == (not whole) and len(template.encode(kept.problem, words)) <= limit
            before, behind = template.render("@", words).split("@")
            assert template.render(kept.problem, words) == before + kept.problem + behind

    attempt()
    tally.close()


# Model folders

TIED = ROOT / "tests/golden/qwen2_tied"
SEVERAL = ROOT / "tests/golden/qwen2"  # in three files with an index


def read_model(folder):
    config = ModelConfig(**config_from_folder(folder))
    return config, load_parameters(folder, config)


def check_weights(weights):
    assert all(np.isfinite(leaf).all() and leaf.size for leaf in map(np.asarray, jax.tree.leaves(weights)))


@pytest.fixture
def model(tmp_path):
    """A copy of TIED, or of SEVERAL, to damage; always the same folder."""

    def copy(origin):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        return shutil.copytree(origin, tmp_path / "model")

    return copy


def test_configs_of_models(model):
    tally = Tally("config.json of models")
    good = json.loads((TIED / "config.json").read_text())
    good |= {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 100.0}, "layer_types": ["full_attention"] * 2, "head_dim": 8}
    folder = model(TIED)

    @fuzz(400)
    @given(changed(good).flatmap(lambda once: st.just(once) | changed(once)).map(dump) | DAMAGED_FILES | damaged(dump(good)))
    def attempt(content):
        (folder / "config.json").write_bytes(content)
        got = tally.attempt(lambda: read_model(folder), folder)
        if got is not None:
            check_weights(got[1])

    attempt()
    tally.close()


def test_indexes_and_files_of_weights(model):
    tally = Tally("files of weights")
    index = json.loads((SEVERAL / "model.safetensors.index.json").read_text())
    several = sorted(path.name for path in SEVERAL.glob("*.safetensors"))
    contents = {name: (SEVERAL / name).read_bytes() for name in several}

    @fuzz(200)
    @given(st.data())
    def attempt(data):
        folder = model(SEVERAL)
        name = data.draw(st.sampled_from([*several, "model.safetensors.index.json"]))
        if name.endswith(".json"):
            (folder / name).write_bytes(data.draw(changed(index).map(dump) | DAMAGED_FILES | damaged(dump(index))))
        elif data.draw(st.integers(0, 5)) == 0:
            (folder / name).unlink()
            if data.draw(st.booleans()):
                (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data.draw(damaged(contents[name]) | DAMAGED_FILES))
        got = tally.attempt(lambda: read_model(folder), folder)
        if got is not None:
            check_weights(got[1])

    attempt()
    tally.close()


def test_weights_that_are_not_those_of_the_model(model):
    tally = Tally("tensors")
    folder, tensors = model(TIED), load_file(TIED / "model.safetensors")
    spoilt = {
        "nan": lambda values, place: with_one(values, place, math.nan), "inf": lambda values, place: with_one(values, place, -math.inf),
        "whole numbers": lambda values, _: values.astype(np.int32), "double": lambda values, _: values.astype(np.float64),
        "one row less": lambda values, _: values[1:], "flat": lambda values, _: values.reshape(1, -1),
        "none at all": lambda *_: np.zeros(0, np.float32), "larger": lambda values, _: values * 2,
    }  # fmt: skip

    @fuzz(150)
    @given(st.sampled_from(sorted(tensors)), st.sampled_from(["lost", "twice", *spoilt]), st.integers(0, 10**6))
    def attempt(name, what, place):
        kept = dict(tensors)
        values = np.array(kept.pop(name), np.float32)
        added = {"lost": {}, "twice": {name: values, f"{name}.copy": values}}
        save_file(kept | (added[what] if what in added else {name: spoilt[what](values, place)}), folder / "model.safetensors")
        got = tally.attempt(lambda: read_model(folder), name)
        assert (got is not None) == (what == "larger")  # finite numbers of the right shape are weights

    attempt()
    tally.close()


def with_one(values, place, number):
    values.flat[place % values.size] = number
    return values


def test_folders_of_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    tally = Tally("tokenizers")
    load_tokenizer("builtin:words").save(tmp_path / "good")
    (tmp_path / "good/generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    contents = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    templates = st.sampled_from([b"{{", b"{% if %}", b"{{ x.y }}", b"{{ 1/0 }}", b"{{ raise_exception('a\nb') }}", b"{{ messages[5].content }}", b"", b"\xff"])

    @fuzz(250)
    @given(st.sampled_from(sorted(contents)), st.data())
    def attempt(name, data):
        folder = tmp_path / "tokenizer"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        if name.endswith(".json"):
            (folder / name).write_bytes(data.draw(changed(json.loads(contents[name])).map(dump) | DAMAGED_FILES | damaged(contents[name])))
        else:
            (folder / name).write_bytes(data.draw(templates | damaged(contents[name])))
        tally.attempt(lambda: use_tokenizer(folder), folder)

    attempt()
    tally.close()


def use_tokenizer(folder):
    tokenizer = load_tokenizer(str(folder))
    ids = Template().encode("9 + 8 = ?", tokenizer) + Template("plain").encode("9 + 8 = ?", tokenizer)
    assert all(isinstance(one, int) and 0 <= one < 2**31 for one in (*ids, *tokenizer.stop_ids, tokenizer.pad_id))
    return tokenizer.decode(ids)


# Checkpoints and what else an earlier life left


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a folder with checkpoints of iterations 1 to 3, the abstract state): everything in number n says n."""
    folder = tmp_path_factory.mktemp("saved")
    sharding = SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(folder, keep=3) as checkpoints:
        for number in (1, 2, 3):
            state = TrainState(jnp.int32(number), {"weights": jnp.full((4, 4), float(number))}, ({"moment": jnp.ones((4, 4))},))
            checkpoints.save(number, state, {"position": number}, {"waiting": np.arange(number)})
    return folder, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


STRANGE_NAMES = ["iteration_abc", "iteration_", "iteration_" + "9" * 20, "iteration_000004.0", "iteration_000003.2", "iteration_3", "iteration_-1", "iteration_²", "iteration_０００００５", "iteration_000007",
                 "iteration_000009.bad", "iteration_000002." + "9" * 20, "x"]  # fmt: skip


@st.composite
def damage_to(draw, folder):
    """Does one thing to a folder of checkpoints."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    how = draw(st.sampled_from(["bytes", "bytes", "JSON", "JSON", "name", "lose", "cut off"]))
    if how == "name":
        path = folder / draw(st.sampled_from(STRANGE_NAMES))
        what = draw(st.sampled_from(["folder", "file", "copy"]))
        if path.exists():
            return
        if what == "folder":
            path.mkdir()
        elif what == "file":
            path.write_text("x")
        elif (folder / "iteration_000002").is_dir():
            shutil.copytree(folder / "iteration_000002", path)
        return
    records = [path for path in files if path.name in ("manifest.json", "details.json")]
    path = draw(st.sampled_from(records if how == "JSON" and records else files))
    content = path.read_bytes()
    if how == "JSON":
        with contextlib.suppress(ValueError, RecursionError):  # damaged before
            content = draw(changed(json.loads(content)).map(dump) | DAMAGED_FILES)
    elif how == "bytes":
        content = draw(damaged(content, start=len(content)))
    elif how == "cut off":
        content = content[: draw(st.integers(0, len(content)))]
    else:
        path.unlink()
        return
    path.write_bytes(content)


def test_checkpoints(saved, tmp_path, caplog):
    tally = Tally("checkpoints")
    folder, abstract = tmp_path / "checkpoints", saved[1]

    @fuzz(120)
    @given(st.integers(1, 4), st.data())
    def attempt(times, data):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[0], folder)
        for _ in range(times):
            if any(path.is_file() for path in folder.rglob("*")):
                data.draw(damage_to(folder))
        tally.attempt(lambda: peek(folder), folder)
        tally.attempt(lambda: locate(folder), folder)
        restored = tally.attempt(lambda: restore(folder, abstract), folder)
        if restored is not None:  # the newest that is sound: all of it from one save, under its own number
            number = int(restored.state.update)
            assert (restored.iteration, restored.extra) == (number, {"position": number})
            np.testing.assert_array_equal(restored.state.params["weights"], np.full((4, 4), number))
            np.testing.assert_array_equal(restored.host_arrays["waiting"], np.arange(number))

    attempt()
    tally.close()


def restore(folder, abstract):
    with Checkpoints(folder, keep=3) as checkpoints:
        return checkpoints.restore(abstract)


def test_what_an_earlier_run_left_in_its_workdir(tmp_path):
    tally = Tally("files of a workdir")
    config, problems = resolve(load([TINY])), {"training": [Problem("1", "2 + 2?", "4", "test")]}
    good = tmp_path / "good"
    claim_workdir(config, good)
    claim_problems(config, good, fingerprints(problems))
    with MetricsWriter(good, console=False) as writer:
        for iteration in (0, 1, 2):
            writer.write(iteration, {"reward/mean": 0.5 * iteration})
    contents = {name: (good / name).read_bytes() for name in ("config.json", "problems.json", "metrics.jsonl")}
    workdir = tmp_path / "run"

    @fuzz(300)
    @given(st.sampled_from(sorted(contents)), st.data())
    def attempt(name, data):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(good, workdir)
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in contents[name].splitlines()]
            content = data.draw(changed(lines).map(lambda rows: b"".join(dump(row) + b"\n" for row in rows) if isinstance(rows, list) else dump(rows)) | DAMAGED_FILES.map(lambda file: file + b"\n") | damaged(contents[name]))
        else:
            content = data.draw(changed(json.loads(contents[name])).map(dump) | DAMAGED_FILES | damaged(contents[name]))
        (workdir / name).write_bytes(content)
        tally.attempt(lambda: start_again(config, workdir, problems), workdir)

    attempt()
    tally.close()


def start_again(config, workdir, problems):
    """What `train` does with these files; the run goes on after iteration 1."""
    claim_workdir(config, workdir)
    claim_problems(config, workdir, fingerprints(problems))
    settle(config, workdir, run_record(config, problems))
    with MetricsWriter(workdir, resume_iteration=2, console=False) as writer:
        writer.write(2, {"reward/mean": 1.0})
    assert read_metrics(workdir / "metrics.jsonl")[-1]["iteration"] == 2
