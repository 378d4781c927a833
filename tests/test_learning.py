"""From a rollout to updates: what is computed, what it is divided by, and what is reported."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_config import get_config

from dgpo_jax import build, train
from dgpo_jax.data.prompts import encode_prompts
from dgpo_jax.learning import gap_metrics, learn, make_minibatches, policy_metrics, set_old_logprobs
from dgpo_jax.rl.packing import split_groups
from dgpo_jax.rl.update import LOSS_MAXIMA, LOSS_SUMS, StepFigures, Totals
from dgpo_jax.rollout import Responses
from dgpo_jax.sharding import make_mesh, to_device, to_host
from dgpo_jax.types import Rollout

ITERATION = 3
# Four groups of two; the first and the last learn something.
LENGTHS = np.array([[3, 5], [2, 4], [1, 6], [2, 2]])
ADVANTAGES = np.array([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.5, -0.5]], np.float32)


def config_for(**changes):
    config = get_config()
    update = {name: changes.pop(name) for name in ("updates", "old_logprobs") if name in changes}
    return replace(
        config, rollout=replace(config.rollout, prompts=4, group_size=2), update=replace(config.update, **update),
        loss=replace(config.loss, **changes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    """On one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        return build.build_parts(config_for())


@pytest.fixture(scope="module")
def fresh(parts):
    """The function () -> the same new state every time: an update takes the old one's memory."""
    state = to_host(build.build_state(config_for(), parts))
    return lambda: to_device(state, parts.shardings.state)


@pytest.fixture(scope="module")
def programs_of(parts):
    """The function config -> programs, compiled once for each method."""
    return functools.cache(lambda method: build.build_programs(config_for(method=method), parts))


@pytest.fixture(scope="module")
def responses(parts):
    """Random tokens of the lengths above, with log-probabilities that no model would give them."""
    config = config_for()
    problems = parts.stream.take(0, 4)
    prompts = encode_prompts(problems, parts.tokenizer, parts.template, config.rollout.max_prompt)
    mask = np.arange(config.rollout.max_response) < LENGTHS.reshape(-1)[:, None]
    tokens = np.random.default_rng(0).integers(5, 100, mask.shape).astype(np.int32)
    rollout = Rollout(np.where(mask, tokens, 0), mask, np.where(mask, np.float32(-9), 0), np.zeros(8, bool))
    return Responses(problems, prompts, rollout, [""] * 8)


def groups_of_updates(config):
    return split_groups(4, config.update.updates, config.seed, ITERATION)


def test_a_group_without_advantage_is_not_computed_but_its_tokens_count_in_the_normaliser(parts, responses):
    config = config_for(updates=2)
    minibatches = make_minibatches(config, parts, responses, ADVANTAGES, ITERATION)
    counted = {0: 8, 1: 6, 2: 7, 3: 4}  # tokens of each group, from LENGTHS
    computed = {0: 8, 1: 0, 2: 0, 3: 4}
    assert len(minibatches) == 2
    for groups, (normaliser, batches) in zip(groups_of_updates(config), minibatches, strict=True):
        assert float(normaliser) == sum(counted[group] for group in groups)
        assert sum(int(batch.loss_mask.sum()) for batch in batches) == sum(computed[group] for group in groups)
    assert sum(float(normaliser) for normaliser, _ in minibatches) == 25
    packed = np.concatenate([np.asarray(b.advantages)[np.asarray(b.loss_mask)] for _, batches in minibatches for b in batches])
    # Each token of a response carries its advantage: 3 and 5 tokens, 2 and 2.
    assert sorted(packed.tolist()) == [-1.0] * 5 + [-0.5] * 2 + [0.5] * 2 + [1.0] * 3


def test_an_iteration_in_which_no_group_has_an_advantage_learns_nothing_and_says_so(parts, programs_of, fresh, responses):
    state, metrics = learn(config_for(), parts, programs_of("dgpo"), fresh(), responses, 0 * ADVANTAGES, ITERATION)
    assert int(state.update) == 2  # the optimizer steps all the same, on a gradient of 0
    assert metrics["policy/tokens"] == metrics["optim/grad_norm"] == metrics["update/microbatches"] == 0
    assert metrics["optim/skipped"] == 0
    # What is a mean over tokens is not there, rather than 0 or a division by 0.
    assert not {"policy/loss", "policy/ratio_mean", "policy/entropy", "gap/mean"} & metrics.keys()


def figures(tokens, ratio_max, skipped=0.0, **sums):
    sums = dict.fromkeys(LOSS_SUMS, 0.0) | {"tokens": tokens} | sums
    maxima = dict.fromkeys(LOSS_MAXIMA, -np.inf) | ({"ratio": ratio_max, "minus_ratio": -0.5, "ratio_error": 0.25} if tokens else {})
    return Totals(sums, maxima), StepFigures(grad_norm=np.float32(tokens / 10), skipped=skipped)


def test_figures_per_token_are_means_over_the_tokens_of_all_updates():
    metrics = policy_metrics([
        figures(10.0, 1.25, entropy=20.0, ratio=10.0, too_low=1.0, too_high=0.0, loss=0.5),
        figures(30.0, 2.0, entropy=20.0, ratio=50.0, too_low=1.0, too_high=4.0, loss=0.1),
    ])  # fmt: skip
    assert metrics["policy/tokens"] == 40
    assert metrics["policy/entropy"] == 1.0  # 40 / 40, where the mean of the two means would be 4/3
    assert metrics["policy/ratio_mean"] == 1.5
    assert metrics["policy/too_low"] == 0.05 and metrics["policy/too_high"] == 0.1
    assert metrics["policy/clipped"] == pytest.approx(0.15)
    assert metrics["policy/loss"] == pytest.approx(0.3)  # each update's is a mean already
    assert metrics["policy/ratio_max"] == 2.0 and metrics["policy/ratio_min"] == 0.5
    assert metrics["policy/first_ratio_error"] == 0.25
    assert metrics["optim/grad_norm"] == 2.0 and metrics["optim/grad_norm_max"] == 3.0


def test_the_first_ratio_is_left_out_where_the_first_update_had_no_tokens():
    metrics = policy_metrics([figures(0.0, None), figures(30.0, 2.0, ratio=30.0)])
    assert metrics["policy/first_ratio_error"] is None  # the second update's would look like a fault
    assert metrics["policy/ratio_mean"] == 1.0 and metrics["policy/ratio_max"] == 2.0


def test_the_gap_is_a_mean_over_tokens_and_absent_without_them():
    gaps = [Totals({"tokens": 10.0, "gap": 1.0}, {"gap": 0.5}), Totals({"tokens": 30.0, "gap": 1.0}, {"gap": 0.25})]
    assert gap_metrics(gaps) == {"gap/mean": 0.05, "gap/max": 0.5}
    assert gap_metrics([]) == {}


def test_old_logprobs_are_the_trainers_own_unless_the_samplers_are_asked_for(parts, programs_of, fresh, responses):
    programs, params = programs_of("dgpo"), fresh().params

    def old(source):
        config = config_for(old_logprobs=source)
        minibatches = make_minibatches(config, parts, responses, ADVANTAGES, ITERATION)
        minibatches, gaps = set_old_logprobs(config, programs, params, minibatches)
        found = [np.asarray(b.old_logprobs)[np.asarray(b.loss_mask)] for _, batches in minibatches for b in batches]
        return np.concatenate(found), gaps

    sampler, no_gaps = old("sampler")
    assert (sampler == -9).all() and no_gaps == []  # as made up above
    trainer, gaps = old("trainer")
    assert (trainer != -9).all()
    gap = gap_metrics(to_host(gaps))
    assert gap["gap/mean"] == pytest.approx(np.abs(trainer + 9).mean(), rel=1e-5)
    assert gap["gap/max"] == pytest.approx(np.abs(trainer + 9).max(), rel=1e-5)


def test_with_the_samplers_logprobs_the_first_ratio_shows_the_gap(parts, programs_of, fresh, responses):
    arguments = parts, programs_of("dgpo"), fresh(), responses, ADVANTAGES, ITERATION
    _, metrics = learn(config_for(old_logprobs="sampler"), *arguments)
    assert metrics["policy/first_ratio_error"] > 1  # exp(-5 + 9) - 1 and the like
    assert "gap/mean" not in metrics  # what has not been measured is not reported


@pytest.mark.parametrize("method", ["dgpo", "grpo", "reinforce"])
def test_each_method_runs_an_iteration(method, parts, programs_of, fresh, responses):
    before = to_host(fresh().params)
    state, metrics = learn(
        config_for(method=method), parts, programs_of(method), fresh(), responses, ADVANTAGES, ITERATION
    )
    assert int(state.update) == 2
    assert metrics["policy/first_ratio_error"] < 1e-5 and metrics["optim/grad_norm"] > 0
    assert all(np.isfinite(value) for value in metrics.values())
    assert any((new != old).any() for new, old in zip(*map(jax.tree.leaves, (to_host(state.params), before)), strict=True))


def test_with_one_update_an_iteration_every_method_is_the_same(parts, programs_of, fresh, responses):
    norms = [
        learn(config_for(method=method, updates=1), parts, programs_of(method), fresh(), responses, ADVANTAGES, ITERATION)[1][
            "optim/grad_norm"
        ]
        for method in ("dgpo", "grpo", "reinforce")
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)  # all ratios are 1, inside any region


@pytest.mark.parametrize("broken_update, before, expected", [
    (None, 3, 0),  # two good ones end the row
    (0, 3, 0),  # so does a good one behind a bad one
    (1, 3, 1),  # a bad one behind a good one begins a row
    ("both", 3, 5),  # and two bad ones lengthen it
])  # fmt: skip
def test_updates_without_a_finite_gradient_are_skipped_and_counted_in_a_row(
    broken_update, before, expected, parts, programs_of, fresh, responses
):
    config = config_for()
    advantages = np.ones_like(ADVANTAGES)
    for number, groups in enumerate(groups_of_updates(config)):
        if broken_update in (number, "both"):
            advantages[groups] = np.nan
    state, metrics = learn(config, parts, programs_of("dgpo"), fresh(), responses, advantages, ITERATION, before)
    skipped = {None: 0, "both": 2}.get(broken_update, 1)
    assert metrics["optim/skipped"] == skipped and metrics["optim/skipped_in_a_row"] == expected
    assert int(state.update) == 2 - skipped
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_host(state.params)))


def test_a_run_stops_when_too_many_updates_in_a_row_were_skipped():
    config = get_config()
    most = config.optimizer.max_skipped
    assert train.check_skipped(config, most - 1) == most - 1
    with pytest.raises(ValueError, match=rf"{most} updates in a row .* lower optimizer.learning_rate"):
        train.check_skipped(config, most)
