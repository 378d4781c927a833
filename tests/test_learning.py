"""From experience to updates: what is computed, what it is divided by, and what is reported."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_config import get_config

from dgpo_jax import build
from dgpo_jax.config import CorrectionConfig, KlConfig
from dgpo_jax.data.prompts import encode_prompts
from dgpo_jax.keeping import check_skipped
from dgpo_jax.learning import (
    complete_minibatches,
    compute_advantages,
    in_baseline,
    in_loss,
    learn,
    microbatches,
    packing_shape,
    plan_minibatches,
    sampled_gap,
    score_responses,
    score_waiting,
    to_compute,
)
from dgpo_jax.recipe import resolve
from dgpo_jax.rl.correction import Correction
from dgpo_jax.rl.experience import join
from dgpo_jax.rl.figures import gap_metrics, policy_metrics
from dgpo_jax.rl.packing import split_groups
from dgpo_jax.rl.update import LOSS_MAXIMA, LOSS_SUMS, StepFigures, Totals
from dgpo_jax.sharding import make_mesh, to_device, to_host
from dgpo_jax.types import Experience, Rollout

ITERATION = 3
# One of each kind: soft and hard clipping, the ratio of a whole sequence, none. tests/test_losses.py has all.
METHODS = ("dgpo", "grpo", "gspo", "reinforce")
# Four groups of two; the first and the last learn something.
LENGTHS = np.array([[3, 5], [2, 4], [1, 6], [2, 2]])
ADVANTAGES = np.array([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.5, -0.5]], np.float32)
CORRECT = np.array([[True, False], [True, True], [False, False], [True, False]])


def config_for(**changes):
    """The tiny config, resolved, with changes of loss.NAME, or of another section where one is named."""
    config = get_config()
    update = {name: changes.pop(name) for name in ("updates", "old_logprobs") if name in changes}
    reward = {name: changes.pop(name) for name in ("truncated",) if name in changes}
    kl, correction = KlConfig(**changes.pop("kl", {})), CorrectionConfig(**changes.pop("correction", {}))
    return resolve(replace(
        config, rollout=replace(config.rollout, prompts=4, group_size=2), update=replace(config.update, **update),
        reward=replace(config.reward, **reward), kl=kl, correction=correction,
        loss=replace(config.loss, **changes),
    ))  # fmt: skip


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
def experience(parts):
    """Random tokens of the lengths above, with log-probabilities that no model would give them; none is truncated."""
    config = config_for()
    problems = parts.stream.take(0, 4)
    prompts = encode_prompts(problems, parts.tokenizer, parts.template, config.rollout.max_prompt)
    mask = np.arange(config.rollout.max_response) < LENGTHS.reshape(-1)[:, None]
    tokens = np.random.default_rng(0).integers(5, 100, mask.shape).astype(np.int32)
    logprobs = np.where(mask, np.float32(-9), 0)
    rollout = Rollout(np.where(mask, tokens, 0), mask, logprobs, np.zeros(8, bool))
    correct = CORRECT.reshape(-1)
    return Experience(
        prompts, rollout, np.full_like(logprobs, np.nan), correct, correct.astype(np.float32), np.full(4, ITERATION, np.int32)
    )


def known(experience):
    """As under update.old_logprobs='sampler'."""
    return experience._replace(old_logprobs=experience.rollout.logprobs)


def cut_off(experience, *rows):
    """With these responses truncated."""
    return experience._replace(rollout=experience.rollout._replace(truncated=np.isin(np.arange(8), rows)))


def tokens_of(batches, field):
    """What the response tokens of some batches hold."""
    return np.concatenate([to_host(getattr(batch, field))[to_host(batch.loss_mask)] for batch in batches])


def make_minibatches(config, parts, *arguments):
    """The packed microbatches of each update, on the host."""
    return [list(microbatches(parts, plan)) for plan in plan_minibatches(config, parts, *arguments)]


def groups_of_updates(config):
    return split_groups(4, config.update.updates, config.seed, ITERATION)


def test_a_group_without_advantage_is_not_computed_but_its_tokens_count_in_what_the_loss_is_divided_by(parts, experience):
    config = config_for(updates=2)
    minibatches = make_minibatches(config, parts, experience, ADVANTAGES, ITERATION)
    counted = {0: 8, 1: 6, 2: 7, 3: 4}  # tokens of each group, from LENGTHS
    computed = {0: 8, 1: 0, 2: 0, 3: 4}
    assert len(minibatches) == 2
    for groups, batches in zip(groups_of_updates(config), minibatches, strict=True):
        assert sum(int(batch.loss_mask.sum()) for batch in batches) == sum(computed[group] for group in groups)
        for batch in batches:
            np.testing.assert_array_equal(
                batch.weights, np.where(batch.loss_mask, np.float32(1 / sum(counted[group] for group in groups)), 0)
            )
    packed = np.concatenate([tokens_of(batches, "advantages") for batches in minibatches if batches])
    # Each token of a response carries its advantage: 3 and 5 tokens, 2 and 2.
    assert sorted(packed.tolist()) == [-1.0] * 5 + [-0.5] * 2 + [0.5] * 2 + [1.0] * 3


def test_microbatches_are_made_on_the_host(parts, experience):
    # They cross to the device one by one.
    minibatches = make_minibatches(config_for(), parts, experience, ADVANTAGES, ITERATION)
    leaves = jax.tree.leaves(minibatches)
    assert leaves and all(type(leaf) is np.ndarray for leaf in leaves)


@pytest.mark.parametrize("aggregation, expected", [
    ("token-mean", [1 / 25] * 8),
    ("seq-mean-token-sum", [1 / 8] * 8),
    ("seq-mean-token-mean", [1 / (8 * length) for length in LENGTHS.reshape(-1)]),
    ("seq-mean-token-sum-norm", [1 / (8 * 12)] * 8),  # of max_response slots
])  # fmt: skip
def test_tokens_weigh_as_the_aggregation_says(aggregation, expected, parts, experience):
    config = config_for(updates=1, aggregation=aggregation)
    advantages = np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2)  # so that a token tells its response
    (batches,) = make_minibatches(config, parts, experience, advantages, ITERATION)
    found = set(zip(tokens_of(batches, "advantages").tolist(), tokens_of(batches, "weights").tolist(), strict=True))
    assert found == {(row + 1.0, float(np.float32(weight))) for row, weight in enumerate(expected)}


def test_the_supervised_term_is_a_mean_over_the_tokens_of_right_responses_of_each_update(parts, experience):
    config = config_for(updates=2, supervised=0.1)
    right = {0: 3, 1: 6, 2: 0, 3: 2}  # tokens of right responses of each group
    for groups, batches in zip(
        groups_of_updates(config), make_minibatches(config, parts, experience, ADVANTAGES, ITERATION), strict=True
    ):
        tokens, supervised = sum(right[group] for group in groups), tokens_of(batches, "supervised")
        assert (supervised > 0).sum() == tokens  # also of group 1, whose responses are all right: no advantage
        np.testing.assert_allclose(supervised.sum(), 0.1, rtol=1e-6)
        np.testing.assert_allclose(supervised[supervised > 0], 0.1 / tokens, rtol=1e-6)


@pytest.mark.parametrize("changes, expected", [
    ({}, [1, 1, 0, 0, 0, 0, 1, 1]),  # those with an advantage
    ({"supervised": 0.1}, [1, 1, 1, 1, 0, 0, 1, 1]),  # and the right ones
    ({"entropy": 0.01}, [1] * 8),  # a term that asks for neither
    ({"kl": {"coefficient": 0.1}}, [1] * 8),
    ({"kl": {"coefficient": 0.1, "place": "reward"}}, [1, 1, 0, 0, 0, 0, 1, 1]),  # is in the advantages already
])  # fmt: skip
def test_a_response_is_computed_if_a_term_of_the_loss_needs_it(changes, expected, experience):
    np.testing.assert_array_equal(to_compute(config_for(**changes), experience, ADVANTAGES), np.array(expected, bool))


@pytest.mark.parametrize("truncated, in_the_baseline, in_the_loss", [
    ("keep", True, True),
    ("mask", True, False),
    ("drop", False, False),
])  # fmt: skip
def test_responses_cut_off_count_as_is_set(truncated, in_the_baseline, in_the_loss, parts, experience):
    config, experience = config_for(truncated=truncated, updates=1, supervised=0.1), cut_off(experience, 0, 1)
    baseline = np.ones((4, 2), bool)
    baseline[0] = in_the_baseline
    np.testing.assert_array_equal(in_baseline(config, experience), baseline)
    np.testing.assert_array_equal(in_loss(config, experience), [in_the_loss] * 2 + [True] * 6)
    (batches,) = make_minibatches(config, parts, experience, ADVANTAGES, ITERATION)
    # Group 0 has 8 tokens of 25, 3 of them of a right response of 11.
    left_out = 0 if in_the_loss else 1
    assert len(tokens_of(batches, "weights")) == 18 - 8 * left_out  # all but group 2, which has nothing to learn
    np.testing.assert_allclose(tokens_of(batches, "weights"), 1 / (25 - 8 * left_out), rtol=1e-6)
    supervised = tokens_of(batches, "supervised")
    np.testing.assert_allclose(supervised[supervised > 0], 0.1 / (11 - 3 * left_out), rtol=1e-6)


def test_advantages_are_those_of_the_estimator_without_the_responses_cut_off(experience):
    rewards = np.array([1, 0, 1, 1, 0, 0, 3, 0], np.float32)
    experience = cut_off(experience._replace(rewards=rewards), 0)
    centred = [[0.5, -0.5], [0, 0], [0, 0], [1.5, -1.5]]
    np.testing.assert_allclose(compute_advantages(config_for(method="dr_grpo"), experience), centred)
    # A group of one that counts has nobody to be compared with.
    centred[0] = [0, 0]
    np.testing.assert_allclose(compute_advantages(config_for(method="dr_grpo", truncated="drop"), experience), centred)
    np.testing.assert_allclose(compute_advantages(config_for(std_floor=1.0), experience)[3], [1.5 / (1 + 4.5**0.5), -1.5 / (1 + 4.5**0.5)])


def test_an_iteration_in_which_no_group_has_an_advantage_learns_nothing_and_says_so(parts, programs_of, fresh, experience):
    state, metrics = learn(config_for(), parts, programs_of("dgpo"), fresh(), experience, 0 * ADVANTAGES, ITERATION)
    assert int(state.update) == 2  # the optimizer steps all the same, on a gradient of 0
    assert metrics["policy/tokens"] == metrics["optim/grad_norm"] == metrics["update/microbatches"] == 0
    assert metrics["optim/skipped"] == 0
    # What is a mean over tokens is not there, rather than 0 or a division by 0.
    assert not {"policy/loss", "policy/ratio_mean", "policy/entropy", "gap/mean"} & metrics.keys()


def figures(tokens, ratio_max, skipped=0.0, **sums):
    sums = dict.fromkeys(LOSS_SUMS, 0.0) | {"tokens": tokens, "histogram": np.zeros(3)} | sums
    maxima = dict.fromkeys(LOSS_MAXIMA, -np.inf)
    if tokens:
        maxima |= {"ratio": ratio_max, "minus_ratio": -0.5, "ratio_error": 0.25, "too_low_weight": ratio_max}
    return Totals(sums, maxima), StepFigures(grad_norm=np.float32(tokens / 10), skipped=skipped)


def test_figures_per_token_are_means_over_the_tokens_of_all_updates():
    metrics = policy_metrics([
        figures(10.0, 1.25, entropy=20.0, ratio=10.0, too_low=1.0, too_high=0.0, loss=0.5, supervised=0.5, clipped=1.0,
                kl_old=2.0, kl_ref=4.0, too_low_weight=1.0, histogram=np.array([0.0, 10.0, 0.0])),
        figures(30.0, 2.0, entropy=20.0, ratio=50.0, too_low=1.0, too_high=4.0, loss=0.1, supervised=0.1, clipped=5.0,
                kl_old=2.0, kl_ref=0.0, too_low_weight=2.0, dual_clipped=2.0, histogram=np.array([10.0, 10.0, 10.0])),
    ], fresh=True, terms=["kl_ref", "supervised"])  # fmt: skip
    assert metrics["policy/tokens"] == 40
    assert metrics["policy/entropy"] == 1.0  # 40 / 40, where the mean of the two means would be 4/3
    assert metrics["policy/ratio_mean"] == 1.5
    assert metrics["policy/too_low"] == 0.05 and metrics["policy/too_high"] == 0.1
    assert metrics["policy/clipped"] == pytest.approx(0.15)
    assert metrics["policy/dual_clipped"] == 0.05
    assert metrics["policy/kl_old"] == metrics["policy/kl_ref"] == 0.1
    assert metrics["policy/ratio_histogram"] == [0.25, 0.5, 0.25]
    assert metrics["policy/too_low_weight_mean"] == 1.5 and metrics["policy/too_low_weight_max"] == 2.0
    assert "policy/low_reverse_weight_mean" not in metrics  # no token was there
    assert metrics["policy/loss"] == pytest.approx(0.3)  # each update's is a mean already
    assert metrics["policy/supervised"] == pytest.approx(0.3)
    assert metrics["policy/ratio_max"] == 2.0 and metrics["policy/ratio_min"] == 0.5
    assert metrics["policy/first_ratio_error"] == 0.25
    assert metrics["optim/grad_norm"] == 2.0 and metrics["optim/grad_norm_max"] == 3.0


def test_the_first_ratio_is_left_out_where_the_first_update_had_no_tokens():
    metrics = policy_metrics([figures(0.0, None), figures(30.0, 2.0, ratio=30.0)], fresh=True)
    assert "policy/first_ratio_error" not in metrics  # the second update's would look like a fault
    assert metrics["policy/ratio_mean"] == 1.0 and metrics["policy/ratio_max"] == 2.0


def test_the_first_ratio_is_left_out_where_other_weights_have_sampled():
    assert "policy/first_ratio_error" in policy_metrics([figures(10.0, 1.25)], fresh=True)
    assert "policy/first_ratio_error" not in policy_metrics([figures(10.0, 1.25)], fresh=False)  # it is no fault there


@pytest.mark.parametrize("terms", [(), ("kl_ref",), ("supervised",), ("kl_ref", "supervised")])
def test_a_term_is_reported_only_if_it_is_part_of_the_loss(terms):
    # Also where it is 0: a run that never has a right response differs from one without the supervised term.
    metrics = policy_metrics([figures(10.0, 1.25)], fresh=True, terms=terms)
    assert {name for name in ("kl_ref", "supervised") if f"policy/{name}" in metrics} == set(terms)
    assert all(metrics[f"policy/{name}"] == 0 for name in terms)


def test_the_gap_is_a_mean_over_tokens_and_absent_without_them():
    gaps = [
        Totals({"tokens": 10.0, "gap": 1.0, "weight": 12.0, "rejected": 0.0}, {"gap": 0.5, "weight": 2.0}),
        Totals({"tokens": 30.0, "gap": 1.0, "weight": 20.0, "rejected": 10.0}, {"gap": 0.25, "weight": 1.0}),
    ]
    assert gap_metrics(gaps) == {
        "gap/mean": 0.05, "gap/max": 0.5, "gap/weight_mean": 0.8, "gap/weight_max": 2.0, "gap/rejected": 0.25
    }  # fmt: skip
    assert gap_metrics([]) == {}


def completed(config, parts, programs, params, experience, reference=None):
    """([TrainBatch] of all updates, metrics of the gap)."""
    plans = plan_minibatches(config, parts, experience, ADVANTAGES, ITERATION)
    minibatches, gaps = complete_minibatches(config, parts, programs, params, reference, plans)
    return [batch for batches in minibatches for batch in batches], gap_metrics(to_host(gaps))


def test_old_logprobs_are_the_trainers_own_unless_the_samplers_are_asked_for(parts, programs_of, fresh, experience):
    programs, params = programs_of("dgpo"), fresh().params
    batches, no_gap = completed(config_for(old_logprobs="sampler"), parts, programs, params, known(experience))
    assert (tokens_of(batches, "old_logprobs") == -9).all() and no_gap == {}  # as made up above
    batches, gap = completed(config_for(), parts, programs, params, experience)
    trainer = tokens_of(batches, "old_logprobs")
    assert (trainer != -9).all() and (tokens_of(batches, "sampler_logprobs") == -9).all()
    assert gap["gap/mean"] == pytest.approx(np.abs(trainer + 9).mean(), rel=1e-5)
    assert gap["gap/max"] == pytest.approx(np.abs(trainer + 9).max(), rel=1e-5)
    assert gap["gap/weight_mean"] == gap["gap/weight_max"] == 1 and gap["gap/rejected"] == 0


def counting_scores(programs):
    """(programs, list that grows with every call of score)."""
    calls = []
    return programs._replace(score=lambda *arguments: calls.append(arguments) or programs.score(*arguments)), calls


def test_what_has_its_logprobs_already_is_not_scored_again(parts, programs_of, fresh, experience):
    # Sampled by weights of an earlier iteration: those of now would give other numbers.
    earlier = np.where(experience.rollout.response_mask, np.float32(-7), 0)
    programs, calls = counting_scores(programs_of("dgpo"))
    batches, gap = completed(config_for(), parts, programs, fresh().params, experience._replace(old_logprobs=earlier))
    assert not calls and (tokens_of(batches, "old_logprobs") == -7).all()
    assert gap["gap/mean"] == gap["gap/max"] == 2  # of them too the gap to the sampler is measured


def test_waiting_and_fresh_groups_may_share_an_update(parts, programs_of, fresh, experience):
    earlier = np.where(experience.rollout.response_mask, np.float32(-7), 0)
    earlier[:6] = np.nan  # only the last group has waited
    config = config_for(updates=1)
    batches, _ = completed(config, parts, programs_of("dgpo"), fresh().params, experience._replace(old_logprobs=earlier))
    old_logprobs, waited = tokens_of(batches, "old_logprobs"), np.abs(tokens_of(batches, "advantages")) == 0.5
    assert (old_logprobs[waited] == -7).all() and (old_logprobs[~waited] != -7).all()
    assert np.isfinite(old_logprobs).all()


def test_with_the_samplers_logprobs_an_update_is_packed_only_when_it_is_asked_for(parts, experience):
    # So that the device works on one update while the next is packed. The trainer's must be scored before any update.
    config = config_for(old_logprobs="sampler", updates=2)
    plans = plan_minibatches(config, parts, known(experience), ADVANTAGES, ITERATION)
    minibatches, gaps = complete_minibatches(config, parts, None, None, None, plans)
    assert iter(minibatches) is minibatches and gaps == []
    assert [len(batches) for batches in minibatches] == [plan.layout.batches for plan in plans]


def test_the_replicas_share_what_attention_and_logits_cost(parts):
    config = config_for()
    shape, model = packing_shape(config, parts), config.model
    assert (shape.rows, shape.tokens_per_row, shape.devices) == (4, 64, 1)
    # A pair: a head's width for the logit and again for the value, in every head and layer, and half of the pairs are in
    # the future. A logit: the width, for every word.
    assert shape.attention == model.layers * model.heads * model.head_width / (model.width * model.vocab_size)


def test_the_packing_is_reported(parts, programs_of, fresh, experience):
    _, metrics = learn(config_for(), parts, programs_of("dgpo"), fresh(), experience, ADVANTAGES, ITERATION)
    plans = plan_minibatches(config_for(), parts, experience, ADVANTAGES, ITERATION)
    batches = [batch for plan in plans for batch in microbatches(parts, plan)]
    assert metrics["update/packing_efficiency"] == np.mean([batch.segment > 0 for batch in batches])
    assert metrics["update/imbalance"] == 1 and metrics["update/microbatches"] == len(batches)


def test_only_a_kl_in_the_loss_has_the_reference_score(parts, programs_of, fresh, experience):
    params = fresh().params
    reference = jax.tree.map(lambda leaf: leaf * 1.5, params)
    programs, calls = counting_scores(programs_of("dgpo"))
    for off in ({}, {"coefficient": 0.1, "place": "reward"}):  # the second has a reference, for the rewards
        batches, _ = completed(config_for(kl=off), parts, programs, params, experience, reference)
        assert not tokens_of(batches, "ref_logprobs").any() and not any(params_ is reference for params_, _ in calls)
    on = config_for(kl={"coefficient": 0.1})
    batches, _ = completed(on, parts, programs, params, experience, reference)
    ours, other = tokens_of(batches, "old_logprobs"), tokens_of(batches, "ref_logprobs")
    assert (other < 0).all() and (other != ours).all()
    batches, _ = completed(on, parts, programs, params, experience, params)
    np.testing.assert_array_equal(tokens_of(batches, "ref_logprobs"), ours)  # a reference that is the policy


def test_scores_of_responses_come_back_to_their_rows(parts, programs_of, fresh, experience):
    config, params = config_for(updates=1), fresh().params
    rows = [7, 0, 3]
    logprobs = score_responses(config, parts, programs_of("dgpo"), params, experience, rows)
    chosen = np.isin(np.arange(8), rows)[:, None] & experience.rollout.response_mask
    np.testing.assert_array_equal(np.isnan(logprobs), ~chosen)
    # The same as in a batch of an update, whatever else is packed there; advantages tell the responses.
    advantages = np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2)
    plans = plan_minibatches(config, parts, experience, advantages, ITERATION)
    ((*batches,),), _ = complete_minibatches(config, parts, programs_of("dgpo"), params, None, plans)
    old_logprobs, whose = tokens_of(batches, "old_logprobs"), tokens_of(batches, "advantages")
    for row in rows:
        np.testing.assert_allclose(logprobs[row][chosen[row]], old_logprobs[whose == row + 1], rtol=1e-5)


def test_waiting_groups_are_scored_once_and_only_where_something_is_learned(parts, programs_of, fresh, experience):
    programs, params = programs_of("dgpo"), fresh().params
    once = score_waiting(config_for(), parts, programs, params, experience)
    learned = np.repeat([True, False, False, True], 2)[:, None] & experience.rollout.response_mask
    np.testing.assert_array_equal(np.isfinite(once.old_logprobs), learned)
    # The weights have moved on by the next iteration: what is there stays.
    programs, calls = counting_scores(programs)
    twice = score_waiting(config_for(), parts, programs, jax.tree.map(lambda leaf: leaf * 2, params), once)
    np.testing.assert_array_equal(twice.old_logprobs, once.old_logprobs)
    assert not calls
    untouched = score_waiting(config_for(old_logprobs="sampler"), parts, None, None, known(experience))
    np.testing.assert_array_equal(untouched.old_logprobs, experience.rollout.logprobs)


def test_a_waiting_group_whose_score_is_no_number_makes_the_update_that_meets_it_a_skipped_one(parts, programs_of, fresh, experience):
    config, programs = config_for(), programs_of("dgpo")
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), fresh().params)
    waiting = score_waiting(config, parts, programs, broken, experience)
    learned = np.repeat([True, False, False, True], 2)[:, None] & experience.rollout.response_mask
    np.testing.assert_array_equal(np.isneginf(waiting.old_logprobs), learned)  # and NaN elsewhere: not scored
    again, calls = counting_scores(programs)
    assert score_waiting(config, parts, again, fresh().params, waiting) is waiting and not calls
    # The weights that meet it are sound again: only what it carries tells.
    reports = []
    state, metrics = learn(config, parts, programs, fresh(), waiting, ADVANTAGES, ITERATION, report=reports.extend)
    skipped = sum(bool({0, 3} & set(groups)) for groups in groups_of_updates(config))
    assert metrics["optim/skipped"] == skipped > 0 and int(state.update) == 2 - skipped
    assert {tuple(line["given_not_finite"]) for line in reports if line["tokens_not_finite"]} == {("old_logprobs",)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_host(state.params)))


def test_with_the_samplers_logprobs_the_first_ratio_shows_that_they_are_not_the_trainers(parts, programs_of, fresh, experience):
    config = config_for(old_logprobs="sampler")
    _, metrics = learn(config, parts, programs_of("dgpo"), fresh(), known(experience), ADVANTAGES, ITERATION)
    assert metrics["policy/first_ratio_error"] > 1  # exp(-5 + 9) - 1 and the like
    assert not any(name.startswith("gap/") for name in metrics)  # which is measured where responses are collected


def test_the_sampled_gap_is_of_all_responses_that_one_microbatch_holds(parts, programs_of, fresh, experience):
    config, params = config_for(old_logprobs="sampler"), fresh().params
    trainer = score_responses(config, parts, programs_of("dgpo"), params, experience, range(8))
    gaps = np.abs(trainer + 9)[experience.rollout.response_mask]
    metrics = sampled_gap(config, parts, programs_of("dgpo"), params, known(experience))
    assert metrics["gap/mean"] == pytest.approx(gaps.mean(), rel=1e-5)  # those without an advantage too
    assert metrics["gap/max"] == pytest.approx(gaps.max(), rel=1e-5)
    assert metrics["gap/weight_mean"] == metrics["gap/weight_max"] == 1 and metrics["gap/rejected"] == 0
    # Of more than a microbatch holds, one is enough to see a sampler that is off.
    programs, calls = counting_scores(programs_of("dgpo"))
    many = functools.reduce(join, [known(experience)] * 4)
    metrics = sampled_gap(config, parts, programs, params, many)
    assert len(calls) == 1 and 25 < to_host(calls[0][1].loss_mask).sum() < 4 * 25
    assert metrics["gap/max"] == pytest.approx(gaps.max(), rel=1e-5)


def test_nothing_that_looks_like_a_fault_is_reported_of_experience_from_an_earlier_iteration(parts, programs_of, fresh, experience):
    stale = known(experience)._replace(iteration=np.array([ITERATION, ITERATION, ITERATION, ITERATION - 1], np.int32))
    _, metrics = learn(config_for(old_logprobs="sampler"), parts, programs_of("dgpo"), fresh(), stale, ADVANTAGES, ITERATION)
    assert "policy/first_ratio_error" not in metrics
    assert metrics["policy/tokens"] == 12


@pytest.mark.parametrize("method", METHODS)
def test_each_method_runs_an_iteration(method, parts, programs_of, fresh, experience):
    before = to_host(fresh().params)
    state, metrics = learn(
        config_for(method=method), parts, programs_of(method), fresh(), experience, ADVANTAGES, ITERATION
    )
    assert int(state.update) == 2
    assert metrics["policy/first_ratio_error"] < 1e-5 and metrics["optim/grad_norm"] > 0
    assert all(np.isfinite(value).all() for value in metrics.values())
    assert any((new != old).any() for new, old in zip(*map(jax.tree.leaves, (to_host(state.params), before)), strict=True))


def test_with_one_update_an_iteration_every_method_is_the_same(parts, programs_of, fresh, experience):
    # But for the aggregation, which is therefore fixed here; GSPO and GMPO see whole sequences, of ratio 1 too.
    norms = {
        method: learn(
            config_for(method=method, updates=1, aggregation="token-mean"), parts, programs_of(method), fresh(), experience,
            ADVANTAGES, ITERATION,
        )[1]["optim/grad_norm"]
        for method in METHODS
    }  # fmt: skip
    assert norms == pytest.approx(dict.fromkeys(METHODS, norms["dgpo"]), rel=1e-5)  # all ratios are 1, inside any region


def test_right_responses_move_the_weights_without_any_advantage(parts, programs_of, fresh, experience):
    config = config_for(updates=1, supervised=0.1)
    _, metrics = learn(config, parts, programs_of("dgpo"), fresh(), experience, 0 * ADVANTAGES, ITERATION)
    assert metrics["optim/grad_norm"] > 0 and metrics["policy/loss"] == 0
    assert metrics["policy/tokens"] == 11 and metrics["policy/supervised"] > 0
    assert "policy/kl_ref" not in metrics  # what is off is not reported


def test_a_kl_in_the_loss_moves_every_response_towards_the_reference(parts, fresh, experience):
    config = config_for(updates=1, kl={"coefficient": 0.1})
    programs, reference = build.build_programs(config, parts), fresh().params
    away = fresh()._replace(params=jax.tree.map(lambda leaf: leaf * 1.5, reference))
    _, metrics = learn(config, parts, programs, away, experience, 0 * ADVANTAGES, ITERATION, reference)
    assert metrics["optim/grad_norm"] > 0 and metrics["policy/loss"] == 0
    assert metrics["policy/tokens"] == 25 and metrics["policy/kl_ref"] > 0
    assert "policy/supervised" not in metrics
    # At the reference itself there is no pull.
    _, metrics = learn(config, parts, programs, fresh(), experience, 0 * ADVANTAGES, ITERATION, reference)
    assert metrics["optim/grad_norm"] < 1e-5 and metrics["policy/kl_ref"] < 1e-6


def test_the_programs_are_built_with_every_setting_of_the_loss(parts, monkeypatch):
    monkeypatch.setattr(build, "make_programs", lambda model, optimizer, loss, shardings: loss)
    correction = {"weights": "token", "cap": 3.0, "reject": "geometric", "low": 0.25, "high": 4.0}
    config = config_for(method="grpo", clip_low=0.1, max_log_ratio=40.0, entropy=0.01,
                        kl={"coefficient": 0.1, "estimator": "k2"}, correction=correction)  # fmt: skip
    loss = build.build_programs(config, parts)
    assert loss.method == "grpo" and loss.settings == {"clip_low": 0.1, "clip_high": 0.2, "dual_clip": None}
    assert (loss.temperature, loss.logprob_chunk) == (config.rollout.temperature, config.update.logprob_chunk)
    assert (loss.kl, loss.kl_estimator, loss.entropy, loss.max_log_ratio) == (0.1, "k2", 0.01, 40.0)
    assert loss.correction == Correction(**correction)
    # In the reward it is not in the loss too.
    assert build.build_programs(config_for(kl={"coefficient": 0.1, "place": "reward"}), parts).kl == 0


@pytest.mark.parametrize("broken_update, before, expected", [
    (None, 3, 0),  # two good ones end the row
    (0, 3, 0),  # so does a good one behind a bad one
    (1, 3, 1),  # a bad one behind a good one begins a row
    ("both", 3, 5),  # and two bad ones lengthen it
])  # fmt: skip
def test_updates_without_a_finite_gradient_are_skipped_and_counted_in_a_row(
    broken_update, before, expected, parts, programs_of, fresh, experience
):
    config = config_for()
    advantages = np.ones_like(ADVANTAGES)
    for number, groups in enumerate(groups_of_updates(config)):
        if broken_update in (number, "both"):
            advantages[groups] = np.nan
    state, metrics = learn(config, parts, programs_of("dgpo"), fresh(), experience, advantages, ITERATION, None, before)
    skipped = {None: 0, "both": 2}.get(broken_update, 1)
    assert metrics["optim/skipped"] == skipped and metrics["optim/skipped_in_a_row"] == expected
    assert int(state.update) == 2 - skipped
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_host(state.params)))


def test_responses_drawn_from_no_numbers_count_as_skipped_updates(parts, programs_of, fresh, experience):
    # Weights that overflow in the sampler say the same everywhere: no advantage, no token learned from, a gradient of 0.
    logprobs = experience.rollout.logprobs.copy()
    logprobs[3, 1] = np.nan
    broken = experience._replace(rollout=experience.rollout._replace(logprobs=logprobs))
    _, metrics = learn(config_for(), parts, programs_of("dgpo"), fresh(), broken, 0 * ADVANTAGES, ITERATION, None, 4)
    assert metrics["policy/tokens"] == metrics["optim/skipped"] == 0 and metrics["optim/skipped_in_a_row"] == 6
    logprobs[3, 1], logprobs[3, 4] = -9, np.nan  # behind the end of a response of 4 tokens
    _, metrics = learn(config_for(), parts, programs_of("dgpo"), fresh(), broken, 0 * ADVANTAGES, ITERATION, None, 4)
    assert metrics["optim/skipped_in_a_row"] == 0


def test_a_run_stops_when_too_many_updates_in_a_row_were_skipped(tmp_path):
    most = get_config().optimizer.max_skipped
    check_skipped(most, most - 1, tmp_path)
    with pytest.raises(ValueError, match=rf"{most} updates in a row .* not finite.* Lower optimizer.learning_rate"):
        check_skipped(most, most, tmp_path)
    (tmp_path / "nonfinite").mkdir()
    with pytest.raises(ValueError, match=rf"Look at {tmp_path}/nonfinite, or lower"):
        check_skipped(most, most, tmp_path)
