"""A run that is stopped and goes on ends as one that was not: in every mode, wherever it was stopped, to the bit.

Stops are asked for by the run itself, at the point that a test names; signals and kills are in tests/test_chaos.py.
"""

import contextlib
import functools
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from same_runs import differences, differing_lines, recorded, saved_places

from dgpo_jax import build, sft, supervised, train
from dgpo_jax.checkpoint import peek
from dgpo_jax.config import load
from dgpo_jax.metrics import read_metrics
from dgpo_jax.rewards.checkers import Checkers, CodeSettings, MathSettings
from dgpo_jax.sharding import make_mesh
from dgpo_jax.stopping import Stop, Stopping

TINY = f"--config={Path(__file__).parent / 'tiny_config.py'}"
# 20 problems, 8 an iteration: the third one meets the end of an epoch. The learning rate rises for three iterations. With a
# grace period of 0 a stop drops what is under way.
SMALL = [
    "--config.model.layers=1", "--config.iterations=4", "--config.data.size=20", "--config.eval.problems=6", "--config.eval.every=2",
    "--config.optimizer.warmup-iterations=3", "--config.grace-seconds=0",
]  # fmt: skip
MODES = {
    "plain": [],
    "dynamic sampling, a surplus waiting, two iterations stale, KL in the loss": [
        "--config.loss.method=dapo", "--config.rollout.staleness=2", "--config.kl.coefficient=0.05", "--config.data.held-out=",
    ],
    "no warm start, int8 rollout, the sampler's log-probabilities, KL in the reward": [
        "--config.sft.updates=0", "--config.rollout.int8-weights=True", "--config.rollout.int8-cache=True", "--config.data.held-out=",
        "--config.update.old-logprobs=sampler", "--config.kl.coefficient=0.05", "--config.kl.place=reward", "--config.kl.estimator=k1",
    ],
}  # fmt: skip
PLAIN, DYNAMIC, COLD = MODES


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    """One device, and one checker for all runs: starting one takes longer than a run. No curves are drawn."""
    with pytest.MonkeyPatch.context() as patch, Checkers(MathSettings(extract="last", workers=1), CodeSettings(), {"math"}) as checkers:
        patch.setattr(build, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        patch.setattr(train, "build_checkers", lambda config, problems: contextlib.nullcontext(checkers))
        patch.setattr(train, "plot_curves", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def warm(surroundings, tmp_path_factory):
    """A workdir in which only the warm start is done; some answers are right."""
    workdir = tmp_path_factory.mktemp("warm")
    train.train(load([TINY, *SMALL, "--config.iterations=0"]), workdir)
    return workdir


@pytest.fixture(scope="module")
def begun(warm):
    """The function workdir -> the same, with the warm start done."""

    def begun(workdir):
        shutil.copytree(warm / "sft", workdir / "sft")
        return workdir

    return begun


@pytest.fixture(scope="module")
def whole_run_of(begun, tmp_path_factory):
    """The function mode -> (workdir, config) of a run of four iterations that nothing happened to."""

    @functools.cache
    def whole_run_of(mode):
        config, workdir = load([TINY, *SMALL, *MODES[mode]]), tmp_path_factory.mktemp("whole") / "run"
        train.train(config, workdir if mode == COLD else begun(workdir))
        return workdir, config

    return whole_run_of


class StoppingAt(Stopping):
    """Asks for a stop at one point of a run: in the Nth iteration of this start, at the place named, when it has come there so often."""

    def __init__(self, *arguments, iteration, place, visit):
        super().__init__(*arguments)
        self.wanted, self.iteration, self.learning, self.visits = (iteration, place), 0, False, 0
        self.visit = visit

    def come_to(self, place):
        self.visits += self.wanted == (self.iteration, place)
        if self.visits == self.visit and not self.reason:
            self.request(f"the test, {place}")

    def boundary(self, *given, **named):
        self.iteration, self.learning = self.iteration + 1, False
        self.come_to("boundary")
        super().boundary(*given, **named)

    def chunk(self):
        self.come_to("evaluation" if self.learning or not self.iteration else "rollout")
        super().chunk()

    def update(self, *given, **named):
        self.learning = True
        self.come_to("update")
        super().update(*given, **named)


@pytest.fixture
def stopped_at(monkeypatch):
    """The function (config, workdir, place, iteration=1, visit=1) that trains up to there. A warm start is in iteration 0."""

    def stopped_at(config, workdir, place, iteration=1, visit=1):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(train, "Stopping", functools.partial(StoppingAt, iteration=iteration, place=place, visit=visit))
            train.train(config, workdir)

    return stopped_at


def assert_same_end(workdir, whole, config):
    assert list(differences(workdir, whole, config, same_saves=False)) == []


def test_the_modes_reach_what_they_are_tested_for(whole_run_of):
    rows = {mode: read_metrics(whole_run_of(mode)[0] / "metrics.jsonl") for mode in MODES}
    for mode in MODES:
        assert [row["iteration"] for row in rows[mode]] == [0, 1, 2, 3, 4]
        assert all(row["policy/tokens"] > 0 and row["optim/grad_norm"] > 0 for row in rows[mode][1:]), mode
        assert [row["optim/learning_rate"] / 1e-3 for row in rows[mode][1:]] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [row["iteration"] for row in rows[PLAIN] if "eval/greedy" in row] == [0, 2, 4]
    waiting = [row["rollout/groups_waiting"] for row in rows[DYNAMIC][1:]]
    assert len(set(waiting)) > 1 and min(waiting) >= 16  # two iterations' worth, and a surplus that varies
    assert rows[DYNAMIC][-1]["rollout/staleness"] > 1 and rows[DYNAMIC][-1]["policy/kl_ref"] > 0
    assert rows[COLD][-1]["reward/kl"] != 0 and rows[COLD][-1]["gap/mean"] > 1e-5  # eight bits are coarser than float32
    assert not (whole_run_of(COLD)[0] / "sft").exists()
    problems = [row["problem_id"] for row in texts(whole_run_of(PLAIN)[0] / "rollouts/iteration_000003.jsonl")]
    first = [row["problem_id"] for number in (1, 2) for row in texts(whole_run_of(PLAIN)[0] / f"rollouts/iteration_{number:06d}.jsonl")]
    assert set(problems) - set(first) and set(problems) & set(first)  # the rest of one epoch, and the beginning of the next


def where(workdir):
    """What the newest checkpoint holds, in words."""
    number, extra = peek(workdir / "checkpoints")
    if extra["collected"] is None:
        return f"after iteration {number}"
    details = np.load(max((workdir / "checkpoints").glob(f"iteration_{number:06d}*")) / "host.npz")
    updates = [array for name, array in details.items() if name == "results/figures/skipped"]
    return f"after iteration {number - 1} and {len(updates[0]) if updates else 0} updates"


def texts(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_stopped_in_a_rollout_and_amid_updates_ends_as_if_it_had_not_been(mode, whole_run_of, begun, stopped_at, tmp_path):
    whole, config = whole_run_of(mode)
    workdir = tmp_path / "run" if mode == COLD else begun(tmp_path / "run")
    microbatches = [line.get("update/microbatches") for line in read_metrics(whole / "metrics.jsonl")]
    stopped_at(config, workdir, "update")  # before the first microbatch is scored
    assert where(workdir) == "after iteration 0 and 0 updates"
    responses = workdir / "rollouts/iteration_000001.jsonl"
    sampled = responses.stat().st_mtime_ns
    # Each is scored, or at least sent, and then learned from; the last one is of the second update, whose gradient is dropped.
    stopped_at(config, workdir, "update", visit=2 * microbatches[1])
    assert where(workdir) == "after iteration 0 and 1 updates"
    stopped_at(config, workdir, "rollout", iteration=2)
    assert where(workdir) == "after iteration 1"  # what was under way is dropped, what was done is saved
    assert responses.stat().st_mtime_ns == sampled  # once
    stopped_at(config, workdir, "update", iteration=3, visit=2 * microbatches[4])
    assert where(workdir) == "after iteration 3 and 1 updates"  # of the last one, which is not done by that
    train.train(config, workdir)
    assert_same_end(workdir, whole, config)


def test_a_run_stopped_amid_each_of_its_evaluations_ends_as_if_it_had_not_been(whole_run_of, begun, stopped_at, tmp_path, monkeypatch):
    whole, config = whole_run_of(PLAIN)
    workdir, trained, learn = begun(tmp_path / "run"), [], train.learn
    monkeypatch.setattr(train, "learn", lambda *given, **named: trained.append(given[6]) or learn(*given, **named))
    for stopped_in, iteration in ((0, 0), (2, 2), (4, 2)):  # by its number, and counted from this start on
        stopped_at(config, workdir, "evaluation", iteration=iteration)
        saved, extra = peek(workdir / "checkpoints")
        assert saved == stopped_in and bool(extra["unwritten"]) == (stopped_in > 0)
        assert len(read_metrics(workdir / "metrics.jsonl")) == stopped_in  # its line comes with its evaluation
    train.train(config, workdir)
    assert trained == [1, 2, 3, 4]  # only evaluations were done again
    assert_same_end(workdir, whole, config)
    # Which iteration was the best came out after the restarts; it must be kept all the same.
    assert ("", best_iteration(whole)) in set(saved_places(whole)) & set(saved_places(workdir))
    monkeypatch.setattr(train, "build_programs", None)  # and now it is finished: nothing is even built
    train.train(config, workdir)


def best_iteration(workdir):
    """By its evaluation; of two alike the later one."""
    rows = [row for row in read_metrics(workdir / "metrics.jsonl")[1:] if "eval/avg@2" in row]
    return max(rows, key=lambda row: (row["eval/avg@2"], row["iteration"]))["iteration"]


def test_a_warm_start_that_was_stopped_ends_as_if_it_had_not_been(warm, stopped_at, tmp_path):
    config, workdir, done = load([TINY, *SMALL, "--config.iterations=0"]), tmp_path / "run", 0
    for updates in (0, 7, 20, 59):  # nothing to save; between two lines; where one is saved anyway; but the last
        stopped_at(config, workdir, "update", iteration=0, visit=updates - done + 1)
        found, done = peek(workdir / "sft/checkpoints"), updates
        assert (found[0] if found else 0) == updates
    train.train(config, workdir)
    assert_same_end(workdir, warm, config)
    assert recorded(workdir / "sft/metrics.jsonl")[-1]["update"] == 60


def test_a_finished_run_asked_for_more_iterations_is_one_run_of_that_many(whole_run_of, begun, tmp_path, capsys):
    whole, config = whole_run_of(PLAIN)
    workdir = begun(tmp_path / "run")
    shorter = replace(config, iterations=2)
    train.train(shorter, workdir)
    before = contents(workdir)
    train.train(shorter, workdir)
    assert "nothing to do: all 2 iterations were done before" in capsys.readouterr().out
    assert contents(workdir) == before
    train.train(config, workdir)
    assert_same_end(workdir, whole, config)


def contents(workdir):
    """Bytes of all files but TensorBoard's, whose name has the time, by their names."""
    files = [path for path in workdir.glob("**/*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


@pytest.fixture
def is_accepted(monkeypatch):
    """The function (config, workdir) -> whether the run there would go on: it has come to building its programs."""

    class Accepted(Exception):  # noqa: N818 (no error)
        pass

    def refuse_to_build(*_):
        raise Accepted

    def is_accepted(config, workdir):
        with monkeypatch.context() as patch:
            patch.setattr(train, "build_programs", refuse_to_build)
            with pytest.raises(Accepted):
                train.train(config, workdir)
        return True

    return is_accepted


@pytest.fixture
def copied(whole_run_of, tmp_path):
    """A finished plain run in a folder of its own, and its config asked for one iteration more."""
    whole, config = whole_run_of(PLAIN)
    return shutil.copytree(whole, tmp_path / "run"), replace(config, iterations=5)


def test_a_changed_setting_is_refused_by_its_name_and_accepted_on_purpose(copied, is_accepted):
    workdir, config = copied
    changed = replace(config, optimizer=replace(config.optimizer, learning_rate=5e-4))
    before = contents(workdir)
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate was 0\.001 and is 0\.0005") as refusal:
        train.train(changed, workdir)
    assert "--config.checkpoint.accept_changes=optimizer.learning_rate" in str(refusal.value)
    assert "warmup" not in str(refusal.value)  # what is the same is not told
    assert contents(workdir) == before
    row = train.train(replace(changed, checkpoint=replace(config.checkpoint, accept_changes="optimizer.learning_rate")), workdir)
    assert row["iteration"] == 5 and row["optim/learning_rate"] == pytest.approx(5e-4)
    assert is_accepted(replace(changed, iterations=6), workdir)  # from now on it is a setting of the run


def test_a_checkpoint_knows_its_run_even_if_config_json_does_not(copied):
    workdir, config = copied
    (workdir / "config.json").unlink()
    (workdir / "problems.json").unlink()
    with pytest.raises(ValueError, match=r"seed was 0 and is 1"):
        train.train(replace(config, seed=1), workdir)


def test_a_checkpoint_of_another_run_that_was_moved_here_is_refused(copied, begun, tmp_path):
    workdir, config = copied
    other = begun(tmp_path / "other")
    (other / "checkpoints").mkdir()
    shutil.copytree(workdir / "checkpoints/iteration_000004", other / "checkpoints/iteration_000004")
    clipped = replace(config, loss=replace(config.loss, clip_high=0.5))
    with pytest.raises(ValueError, match=r"loss\.clip_high was 0\.28 and is 0\.5"):
        train.train(clipped, other)


def test_edited_problems_are_refused_and_accepted_on_purpose(is_accepted, tmp_path):
    lines = [{"id": str(number), "problem": f"anna has {number} coins . how many ?", "answer": str(number)} for number in range(5)]
    path, workdir = tmp_path / "problems.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [f"--config.data.train={path}", "--config.data.held-out=", "--config.sft.updates=0", "--config.iterations=1"]
    config = load([TINY, *SMALL, *settings])
    train.train(config, workdir)
    lines[3]["answer"] = "4"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = replace(config, iterations=2)
    with pytest.raises(ValueError, match="other training problems: they were 5 and are 5, or their texts have changed"):
        train.train(config, workdir)
    (workdir / "problems.json").unlink()  # the checkpoint knows it too
    with pytest.raises(ValueError, match="other training problems"):
        train.train(config, workdir)
    assert is_accepted(replace(config, checkpoint=replace(config.checkpoint, accept_changes="problems")), workdir)


@pytest.fixture
def amid_the_warm_start(stopped_at, tmp_path):
    """A run stopped after 3 of the 6 updates of its warm start, its config, and the function that writes other solutions for it."""

    def write(solution):
        lines = [{"id": str(number), "problem": f"anna has {number} coins . how many ?", "answer": str(number)} for number in range(5)]
        path.write_text("".join(json.dumps(line | {"solution": solution.format(line["answer"])}) + "\n" for line in lines))

    path, workdir = tmp_path / "solved.jsonl", tmp_path / "run"
    write("{}")
    settings = [f"--config.sft.data={path}", "--config.sft.updates=6", "--config.sft.log-every=2", "--config.sft.examples=2", "--config.iterations=0"]
    config = load([TINY, *SMALL, *settings])
    stopped_at(config, workdir, "update", iteration=0, visit=4)
    assert peek(workdir / "sft/checkpoints")[0] == 3
    return workdir, config, write


def accepting(config, names):
    """The config with checkpoint.accept_changes."""
    return replace(config, checkpoint=replace(config.checkpoint, accept_changes=names))


def test_solutions_edited_amid_the_warm_start_are_refused_and_accepted_on_purpose(amid_the_warm_start, is_accepted):
    workdir, config, write = amid_the_warm_start
    write("so it is {}")
    before = contents(workdir)
    for command in (train.train, sft.sft):
        with pytest.raises(ValueError, match="other sft problems: they were 5 and are 5, or their texts have changed"):
            command(config, workdir)
    assert contents(workdir) == before
    assert is_accepted(accepting(config, "problems"), workdir)
    write("{}")
    assert is_accepted(config, workdir)  # put back


def test_a_checkpoint_of_the_warm_start_knows_its_run_even_if_config_json_does_not(amid_the_warm_start, is_accepted):
    workdir, config, write = amid_the_warm_start
    (workdir / "config.json").unlink()
    (workdir / "problems.json").unlink()
    for command in (train.train, sft.sft):
        with pytest.raises(ValueError, match=r"run/sft holds a run with other settings: sft\.learning_rate was 0\.01 and is 0\.1"):
            command(replace(config, sft=replace(config.sft, learning_rate=0.1)), workdir)
    assert is_accepted(config, workdir)
    write("so it is {}")
    for command in (train.train, sft.sft):
        with pytest.raises(ValueError, match=r"run/sft holds a run with other sft problems"):
            command(config, workdir)


def test_a_change_accepted_amid_the_warm_start_is_one_of_the_run_once_it_goes_on_and_not_before(amid_the_warm_start, stopped_at, is_accepted, monkeypatch):
    workdir, config, _ = amid_the_warm_start
    changed, before = replace(config, sft=replace(config.sft, learning_rate=0.1)), contents(workdir)

    def fail(*_):
        raise ValueError("no weights")

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "find_start", fail)
        for command in (train.train, sft.sft):
            with pytest.raises(ValueError, match="no weights"):
                command(accepting(changed, "sft"), workdir)
    assert contents(workdir) == before
    assert is_accepted(config, workdir)
    stopped_at(accepting(changed, "sft"), workdir, "update", iteration=0, visit=2)
    assert is_accepted(changed, workdir)
    with pytest.raises(ValueError, match=r"sft\.learning_rate was 0\.1 and is 0\.01"):
        train.train(config, workdir)


def test_a_change_accepted_by_a_start_that_then_fails_is_none_of_the_run(copied, is_accepted, monkeypatch):
    workdir, config = copied
    changed = accepting(replace(config, optimizer=replace(config.optimizer, learning_rate=5e-4)), "optimizer.learning_rate")

    def fail(*_):
        raise ValueError("no reference")

    before = contents(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_all", lambda *_: 0.0)
        patch.setattr(train, "find_reference", fail)  # the last thing that can fail, after the checkpoint was read
        with pytest.raises(ValueError, match="no reference"):
            train.train(changed, workdir)
    assert contents(workdir) == before
    assert is_accepted(config, workdir)


def test_a_finished_run_without_its_metrics_says_so_and_goes_on_if_there_is_more_to_do(copied):
    workdir, config = copied
    (workdir / "metrics.jsonl").unlink()
    for _ in range(2):  # the first time leaves no empty file that would pass for it
        with pytest.raises(ValueError, match=r"metrics\.jsonl has no line, though all iterations are done; put the file back, or raise iterations"):
            train.train(replace(config, iterations=4), workdir)
    assert train.train(config, workdir)["iteration"] == 5


def test_a_difference_between_two_runs_is_found_wherever_it_is(whole_run_of, tmp_path):
    whole, config = whole_run_of(PLAIN)

    def damaged(change):
        workdir = shutil.copytree(whole, tmp_path / f"run {len(list(tmp_path.iterdir()))}")
        change(workdir)
        return next(differences(workdir, whole, config), "")

    def last_line(workdir, edit):
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:-1], *edit(lines[-1])]))

    assert damaged(lambda workdir: None) == ""
    assert "4 lines instead of 5" in damaged(lambda workdir: last_line(workdir, lambda line: []))
    assert "line 5: reward/mean is 9 instead" in damaged(
        lambda workdir: last_line(workdir, lambda line: [re.sub(r'"reward/mean": [^,]+', '"reward/mean": 9', line)])
    )
    assert "eval: only one of the runs has iteration_000002.jsonl" in damaged(lambda workdir: (workdir / "eval/iteration_000002.jsonl").unlink())
    assert "rollouts/iteration_000003.jsonl: other bytes" in damaged(lambda workdir: (workdir / "rollouts/iteration_000003.jsonl").write_text("{}\n"))
    events = next((whole / "tensorboard").iterdir()).name
    assert "tensorboard: " in damaged(lambda workdir: shutil.copy(workdir / "tensorboard" / events, workdir / f"tensorboard/{events}.2"))
    assert "checkpoints: " in damaged(lambda workdir: shutil.rmtree(workdir / "checkpoints/iteration_000002"))
    assert "last checkpoint: " in damaged(lambda workdir: shutil.rmtree(workdir / "checkpoints/iteration_000004")).replace("checkpoints: ", "last checkpoint: ")
    assert list(differing_lines("x", [{"a": 1}], [{"a": 1, "b": 0}])) == ["x, line 1: b is None instead of 0"]


def test_a_run_whose_last_updates_are_all_skipped_ends_with_an_error_and_not_as_finished(begun, tmp_path, monkeypatch):
    settings = ["--config.optimizer.max-skipped=4", "--config.checkpoint.keep=1", "--config.checkpoint.keep-best=0", "--config.checkpoint.every=1"]
    config, workdir = load([TINY, *SMALL, *settings]), begun(tmp_path / "run")
    compute, seen = train.compute_advantages, []

    def broken_from_the_third_on(*given):
        seen.append(None)
        return compute(*given) * (np.nan if len(seen) > 2 else 1)

    monkeypatch.setattr(train, "compute_advantages", broken_from_the_third_on)
    for start in ("first", "again"):
        seen[:] = [None] * 2 if start == "again" else []
        with pytest.raises(ValueError, match=r"4 updates in a row .* the newest checkpoint is from before them\. Look at .*nonfinite"):
            train.train(config, workdir)
        assert where(workdir) == "after iteration 2"
    monkeypatch.undo()
    assert train.train(config, workdir)["iteration"] == 4  # in another way, here by itself, it goes on
