"""Weights of tokens in the loss of an update, by hand."""

import numpy as np
import pytest

from dgpo_jax.rl.aggregation import MODES, token_weights

# Token losses of three responses of 3, 1 and 2 tokens, the last of which is not learned from; 3 slots.
LOSSES = np.array([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [50.0, 60.0, 0.0]])
LENGTHS = [3, 1, 2]
COUNTED = [True, True, False]


@pytest.mark.parametrize("mode, weights, loss", [
    ("token-mean", [1 / 4, 1 / 4, 0], 2.5),  # (1 + 2 + 3 + 4) / 4 tokens
    ("seq-mean-token-sum", [1 / 2, 1 / 2, 0], 5.0),  # (6 + 4) / 2
    ("seq-mean-token-mean", [1 / 6, 1 / 2, 0], 3.0),  # (6 / 3 + 4 / 1) / 2
    ("seq-mean-token-sum-norm", [1 / 6, 1 / 6, 0], 5 / 3),  # (6 / 3 + 4 / 3) / 2; verl's main has 10 / 3
])  # fmt: skip
def test_each_mode_by_hand(mode, weights, loss):
    ours = token_weights(LENGTHS, COUNTED, mode, scale=3)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, weights, rtol=1e-15)
    np.testing.assert_allclose(np.sum(ours[:, None] * LOSSES), loss, rtol=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_response_counts_no_more_than_one_left_out(mode):
    left_out = token_weights([3, 1, 2], [True, True, False], mode, scale=3)
    np.testing.assert_array_equal(token_weights([3, 1, 0], [True, True, True], mode, scale=3), left_out)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths, counted", [
    ([3, 2], [False, False]),
    ([0, 0], [True, True]),
    ([], []),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_nothing_to_learn_from_weighs_nothing_without_a_warning(mode, lengths, counted):
    np.testing.assert_array_equal(token_weights(lengths, counted, mode, scale=3), np.zeros(len(lengths)))


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_responses_does_not_matter(mode):
    rng = np.random.default_rng(0)
    lengths, counted, order = rng.integers(0, 9, 40), rng.random(40) < 0.7, rng.permutation(40)
    np.testing.assert_array_equal(
        token_weights(lengths[order], counted[order], mode, scale=8),
        token_weights(lengths, counted, mode, scale=8)[order],
    )


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_the_means_over_tokens_sum_to_one(mode):
    rng = np.random.default_rng(1)
    lengths, counted = rng.integers(0, 32_768, 1000), rng.random(1000) < 0.7
    np.testing.assert_allclose(np.sum(token_weights(lengths, counted, mode, scale=None) * lengths), 1, rtol=1e-12)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="'mean' is no mode; use one of token-mean, seq-mean-token-sum, "):
        token_weights([1], [True], "mean", scale=1)
    for scale in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            token_weights([1], [True], "seq-mean-token-sum-norm", scale=scale)
