"""The TPU kernels of one-token decoding, run as plain XLA, against loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dgpo_jax.models.decode_attention import _block, attend, write
from dgpo_jax.sharding import make_mesh
from dgpo_jax.types import KVCache

LAYERS, ROWS, HEADS, QUERIES, SLOTS, WIDTH = 3, 5, 2, 3, 384, 8
# Of the first four rows: the first slot, both sides of a border between blocks of 128, the last slot.
POSITION = np.array([0, 127, 128, 383], np.int32)
LAYER = np.int32(1)


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_cache(rows=ROWS):
    shape = (LAYERS, rows, HEADS, SLOTS, WIDTH)
    return KVCache(normal(*shape, seed=1), normal(*shape, seed=2))


def test_a_token_is_written_to_its_row_s_slot_in_one_layer_and_nowhere_else():
    cache, key, value = random_cache(), normal(4, HEADS, WIDTH, seed=3), normal(4, HEADS, WIDTH, seed=4)
    written = write(cache, key, value, LAYER, POSITION, interpret=True)
    for before, after, new in zip(cache, written, (key, value), strict=True):
        expected = np.array(before)
        for row, slot in enumerate(POSITION):
            expected[LAYER, row, :, slot] = new[row]
        np.testing.assert_array_equal(after, expected)


def attend_by_loop(query, cache, layer, position):
    output = np.zeros(query.shape)
    for row, last in enumerate(position):
        for head in range(HEADS):
            keys, values = (np.asarray(part[layer, row, head, : last + 1], np.float64) for part in cache)
            weights = np.exp(np.asarray(query[row, head], np.float64) @ keys.T / np.sqrt(WIDTH))
            output[row, head] = weights @ values / weights.sum(axis=1, keepdims=True)
    return output


def test_a_query_attends_its_row_up_to_its_own_slot():
    query, cache = normal(4, HEADS, QUERIES, WIDTH), random_cache()
    output = attend(query, cache, LAYER, POSITION, interpret=True)
    np.testing.assert_allclose(output, attend_by_loop(query, cache, LAYER, POSITION), atol=1e-6)


def test_what_lies_behind_a_row_s_last_token_does_not_matter():
    query, cache = normal(4, HEADS, QUERIES, WIDTH), random_cache()
    behind = np.arange(SLOTS)[None, :] > np.pad(POSITION, (0, 1))[:, None]  # bool[C, S]
    spoilt = KVCache(*(jnp.where(behind[None, :, None, :, None], 1e4, part) for part in cache))
    outputs = (attend(query, part, LAYER, POSITION, interpret=True) for part in (cache, spoilt))
    np.testing.assert_array_equal(*outputs)


def test_logits_of_any_size_give_finite_weights():
    query, cache = 1e4 * normal(4, HEADS, QUERIES, WIDTH), random_cache()
    output = np.asarray(attend(query, cache, LAYER, POSITION, interpret=True))
    assert np.isfinite(output).all()
    np.testing.assert_allclose(output[0], cache.value[LAYER, 0, :, :1].repeat(QUERIES, 1), rtol=1e-6)  # one slot to see


@pytest.mark.parametrize("replicas", [(), ("data", "fsdp", "context")])
def test_on_a_mesh_each_device_has_its_rows_and_heads(replicas):
    mesh, position = make_mesh(2, 2, 2), POSITION
    query, cache = normal(4, HEADS, QUERIES, WIDTH), random_cache(rows=4)
    key, value = normal(4, HEADS, WIDTH, seed=3), normal(4, HEADS, WIDTH, seed=4)

    def step(query, cache, key, value, position):
        written = write(cache, key, value, LAYER, position, mesh=mesh, interpret=True)
        return attend(query, written, LAYER, position, mesh=mesh, interpret=True), written

    expected = write(cache, key, value, LAYER, position, interpret=True)
    if replicas:  # as the sampler runs it: each replica by itself, heads left to us
        rows, cached = PartitionSpec(replicas), PartitionSpec(None, replicas)
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(rows, KVCache(cached, cached), rows, rows, rows), out_specs=(rows, KVCache(cached, cached)),
            axis_names=set(replicas), check_vma=False,
        )  # fmt: skip
    output, written = jax.jit(step)(query, cache, key, value, position)
    jax.tree.map(np.testing.assert_array_equal, written, expected)
    np.testing.assert_allclose(output, attend_by_loop(query, expected, LAYER, position), atol=1e-6)


@pytest.mark.parametrize("heads, slots, block", [
    (2, 8192, 1024),  # 2 * 1024 * 128 numbers of 2 bytes are BLOCK_BYTES
    (8, 8192, 256),
    (2, 640, 128),  # 256 does not divide it
    (64, 4096, 128),  # never less
])
def test_a_block_is_half_a_megabyte_at_most_and_divides_the_slots(heads, slots, block):
    assert _block(jax.ShapeDtypeStruct((1, 1, heads, slots, 128), jnp.bfloat16)) == block


def test_a_cache_whose_slots_are_not_whole_tiles_is_refused():
    cache = KVCache(*[jnp.zeros((1, 1, 2, 200, 8))] * 2)
    with pytest.raises(ValueError, match="a cache of 200 slots: the TPU kernels take a multiple of 128; round it up"):
        attend(normal(1, 2, 3, 8), cache, LAYER, POSITION[:1])
