"""Advantages of a group, by hand."""

import numpy as np
import pytest

from dgpo_jax.rl.advantages import group_advantages


@pytest.mark.parametrize("rewards, expected", [
    ([1, 0], [1, -1]),  # mean 1/2, deviations +-1/2, std sqrt((1/4 + 1/4) / 1) = 0.70711; 0.5 / 0.70711
    ([1, 0, 0, 0], [3, -1, -1, -1]),  # mean 1/4, std sqrt((9 + 3) / 16 / 3) = 1/2: 0.75 / 0.5 and -0.25 / 0.5
    ([2, 4, 6], [-2, 0, 2]),  # mean 4, std sqrt((4 + 0 + 4) / 2) = 2
])
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
