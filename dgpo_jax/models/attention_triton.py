"""Attention for packed rows on a GPU: JAX's Pallas Triton kernel with segment numbers.

It computes every block before the diagonal, whatever the segments, and wants a key head for every query head.
Source: jax.experimental.pallas.ops.gpu.attention.
"""

import jax.numpy as jnp

BLOCK = 128  # tokens of a block of scores; rows are filled up to a multiple of it


def triton_attention(query, key, value, segment, *, interpret=False):
    """Causal attention within segments; padding (segment 0) attends padding.

    Args:
        query: [B, T, K, M, H].
        key, value: [B, K, T, H].
        segment: i32[B, T].
        interpret: runs on any platform, slowly.
    Returns:
        [B, T, K, M, H]. What a padding query gives means nothing, and its gradient must be 0.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha  # imported late: only GPUs need it

    rows, tokens, key_heads, queries, width = query.shape

    def fill(x):  # [B, T, ...]
        return jnp.pad(x, [(0, 0), (0, -tokens % BLOCK)] + [(0, 0)] * (x.ndim - 2))

    def per_query_head(x):  # [B, K, T, H] -> [B, T, K * M, H]
        return fill(jnp.repeat(jnp.moveaxis(x, 1, 2), queries, axis=2))

    query = fill(query.reshape(rows, tokens, key_heads * queries, width))
    output = mha(
        query, per_query_head(key), per_query_head(value), fill(segment), sm_scale=width**-0.5, causal=True,
        interpret=interpret,
    )  # fmt: skip
    return output[:, :tokens].reshape(rows, tokens, key_heads, queries, width)
