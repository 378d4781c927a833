"""Model FLOPs by formula: what the mathematics of the model asks for, however it is computed.

Source: PaLM (arXiv:2204.02311), appendix B, whose "model FLOPs utilisation" divides them by what the chip could have
done. A product of matrices counts 2 per multiplication and addition. Per token of a forward pass:

    2 * N              N = numbers in the layers' matrices (query, key, value, output, gate, up, down)
    4 * L * E * c      E = heads * head_width, c = keys that the token attends, itself included: scores and their values
    2 * D * V          where logits are computed, so for predicted tokens only

Left out, as there: looking up the embedding, norms, rotary embedding, softmax, biases, the optimizer. A backward pass
takes twice its forward pass. What a program computes beyond that does not count, so that it lowers the utilisation:
padding, masked halves of attention (PaLM counts these), a forward pass done again to save memory.

Lengths are host arrays of whole numbers; results are Python floats, exact up to 2**53.
"""

import math

import numpy as np

from dgpo_jax.models.parameters import table


def forward_flops(config, tokens, pairs, predicted) -> float:
    """Of a forward pass.

    Args:
        config: ModelConfig.
        tokens: that go through all layers.
        pairs: of a query and a key that it attends.
        predicted: tokens that logits over the vocabulary are computed for.
    """
    numbers = sum(math.prod(row.shape) for name, row in table(config).items() if row.stacked and name.endswith("/kernel"))
    attention = 4 * config.layers * config.heads * config.head_width
    return float(2 * numbers * int(tokens) + attention * int(pairs) + 2 * config.width * config.vocab_size * int(predicted))


def causal_pairs(length, before=0):
    """i64, the shape of `length`: pairs where each of `length` tokens attends itself, those before it, and `before` more."""
    length, before = np.asarray(length, np.int64), np.asarray(before, np.int64)
    return length * before + length * (length + 1) // 2


def rollout_flops(config, prompts, responses) -> float:
    """Of sampling: every prompt runs once, whatever the number of its samples, and so does each sampled token.

    The last token of a response is drawn and never run; the first is drawn from its prompt's logits.

    Args:
        prompts: int[Q], lengths.
        responses: int[B], lengths; row q * G + g answers prompt q.
    """
    prompts, decoded = np.asarray(prompts, np.int64), np.maximum(np.asarray(responses, np.int64) - 1, 0)
    before = np.repeat(prompts, len(decoded) // len(prompts))
    pairs = causal_pairs(prompts).sum() + causal_pairs(decoded, before).sum()
    return forward_flops(config, prompts.sum() + decoded.sum(), pairs, len(prompts) + decoded.sum())


def training_flops(config, prompts, responses, scorings: int = 0) -> float:
    """Of learning from sequences: forward and backward, and `scorings` more forward passes for log-probabilities.

    Args:
        prompts, responses: int[B], lengths of each sequence's two parts; logits are for the responses.
    """
    lengths = np.asarray(prompts, np.int64) + np.asarray(responses, np.int64)
    forward = forward_flops(config, lengths.sum(), causal_pairs(lengths).sum(), np.sum(responses))
    return (3 + scorings) * forward
