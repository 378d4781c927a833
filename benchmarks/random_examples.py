"""Sequences to learn from that mean nothing, for benchmarks of the update."""

import numpy as np

from dgpo_jax.rl.packing import Example


def random_examples(count: int, prompt: int, response: int, vocabulary: int) -> list[Example]:
    """Sequences of so many random tokens, their old log-probabilities far enough off for ratios in every region."""
    rng = np.random.default_rng(0)
    return [
        Example(
            rng.integers(1, vocabulary, prompt).astype(np.int32), rng.integers(1, vocabulary, response).astype(np.int32),
            0.0, rng.normal(-np.log(vocabulary), 0.5, response).astype(np.float32),
            float(rng.choice([-1.0, 1.0])), 1.0 / (count * response),
        )
        for _ in range(count)
    ]  # fmt: skip
