"""Corrections for the sampler's probabilities, on packed rows by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpo_jax.config import CorrectionConfig
from dgpo_jax.rl.correction import Correction, correction_weights


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


# One row: a sequence with a prompt token and two of the response, one with one and three, padding.
SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 2, 0]], np.int32)
MASK = np.array([[0, 1, 1, 0, 1, 1, 1, 0]], bool)
# trainer / sampler by token; the sequences' products are 4 * 0.5 = 2 and 0.5 * 0.25 * 1 = 1/8, their geometric means
# 2^(1/2) = 1.414 and (1/8)^(1/3) = 1/2.
RATIO = np.array([[1, 4, 0.5, 1, 0.5, 0.25, 1, 1]], np.float32)


def weights(correction, ratio=RATIO, segment=SEGMENT, mask=MASK):
    """Of the response tokens; of the others nobody asks."""
    found = correction_weights(correction, jnp.log(ratio), segment, mask)
    assert found.shape == ratio.shape and found.dtype == jnp.float32
    return np.asarray(found)[mask]


@pytest.mark.parametrize("correction, expected", [
    (Correction(), [1, 1, 1, 1, 1]),
    (Correction("token"), [2, 0.5, 0.5, 0.25, 1]),  # 4 is cut off at 2; there is no lower bound
    (Correction("token", cap=8.0), [4, 0.5, 0.5, 0.25, 1]),
    (Correction("token", cap=0.5), [0.5, 0.5, 0.5, 0.25, 0.5]),
    (Correction("sequence"), [2, 2, 1 / 8, 1 / 8, 1 / 8]),
    (Correction("sequence", cap=1.5), [1.5, 1.5, 1 / 8, 1 / 8, 1 / 8]),  # the product is cut off, not its factors
    (Correction(reject="token"), [0, 1, 1, 0, 1]),  # 4 and 1/4 are outside of 1/2 to 2, whose ends are inside
    (Correction(reject="sequence"), [1, 1, 0, 0, 0]),  # 2 is in, 1/8 is out
    (Correction(reject="sequence", high=1.9), [0, 0, 0, 0, 0]),
    (Correction(reject="sequence", low=0.1, high=1.9), [0, 0, 1, 1, 1]),
    (Correction(reject="geometric"), [1, 1, 1, 1, 1]),  # 1.414 and 1/2: length does not count
    (Correction(reject="geometric", low=0.51), [1, 1, 0, 0, 0]),
    (Correction(reject="geometric", low=0.4, high=1.4), [0, 0, 1, 1, 1]),
    (Correction("token", reject="sequence"), [2, 0.5, 0, 0, 0]),  # two levels at once
    (Correction("sequence", reject="token"), [0, 2, 1 / 8, 0, 1 / 8]),
    (Correction("token", cap=8.0, reject="token"), [0, 0.5, 0.5, 0, 1]),  # what is judged is not the capped weight
    (Correction("token", cap=1.5, reject="token"), [0, 0.5, 0.5, 0, 1]),
])  # fmt: skip
def test_weights_by_hand(correction, expected):
    # The ends are met to rounding only: a hair inside.
    correction = correction._replace(low=correction.low * (1 - 1e-5), high=correction.high * (1 + 1e-5))
    np.testing.assert_allclose(weights(correction), expected, rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_rejected_token_weighs_exactly_nothing_and_others_exactly_one(level):
    found = weights(Correction(reject=level, low=0.9, high=1.1))
    assert set(found.tolist()) <= {0.0, 1.0} and 0.0 in found
    assert (weights(Correction(reject=level), np.ones_like(RATIO)) == 1).all()


@pytest.mark.parametrize("correction", [Correction("sequence", reject="geometric"), Correction("sequence", reject="sequence")])
def test_sequences_do_not_see_their_neighbours(correction):
    # The first one far off: neither the other of the row nor the same segment number of the next row is touched.
    ratio = np.concatenate([np.where(SEGMENT == 1, 16, 1), np.ones_like(RATIO)]).astype(np.float32)
    segment, mask = np.tile(SEGMENT, (2, 1)), np.tile(MASK, (2, 1))
    np.testing.assert_array_equal(weights(correction, ratio, segment, mask), [0, 0, *[1] * 8])


def test_masked_tokens_do_not_count_in_a_sequence():
    # The prompt token has a ratio of its own here, which nobody should have put there.
    spoilt = np.where(MASK, RATIO, 1000).astype(np.float32)
    for correction in (Correction("sequence"), Correction(reject="geometric"), Correction(reject="sequence")):
        np.testing.assert_array_equal(weights(correction, spoilt), weights(correction))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_sequence_of_one_token(level):
    one = np.ones((1, 1), np.int32), np.ones((1, 1), bool)
    np.testing.assert_allclose(weights(Correction(level), np.full((1, 1), 1.5, np.float32), *one), [1.5], rtol=1e-6)
    assert weights(Correction(level, reject=level), np.full((1, 1), 3, np.float32), *one) == [0]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reject", ["token", "sequence", "geometric"])
def test_all_masked_is_finite(level, reject):
    nothing = np.zeros((1, 8), bool)
    for segment in (SEGMENT, np.zeros_like(SEGMENT)):
        found = correction_weights(Correction(level, reject=reject), jnp.zeros((1, 8)), segment, nothing)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("level, reject", [("token", "token"), ("sequence", "sequence"), ("sequence", "geometric")])
def test_log_ratios_of_any_size_stay_finite(level, reject):
    # A response of thousands of tokens has a product that overflows.
    log_ratio = jnp.where(SEGMENT == 1, 1e4, -1e4)
    for correction in (Correction(level), Correction(level, reject=reject)):
        found = np.asarray(correction_weights(correction, log_ratio, SEGMENT, MASK))
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[0, 1], 2 if correction.reject == "none" else 0)
        assert (found[0, 4:7] < 1e-8).all()


def test_the_settings_are_those_of_the_config():
    assert Correction()._asdict() == vars(CorrectionConfig())
