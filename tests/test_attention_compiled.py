"""The kernels compiled for a TPU that is not there: they fit its rules, and nothing grows with the square or is copied."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from dgpo_jax.costs.topology import find_devices
from dgpo_jax.models.attention import attention
from dgpo_jax.models.decode_attention import attend, write
from dgpo_jax.sharding import DECODE_RULES, REPLICA_AXES, make_mesh, sharding_for
from dgpo_jax.types import KVCache

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs TPU's compiler: pip install libtpu")

ROW, QUERY, KEY = ("batch", "tokens"), ("batch", "tokens", "key_heads", "queries", "head"), ("batch", "key_heads", "tokens", "head")


@pytest.fixture(scope="module")
def chips():
    return find_devices("v5e:2x2")


def abstract(mesh, axes, shape, dtype="bfloat16", rules=None):
    rules = {} if rules is None else {"rules": rules}
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding_for(mesh, axes, shape, **rules))


def compile_for_tpu(function, *arguments, **options):
    return jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("sizes, width", [
    ((1, 2, 2, 1), 128),
    ((1, 2, 1, 2), 64),  # rows split over two chips, heads narrower than a TPU's lanes
])
def test_attention_takes_the_splash_kernel_on_a_tpu_and_holds_no_square_of_scores(chips, sizes, width):
    mesh, tokens = make_mesh(*sizes, devices=chips), 4096
    heads = abstract(mesh, QUERY, (2, tokens, 2, 2, width))
    keys, row = abstract(mesh, KEY, (2, 2, tokens, width)), abstract(mesh, ROW, (2, tokens), "int32")

    def loss(query, key, value, segment, position):
        output = attention(query, key, value, segment, position, segment, position, mesh=mesh, split_rows=True)
        return jnp.sum(jnp.square(output.astype(jnp.float32)))

    compiled = compile_for_tpu(jax.grad(loss, argnums=(0, 1, 2)), heads, keys, keys, row, row)
    text = compiled.as_text()
    assert len(re.findall('custom_call_target="tpu_custom_call"', text)) == 3  # forward, gradient of queries, of keys
    assert not re.search(rf"\[(\d+,)*{tokens // mesh.shape['context']},{tokens}\]", text)
    # Less than the f32 scores of a single head.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens**2


def test_a_decoding_loop_keeps_the_stacked_cache_in_place(chips):
    mesh, layers, rows, slots = make_mesh(2, 1, 2, devices=chips), 4, 16, 1024
    part = abstract(mesh, ("layers", "batch", "key_heads", "slots", "head"), (layers, rows, 2, slots, 128), rules=DECODE_RULES)
    query = abstract(mesh, ("batch", "key_heads", "queries", "head"), (rows, 2, 6, 128), rules=DECODE_RULES)
    position = abstract(mesh, ("batch",), (rows,), "int32", rules=DECODE_RULES)

    def one_layer(carry, layer):
        query, cache, position = carry
        cache = write(cache, query[:, :, 0], query[:, :, 1], layer, position, mesh=mesh)
        return (attend(query, cache, layer, position, mesh=mesh), cache, position), None

    def four_tokens(query, cache, position):
        def one_token(_, carry):
            query, cache, position = jax.lax.scan(one_layer, carry, jnp.arange(layers, dtype=jnp.int32))[0]
            return query, cache, position + 1

        return jax.lax.fori_loop(0, 4, one_token, (query, cache, position))[:2]

    replica = jax.sharding.PartitionSpec(REPLICA_AXES)
    cached = KVCache(*[jax.sharding.PartitionSpec(None, REPLICA_AXES)] * 2)
    mapped = jax.shard_map(
        four_tokens, mesh=mesh, in_specs=(replica, cached, replica), out_specs=(replica, cached),
        axis_names=set(REPLICA_AXES), check_vma=False,
    )  # fmt: skip
    memory = compile_for_tpu(mapped, query, KVCache(part, part), position, donate_argnums=1).memory_analysis()
    cache_bytes = 2 * layers * rows // 2 * 1 * slots * 128 * 2  # of one chip: half the rows, one of two key heads
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 20
