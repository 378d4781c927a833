"""Drawing tokens: one uniform number per token, through a running sum of the probabilities.

Randomness is one uniform number per (seed, stream, iteration, prompt, sample, token index), so that neither the number
of devices, nor the slot of a row, nor a restart changes a response.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are drawn; static, so another value is another program."""

    group_size: int  # G, samples per prompt
    max_response: int  # R
    stop_ids: tuple[int, ...]  # a response ends with the first of these
    pad_id: int  # fills the slots behind it
    temperature: float = 1.0  # 0 = greedy: the likeliest token, logprobs at temperature 1
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 = off


class Draw(NamedTuple):
    """What names a batch of responses, besides prompt and sample; ints, i32[] on the device."""

    seed: Any  # i32[]
    stream: Any  # i32[], what the responses are for: TRAINING or EVALUATION
    iteration: Any  # i32[]
    first_prompt: Any  # i32[], number of this batch's first prompt within the iteration


TRAINING, EVALUATION = 0, 1

# Probabilities are summed in blocks of this many tokens; then only one block of them is summed token by token.
CDF_BLOCK = 256


def base_key(draw: Draw):
    """The key that a batch's rows are told apart under."""
    key = jax.random.key(draw.seed)
    for number in (draw.stream, draw.iteration):
        key = jax.random.fold_in(key, number)
    return key


def row_keys(base, prompt, sample):
    """One key per response: (key, i32[B], i32[B]), numbers of prompt and sample, -> key[B]."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(base, prompt)
    return jax.vmap(jax.random.fold_in)(keys, sample)


@jax.named_scope("draw")
def draw_tokens(logits, keys, index, sampling: Sampling):
    """Draws one token a row.

    Args:
        logits: f32[B, V], not yet divided by the temperature.
        keys: key[B].
        index: i32[B], the token's place in its response; with the key it gives the row's uniform number.
    Returns:
        (token i32[B], logprob f32[B] under log_softmax(logits / temperature), top-p and top-k left out).
    """
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, log_probability(logits, token)
    logits = logits / sampling.temperature
    uniform = jax.vmap(lambda key, place: jax.random.uniform(jax.random.fold_in(key, place)))(keys, index)
    token = inverse_cdf(jax.nn.softmax(restrict(logits, sampling.top_p, sampling.top_k), axis=-1), uniform)
    return token, log_probability(logits, token)


def log_probability(logits, token):
    """f32[B, V], i32[B] -> f32[B]."""
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def restrict(logits, top_p: float, top_k: int):
    """Sets the logits of tokens outside top-k, then outside top-p of what is left, to -inf.

    top-p keeps the likeliest tokens up to and including the one that brings their probability to top_p, so at least
    one; ties at the border are all kept.
    """
    if top_k:
        kept = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits < kept[:, -1:], -jnp.inf, logits)
    if top_p < 1:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(probabilities < nucleus_border(probabilities, top_p)[:, None], -jnp.inf, logits)
    return logits


def nucleus_border(probabilities, top_p: float):
    """The smallest probability of a token that top-p keeps: those above it have less than top_p together.

    Found by bisection of its bits, which as integers are in the order of the numbers they stand for: 31 sums over the
    vocabulary, 9 to 22 ms at 32 x 49152 on 2 CPU cores, where sorting it took 380 ms; and TPUs sort slowly too.

    Args:
        probabilities: f32[B, V], 0 to 1.
    Returns:
        f32[B].
    """

    def halve(_, bounds):
        low, high = bounds  # i32[B]; the border is one of low to high
        middle = low + (high - low) // 2
        above = jnp.where(probabilities > jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None], probabilities, 0.0)
        enough = jnp.sum(above, axis=-1) < top_p
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros(len(probabilities), jnp.int32)
    high = jax.lax.bitcast_convert_type(jnp.max(probabilities, axis=-1), jnp.int32)
    border = jax.lax.fori_loop(0, 31, halve, (low, high))[1]
    return jax.lax.bitcast_convert_type(border, jnp.float32)


def inverse_cdf(probabilities, uniform):
    """The token at which the running sum of probabilities first exceeds `uniform`, found in two levels.

    A running sum over a vocabulary of 152K is slow, and one Gumbel number per entry slower still; block sums first,
    then one block token by token.

    Args:
        probabilities: f32[B, V], any positive sum.
        uniform: f32[B] in [0, 1).
    Returns:
        i32[B]; never a token of probability 0, whatever the rounding.
    """
    rows, vocabulary = probabilities.shape
    blocks = -(-vocabulary // CDF_BLOCK)
    padded = jnp.pad(probabilities, [(0, 0), (0, blocks * CDF_BLOCK - vocabulary)])
    padded = padded.reshape(rows, blocks, CDF_BLOCK)
    block_sums = jnp.sum(padded, axis=2)
    block_ends = jnp.cumsum(block_sums, axis=1)
    target = uniform * block_ends[:, -1]
    block = _first_above(block_sums, block_ends, target)
    before = jnp.take_along_axis(block_ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    target = target - jnp.where(block > 0, before, 0.0)
    return (block * CDF_BLOCK + _first_above(inside, jnp.cumsum(inside, axis=1), target)).astype(jnp.int32)


def _first_above(weights, ends, target):
    """Index, per row, of the first positive entry whose running sum is above the target.

    A parallel running sum adds in an order that depends on the place, so it may rise by rounding across a weight of 0
    and end above the last positive one: zeros are passed over by name, and the target is held below every rounding.

    Args:
        weights, ends: f32[B, X] and its running sum.
        target: f32[B].
    """
    ends = jnp.where(weights > 0, ends, -jnp.inf)
    target = jnp.minimum(target, jnp.max(ends, axis=1) * jnp.float32(1 - 2**-23))
    return jnp.argmax(ends > target[:, None], axis=1)
