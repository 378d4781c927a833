"""The command: the files it leaves, that they are the same twice, and that a kill or another bound costs nothing."""

import contextlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_config import get_config

from dgpo_jax import prepare as story
from dgpo_jax.config import PrepareConfig, load, parse_command
from dgpo_jax.data.problems import fingerprint, load_problems
from dgpo_jax.data.tokenizers import load_tokenizer
from dgpo_jax.preparation.report import describe_sources, report_paths, to_markdown
from dgpo_jax.preparation.steps import Drop, Step
from dgpo_jax.prepare import Options, prepare

LEAK = "there are two apples in a box and tom adds three more of them"
ROWS = [
    {"id": "good", "problem": "how many apples are in the box?", "answer": "3"},
    {"id": "twin", "problem": "How many  apples are in the box", "answer": "3"},
    {"id": "leak", "problem": f"tom says: {LEAK}", "answer": "5"},
    {"id": "long", "problem": "how many " * 20, "answer": "5"},
    {"id": "prose", "problem": "how many coins?", "answer": "see the solution of the previous exercise"},
    {"id": "also", "problem": "how many pens?", "answer": "4", "solution": "4", "tolerance": 0.01},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path):
    """The tiny run, on ROWS, against a benchmark of one problem."""
    tiny = get_config()
    train, bench = (
        write(tmp_path / "train.jsonl", ROWS),
        write(tmp_path / "bench.jsonl", [{"problem": LEAK, "answer": "5"}]),
    )
    return replace(
        tiny, data=replace(tiny.data, train=train), rollout=replace(tiny.rollout, max_prompt=40),
        prepare=PrepareConfig(against=f"mine={bench}"),
    )  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("out*") if path.is_file()}


def test_each_step_drops_its_kind_and_the_rest_can_be_read_back(config, tmp_path):
    output = tmp_path / "new" / "out.jsonl"  # in a folder that is not there yet
    report = prepare(config, None, Options(str(output)))
    assert load_problems(str(output)) == [
        problem for problem in load_problems(config.data.train) if problem.id in ("good", "also")
    ]
    dropped = [json.loads(line) for line in report_paths(output)["dropped.jsonl"].read_text().splitlines()]
    assert [(row["id"], row["step"]) for row in dropped] == [
        ("twin", "deduplicate"), ("leak", "decontaminate"), ("long", "length"), ("prose", "parsable"),
    ]  # fmt: skip
    assert [(step["before"], step["kept"]) for step in report["steps"]] == [(6, 5), (5, 4), (4, 3), (3, 2)]
    assert report["fingerprint"]["kept"] == fingerprint(load_problems(str(output)))
    assert json.loads(report_paths(output)["report.json"].read_text()) == report
    assert "2 of 6 problems kept (33.3%)" in report_paths(output)["report.md"].read_text()
    assert not (tmp_path / "new" / "out.samples").exists()  # nothing was measured


def test_steps_that_are_off_leave_all_they_would_drop(config, tmp_path):
    config = replace(config, prepare=PrepareConfig(deduplicate=False, parsable=False))
    prepare(config, None, Options(str(tmp_path / "out.jsonl")))
    assert [problem.id for problem in load_problems(str(tmp_path / "out.jsonl"))] == [
        "good",
        "twin",
        "leak",
        "prose",
        "also",
    ]


def test_the_same_command_twice_gives_the_same_files(config, tmp_path):
    prepare(config, None, Options(str(tmp_path / "out.jsonl")))
    first = contents(tmp_path)
    prepare(config, None, Options(str(tmp_path / "out.jsonl")))
    assert contents(tmp_path) == first and len(first) == 4


def test_where_nothing_is_left_the_report_says_so_and_no_output_is_written(config, tmp_path):
    config = replace(config, rollout=replace(config.rollout, max_prompt=1))
    with pytest.raises(ValueError, match="no problem is left of 6"):
        prepare(config, None, Options(str(tmp_path / "out.jsonl")))
    assert sorted(contents(tmp_path)) == ["out.dropped.jsonl", "out.report.json", "out.report.md"]


def test_an_old_output_never_stands_beside_a_new_report(config, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    output.write_text("of another day")
    none = replace(config, rollout=replace(config.rollout, max_prompt=1))
    with pytest.raises(ValueError, match="no problem is left"):
        prepare(none, None, Options(str(output)))
    assert not output.exists() and report_paths(output)["report.md"].exists()

    output.write_text("of another day")
    monkeypatch.setattr(story, "write_report", lambda *_: pytest.fail("stop") if output.exists() else {}["killed"])
    with pytest.raises(KeyError, match="killed"):
        prepare(config, None, Options(str(output)))


def test_a_kill_loses_no_output_of_another_day(config, tmp_path, monkeypatch):
    output, before = tmp_path / "out.jsonl", tmp_path / "out.jsonl.before"
    output.write_text("of another day")
    monkeypatch.setattr(story, "write_report", lambda *_: {}["killed"])
    for _ in range(2):  # killed again, there is no output to set aside
        with pytest.raises(KeyError, match="killed"):
            prepare(config, None, Options(str(output)))
        assert before.read_text() == "of another day" and not output.exists()
    monkeypatch.undo()
    prepare(config, None, Options(str(output)))
    assert [problem.id for problem in load_problems(str(output))] == ["good", "also"] and not before.exists()

    none = replace(config, rollout=replace(config.rollout, max_prompt=1))
    with pytest.raises(ValueError, match=r"no problem is left .* What was there is .*out\.jsonl\.before now"):
        prepare(none, None, Options(str(output)))
    assert [problem.id for problem in load_problems(str(tmp_path / "train.jsonl"))] and before.exists()


@pytest.mark.parametrize("source, output", [
    ("", "train.jsonl"),  # a folder, whose train split this is
    (":train", "train.jsonl"),
    ("/out.dropped.jsonl", "out.jsonl"),  # the list of what is dropped would be written over it, and then the source be empty
    ("/out.report.json", "out.jsonl"),
    ("/link.jsonl", "train.jsonl"),
    ("/out.jsonl.before", "out.jsonl"),
    ("/out.samples/generations/train.jsonl", "out.jsonl"),  # responses would be appended
])  # fmt: skip
def test_no_file_that_is_read_is_written_over(config, tmp_path, source, output):
    folder = tmp_path / "set"
    (folder / "out.samples/generations").mkdir(parents=True)
    path = f"{folder}{source}"
    read = folder / ("train.jsonl" if source in ("", ":train") else source.removeprefix("/"))
    if source == "/link.jsonl":
        read.symlink_to("train.jsonl")
        read = folder / "train.jsonl"
    if source.endswith(".before"):  # has no ending of a source, but a link may
        read.with_name("odd.jsonl").symlink_to(read.name)
        path = f"{folder}/odd.jsonl"
    write(read, ROWS)
    content = read.read_bytes()
    for other in (path, f"generated:arithmetic/train + {path}"):
        with pytest.raises(ValueError, match="is what is read"):
            prepare(replace(config, data=replace(config.data, train=other)), None, Options(str(folder / output)))
    assert read.read_bytes() == content
    with pytest.raises(ValueError, match="is what is read"):
        prepare(replace(config, prepare=PrepareConfig(against=f"mine={path}")), None, Options(str(folder / output)))


def test_a_workdir_that_a_source_merely_lies_in_is_no_harm(config, tmp_path):
    prepare(config, tmp_path, Options(str(tmp_path / "out.jsonl")))
    assert (tmp_path / "out.jsonl").exists()


def test_a_preparation_without_benchmarks_says_so(config, tmp_path, capsys):
    for against, said in ((config.prepare.against, False), ("", True)):
        prepare(replace(config, prepare=PrepareConfig(against=against)), None, Options(str(tmp_path / "out.jsonl")))
        for text in (capsys.readouterr().out, report_paths(tmp_path / "out.jsonl")["report.md"].read_text()):
            assert ("prepare.against is empty: no problem was compared" in text) is said


def test_what_to_type_next_is_a_command_that_reads_the_output(config, tmp_path, capsys):
    rows = [{"question": row["problem"], "final": row["answer"]} for row in ROWS[:1]]
    source = write(tmp_path / "other names.jsonl", rows)
    names = {"problem_field": "question", "answer_field": "final"}
    config = replace(config, data=replace(config.data, train=source, **names), prepare=PrepareConfig())
    prepare(config, None, Options(str(tmp_path / "o t.jsonl")))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("to train"))
    tiny, flags = Path(__file__).parent / "tiny_config.py", shlex.split(line.partition("--config=... ")[2])
    typed = load([f"--config={tiny}", *(f"--config.data.{name}={value}" for name, value in names.items()), *flags])
    assert [problem.answer for problem in story.load(typed.data, typed.data.train, 0)] == ["3"]


@pytest.mark.parametrize("change, output, message", [
    ({}, "out.parquet", "give --output=prepared.jsonl"),  # nothing else is written
    ({}, "", "give --output=prepared.jsonl"),  # it was forgotten
    ({}, "train.jsonl", "is what is read"),  # would destroy the source
    ({}, "bench.jsonl", "is what is read"),  # or the benchmark
    ({}, "folder.jsonl", "is a folder, but problems are written to a file"),
    ({"pass_above": 0.5}, "out.jsonl", "eval.samples is 0"),  # a rate of no responses
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_read(config, tmp_path, monkeypatch, change, output, message):
    config = replace(config, prepare=replace(config.prepare, **change), eval=replace(config.eval, samples=0))
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.setattr(story, "load", lambda *_: pytest.fail("something was read"))
    with pytest.raises(ValueError, match=message):
        prepare(config, None, Options(str(tmp_path / output) if output else ""))


def test_a_checkpoint_that_nothing_would_be_asked_of_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"set prepare\.pass_above"):
        prepare(config, None, Options(str(tmp_path / "out.jsonl"), checkpoint="runs/x"))


def test_a_place_that_cannot_be_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        prepare(config, None, Options(str(tmp_path / "file" / "out.jsonl")))


@pytest.fixture
def measured(config, tmp_path):
    """Pass rates of eight generated problems."""
    return replace(
        config, data=replace(config.data, train="generated:arithmetic/train", size=8),
        eval=replace(config.eval, samples=4), prepare=PrepareConfig(pass_above=0.25),
    )  # fmt: skip


def fake_rollouts(monkeypatch, calls):
    """A model whose sample number s of a problem is right where s < the answer modulo 5, so that rates are known."""
    tokenizer = load_tokenizer("builtin:words")

    def make_rollout(actor, sampling, max_prompt, slots, stopping=None):
        def rollout(params, problems, draw):
            calls.append(len(problems))
            rows = [(one, number) for one in problems for number in range(sampling.group_size)]
            texts = [one.answer if number < int(one.answer) % 5 else "999" for one, number in rows]
            return FakeResponses(problems, texts, [len(tokenizer.encode(text)) for text in texts])

        return rollout

    class FakeResponses:
        def __init__(self, problems, texts, lengths):
            self.problems, self.texts, self.lengths = problems, texts, lengths
            self.group_size = len(texts) // len(problems)
            self.rollout = type("Rollout", (), {"truncated": [False] * len(texts)})

        def answers(self):
            return [(self.problems[row // self.group_size], text) for row, text in enumerate(self.texts)]

    monkeypatch.setattr("dgpo_jax.evaluation.sampling.make_rollout", make_rollout)
    monkeypatch.setattr("dgpo_jax.evaluation.protocol.build_params", lambda *_: {})  # it needs no weights
    monkeypatch.setattr(story, "make_decode_params", lambda actor: lambda params: params)


def test_problems_are_kept_by_the_share_of_right_responses_and_carry_it(measured, tmp_path, monkeypatch, capsys):
    fake_rollouts(monkeypatch, calls := [])
    report = prepare(measured, None, Options(str(tmp_path / "out.jsonl")))
    assert "first prompt, answer" in capsys.readouterr().out  # before hours of sampling
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    given = list(story.load(measured.data, measured.data.train, measured.seed))
    expected = {one.id: min(4, int(one.answer) % 5) / 4 for one in given}
    assert {row["id"]: row["pass_rate"] for row in rows} == {
        name: rate for name, rate in expected.items() if rate > 0.25
    }
    assert report["steps"][-1]["dropped"] == len(given) - len(rows) > 0 and rows  # both kinds occur
    assert (tmp_path / "out.samples" / "generations" / "train.jsonl").exists() and calls


def test_a_kill_and_other_bounds_sample_nothing_again(measured, tmp_path, monkeypatch):
    fake_rollouts(monkeypatch, calls := [])
    prepare(measured, None, Options(str(tmp_path / "out.jsonl")))
    whole, first = contents(tmp_path), len(calls)
    samples = tmp_path / "out.samples" / "generations" / "train.jsonl"
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # what a kill in the middle of the last line leaves
    prepare(measured, None, Options(str(tmp_path / "out.jsonl")))
    assert contents(tmp_path) == whole and samples.read_bytes() == b"".join(lines)

    monkeypatch.setattr("dgpo_jax.evaluation.protocol.build_params", lambda *_: pytest.fail("weights were loaded"))
    other = replace(measured, prepare=replace(measured.prepare, pass_above=0.0, pass_below=1.0))
    prepare(other, None, Options(str(tmp_path / "out.jsonl")))
    assert contents(tmp_path)["out.jsonl"] != whole["out.jsonl"] and first > 0


@pytest.mark.parametrize("part, change, message", [
    ("eval", {"temperature": 2.0}, r"temperature was 1\.0 and is 2\.0"),  # sampled otherwise
    # Judged otherwise, and there is a way on.
    ("reward", {"extract": "boxed"}, "extract was 'last' and is 'boxed'; go back .* or give another --workdir"),
    ("data", {"size": 7}, "sets.train.problems was 8 and is 7"),  # other problems
])  # fmt: skip
def test_responses_by_other_settings_are_not_taken_for_these(measured, tmp_path, monkeypatch, part, change, message):
    fake_rollouts(monkeypatch, [])
    prepare(measured, None, Options(str(tmp_path / "out.jsonl")))
    other = replace(
        measured, **{part: replace(getattr(measured, part), **change)}, prepare=PrepareConfig(pass_below=1.0)
    )
    with pytest.raises(ValueError, match=message):
        prepare(other, None, Options(str(tmp_path / "out.jsonl")))
    with contextlib.suppress(ValueError):  # nothing may be left
        prepare(other, tmp_path / "elsewhere", Options(str(tmp_path / "out.jsonl")))
    assert (tmp_path / "elsewhere" / "generations" / "train.jsonl").exists()


def test_a_real_model_measures_rates_that_its_stored_verdicts_add_up_to(measured, tmp_path):
    config = replace(measured, data=replace(measured.data, size=3), prepare=PrepareConfig(pass_below=0.99))
    prepare(config, None, Options(str(tmp_path / "out.jsonl")))
    stored = [
        json.loads(line) for line in (tmp_path / "out.samples" / "generations" / "train.jsonl").read_text().splitlines()
    ]
    rates = {row["problem_id"]: sum(one["status"] == "correct" for one in row["responses"]) / 4 for row in stored}
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["id"]: row["pass_rate"] for row in rows} == {name: rate for name, rate in rates.items() if rate < 0.99}
    assert len(stored) == 3 and all(len(row["responses"]) == 4 for row in stored)


def test_the_command_line_has_output_and_checkpoint():
    tiny = Path(__file__).parent / "tiny_config.py"
    arguments = [f"--config={tiny}", "--output=a.jsonl", "--checkpoint=runs/x", "--config.prepare.ngram=13"]
    config, workdir, options = parse_command(arguments, program="p", description="", options=Options)
    assert (options, workdir, config.prepare.ngram) == (Options("a.jsonl", "runs/x"), None, 13)


def test_joined_sources_are_counted_and_licensed_one_by_one(tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", ROWS[3:])
    joined = f"{first} + {second} + generated:arithmetic/train"
    before = load_problems(joined, size=2)
    rows = describe_sources(joined, before, [before[0], before[2], before[3]])
    assert [(row["before"], row["kept"]) for row in rows] == [(2, 1), (3, 2), (2, 0)]
    assert ["not known here" in row["licence"] for row in rows] == [True, True, False]


def test_a_known_set_brings_its_licence():
    assert describe_sources("tfds:gsm8k/train", [], [])[0]["licence"].startswith("MIT (c) 2021 OpenAI")


def test_signs_of_markdown_in_problems_do_not_break_the_report():
    step = Step("length", "a | b", 1, [Drop("x", "r")], [Drop("`x`\n", 'shares: "|y| `z`\n"')], {"T": {"`a|b`": 1}})
    report = {
        "settings": {"s": "a|b"}, "problems": {"before": 1, "kept": 0}, "fingerprint": {"before": "f", "kept": "g"},
        "steps": [{"name": step.name, "keeps": step.rule, "before": 1, "dropped": 1, "kept": 0, "tables": step.tables,
                   "examples": [drop._asdict() for drop in step.examples]}],
        "sources": [{"source": "a|b", "before": 1, "kept": 0, "licence": "c"}],
    }  # fmt: skip
    text = to_markdown(report, "out.jsonl")
    assert "| length | a \\| b | 1 | 1 | 0 |" in text  # a bar in a cell is no border
    assert "- `'x'`: shares: `\"|y| 'z' \"`" in text  # nor does a backtick end the code, or a line end the item
    assert "'a|b'  1  ████" in text
