"""Attention among packed sequences, behind one function.

The two versions here are plain XLA and run anywhere; kernels of a backend belong here too, chosen by
`implementation` and checked against `_plain`.
"""

import jax
import jax.numpy as jnp

# With "auto", a row of T queries and S keys is handled at once up to this many T * S. Above it the f32 logits of
# one row and head exceed 1 MB, and it is cheaper to compute them a second time in the backward pass than to keep them.
PLAIN_LIMIT = 512 * 512

IMPLEMENTATIONS = ("auto", "plain", "chunked")


def attention(query, key, value, query_segment, query_position, key_segment, key_position,
              *, implementation="auto", chunk=512):
    """Causal attention within segments.

    A query attends a key if both have the same segment, which is not 0, and the key's position is not after the
    query's. A query that attends nothing (padding) gives exactly 0, also in the gradient.

    Args:
        query: [B, T, K, M, H]; key head k serves the queries [:, :, k].
        key, value: [B, K, S, H], the layout of the cache.
        query_segment, query_position: i32[B, T].
        key_segment, key_position: i32[B, S].
        implementation: "plain", "chunked" (a block of queries at a time, recomputed in the backward pass, so that
            the memory is chunk * S and not T * S) or "auto" (by size).
        chunk: queries in a block.
    Returns:
        [B, T, K, M, H] in the dtype of `value`; the softmax is f32.
    Raises:
        ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"model.attention={implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    tokens, slots = query.shape[1], key.shape[2]
    if implementation == "auto":
        implementation = "plain" if tokens * slots <= PLAIN_LIMIT else "chunked"
    arguments = (query, key, value, query_segment, query_position, key_segment, key_position)
    if implementation == "plain" or tokens <= chunk:
        return _plain(*arguments)
    return _chunked(*arguments, chunk=chunk)


def _plain(query, key, value, query_segment, query_position, key_segment, key_position):
    visible = (
        (query_segment[:, :, None] == key_segment[:, None, :])
        & (key_position[:, None, :] <= query_position[:, :, None])
        & (query_segment > 0)[:, :, None]
    )[:, None, None]  # bool[B, 1, 1, T, S]
    logits = jnp.einsum("btkmh,bksh->bkmts", query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    # The lowest finite number and not -inf: a row without a visible key would be inf - inf = NaN, and NaN * 0 in
    # the gradient. Its uniform weights are then cut to 0 by the second `where`.
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.where(visible, jax.nn.softmax(logits, axis=-1), 0.0)
    return jnp.einsum("bkmts,bksh->btkmh", weights.astype(value.dtype), value)


def _chunked(query, key, value, query_segment, query_position, key_segment, key_position, *, chunk):
    batch, tokens = query.shape[:2]
    blocks = -(-tokens // chunk)
    missing = blocks * chunk - tokens

    def to_blocks(x):
        # [B, T, ...] -> [blocks, B, chunk, ...]; the slots added have segment 0 and attend nothing.
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, blocks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_block(block):
        block_query, block_segment, block_position = block
        return _plain(block_query, key, value, block_segment, block_position, key_segment, key_position)

    output = jax.lax.map(one_block, (to_blocks(query), to_blocks(query_segment), to_blocks(query_position)))
    return jnp.moveaxis(output, 0, 1).reshape(batch, blocks * chunk, *query.shape[2:])[:, :tokens]
