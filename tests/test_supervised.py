"""What the warm start learns from."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_config import get_config

from dgpo_jax import build
from dgpo_jax.build import build_parts, build_state
from dgpo_jax.checkpoint import Checkpoints
from dgpo_jax.collecting import nothing_drawn
from dgpo_jax.restart import restore
from dgpo_jax.rl.update import Programs
from dgpo_jax.sft import sft
from dgpo_jax.sharding import make_mesh, to_host
from dgpo_jax.supervised import solved_problems, supervised_update


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
