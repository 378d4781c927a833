"""`python -m dgpo_jax.evaluate` as a whole, on a tiny random model: killed, repeated, judged again, refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest
import sympy

from dgpo_jax import evaluate as story
from dgpo_jax.build import build_checkers, build_params, build_parts, fresh_state, make_decode_params
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.config import load, to_json
from dgpo_jax.evaluate import Options, evaluate
from dgpo_jax.evaluation import protocol as protocols
from dgpo_jax.evaluation.estimators import NO_VOTE
from dgpo_jax.evaluation.generations import read_generations, rewrite
from dgpo_jax.evaluation.in_training import make_evaluation
from dgpo_jax.evaluation.judging import Answered, Judged
from dgpo_jax.files import alone_in
from dgpo_jax.rewards import math_verify
from dgpo_jax.types import Problem, Verdict

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = 40
SETTINGS = [
    f"--config={ROOT}/tests/tiny_config.py", f"--config.eval.problems={PROBLEMS}", "--config.eval.samples=3",
    "--config.eval.responses=24", "--config.eval.sets=sums=generated:arithmetic/test", "--config.model.layers=1",
]  # fmt: skip
DEADLINE_S = 300


def run(workdir, *settings, **options):
    return evaluate(load([*SETTINGS, *settings]), workdir, Options(**options))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The workdir of an evaluation that nothing happened to."""
    workdir = tmp_path_factory.mktemp("evaluate") / "undisturbed"
    run(workdir)
    return workdir


@pytest.fixture
def copy(undisturbed, tmp_path):
    """Another one to spoil."""
    return shutil.copytree(undisturbed, tmp_path / "copy")


def contents(workdir):
    """Every file that a reader may look at."""
    files = [*workdir.glob("generations/*"), workdir / "results.json", workdir / "results.md"]
    return {path.name: path.read_bytes() for path in files}


def forbid(monkeypatch, name):
    def forbidden(*_, **__):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(story, name, forbidden)


def test_an_evaluation_that_was_killed_ends_up_with_the_same_files(undisturbed, tmp_path):
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "dgpo_jax.evaluate", *SETTINGS, f"--workdir={workdir}"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_S
    while lines(workdir / "generations/sums.jsonl") < 2:  # among the samples, after the greedy ones
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (workdir / "results.json").exists()
    assert 2 <= lines(workdir / "generations/sums.jsonl") < PROBLEMS
    run(workdir)
    assert contents(workdir) == contents(undisturbed)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_same_command_again_reads_no_weights_and_changes_nothing(undisturbed, monkeypatch):
    before = contents(undisturbed)
    forbid(monkeypatch, "make_decode_params")
    run(undisturbed)
    assert contents(undisturbed) == before


def test_the_files_say_everything(undisturbed):
    results = json.loads((undisturbed / "results.json").read_text())
    one = results["sets"]["sums"]
    assert one["problems"] == PROBLEMS and one["too_long"] == 0
    assert list(one["scores"]) == [
        "greedy", "avg@3", "pass@1", "pass@2", "pass@3", "best@2", "best@3", "maj@1", "maj@2", "maj@3"
    ]  # fmt: skip
    protocol = results["protocol"]
    assert protocol["weights"] == "random, seed 0" and protocol["grading"]["extract"] == "last"
    assert protocol["asking"]["sets"]["sums"]["source"] == "generated:arithmetic/test"
    assert protocol["asking"]["samples"] == 3 and protocol["asking"]["temperature"] == 1.0
    rows = [json.loads(line) for line in (undisturbed / "generations/sums.jsonl").read_text().splitlines()]
    assert len(rows) == PROBLEMS and all([one["sample"] for one in row["responses"]] == [0, 1, 2] for row in rows)
    assert protocol["asking"]["example_prompt"].startswith(rows[0]["problem"])
    right = np.mean([[one["status"] == "correct" for one in row["responses"]] for row in rows])
    assert one["scores"]["avg@3"]["value"] == right
    tokens = np.mean([[one["tokens"] for one in row["responses"]] for row in rows])
    assert one["samples"]["tokens"]["value"] == pytest.approx(tokens)
    greedy = [json.loads(line) for line in (undisturbed / "generations/sums.greedy.jsonl").read_text().splitlines()]
    assert len(greedy) == PROBLEMS and all(len(row["responses"]) == 1 for row in greedy)


def test_training_and_the_command_report_the_same(undisturbed):
    settings = ["--config.eval.sets=again=generated:arithmetic/test"]
    config = load([*SETTINGS, *settings])
    parts = build_parts(config)
    params = make_decode_params(parts)(build_params(config, parts))
    with build_checkers(config, parts.held_out) as checkers:
        metrics, rows = make_evaluation(config, parts, checkers)(params)
    found = json.loads((undisturbed / "results.json").read_text())["sets"]["sums"]
    for prefix in ("eval", "eval/again"):  # data.held_out are the same problems
        for key in ("greedy", "avg@3", "pass@3", "maj@3"):
            assert metrics[f"{prefix}/{key}"] == found["scores"][key]["value"]
        assert metrics[f"{prefix}/avg@3_length"] == found["samples"]["tokens"]["value"]
    assert len(metrics) == 12 and len(rows) == 2 * PROBLEMS * 4
    texts = [row["response"] for row in rows if row["round"] == "eval/avg@3"]
    kept = [json.loads(line) for line in (undisturbed / "generations/sums.jsonl").read_text().splitlines()]
    assert texts == [one["text"] for row in kept for one in row["responses"]]


def test_problems_that_are_too_long_count_as_wrong_in_training_too():
    settings = [
        "--config.rollout.max_prompt=21", "--config.eval.problems=12", "--config.eval.samples=1", "--config.data.too_long=drop",
        "--config.eval.sets=again=generated:arithmetic/test", "--config.data.train=generated:arithmetic/test",
    ]  # fmt: skip
    config = load([*SETTINGS, *settings])
    parts = build_parts(config)
    asked = len(parts.held_out)
    assert 0 < asked < 12 and parts.unasked == {"held_out": 12 - asked, "again": 12 - asked}

    class AllRight:
        def submit(self, problem, response):
            return Verdict("correct", problem.answer)

        def gather(self, tickets):
            return tickets

    params = make_decode_params(parts)(build_params(config, parts))
    metrics, _ = make_evaluation(config, parts, AllRight())(params)
    for prefix in ("eval", "eval/again"):
        for key in ("greedy", "avg@1", "pass@1", "maj@1"):
            assert metrics[f"{prefix}/{key}"] == pytest.approx(asked / 12)


def test_a_reference_answer_that_nobody_can_match_is_named_and_no_obstacle(tmp_path, capsys):
    rows = [{"id": "odd", "problem": "1 + 1 = ?", "answer": "np.arcsin(10/13)"}, {"problem": "1 + 2 = ?", "answer": "3"}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "work", f"--config.eval.sets=odd={tmp_path}/odd.jsonl", "--config.eval.samples=0")
    said = capsys.readouterr().out
    assert "warning: 1 reference answers cannot be checked, such as that of odd: " in said
    assert "first prompt, answer 'np.arcsin(10/13)':\n  | 1 + 1 = ?" in said
    assert json.loads((tmp_path / "work/results.json").read_text())["answers_that_do_not_equal_themselves"] == ["odd"]


def test_another_protocol_is_refused_with_what_differs(undisturbed):
    before = contents(undisturbed)
    with pytest.raises(ValueError, match=r"temperature was 1\.0 and is 0\.5; use another --workdir"):
        run(undisturbed, "--config.eval.temperature=0.5")
    with pytest.raises(ValueError, match=r"model\.rope_theta was 10000\.0 and is 500\.0"):
        run(undisturbed, "--config.model.rope_theta=500")
    with pytest.raises(ValueError, match=r"memory_mb was 2048 and is 1024; add --regrade"):
        run(undisturbed, "--config.reward.memory_mb=1024")
    with pytest.raises(ValueError, match=r"sets\.sums\.problems was 40 and is 9"):
        run(undisturbed, "--config.eval.problems=9")
    with pytest.raises(ValueError, match="extract was 'last' and is 'boxed'; add --regrade"):
        run(undisturbed, "--config.reward.extract=boxed")
    assert contents(undisturbed) == before


def test_the_default_workdir_follows_what_is_asked_and_not_how_it_is_judged():
    def name(*settings, checkpoint=""):
        config = load([*SETTINGS, *settings])
        actor = story.build_actor(config)
        sets = protocols.load_sets(config, actor, protocols.name_sets(config))
        asking = protocols.describe_asking(config, actor, protocols.find_weights(config, actor, checkpoint), sets)
        return protocols.default_workdir(config, asking)

    plain = name()
    assert str(plain).startswith("evals/tiny-") and name() == plain
    for same in ("--config.reward.extract=boxed", "--config.eval.responses=8", "--config.optimizer.learning_rate=1.0",
                 "--config.model.remat=full", "--config.model.attention=plain"):  # fmt: skip
        assert name(same) == plain
    for other in (
        "--config.seed=1", "--config.eval.samples=4", "--config.eval.greedy=False", "--config.rollout.top_k=5",
        "--config.data.instruction=please", "--config.eval.max_response=5", "--config.model.width=16",
        "--config.model.rope_theta=500", "--config.model.norm_eps=1e-5", "--config.model.initializer_std=0.2",
        "--config.eval.sets=other=generated:arithmetic/test",
    ):  # fmt: skip
        assert name(other) != plain


def test_regrading_samples_nothing_and_lists_what_changed(copy, undisturbed, monkeypatch):
    forbid(monkeypatch, "make_decode_params")
    run(copy, "--config.reward.extract=boxed", regrade=True)  # the model never boxes an answer
    report = (copy / "regrade.md").read_text()
    before = [json.loads(line) for path in undisturbed.glob("generations/*") for line in path.read_text().splitlines()]
    answered = sum(one["status"] != "no_answer" for row in before for one in row["responses"])
    assert answered > 5 and f"{answered} responses changed" in report and "wrong -> no_answer" in report
    assert report.count("\n## sums, ") == answered
    results = json.loads((copy / "results.json").read_text())
    assert results["sets"]["sums"]["samples"]["no_answer"]["value"] == 1.0
    assert results["protocol"]["grading"]["extract"] == "boxed"
    run(copy, "--config.reward.extract=boxed")  # goes on under the new rule

    run(copy, regrade=True)  # and back
    assert contents(copy) == contents(undisturbed)


def test_an_evaluation_that_is_not_finished_can_be_judged_again_and_goes_on(copy, undisturbed):
    path = copy / "generations/sums.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]) + b'{"torn')
    (copy / "results.json").unlink()
    assert run(copy, regrade=True) == []
    assert lines(path) == 7 and not (copy / "results.json").exists()
    run(copy)
    assert contents(copy) == contents(undisturbed)


def test_a_regrade_that_was_killed_has_to_be_finished(copy, undisturbed, monkeypatch):
    class KilledError(Exception):
        pass

    def die(path, done):
        rewrite(path, done)
        raise KilledError  # after the first of two files

    monkeypatch.setattr(story, "rewrite", die)
    with pytest.raises(KilledError):
        run(copy, "--config.reward.extract=boxed", regrade=True)
    monkeypatch.undo()
    for extract in ("last", "boxed"):
        with pytest.raises(ValueError, match="regrade was 'not finished'"):
            run(copy, f"--config.reward.extract={extract}")
    run(copy, regrade=True)
    assert contents(copy) == contents(undisturbed)


def test_a_regrade_that_was_killed_and_repeated_lists_all_that_changed(copy, tmp_path, monkeypatch):
    boxed, whole = "--config.reward.extract=boxed", shutil.copytree(copy, tmp_path / "whole")
    run(whole, boxed, regrade=True)
    calls = []

    def die(path, done):
        calls.append(path.name)
        rewrite(path, done)
        if len(calls) in (2, 3):  # after the last file, and again after the first
            raise KeyboardInterrupt

    monkeypatch.setattr(story, "rewrite", die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(copy, boxed, regrade=True)
    run(copy, boxed, regrade=True)
    assert (copy / "regrade.md").read_bytes() == (whole / "regrade.md").read_bytes()
    assert contents(copy) == contents(whole)  # and no copy is left


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"asking": 1, "grading": {}, "sessions": []}', '{"asking": {}, "grading": {}, "sessions": [1]}',
    '{"asking": {}, "grading": {}, "sessions": [], "graded_before": 3}', pytest.param("[" * 200_000, id="deep"),
])  # fmt: skip
def test_a_damaged_protocol_is_named_with_a_way_on(copy, text):
    (copy / "protocol.json").write_text(text)
    with pytest.raises(ValueError, match=r"copy/protocol\.json is damaged .*another --workdir"):
        run(copy)


def test_the_protocol_says_how_programs_are_judged_and_by_which_sympy(undisturbed):
    sessions = json.loads((undisturbed / "protocol.json").read_text())["sessions"]
    assert [session["sympy"] for session in sessions] == [sympy.__version__]
    problem = Problem("p", "?", "", "s", checker="code", tests="[]")
    config = load([*SETTINGS, "--config.code.grade=hard"])
    grading = protocols.describe_grading(config, [protocols.Asked("one", "s", [problem], 0, "", 1)])
    assert grading["grade"] == "hard" and grading["sandbox"] == config.code.sandbox and "deadline_s" not in grading


@pytest.mark.parametrize("grade, expected", [("soft", 0.5), ("hard", 0.0)])
def test_programs_are_scored_by_the_grade_that_is_set(grade, expected):
    problem = Problem("p", "?", "", "s", checker="code", tests="[]")
    done = [Answered(problem, [Judged("x", Verdict("wrong", "x", 0.5), NO_VOTE, 1, False)])]
    config = load([*SETTINGS, f"--config.code.grade={grade}"])
    one = story.score(config, protocols.Asked("one", "s", [problem], 0, "", 1), {"samples": done})
    assert one.scores["avg@1"].value == expected and one.scores["pass@1"].value == 0.0


def test_regrading_nothing_is_refused_and_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no responses to judge"):
        run(tmp_path / "nothing", regrade=True)
    assert not (tmp_path / "nothing").exists()


def test_a_checkpoint_brings_its_weights(tmp_path, capsys):
    config = load([*SETTINGS, "--config.eval.problems=8", "--config.eval.samples=0"])
    parts = build_parts(config)
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        for iteration in (3, 4):
            checkpoints.save(iteration, fresh_state(parts, parts.model.init(jax.random.key(iteration))), {})
    said = {}
    for name, checkpoint in (("random", ""), ("newest", "run"), ("third", "run/checkpoints/iteration_000003")):
        chosen = str(tmp_path / checkpoint) if checkpoint else ""
        run(tmp_path / name, "--config.eval.problems=8", "--config.eval.samples=0", checkpoint=chosen)
        said[name] = [
            json.loads(line)["responses"]
            for line in (tmp_path / name / "generations/sums.greedy.jsonl").read_text().splitlines()
        ]
    with build_checkers(config, parts.held_out) as checkers:
        way = story.make_rounds(config, parts, 8)["greedy"]
        params = make_decode_params(parts)(parts.model.init(jax.random.key(4)))
        expected = story.generate_set(
            tmp_path / "expected.jsonl", way, params, parts.held_out[:8], checkers, config.seed
        )
    assert [[one["text"] for one in row] for row in said["newest"]] == [
        [one.text for one in row.responses] for row in expected
    ]
    assert said["newest"] != said["third"] != said["random"] != said["newest"]
    assert "iteration 000004" in (tmp_path / "newest/results.md").read_text()
    (tmp_path / "run/config.json").write_text(to_json(config))
    few = ["--config.eval.problems=8", "--config.eval.samples=0"]
    with pytest.raises(ValueError, match=r"run/config\.json has another model: model\.rope_theta was 10000\.0 and is 500\.0"):
        run(tmp_path / "other", *few, "--config.model.rope_theta=500", checkpoint=str(tmp_path / "run"))
    assert "warning: the run" not in capsys.readouterr().out
    run(tmp_path / "asked", *few, "--config.data.instruction=please", checkpoint=str(tmp_path / "run"))
    assert "warning: the run had data.instruction '', here it is 'please'\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no finished checkpoint"):
        run(tmp_path / "none", checkpoint=str(tmp_path))


def test_prompts_that_are_too_long_are_refused_or_count_as_wrong(tmp_path, capsys):
    short = [
        "--config.rollout.max_prompt=21",
        "--config.eval.problems=12",
        "--config.eval.samples=1",
        "--config.eval.greedy=False",
    ]
    with pytest.raises(ValueError, match="sums: problem arithmetic-test"):
        run(tmp_path / "refused", *short)
    run(tmp_path / "dropped", *short, "--config.data.too_long=drop")
    one = json.loads((tmp_path / "dropped/results.json").read_text())["sets"]["sums"]
    asked = lines(tmp_path / "dropped/generations/sums.jsonl")
    assert one["problems"] == 12 and 0 < asked < 12 and one["too_long"] == 12 - asked
    assert f"{12 - asked} of 12 problems do not fit into 21 tokens" in (tmp_path / "dropped/results.md").read_text()
    assert "count as wrong" in capsys.readouterr().out


@pytest.mark.parametrize("settings, complaint", [
    (["--config.eval.sets=gsm8"], "no benchmark 'gsm8', perhaps 'gsm8k'"),
    (["--config.eval.sets=", "--config.data.held_out="], "name a set to evaluate on"),
    (["--config.eval.sets=mine=nowhere.jsonl"], "mine: nowhere.jsonl"),  # which of many sets it was
])  # fmt: skip
def test_sets_that_cannot_be_had_are_refused_before_anything_is_written(tmp_path, settings, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        run(tmp_path / "never", *settings)
    assert not (tmp_path / "never").exists()


def test_without_sets_the_held_out_problems_are_asked(tmp_path):
    run(tmp_path / "work", "--config.eval.sets=", "--config.eval.problems=8", "--config.eval.samples=0")
    assert lines(tmp_path / "work/generations/held_out.greedy.jsonl") == 8


def test_two_evaluations_do_not_write_into_one_folder(copy):
    with alone_in(copy), pytest.raises(ValueError, match="being worked on"):
        run(copy)


def test_math_verify_is_asked_last_and_its_differences_are_listed(copy, undisturbed, monkeypatch):
    asked = []

    class Opposite:
        """Says right to the first response of all, gives up on the second, and finds nothing elsewhere."""

        def __init__(self, workers):
            assert (copy / "results.json").exists()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, answer, response):
            asked.append((answer, response))
            ticket = Future()
            ticket.set_result({1: math_verify.CORRECT, 2: math_verify.LATE}.get(len(asked), math_verify.NOTHING))
            return ticket

    monkeypatch.setattr(math_verify, "installed", lambda: True)
    monkeypatch.setattr(math_verify, "MathVerifyPool", Opposite)
    run(copy)
    done = read_generations(copy / "generations/sums.greedy.jsonl", [row.problem for row in rows_of(copy)])
    right = sum(one.verdict.correct for row in (*rows_of(copy), *done) for one in row.responses)
    report = (copy / "disagreements.md").read_text()
    assert (
        len(asked) == 4 * PROBLEMS
        and f"{1 + right} of {4 * PROBLEMS - 1} responses. It gave up 1 more (timed out)" in report
    )
    assert report.count("\n## sums, ") == 1 + right and "theirs correct" in report
    run(copy)
    assert len(asked) == 4 * PROBLEMS  # nothing is new, so it is not asked again
    assert contents(copy) == contents(undisturbed)


def rows_of(workdir):
    config = load(SETTINGS)
    problems = protocols.load_sets(config, story.build_actor(config), protocols.name_sets(config))[0].problems
    return read_generations(workdir / "generations/sums.jsonl", problems)
