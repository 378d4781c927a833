"""Advantages of a group, by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_jax.rl.advantages import ESTIMATORS, alike, group_advantages


@pytest.mark.parametrize("rewards, expected", [
    ([1, 0], [1, -1]),  # mean 1/2, deviations +-1/2, std sqrt((1/4 + 1/4) / 1) = 0.70711; 0.5 / 0.70711
    ([1, 0, 0, 0], [3, -1, -1, -1]),  # mean 1/4, std sqrt((9 + 3) / 16 / 3) = 1/2: 0.75 / 0.5 and -0.25 / 0.5
    ([2, 4, 6], [-2, 0, 2]),  # mean 4, std sqrt((4 + 0 + 4) / 2) = 2
])  # fmt: skip
def test_rewards_are_centred_and_divided_by_the_unbiased_deviation(rewards, expected):
    scale = {2: np.sqrt(0.5), 4: 0.5, 3: 0.5}[len(rewards)]
    advantages = group_advantages([rewards])
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, [np.array(expected) * scale], rtol=1e-5, atol=1e-7)


def test_groups_do_not_see_each_other():
    together = group_advantages([[1, 0, 0], [5, 7, 9]])
    np.testing.assert_array_equal(together[0], group_advantages([[1, 0, 0]])[0])
    np.testing.assert_array_equal(together[1], group_advantages([[5, 7, 9]])[0])


@pytest.mark.parametrize("reward", [0.0, 1.0, -1.0, 0.1, 1 / 3, 1e8])
def test_a_group_that_scored_alike_is_exactly_zero(reward):
    # The mean of seven 0.1 is not 0.1 in binary: rounding divided by std_floor would be a gradient from nothing.
    np.testing.assert_array_equal(group_advantages(np.full((2, 7), reward)), 0)


def test_masked_responses_are_zero_and_do_not_move_the_others():
    rewards = [[1.0, 0.0, np.nan, 100.0], [2.0, 4.0, 6.0, -1e9]]
    mask = [[True, True, False, False], [True, True, True, False]]
    expected = [[np.sqrt(0.5), -np.sqrt(0.5), 0, 0], [-1, 0, 1, 0]]
    np.testing.assert_allclose(group_advantages(rewards, mask), expected, atol=1e-5)


@pytest.mark.parametrize("mask", [
    [True, False, False],  # one alone has no baseline
    [False, False, False],
    [True, True, False],  # the two that count scored alike
])  # fmt: skip
def test_a_group_without_two_different_scores_that_count_is_zero(mask):
    np.testing.assert_array_equal(group_advantages([[1.0, 1.0, 0.0]], [mask]), 0)


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (3,), (2, 2, 2)])
def test_a_group_of_one_and_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="expected \\[Q, G\\] with G of at least 2"):
        group_advantages(np.zeros(shape))


def test_the_floor_keeps_nearly_equal_scores_small():
    # Deviations of 5e-10 against std_floor 1e-6, std 7.07e-10: 5e-10 / 1.000707e-6 = 4.9965e-4, and not 0.707.
    np.testing.assert_allclose(group_advantages([[0.0, 1e-9]]), [[-4.9965e-4, 4.9965e-4]], rtol=1e-4)


# The second group scored alike, the third has two that count, the fourth one, the fifth none.
REWARDS = [
    [3.0, 1.0, 1.0, 1.0],
    [0.1, 0.1, 0.1, 0.1],
    [2.0, 8.0, 4.0, np.nan],
    [5.0, 1.0, 7.0, 9.0],
    [1.0, 2.0, 3.0, 4.0],
]
MASK = [[True] * 4, [True] * 4, [True, False, True, False], [False, True, False, False], [False] * 4]


@pytest.mark.parametrize("estimator, first, third", [
    # Group 1: mean 6/4, deviations 3/2 and three of -1/2. Group 3: 2 and 4 count, mean 3, deviations -1 and 1.
    ("grpo", [1.5, -0.5, -0.5, -0.5], [-np.sqrt(0.5), 0, np.sqrt(0.5), 0]),  # std sqrt((9 + 3) / 4 / 3) = 1, sqrt(2 / 1)
    ("dr_grpo", [1.5, -0.5, -0.5, -0.5], [-1, 0, 1, 0]),
    ("rloo", [2, -2 / 3, -2 / 3, -2 / 3], [-2, 0, 2, 0]),  # 3 - 1, 1 - (3 + 1 + 1) / 3; 2 - 4, 4 - 2
    # 4 + 4 + 2 + 1 count: std sqrt((9/4 + 3/4 + 1 + 1) / 10) = sqrt(1/2)
    ("reinforce_plus_plus", np.array([1.5, -0.5, -0.5, -0.5]) * np.sqrt(2), [-np.sqrt(2), 0, np.sqrt(2), 0]),
])  # fmt: skip
def test_each_estimator_by_hand(estimator, first, third):
    advantages = group_advantages(REWARDS, MASK, estimator=estimator)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages[[0, 2]], [first, third], rtol=1e-5)
    np.testing.assert_array_equal(advantages[[1, 3, 4]], 0)


def test_alike_are_the_groups_without_an_advantage():
    np.testing.assert_array_equal(alike(REWARDS, MASK), [False, True, False, True, True])
    np.testing.assert_array_equal(alike([[1, 1], [0, 1]]), [True, False])


def test_grpo_is_what_one_gets_unasked():
    np.testing.assert_array_equal(group_advantages(REWARDS, MASK), group_advantages(REWARDS, MASK, estimator="grpo"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rewards, mask", [
    (np.full((2, 7), 0.1), None),  # all alike: the whole batch has no deviation
    ([[1.0, 2.0, 3.0]], [[False] * 3]),
    ([[1.0, 2.0, 3.0]], [[False, True, False]]),
    (np.zeros((0, 4)), None),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_nothing_to_compare_is_exactly_zero_without_a_warning(estimator, rewards, mask):
    advantages = group_advantages(rewards, mask, estimator=estimator, std_floor=0)  # 0 / 0 without a floor
    np.testing.assert_array_equal(advantages, np.zeros(np.shape(rewards)))


def test_reinforce_plus_plus_is_the_only_one_that_sees_other_groups():
    one, other = [[1.0, 0.0, 0.0]], [[5.0, 7.0, 90.0]]
    for estimator in ESTIMATORS:
        together, alone = (group_advantages(rewards, estimator=estimator)[0] for rewards in (one + other, one))
        assert np.array_equal(together, alone) == (estimator != "reinforce_plus_plus")


@given(
    st.integers(2, 5).flatmap(lambda width: st.lists(
        st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.1, 1 / 3, 1.0]), min_size=width, max_size=width),
        min_size=1, max_size=4,
    )),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_properties_of_every_estimator(rewards, seed):
    rewards, rng = np.asarray(rewards, np.float32), np.random.default_rng(seed)
    mask = rng.random(rewards.shape) < 0.8
    advantages = {estimator: group_advantages(rewards, mask, estimator=estimator) for estimator in ESTIMATORS}
    rows, columns = rng.permutation(rewards.shape[0]), rng.permutation(rewards.shape[1])
    for estimator, ours in advantages.items():
        np.testing.assert_allclose(ours.sum(axis=1), 0, atol=1e-5)
        np.testing.assert_array_equal(ours[~mask], 0)
        np.testing.assert_array_equal((ours == 0).all(axis=1), alike(rewards, mask))
        shuffled = group_advantages(rewards[rows][:, columns], mask[rows][:, columns], estimator=estimator)
        np.testing.assert_allclose(shuffled, ours[rows][:, columns], rtol=1e-6, atol=1e-7)
    count = mask.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(advantages["rloo"], advantages["dr_grpo"] * count / np.maximum(count - 1, 1), rtol=1e-6)
    if not alike(rewards, mask).all():  # the deviation of what comes out is 1, up to the floor
        np.testing.assert_allclose(advantages["reinforce_plus_plus"][mask].std(ddof=1), 1, rtol=1e-4)


def test_an_unknown_estimator_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'gae' is no estimator; use one of grpo, dr_grpo, rloo, reinforce_plus_plus"):
        group_advantages([[0, 1]], estimator="gae")
