"""Numbers in eight bits with a scale for several of them: for decoding, where reading weights and cache is the cost."""

import jax
import jax.numpy as jnp

from dgpo_jax.types import Quantized


def quantise(x, axes: tuple[int, ...]) -> Quantized:
    """Rounds to 127 steps on either side of 0; the largest of the numbers that share a scale is exact.

    Args:
        x: a float array.
        axes: along these the numbers share a scale, whose dimensions there are 1.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)


def dequantise(x: Quantized, dtype):
    """The numbers again, up to half a step off."""
    return (x.values.astype(jnp.float32) * x.scale).astype(dtype)


def is_quantised(x) -> bool:
    """For `jax.tree.map`, which otherwise goes on into its two arrays."""
    return isinstance(x, Quantized)


def cast(tree, dtype):
    """Every array of the tree in this dtype, those in eight bits as well."""
    return jax.tree.map(lambda leaf: dequantise(leaf, dtype) if is_quantised(leaf) else leaf.astype(dtype), tree, is_leaf=is_quantised)
