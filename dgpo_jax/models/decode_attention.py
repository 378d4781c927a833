"""TPU kernels for one-token decoding: writing to the stacked cache in place, and reading each row up to its own length.

What XLA makes of the plain versions in decoding.py on a TPU, as the programs compiled for it show: the scatter that
writes wants the key heads next to the width, the attention wants the slots there. So every layer of every token copies
the whole stack of layers from one layout to the other, and a second cache is alive meanwhile. Both kernels here take
the cache as it lies. They find their blocks by the numbers of layer, row and slot, so that nothing is sliced out of the
stack, and a block behind a row's last token is not read.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dgpo_jax.sharding import DECODE_RULES, map_shards
from dgpo_jax.types import KVCache

SLOTS = 128  # the cache has a multiple of this many slots
TILE = 16  # slots that are read, changed and written back for one new token: memory is not addressed more finely
BLOCK_BYTES = 2**19  # of keys, and as much of values, that are read at once

_CACHE = ("layers", "batch", "key_heads", "slots", "head")
_NEW, _QUERY = ("batch", "key_heads", "head"), ("batch", "key_heads", "queries", "head")


def write(cache, key, value, layer, position, *, mesh=None, interpret=False):
    """Puts one token of each row into a layer of the cache, in place where the cache is donated or in a loop's carry.

    Args:
        cache: KVCache [L, C, K, S, H].
        key, value: [B, K, H], for the first B of the C rows.
        layer: i32[].
        position: i32[B], the slots they go to.
        mesh: of the arrays; None = one device.
        interpret: runs on any platform, slowly.
    Returns:
        KVCache.
    Raises:
        ValueError: S is not a multiple of SLOTS.
    """
    _check(cache)

    def on_one_device(keys, values, key, value, layer, position):
        rows, heads, width = key.shape
        new = pl.BlockSpec((1, heads, width), lambda row, place: (row, 0, 0))
        tile = pl.BlockSpec(
            (1, 1, heads, TILE, width), lambda row, place: (place[0], row, 0, place[1 + row] // TILE, 0)
        )
        written = pl.pallas_call(
            _write_kernel,
            out_shape=[jax.ShapeDtypeStruct(keys.shape, keys.dtype)] * 2,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1, grid=(rows,), in_specs=[new, new, tile, tile], out_specs=[tile, tile]
            ),
            input_output_aliases={3: 0, 4: 1},
            interpret=interpret,
            name="write_to_cache",
        )(_place(layer, position), key.astype(keys.dtype), value.astype(values.dtype), keys, values)
        return tuple(written)

    axes = (_CACHE, _CACHE, _NEW, _NEW, (), ("batch",))
    run = _on_shards(on_one_device, mesh, axes, (_CACHE, _CACHE))
    return KVCache(*run(cache.key, cache.value, key, value, layer, position))


def _write_kernel(place, key, value, keys, values, new_keys, new_values):
    slot = place[1 + pl.program_id(0)] % TILE
    for new, old, output in ((key, keys, new_keys), (value, values, new_values)):
        for head in range(old.shape[2]):
            tile = old[0, 0, head]
            here = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0) == slot
            # Selected in f32: older TPUs have no 16-bit selection.
            token, others = new[0, pl.ds(head, 1)].astype(jnp.float32), tile.astype(jnp.float32)
            output[0, 0, head] = jnp.where(here, token, others).astype(tile.dtype)


def attend(query, cache, layer, position, *, mesh=None, interpret=False):
    """Attention of one token a row over the row's slots up to its own, which the cache already holds.

    Args:
        query: [B, K, M, H], of the first B rows.
        cache: KVCache [L, C, K, S, H].
        layer: i32[].
        position: i32[B], slots of the tokens.
        mesh, interpret: as for `write`.
    Returns:
        [B, K, M, H] in the dtype of `query`; the softmax is f32.
    Raises:
        ValueError: S is not a multiple of SLOTS.
    """
    _check(cache)

    def on_one_device(query, keys, values, layer, position):
        rows, heads, queries, width = query.shape
        block = _block(keys)
        of_row = pl.BlockSpec((1, heads, queries, width), lambda row, step, place: (row, 0, 0, 0))
        # Behind the last block that is needed the same one is named again, and not read again.
        of_cache = pl.BlockSpec(
            (1, 1, heads, block, width),
            lambda row, step, place: (place[0], row, 0, jnp.minimum(step, place[1 + row] // block), 0),
        )
        return pl.pallas_call(
            functools.partial(_attend_kernel, scale=width**-0.5),
            out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1, grid=(rows, keys.shape[3] // block),
                in_specs=[of_row, of_cache, of_cache], out_specs=of_row,
                scratch_shapes=[pltpu.VMEM((heads, queries, size), jnp.float32) for size in (1, 1, width)],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
            name="decode_attention",
        )(_place(layer, position), query, keys, values)  # fmt: skip

    run = _on_shards(on_one_device, mesh, (_QUERY, _CACHE, _CACHE, (), ("batch",)), _QUERY)
    return run(query, cache.key, cache.value, layer, position)


def _attend_kernel(place, query, keys, values, output, highest, total, weighted, *, scale):
    """Softmax over blocks of slots: its sums so far are relative to the highest logit so far (arXiv:1805.02867)."""
    step, position = pl.program_id(1), place[1 + pl.program_id(0)]
    heads, block = keys.shape[2:4]

    @pl.when(step == 0)
    def start():
        highest[...] = jnp.full_like(highest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(step * block <= position)  # hence a query sees a slot of each block that gets here, and no maximum is -inf
    def add_block():
        for head in range(heads):
            logits = scale * jax.lax.dot_general(
                query[0, head], keys[0, 0, head], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )  # f32[M, block]
            slot = step * block + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = jnp.where(slot <= position, logits, -jnp.inf)
            before = highest[head]
            now = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            shrink, weights = jnp.exp(before - now), jnp.exp(logits - now)
            highest[head] = now
            total[head] = shrink * total[head] + weights.sum(axis=1, keepdims=True)
            value = values[0, 0, head]
            weighted[head] = shrink * weighted[head] + jax.lax.dot_general(
                weights.astype(value.dtype), value, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

    @pl.when(step == pl.num_programs(1) - 1)
    def finish():
        output[0] = (weighted[...] / total[...]).astype(output.dtype)


def _check(cache):
    if cache.key.shape[3] % SLOTS:
        raise ValueError(
            f"a cache of {cache.key.shape[3]} slots: the TPU kernels take a multiple of {SLOTS}; round it up."
        )


def _block(keys):
    """Slots of a block: a power of two from SLOTS on that divides the cache's, as many as BLOCK_BYTES hold."""
    _, _, heads, slots, width = keys.shape
    block = SLOTS
    while slots % (2 * block) == 0 and 2 * block * heads * width * keys.dtype.itemsize <= BLOCK_BYTES:
        block *= 2
    return block


def _place(layer, position):
    """What the kernels find their blocks by: i32[1 + B], the layer and the slots."""
    return jnp.concatenate([jnp.asarray(layer, jnp.int32)[None], position.astype(jnp.int32)])


def _on_shards(function, mesh, in_axes, out_axes):
    return function if mesh is None else map_shards(function, mesh, in_axes, out_axes, DECODE_RULES)
