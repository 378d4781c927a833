"""What each setting of a recipe does to the gradient, by hand: on logits that are the parameters.

One update at a learning rate of 1, without moments: the logits move by minus the gradient. The gradient of log p(token)
is onehot(token) - p, written `pull(token)` below. Advantages are R - mean of the group unless a test says otherwise.
"""

import functools

import numpy as np
import pytest
from scripted import (
    PROBABILITIES,
    SAMPLER_LOGPROB,
    Said,
    config_for,
    experience_of,
    make_parts,
    unigram,
    unigram_state,
)

from dgpo_jax.build import build_programs
from dgpo_jax.learning import (
    compute_advantages,
    learn,
    microbatches,
    plan_minibatches,
    sampled_gap,
    score_responses,
    score_waiting,
)
from dgpo_jax.rl.experience import join
from dgpo_jax.sharding import to_host

PARTS = make_parts()
UNIFORM = [0.25] * 4


@functools.cache
def _programs(method, kl, entropy):
    return build_programs(config_for({"loss.method": method, "kl": kl, "loss.entropy": entropy}), PARTS)


def programs_for(config):
    """Compiled once for all the settings that the programs do not read."""
    return _programs(config.loss.method, config.kl, config.loss.entropy)


def settings_for(settings):
    return config_for({"loss.advantage": "dr_grpo"} | settings)


def gradient(settings, experience, *, probabilities=PROBABILITIES, reference=None, iteration=1, programs=None):
    """(f64[4], metrics) of the one update that the experience gives."""
    config = settings_for({"rollout.prompts": len(experience.iteration)} | settings)
    state = unigram_state(probabilities)
    before = to_host(state.params)["logits"]
    state, metrics = learn(
        config, PARTS, programs or programs_for(config), state, experience, compute_advantages(config, experience), iteration,
        reference=None if reference is None else unigram(reference),
    )  # fmt: skip
    return before.astype(np.float64) - to_host(state.params)["logits"], metrics


def pull(token, probabilities=PROBABILITIES):
    return np.eye(4)[token] - probabilities


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


# --- what is learned from, and what the sum is divided by ---

UNLIKE = [Said([1], True), Said([2, 2, 2], False)]  # advantages 1/2 and -1/2


@pytest.mark.parametrize("aggregation, of_one, of_three", [
    ("token-mean", 1 / 4, 1 / 4),  # 4 tokens
    ("seq-mean-token-sum", 1 / 2, 1 / 2),  # 2 responses
    ("seq-mean-token-mean", 1 / 2, 1 / 6),  # 2 responses of 1 and 3 tokens
    ("seq-mean-token-sum-norm", 1 / 20, 1 / 20),  # 2 responses, scale 10
])  # fmt: skip
def test_a_tokens_weight_is_that_of_the_aggregation(aggregation, of_one, of_three):
    ours, _ = gradient({"loss.aggregation": aggregation, "loss.aggregation_scale": 10}, experience_of(UNLIKE))
    assert_close(ours, -(of_one * 1 / 2 * pull(1) - of_three * 3 * 1 / 2 * pull(2)))


def test_a_group_without_advantage_is_not_computed_but_counts_in_the_divisor():
    alike = [Said([3, 3, 3, 3], True), Said([1, 1], True)]
    ours, metrics = gradient({}, experience_of(UNLIKE, alike))
    assert_close(ours, -(1 / 2 * pull(1) - 3 / 2 * pull(2)) / 10)  # 4 and 6 tokens
    assert metrics["policy/tokens"] == 4


def test_each_update_is_divided_by_its_own_tokens_and_the_supervised_term_by_its_own_right_ones():
    groups = [[Said([1] * right, True), Said([2] * wrong, False)] for right, wrong in [(1, 3), (4, 2), (2, 2), (3, 1)]]
    config = settings_for({"rollout.prompts": 4, "update.updates": 2, "loss.supervised": 0.1})
    experience = experience_of(*groups)
    plans = plan_minibatches(config, PARTS, experience, compute_advantages(config, experience), iteration=1)
    updates = [list(microbatches(PARTS, plan)) for plan in plans]
    assert len(updates) == 2 and sum(batch.loss_mask.sum() for batches in updates for batch in batches) == 18
    for batches in updates:
        assert sum(batch.weights.sum() for batch in batches) == pytest.approx(1, rel=1e-5)
        assert sum(batch.supervised.sum() for batch in batches) == pytest.approx(0.1, rel=1e-5)
        for batch in batches:
            assert (batch.supervised[batch.advantages < 0] == 0).all()


def test_an_iteration_of_groups_without_advantage_moves_nothing():
    ours, metrics = gradient({}, experience_of([Said([1], False), Said([2], False)]))
    assert_close(ours, np.zeros(4))
    assert metrics["policy/tokens"] == metrics["optim/grad_norm"] == metrics["update/microbatches"] == 0


CUT_OFF = [Said([1], True), Said([2, 2], False), Said([3, 3, 3], False, truncated=True)]


@pytest.mark.parametrize("truncated, expected", [
    # Advantages 2/3, -1/3, -1/3 over 6 tokens.
    ("keep", -(2 / 3 * pull(1) - 2 / 3 * pull(2) - 3 / 3 * pull(3)) / 6),
    # The same advantages, but 3 tokens.
    ("mask", -(2 / 3 * pull(1) - 2 / 3 * pull(2)) / 3),
    # 1/2 and -1/2: the mean is of the other two.
    ("drop", -(1 / 2 * pull(1) - 2 / 2 * pull(2)) / 3),
])  # fmt: skip
def test_what_was_cut_off_counts_out_of_the_loss_or_out_of_the_baseline_too(truncated, expected):
    ours, metrics = gradient({"rollout.group_size": 3, "reward.truncated": truncated}, experience_of(CUT_OFF))
    assert_close(ours, expected)
    assert metrics["policy/tokens"] == (6 if truncated == "keep" else 3)


@pytest.mark.parametrize("estimator, divisor", [("dr_grpo", 1.0), ("grpo", np.sqrt(1 / 2) + 1e-6)])
def test_the_gradient_is_divided_by_the_groups_deviation_or_not(estimator, divisor):
    # Rewards 1 and 0 deviate by sqrt(2 * 1/4 / (2 - 1)).
    ours, _ = gradient({"loss.advantage": estimator}, experience_of(UNLIKE))
    assert_close(ours, -(1 / 2 * pull(1) - 3 / 2 * pull(2)) / 4 / divisor)


# --- further terms ---

ALIKE = [Said([1], True), Said([2, 2], True)]  # no advantage: what moves is the term alone, over 3 tokens
# d KL / d log p of tokens 1 and 2, with p 0.2 and 0.3, and the reference 1/4: log(p / ref), and 1 - ref / p.
KL_SLOPES = {"k2": (np.log(0.8), np.log(1.2)), "k3": (1 - 1.25, 1 - 1 / 1.2)}
KL_VALUES = {
    "k2": (np.log(0.8) ** 2 / 2, np.log(1.2) ** 2 / 2),
    "k3": (1.25 - np.log(1.25) - 1, 1 / 1.2 - np.log(1 / 1.2) - 1),
}


@pytest.mark.parametrize("estimator", KL_SLOPES)
def test_a_kl_in_the_loss_pulls_every_response_to_the_reference(estimator):
    settings = {"kl.coefficient": 0.5, "kl.estimator": estimator}
    ours, metrics = gradient(settings, experience_of(ALIKE), reference=UNIFORM)
    of_1, of_2 = KL_SLOPES[estimator]
    assert_close(ours, 0.5 * (of_1 * pull(1) + 2 * of_2 * pull(2)) / 3)
    of_1, of_2 = KL_VALUES[estimator]
    assert metrics["policy/kl_ref"] == pytest.approx((of_1 + 2 * of_2) / 3, rel=1e-4)
    assert metrics["policy/loss"] == 0  # the policy's own, without the term


def test_a_kl_in_the_loss_weighs_its_tokens_as_the_policy_loss_does():
    settings = {"kl.coefficient": 0.5, "loss.aggregation": "seq-mean-token-mean"}
    ours, _ = gradient(settings, experience_of(ALIKE), reference=UNIFORM)
    of_1, of_2 = KL_SLOPES["k3"]
    assert_close(ours, 0.5 * (1 / 2 * of_1 * pull(1) + 2 / 4 * of_2 * pull(2)))


def test_the_kl_is_added_to_the_policy_loss_and_leaves_out_what_was_cut_off():
    cut = [Said([1], True), Said([2, 2, 2], False), Said([3] * 4, False, truncated=True)]
    settings = {"rollout.group_size": 3, "kl.coefficient": 0.5, "reward.truncated": "drop"}
    ours, _ = gradient(settings, experience_of(cut), reference=UNIFORM)
    of_1, of_2 = KL_SLOPES["k3"]
    assert_close(ours, (-1 / 2 * pull(1) + 3 / 2 * pull(2) + 0.5 * (of_1 * pull(1) + 3 * of_2 * pull(2))) / 4)


def test_a_kl_in_the_loss_is_nothing_where_the_reference_is_the_policy():
    ours, metrics = gradient({"kl.coefficient": 0.5}, experience_of(ALIKE), reference=PROBABILITIES)
    assert_close(ours, np.zeros(4))
    assert metrics["policy/kl_ref"] == 0  # exactly: the same program on the same batch


def test_a_kl_in_the_reward_is_not_in_the_loss_too():
    ours, metrics = gradient({"kl.coefficient": 0.5, "kl.place": "reward"}, experience_of(UNLIKE))
    assert_close(ours, -(1 / 2 * pull(1) - 3 / 2 * pull(2)) / 4)
    assert "policy/kl_ref" not in metrics


def test_the_supervised_term_is_a_mean_over_the_right_tokens_of_all_microbatches():
    # 6 right tokens of 9; rows hold the sequences of 1 + 4 and 1 + 1 tokens, and those of 1 + 3 and 1 + 1.
    groups = [Said([1] * 4, True), Said([2], True)], [Said([3], True), Said([2] * 3, False)]
    ours, metrics = gradient({"loss.supervised": 0.1}, experience_of(*groups))
    assert metrics["update/microbatches"] == 2
    policy = -(1 / 2 * pull(3) - 3 / 2 * pull(2)) / 9  # the second group's
    assert_close(ours, policy - 0.1 * (4 * pull(1) + pull(2) + pull(3)) / 6)
    assert metrics["policy/supervised"] == pytest.approx(-0.1 * (4 * np.log(0.2) + np.log(0.3) + np.log(0.4)) / 6, rel=1e-5)
    assert metrics["policy/tokens"] == 9


def test_the_supervised_term_does_not_follow_the_aggregation_of_the_policy_loss():
    groups = [Said([1] * 4, True), Said([2], True)]
    ours, _ = gradient({"loss.supervised": 0.1, "loss.aggregation": "seq-mean-token-mean"}, experience_of(groups))
    assert_close(ours, -0.1 * (4 * pull(1) + pull(2)) / 5)


def test_the_supervised_term_leaves_out_right_answers_that_were_cut_off_if_those_are_out_of_the_loss():
    groups = [Said([1] * 4, True, truncated=True), Said([2], True)]
    masked, _ = gradient({"loss.supervised": 0.1, "reward.truncated": "mask"}, experience_of(groups))
    assert_close(masked, -0.1 * pull(2))
    kept, _ = gradient({"loss.supervised": 0.1}, experience_of(groups))
    assert_close(kept, -0.1 * (4 * pull(1) + pull(2)) / 5)


def test_an_update_without_a_right_answer_has_no_supervised_term():
    ours, _ = gradient({"loss.supervised": 0.1}, experience_of([Said([1], False), Said([2], False)]))
    assert_close(ours, np.zeros(4))


def test_the_entropy_bonus_flattens_the_distribution_at_every_token():
    # By logit v the entropy H changes by -p_v (log p_v + H); the weights of all tokens sum to 1.
    entropy = -(PROBABILITIES * np.log(PROBABILITIES)).sum()
    ours, metrics = gradient({"loss.entropy": 0.3}, experience_of(ALIKE))
    assert_close(ours, 0.3 * PROBABILITIES * (np.log(PROBABILITIES) + entropy))
    assert metrics["policy/entropy"] == pytest.approx(entropy, rel=1e-5)


def test_without_a_bonus_the_entropy_is_watched_and_moves_nothing():
    bonus, _ = gradient({"loss.entropy": 0.3}, experience_of(UNLIKE))
    plain, metrics = gradient({}, experience_of(UNLIKE))
    entropy = -(PROBABILITIES * np.log(PROBABILITIES)).sum()
    assert_close(bonus - plain, 0.3 * PROBABILITIES * (np.log(PROBABILITIES) + entropy))
    assert metrics["policy/entropy"] == pytest.approx(entropy, rel=1e-5)


# --- whose log-probabilities the ratio is to ---

SAMPLED_BY = np.array([0.2, 0.2, 0.2, 0.4])
TODAY = np.array([0.14, 0.22, 0.24, 0.4])  # ratios 1.1 and 1.2 of tokens 1 and 2, within the region


def refuse(*_):
    raise AssertionError("a forward pass that nobody needs")


def waited(settings, experience, probabilities=SAMPLED_BY):
    """The same groups, after an iteration in which they waited and the weights had these probabilities."""
    config = settings_for({"rollout.prompts": len(experience.iteration)} | settings)
    return score_waiting(config, PARTS, programs_for(config), unigram(probabilities), experience)


def test_a_fresh_groups_first_ratio_is_exactly_1_whatever_the_sampler_said():
    _, metrics = gradient({}, experience_of(UNLIKE, [Said([3, 1, 2], True), Said([0, 2, 3, 1], False)]))
    assert metrics["policy/first_ratio_error"] == 0
    assert metrics["policy/ratio_max"] == metrics["policy/ratio_min"] == 1
    assert metrics["gap/max"] == pytest.approx(np.log(0.4) - SAMPLER_LOGPROB, rel=1e-5)


def test_a_group_that_waited_has_the_log_probabilities_of_the_weights_that_sampled_it():
    stale = waited({}, experience_of(UNLIKE))
    known = np.where(stale.rollout.response_mask, stale.old_logprobs, 0)
    assert_close(known, [[np.log(0.2), 0, 0, 0], [np.log(0.2)] * 3 + [0]])


def test_a_group_that_waited_is_learned_from_with_its_ratio_to_the_weights_that_sampled_it():
    stale = waited({}, experience_of(UNLIKE))
    ours, metrics = gradient({}, stale, probabilities=TODAY, iteration=2)
    # Of dgpo, within the region: the ratio weighs the pull.
    assert_close(ours, -(1.1 / 2 * pull(1, TODAY) - 1.2 * 3 / 2 * pull(2, TODAY)) / 4)
    assert metrics["policy/ratio_mean"] == pytest.approx((1.1 + 3 * 1.2) / 4, rel=1e-5)
    assert metrics["policy/ratio_max"] == pytest.approx(1.2, rel=1e-5)
    # That is no fault of the trainer, as it would be in a fresh iteration.
    assert "policy/first_ratio_error" not in metrics
    # The gap is between the sampler and the weights that it ran, not today's.
    assert metrics["gap/max"] == pytest.approx(np.log(0.2) - SAMPLER_LOGPROB, rel=1e-5)


def test_waiting_once_more_does_not_score_a_group_again():
    stale = waited({}, experience_of(UNLIKE))
    again = waited({}, stale, probabilities=TODAY)
    np.testing.assert_array_equal(again.old_logprobs, stale.old_logprobs)


def test_fresh_groups_beside_stale_ones_keep_their_ratio_of_1():
    both = join(waited({}, experience_of(UNLIKE)), experience_of(UNLIKE, iteration=2))
    ours, metrics = gradient({}, both, probabilities=TODAY, iteration=2)
    stale, fresh = 1.1 * pull(1, TODAY) - 1.2 * 3 * pull(2, TODAY), pull(1, TODAY) - 3 * pull(2, TODAY)
    assert_close(ours, -(stale + fresh) / 2 / 8)
    assert metrics["policy/ratio_mean"] == pytest.approx((1.1 + 3 * 1.2 + 4) / 8, rel=1e-5)
    assert metrics["policy/ratio_min"] == 1  # exactly


@pytest.mark.parametrize("settings, scored", [
    ({}, [False, False, True, True]),
    ({"loss.supervised": 0.1}, [True, True, True, True]),  # the first group's answers are right
    ({"kl.coefficient": 0.1}, [True, True, True, True]),
    ({"kl.coefficient": 0.1, "kl.place": "reward"}, [False, False, True, True]),
    ({"loss.entropy": 0.1}, [True, True, True, True]),
    ({"reward.truncated": "mask"}, [False, False, True, True]),
])  # fmt: skip
def test_a_waiting_group_is_scored_if_it_will_be_computed(settings, scored):
    alike = [Said([1], True), Said([2, 2], True)]
    stale = waited(settings, experience_of(alike, UNLIKE))
    assert (~np.isnan(stale.old_logprobs[:, 0])).tolist() == scored


def test_nothing_is_scored_of_what_was_cut_off_and_is_out_of_the_loss():
    stale = waited({"rollout.group_size": 3, "reward.truncated": "mask"}, experience_of(CUT_OFF))
    assert (~np.isnan(stale.old_logprobs[:, 0])).tolist() == [True, True, False]


def test_with_the_samplers_log_probabilities_updates_score_nothing():
    settings = {"update.old_logprobs": "sampler"}
    config = settings_for(settings)
    programs = programs_for(config)._replace(score=refuse, complete=refuse)
    fresh = experience_of(UNLIKE)
    assert score_waiting(config, PARTS, programs, None, fresh) is fresh
    fresh = fresh._replace(old_logprobs=np.where(fresh.rollout.response_mask, np.log(np.float32(0.2)), 0))  # as collected
    ours, metrics = gradient(settings, fresh, probabilities=TODAY, programs=programs)
    assert_close(ours, -(1.1 / 2 * pull(1, TODAY) - 1.2 * 3 / 2 * pull(2, TODAY)) / 4)
    # A fresh iteration's first ratios are the gap to the sampler.
    assert metrics["policy/first_ratio_error"] == pytest.approx(0.2, rel=1e-5)


def test_with_the_samplers_log_probabilities_the_gap_is_measured_on_one_microbatch():
    # Two rows of 8 slots, a microbatch each: the longest and the shortest sequence, 1 + 4 and 1 + 1, cost more than the others.
    experience = experience_of([Said([1, 1, 1, 1], True), Said([2, 2], False)], [Said([3, 3, 3], True), Said([0], False)])
    config = settings_for({"update.old_logprobs": "sampler"})
    sampler = np.where(experience.rollout.response_mask, experience.rollout.logprobs, 0)
    gap = sampled_gap(config, PARTS, programs_for(config), unigram(), experience._replace(old_logprobs=sampler))
    assert gap["gap/mean"] == pytest.approx((4 * np.log(0.2) + np.log(0.1)) / 5 - SAMPLER_LOGPROB, rel=1e-5)
    assert gap["gap/max"] == pytest.approx(np.log(0.2) - SAMPLER_LOGPROB, rel=1e-5)


def test_scored_responses_come_back_to_their_places_from_whatever_rows_they_were_packed_in():
    said = [Said([1, 2, 3, 0], True), Said([2], True), Said([3, 3, 3], False), Said([0, 1], False)]
    experience = experience_of(said[:2], said[2:])
    config = settings_for({})
    ours = score_responses(config, PARTS, programs_for(config), unigram(), experience, [3, 0, 2])
    expected = np.full((4, 4), np.nan)
    for row in (0, 2, 3):
        expected[row, : len(said[row].tokens)] = np.log(PROBABILITIES[list(said[row].tokens)])
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
