"""The sampler's probabilities are not quite the trainer's: importance weights, and what is left out.

Both run the same weights, but in other shapes and perhaps in another precision, so that the sampler draws from a
distribution pi_sampler that the trainer knows as pi_old. Weighting by pi_old / pi_sampler, cut off at a cap so that one
token cannot rule the gradient, corrects for it; where the two are far apart the token or response is better left out.

Source: truncated importance sampling (Yao et al., "Your efficient RL framework secretly brings you off-policy RL
training", 2025); the levels are those of verl's rollout correction.
"""

from typing import NamedTuple

import jax.numpy as jnp

from dgpo_jax.rl.kl import MAX_LOG_RATIO
from dgpo_jax.rl.losses import sequence_mean, sequence_sum


class Correction(NamedTuple):
    """What is done; the default is nothing."""

    weights: str = "none"  # "token": pi_old / pi_sampler; "sequence": its product over the response
    cap: float = 2.0  # largest weight
    reject: str = "none"  # "token", "sequence" (product) or "geometric" (geometric mean) outside of low to high
    low: float = 0.5
    high: float = 2.0


def correction_weights(correction: Correction, log_ratio, segment, mask):
    """What each token's advantage is to be multiplied by.

    Args:
        log_ratio: f32[N, T], log(pi_old / pi_sampler); 0 where masked.
        segment: i32[N, T].
        mask: bool[N, T].
    Returns:
        f32[N, T], 1 where nothing is to be done, 0 where rejected. A rejected token still counts in what the loss is
        divided by: otherwise an update would be the larger the fewer tokens it trusts.
    """

    def ratio(level):
        over = {"token": lambda x, *_: x, "sequence": sequence_sum, "geometric": sequence_mean}[level]
        return jnp.exp(jnp.clip(over(log_ratio, segment, mask), -MAX_LOG_RATIO, MAX_LOG_RATIO))

    weights = jnp.ones_like(log_ratio)
    if correction.weights != "none":
        weights = jnp.minimum(ratio(correction.weights), correction.cap)
    if correction.reject != "none":
        judged = ratio(correction.reject)
        weights = jnp.where((judged >= correction.low) & (judged <= correction.high), weights, 0.0)
    return weights
