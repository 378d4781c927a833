"""Rows longer than one device holds: their tokens are split over the `context` axis of the mesh.

Every device keeps its queries and gathers the keys and values of the whole row, which with grouped heads are small. A
causal query at the end of a row has far more keys than one at its start, so a row is cut into twice as many chunks as
devices, and each device gets an early and a late one:

    natural order, as everything outside of the layers has it     device 0: 0 1    1: 2 3    2: 4 5    3: 6 7
    spread, for the layers                                        device 0: 0 7    1: 1 6    2: 2 5    3: 3 4

Of the chunks of a device one has an even number and one an odd number in both orders, so that two permutations of the
devices turn one into the other.

Source: Llama 3 (arXiv:2407.21783), section 3.3.2.
"""

import jax
import jax.numpy as jnp

from dgpo_jax.sharding import map_shards

AXIS = "context"


def spread(x, mesh):
    """Natural order to the layers' order: [B, T, ...] -> [B, T, ...].

    Raises:
        ValueError: T is not a multiple of twice the `context` devices.
    """
    return _reorder(x, mesh, _to_spread)


def collect(x, mesh):
    """The layers' order to natural order: the inverse of `spread`."""
    return _reorder(x, mesh, _to_natural)


def _reorder(x, mesh, reorder):
    devices = 1 if mesh is None else mesh.shape[AXIS]
    if devices == 1:
        return x
    if x.shape[1] % (2 * devices):
        raise ValueError(
            f"a row of {x.shape[1]} tokens cannot be cut into 2 chunks for each of mesh.context={devices} devices; make"
            f" update.tokens_per_row a multiple of {2 * devices}."
        )
    axes = ("batch", "tokens", *[None] * (x.ndim - 2))
    return map_shards(lambda part: reorder(part, devices), mesh, (axes,), axes)(x)


def _to_spread(part, devices):
    # Device d holds chunks 2d and 2d + 1.
    even, odd = jnp.split(part, 2, axis=1)
    even = jax.lax.ppermute(even, AXIS, [(device, _holder(2 * device, devices)) for device in range(devices)])
    odd = jax.lax.ppermute(odd, AXIS, [(device, _holder(2 * device + 1, devices)) for device in range(devices)])
    early_is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.concatenate([jnp.where(early_is_even, even, odd), jnp.where(early_is_even, odd, even)], axis=1)


def _to_natural(part, devices):
    early, late = jnp.split(part, 2, axis=1)
    early_is_even = jax.lax.axis_index(AXIS) % 2 == 0
    even, odd = jnp.where(early_is_even, early, late), jnp.where(early_is_even, late, early)
    even = jax.lax.ppermute(even, AXIS, [(_holder(2 * device, devices), device) for device in range(devices)])
    odd = jax.lax.ppermute(odd, AXIS, [(_holder(2 * device + 1, devices), device) for device in range(devices)])
    return jnp.concatenate([even, odd], axis=1)


def _holder(chunk, devices):
    """Which device has this chunk while the rows are spread."""
    return min(chunk, 2 * devices - 1 - chunk)


def local_slots(tokens, devices):
    """i32[tokens]: the slots in the row of this device's tokens, in the layers' order; for use in a `shard_map`."""
    if devices == 1:
        return jnp.arange(tokens, dtype=jnp.int32)
    half = tokens // 2
    early = jax.lax.axis_index(AXIS)
    late = 2 * devices - 1 - early
    within = jnp.arange(half, dtype=jnp.int32)
    return jnp.concatenate([early * half + within, late * half + within]).astype(jnp.int32)


def whole_rows(x, devices, axis):
    """This device's tokens along `axis` and those of the others, in natural order; for use in a `shard_map`.

    Its backward pass adds the devices' gradients up and leaves each its own tokens'.
    """
    if devices == 1:
        return x
    parts = jax.lax.all_gather(x, AXIS, axis=axis)  # [.., devices, tokens, ..]
    early, late = jnp.split(parts, 2, axis=axis + 1)
    chunks = jnp.concatenate([early, jnp.flip(late, axis)], axis=axis)  # [.., 2 * devices, tokens / 2, ..]
    return chunks.reshape(*x.shape[:axis], devices * x.shape[axis], *x.shape[axis + 1 :])
