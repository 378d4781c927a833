"""What the warm start learns from, and what becomes of updates that are skipped."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_config import get_config

from dgpo_jax import build, supervised
from dgpo_jax.build import build_parts, build_state
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.collecting import nothing_drawn
from dgpo_jax.metrics import read_metrics
from dgpo_jax.restart import restore
from dgpo_jax.rl.update import Programs, StepFigures, Totals
from dgpo_jax.sft import sft
from dgpo_jax.sharding import make_mesh, to_host
from dgpo_jax.stopping import Stop, Stopping
from dgpo_jax.supervised import Skipped, solved_problems, supervised_update, warm_start


@pytest.mark.parametrize("sft_data", [False, True])  # True: named in sft.data; False: left to data.train
def test_a_prompt_that_is_too_long_is_dropped_from_the_warm_start_too(tmp_path, sft_data):
    rows = [{"id": name, "problem": text, "answer": "2", "solution": "2"} for name, text in (("short", "1+1"), ("long", "1+1" * 40))]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = get_config()
    config = replace(
        config, data=replace(config.data, train=str(file), too_long="drop"), mesh=replace(config.mesh, data=jax.device_count()),
        sft=replace(config.sft, data=str(file) if sft_data else ""),
    )  # fmt: skip
    stream = solved_problems(config, build_parts(config))
    assert {problem.id for problem in stream.take(0, 6)} == {"short"}


@pytest.mark.parametrize("too_long, complaint", [
    ("drop", "warning: 1 of 2 problems of sft.data were dropped as longer than 32 tokens"),
    ("cut", "warning: 1 of 2 problems of sft.data were cut to 32 tokens"),
])  # fmt: skip
def test_what_is_left_out_of_the_warm_starts_own_problems_is_said(tmp_path, capsys, too_long, complaint):
    config = with_problems(tmp_path, {"short": ("1+1", "2"), "long": ("1+1 " * 40, "2")})
    config = replace(config, data=replace(config.data, too_long=too_long), rollout=replace(config.rollout, max_prompt=32))
    solved_problems(config, build_parts(config))
    assert complaint in capsys.readouterr().out


@pytest.mark.parametrize("own", [False, True])  # True: named in sft.data
def test_solutions_that_do_not_fit_are_refused_before_the_warm_start_and_not_in_the_middle_of_it(tmp_path, own):
    # Digits are a token each, and the stop token is one more.
    config = with_problems(tmp_path, {"fits": ("1+1", "1" * 7), "over": ("2+2", "1" * 8), "far": ("3+3", "1" * 30)}, own)
    config = replace(config, rollout=replace(config.rollout, max_response=8))
    with pytest.raises(ValueError, match=(
        r"^2 solutions of the warm start have more than rollout\.max_response 8 tokens, such as that of problem over with 9; raise it"
        r" \(the longest has 31\), or leave them out \(prepare\.max_solution\)\.$"
    )):  # fmt: skip
        solved_problems(config, build_parts(config))


def with_problems(folder, texts, own=True):
    """The tiny run with a warm start from these {id: (problem, solution)}."""
    file = folder / "problems.jsonl"
    rows = [{"id": name, "problem": text, "answer": "2", "solution": solution} for name, (text, solution) in texts.items()]
    file.write_text("\n".join(map(json.dumps, rows)))
    config = get_config()
    source = {"sft": replace(config.sft, data=str(file))} if own else {"data": replace(config.data, train=str(file))}
    return replace(config, mesh=replace(config.mesh, data=jax.device_count()), **source)


def test_the_loss_is_the_mean_over_all_solution_tokens_of_the_minibatch():
    config = get_config()
    config = replace(config, update=replace(config.update, tokens_per_device=64))
    parts, batches = build_parts(config), []
    stream = solved_problems(config, parts)
    programs = Programs(
        score=None, complete=None, zero=lambda params: ([], None), norm=lambda gradients: None,
        accumulate=lambda params, carry, batch: (batches.append(to_host(batch)) or carry[0], carry[1], None),
        apply=lambda state, gradients, totals, rate: (state, None),
    )  # fmt: skip
    state = type("State", (), {"params": None})
    for update in (0, 1):
        supervised_update(config, parts, programs, stream, state, update)
        solutions = [
            [*parts.tokenizer.encode(problem.solution), parts.tokenizer.turn_end]
            for problem in stream.take(update * config.sft.examples, config.sft.examples)
        ]
        learned = np.concatenate([batch.tokens[batch.loss_mask] for batch in batches])
        assert sorted(learned.tolist()) == sorted(token for solution in solutions for token in solution)
        weights = np.concatenate([batch.weights[batch.loss_mask] for batch in batches])
        np.testing.assert_allclose(weights, 1 / len(learned), rtol=1e-6)
        # As a policy update with every advantage 1, and not as its supervised term, which would count twice.
        assert all((batch.advantages == batch.loss_mask).all() and not batch.supervised.any() for batch in batches)
        batches.clear()


def test_alone_it_leaves_what_train_goes_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
    config = get_config()
    config = replace(config, data=replace(config.data, held_out=""), sft=replace(config.sft, updates=1))
    assert sft(config, tmp_path) == {}  # nothing held out, nothing to report
    parts = build_parts(config)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        start = restore(config, parts, checkpoints)
    assert (start.done, start.skipped) == (0, 0)
    np.testing.assert_equal(start.backlog, nothing_drawn(config))
    # The weights have learned, the moments are those of a run that has not begun.
    state, before = to_host(start.state), to_host(build_state(config, parts))
    np.testing.assert_equal(state._replace(params=None), before._replace(params=None))
    assert any((new != old).any() for new, old in zip(*map(jax.tree.leaves, (state.params, before.params)), strict=True))


@pytest.mark.parametrize("flags, expected", [
    ([0, 0, 0], (0, 0, 0)),
    ([1, 0, 1, 1], (3, 2, 2)),
    ([1, 1, 1, 0], (3, 0, 3)),
])
def test_skipped_updates_are_counted_in_all_and_in_a_row(flags, expected):
    assert Skipped().after(flags) == expected
    assert Skipped().after(flags[:2]).after(flags[2:]) == expected  # in parts as at once
    assert Skipped().after(flags).after_line() == (0, expected[1], 0)  # what goes on across a line is one row


class StoppingAfter(Stopping):
    """Stops after the update `after`, once; counts by what `pretended` says."""

    def __init__(self, done, after):
        super().__init__()
        self.done, self.after = done, after

    def update(self, limited=False):
        assert limited  # stop_after_minutes counts in the warm start too
        if self.done and self.done[-1] == self.after:
            self.reason = "the test"
            raise Stop


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """The function (updates to skip, settings, stops=()) -> (lines, how it ended): a warm start of 30 updates that compute nothing.

    `stops` are updates after which it is stopped and started again; how it ended is "" or an error.
    """
    monkeypatch.setattr(build, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
    config = get_config()
    parts, done = build_parts(config), []

    def pretend(skipped, log_every, max_skipped, stops=()):
        def update(config, parts, programs, stream, state, number):
            done.append(number + 1)
            totals = Totals({"loss": 1.0, "entropy": 1.0, "tokens": 2.0}, {})
            figures = StepFigures(*[np.float32(0)] * len(StepFigures._fields))._replace(skipped=np.float32(number + 1 in skipped))
            return state, (totals, figures, 0.1)

        monkeypatch.setattr(supervised, "supervised_update", update)
        workdir = tmp_path / f"run {len(list(tmp_path.iterdir()))}"
        ours = replace(
            config, sft=replace(config.sft, updates=30, log_every=log_every, checkpoint_every=16),
            optimizer=replace(config.optimizer, max_skipped=max_skipped),
        )  # fmt: skip
        record, ended = {"problems": {}}, ""
        for after in (*stops, None):
            done.clear()
            try:
                warm_start(ours, parts, workdir, StoppingAfter(done, after), parts.stream, record)
                assert after is None
            except Stop:
                assert after is not None
            except ValueError as error:
                ended = str(error)
                break
        lines = [(row["update"], row["optim/skipped"]) for row in read_metrics(workdir / "sft/metrics.jsonl")]
        return lines, ended.replace(str(workdir), "")

    return pretend


@pytest.mark.parametrize("skipped, log_every, max_skipped, lines, dies", [
    ({5, 12, 20}, 10, 3, [(10, 1), (20, 2), (30, 0)], False),  # each is in the line of its own updates
    ({20}, 1, 2, [(number, int(number == 20)) for number in range(1, 31)], False),  # one alone is no row
    ({9, 10, 11}, 10, 3, [(10, 2), (20, 1)], True),  # a row across a line
    ({12, 13, 14}, 10, 3, [(10, 0), (20, 3)], True),  # one that has ended before the line is written
    ({12, 14, 16}, 10, 3, [(10, 0), (20, 3), (30, 0)], False),  # as many, but not in a row
    ({29, 30}, 10, 3, [(10, 0), (20, 0), (30, 2)], False),  # at the very end, and few
])
def test_skipped_updates_are_counted_alike_wherever_the_warm_start_was_stopped(pretended, skipped, log_every, max_skipped, lines, dies):
    undisturbed = pretended(skipped, log_every, max_skipped)
    assert undisturbed[0] == lines
    assert bool(undisturbed[1]) == dies
    for stops in ([19], [4, 9, 11, 29], [10, 13, 16]):
        if not dies or max(stops) < lines[-1][0]:
            assert pretended(skipped, log_every, max_skipped, stops) == undisturbed, stops


def test_a_warm_start_ends_when_too_many_updates_in_a_row_are_skipped_and_keeps_the_weights_from_before(pretended, tmp_path):
    lines, error = pretended(range(15, 31), 10, 4)
    assert lines == [(10, 0), (20, 6)]
    assert "6 updates of the warm start in a row" in error and "optimizer.max_skipped is 4; lower sft.learning_rate" in error
    assert not list(tmp_path.glob("run 0/sft/checkpoints/iteration_*"))  # not even the one due at update 16
