"""Sampling responses: prefill every prompt once, then decode all its samples together in one loop on the device.

Slots of the cache, for a prompt of 2 tokens in P = 4 prompt slots and R = 3 response slots:

    slot       0    1    2    3  |  4    5    6
    token      -    -    a    b  |  x    y    z       prompts end at slot P - 1, so that every row writes slot P + t
    position   0    0    0    1  |  2    3    4       at the same time; padding has segment 0 and is never attended
    segment    0    0    1    1  |  1    1    1

The first token comes from the logits of slot P - 1; the loop writes token t - 1 and samples token t, and ends as soon
as every row has stopped. One program, compiled once.

Randomness is one uniform number per (seed, stream, iteration, prompt, sample, token index), so that neither the number
of devices, nor the order of rows, nor a restart changes a response.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dgpo_jax.types import KVCache, Prompts, Rollout


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
    """What names a batch of responses, besides prompt and sample."""

    seed: Any  # i32[]
    stream: Any  # i32[], what the responses are for: TRAINING or EVALUATION
    iteration: Any  # i32[]
    first_prompt: Any  # i32[], number of this batch's first prompt within the iteration
    first_sample: Any = 0  # i32[], number of this batch's first sample of every prompt


TRAINING, EVALUATION = 0, 1

# Probabilities are summed in blocks of this many tokens; then only one block of them is summed token by token.
CDF_BLOCK = 256


class LoopState(NamedTuple):
    """What the decoding loop carries."""

    index: Any  # i32[], response slots filled so far
    active: Any  # bool[B], True until the stop token has been sampled
    response: Any  # i32[B, R]
    response_mask: Any  # bool[B, R]
    logprobs: Any  # f32[B, R]
    cache: KVCache  # S = P + R slots


def make_sampler(model, sampling: Sampling, *, out_shardings=None) -> Callable[[Any, Prompts, Draw], Rollout]:
    """Returns the jitted function (params, prompts, draw) -> Rollout with B = Q * G rows.

    Args:
        model: has `hidden(params, tokens, segment, position, cache, slot)`, `unembedding(params)` and
            `make_cache(batch, slots)`.
        out_shardings: a Rollout of shardings; left open, the second call may compile again.
    """

    def sample(params, prompts: Prompts, draw: Draw) -> Rollout:
        keys = row_keys(draw, len(prompts.tokens), sampling.group_size)
        cache, logits = prefill(model, params, prompts, sampling)
        state = start(prompts, cache, logits, keys, sampling)
        lengths = jnp.repeat(jnp.sum(prompts.mask, axis=1, dtype=jnp.int32), sampling.group_size)
        slots = prompts.tokens.shape[1]

        def going(state: LoopState):
            return jnp.any(state.active) & (state.index < sampling.max_response)

        def decode(state: LoopState) -> LoopState:
            previous = state.index - 1
            token = jax.lax.dynamic_index_in_dim(state.response, previous, axis=1)  # i32[B, 1]
            hidden, cache = model.hidden(
                params, token, jnp.ones_like(token), (lengths + previous)[:, None], state.cache, slots + previous
            )
            return record(state._replace(cache=cache), to_logits(model, params, hidden), keys, sampling)

        state = jax.lax.while_loop(going, decode, state)
        return Rollout(state.response, state.response_mask, state.logprobs, truncated=state.active)

    return jax.jit(sample, out_shardings=out_shardings)


def prefill(model, params, prompts: Prompts, sampling: Sampling):
    """Runs every prompt once.

    Returns:
        (KVCache with B rows and P + R slots, logits f32[Q, V] of each prompt's last token).
    """
    position = jnp.maximum(jnp.cumsum(prompts.mask, axis=1, dtype=jnp.int32) - 1, 0)
    segment = prompts.mask.astype(jnp.int32)
    cache = model.make_cache(*prompts.tokens.shape)
    hidden, cache = model.hidden(params, prompts.tokens, segment, position, cache, 0)
    logits = to_logits(model, params, hidden[:, -1:])
    return share_prompts(cache, sampling.group_size, sampling.max_response), logits


def share_prompts(cache: KVCache, group_size: int, max_response: int) -> KVCache:
    """Gives each of a prompt's samples its copy of the prompt's cache, with room for a response behind it."""

    def share(x, row_axis, slot_axis):
        # Broadcast and reshape rather than `repeat`: a sharded row axis stays where it is.
        shape = list(x.shape)
        x = jnp.broadcast_to(
            jnp.expand_dims(x, row_axis + 1), [*shape[: row_axis + 1], group_size, *shape[row_axis + 1 :]]
        )
        shape[row_axis] *= group_size
        padding = [(0, 0)] * len(shape)
        padding[slot_axis] = (0, max_response)
        return jnp.pad(x.reshape(shape), padding)

    return KVCache(share(cache.key, 1, 3), share(cache.value, 1, 3), share(cache.segment, 0, 1), share(cache.position, 0, 1))


def to_logits(model, params, hidden):
    """hidden dtype[B, 1, D] -> f32[B, V]."""
    unembedding = model.unembedding(params).astype(hidden.dtype)
    return jnp.einsum("bd,dv->bv", hidden[:, 0], unembedding, preferred_element_type=jnp.float32)


def start(prompts: Prompts, cache: KVCache, logits, keys, sampling: Sampling) -> LoopState:
    """The loop's state with the first token of every response in it."""
    rows = len(prompts.tokens) * sampling.group_size
    shape = (rows, sampling.max_response)
    state = LoopState(
        index=jnp.int32(0),
        active=jnp.ones(rows, bool),
        response=jnp.full(shape, sampling.pad_id, jnp.int32),
        response_mask=jnp.zeros(shape, bool),
        logprobs=jnp.zeros(shape, jnp.float32),
        cache=cache,
    )
    return record(state, jnp.repeat(logits, sampling.group_size, axis=0), keys, sampling)


def record(state: LoopState, logits, keys, sampling: Sampling) -> LoopState:
    """Draws the next token of every row and writes it down where the row is still active.

    Args:
        logits: f32[B, V].
        keys: key[B].
    """
    token, logprob = draw_tokens(logits, keys, state.index, sampling)
    token = jnp.where(state.active, token, sampling.pad_id)
    stopped = jnp.isin(token, jnp.array(sampling.stop_ids, jnp.int32)) if sampling.stop_ids else jnp.zeros_like(state.active)

    def put(array, column):
        return jax.lax.dynamic_update_slice_in_dim(array, column[:, None], state.index, axis=1)

    return state._replace(
        index=state.index + 1,
        response=put(state.response, token),
        response_mask=put(state.response_mask, state.active),
        logprobs=put(state.logprobs, jnp.where(state.active, logprob, 0.0)),
        active=state.active & ~stopped,
    )


def row_keys(draw: Draw, prompts: int, group_size: int):
    """One key per response: key[Q * G]."""
    base = jax.random.key(draw.seed)
    for number in (draw.stream, draw.iteration):
        base = jax.random.fold_in(base, number)
    prompt = draw.first_prompt + jnp.arange(prompts)
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(base, prompt)
    sample = draw.first_sample + jnp.arange(group_size)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(prompt_keys, sample)
    return keys.reshape(prompts * group_size)


def draw_tokens(logits, keys, index, sampling: Sampling):
    """Draws one token a row.

    Args:
        logits: f32[B, V], not yet divided by the temperature.
        keys: key[B]; with `index` (the token's place in its response) they give the row's uniform number.
    Returns:
        (token i32[B], logprob f32[B] under log_softmax(logits / temperature), top-p and top-k left out).
    """
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, log_probability(logits, token)
    logits = logits / sampling.temperature
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index)))(keys)
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
