"""The attention kernels, run as plain XLA, against plain attention; and which one runs where."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import CONFIG

from dgpo_jax.models import build
from dgpo_jax.models.attention import attention, choose
from dgpo_jax.models.attention_splash import _next_computed, computed_blocks
from dgpo_jax.sharding import make_mesh

# Rows of 600 tokens: two blocks of the splash kernel, five of the Triton one, both with something to fill up.
TOKENS = 600
ROWS = {
    "segments and padding": [250, 3, 300],
    "one segment": [600],
    "a short segment": [20],
    "nothing but padding": [],
}


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def packed(*lengths, tokens=TOKENS):
    """(segment, position), i32[rows, tokens] each, of rows that hold segments of these lengths."""
    segment, position = np.zeros((2, len(lengths), tokens), np.int32)
    for row, sizes in enumerate(lengths):
        place = np.concatenate([np.arange(size) for size in (*sizes, tokens - sum(sizes))])
        position[row], segment[row, : sum(sizes)] = place, np.repeat(np.arange(len(sizes)) + 1, sizes)
    return segment, position


def random_heads(rows, width, dtype="float32"):
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(rows, TOKENS, 2, 3, width)), dtype)
    return query, *(jnp.asarray(rng.normal(size=(rows, 2, TOKENS, width)), dtype) for _ in range(2))


@functools.cache
def run(implementation, width=16, dtype="float32"):
    """[output, gradients of query, key and value] of the rows above, f32."""
    segment, position = packed(*ROWS.values())

    def loss(heads):
        output = attention(
            *heads, segment, position, segment, position, implementation=implementation, interpret=implementation != "plain"
        )
        return jnp.sum(jnp.sin(output.astype(jnp.float32))), output

    gradients, output = jax.jit(jax.grad(loss, has_aux=True))(random_heads(len(ROWS), width, dtype))
    return [np.asarray(x.astype(jnp.float32)) for x in (output, *gradients)]


@pytest.mark.parametrize("row", range(len(ROWS)), ids=ROWS)
@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_a_kernel_gives_what_plain_attention_gives_and_its_gradients(kernel, row):
    for ours, expected in zip(run(kernel), run("plain"), strict=True):
        assert np.isfinite(ours[row]).all()
        np.testing.assert_allclose(ours[row], expected[row], atol=2e-5)


def test_padding_gives_zero_from_a_kernel_and_gets_no_gradient():
    segment, _ = packed(*ROWS.values())
    for kernel in ("splash", "triton"):
        output, of_query, of_key, of_value = run(kernel)
        for of_token in (output, of_query, of_key.swapaxes(1, 2), of_value.swapaxes(1, 2)):
            np.testing.assert_array_equal(of_token[segment == 0], 0.0)


def test_splash_attention_in_bfloat16_is_plain_attention_to_its_rounding():
    for ours, expected in zip(run("splash", dtype="bfloat16"), run("plain"), strict=True):
        assert np.abs(ours - expected).max() < 0.03 * np.abs(expected).max()


def seen_blocks(segment, position, slot, block):
    """bool[queries / block, keys / block] by brute force: some query of the block attends some key."""
    seen = (segment[slot][:, None] == segment[None, :]) & (np.arange(len(segment))[None, :] <= slot[:, None])
    return (seen & (segment[slot] > 0)[:, None]).reshape(len(slot) // block, block, -1, block).any((1, 3))


@pytest.mark.parametrize("lengths", [[16, 16, 16], [7, 20, 1, 9], [64], [1] * 64, [], [30]])
@pytest.mark.parametrize("order", ["in order", "a late and an early part"])
def test_a_block_is_computed_where_a_query_attends_a_key_of_it_and_nearly_nowhere_else(lengths, order):
    block = 8
    (segment,), (position,) = packed(lengths, tokens=64)
    slot = np.arange(64) if order == "in order" else np.r_[0:16, 48:64]
    slot = slot.astype(np.int32)
    computed = np.asarray(computed_blocks(segment[slot], segment, slot, block, block))
    seen = seen_blocks(segment, position, slot, block)
    assert computed[seen].all()
    # Besides those, a query needs a block to divide by: its own.
    own = (slot.reshape(-1, block)[:, :1] // block) == np.arange(8)[None, :]
    np.testing.assert_array_equal(computed, seen | own)


def test_a_row_of_eight_segments_costs_an_eighth_of_one_segment():
    slot = np.arange(4096, dtype=np.int32)
    blocks = {
        segments: int(computed_blocks(*[np.repeat(np.arange(segments, dtype=np.int32) + 1, 4096 // segments)] * 2, slot, 64, 64).sum())
        for segments in (1, 8)
    }
    assert blocks == {1: 64 * 65 // 2, 8: 8 * (8 * 9 // 2)}  # triangles of 64 and of 8 blocks


def test_while_a_block_is_skipped_the_next_computed_one_is_fetched():
    computed = jnp.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    np.testing.assert_array_equal(_next_computed(computed), [[0, 1, 1], [1, 1, 2], [2, 2, 2]])
    # Behind the last one there is nothing: the last block of all.
    np.testing.assert_array_equal(_next_computed(jnp.array([[1, 0], [0, 0]], bool)), [[0, 1], [1, 1]])


@pytest.mark.parametrize("replicas", [
    (),
    ("data", "fsdp", "context"),  # as the sampler runs it: each replica by itself
])
def test_a_kernel_runs_on_each_device_s_rows_and_heads(replicas):
    mesh = make_mesh(2, 1, 2, 2)
    segment, position = packed(*ROWS.values())

    def attend(query, key, value, segment, position):
        return attention(
            query, key, value, segment, position, segment, position, mesh=mesh, implementation="splash", interpret=True
        )

    if replicas:
        rows = PartitionSpec(replicas)
        attend = jax.shard_map(attend, mesh=mesh, in_specs=(rows,) * 5, out_specs=rows, axis_names=set(replicas), check_vma=False)
    compiled = jax.jit(attend).lower(*random_heads(4, 16), segment, position).compile()
    np.testing.assert_allclose(compiled(*random_heads(4, 16), segment, position), run("plain")[0], atol=2e-5)


@pytest.mark.parametrize("implementation, platform, context, chosen", [
    ("auto", "tpu", 1, "splash"),
    ("auto", "tpu", 4, "splash"),
    ("auto", "gpu", 1, "triton"),
    ("auto", "gpu", 2, "auto"),  # Triton's kernel knows only whole rows
    ("auto", "cpu", 1, "auto"),  # plain or chunked, by size
    ("chunked", "tpu", 1, "chunked"),
])
def test_auto_is_the_kernel_of_the_platform(implementation, platform, context, chosen):
    assert choose(implementation, platform, context) == chosen


@pytest.mark.parametrize("name, message", [
    ("splash", "'splash' is a kernel for tpu and the devices are cpu; use auto"),
    ("triton", "'triton' is a kernel for gpu and the devices are cpu; use auto"),
    ("flash", "model.attention is 'flash', but it is one of 'auto', 'plain', 'chunked', 'splash', 'triton'"),
])
def test_a_model_refuses_attention_that_its_devices_cannot_run(name, message):
    with pytest.raises(ValueError, match=message):
        build(replace(CONFIG, attention=name), make_mesh())


def test_triton_attention_refuses_split_rows():
    with pytest.raises(ValueError, match=r"mesh.context=2 splits them; use chunked or auto, or mesh.context=1"):
        choose("triton", "gpu", context=2)
