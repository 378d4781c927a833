"""Rows split over the `context` axis: on eight devices the same numbers as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import CONFIG, host_params

from dgpo_jax.build import build_shardings
from dgpo_jax.config import OptimizerConfig
from dgpo_jax.models import build
from dgpo_jax.models.attention import attention
from dgpo_jax.models.context import collect, spread
from dgpo_jax.models.parameters import decays
from dgpo_jax.models.qwen import count_positions
from dgpo_jax.rl.optimizer import make_optimizer
from dgpo_jax.rl.packing import Example, pack
from dgpo_jax.rl.update import LossSettings, make_programs
from dgpo_jax.sharding import make_mesh, sharding_for, to_device, to_host

# Name -> devices along data, fsdp, tensor, context.
MESHES = {"data 2 x context 4": (2, 1, 1, 4), "fsdp 2 x tensor 2 x context 2": (1, 2, 2, 2), "context 8": (1, 1, 1, 8)}


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@functools.cache
def mesh_named(name):
    return make_mesh(*MESHES[name]) if name in MESHES else make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.mark.parametrize("name", MESHES)
def test_spreading_gives_each_device_an_early_and_a_late_chunk_and_collecting_undoes_it(name):
    mesh = mesh_named(name)
    devices = mesh.shape["context"]
    chunk = np.repeat(np.arange(2 * devices), 3)  # three tokens each
    rows = to_device(np.stack([chunk, chunk + 100]).astype(np.int32), sharding_for(mesh, ("batch", "tokens")))
    order = jax.jit(functools.partial(spread, mesh=mesh))(rows)
    by_device = np.asarray(order)[0].reshape(devices, 6)
    np.testing.assert_array_equal(by_device[:, ::3], [[early, 2 * devices - 1 - early] for early in range(devices)])
    np.testing.assert_array_equal(np.asarray(order)[1], np.asarray(order)[0] + 100)
    np.testing.assert_array_equal(jax.jit(functools.partial(collect, mesh=mesh))(order), rows)


def test_a_row_that_the_devices_cannot_share_is_refused():
    mesh = mesh_named("data 2 x context 4")
    with pytest.raises(ValueError, match=r"a row of 20 tokens .* mesh.context=4 devices; make update.tokens_per_row a multiple of 8"):
        spread(jnp.zeros((2, 20), jnp.int32), mesh)


def packed_rows(slots):
    """Segments of uneven length, which cross the borders between devices; the rows end in padding, one is empty."""
    lengths = [[5, 9, 1, slots - 18], [slots], [], [slots // 2 + 1, 3]]
    segment = [np.repeat(np.arange(len(row) + 1), [0, *row]) for row in lengths]
    return jnp.asarray(np.stack([np.pad(row, (0, slots - len(row))) for row in segment]), jnp.int32)


@pytest.mark.parametrize("name, implementation", [
    ("data 2 x context 4", "chunked"),
    ("fsdp 2 x tensor 2 x context 2", "splash"),
])
def test_attention_in_split_rows_is_that_in_whole_rows(name, implementation):
    mesh, rng, slots = mesh_named(name), np.random.default_rng(0), 48
    segment = packed_rows(slots)
    position = count_positions(segment)
    query = jnp.asarray(rng.normal(size=(4, slots, 2, 3, 4)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(4, slots, 2, 4)), jnp.float32) for _ in range(2))

    def run(mesh, implementation):
        def loss(query, key, value, segment, position):
            query, key, value, segment, position = (spread(x, mesh) for x in (query, key, value, segment, position))
            output = attention(
                query, key.swapaxes(1, 2), value.swapaxes(1, 2), segment, position, segment, position,
                mesh=mesh, split_rows=True, implementation=implementation, chunk=5, interpret=implementation == "splash",
            )  # fmt: skip
            output = collect(output, mesh)
            return jnp.sum(jnp.sin(output)), output

        arrays = query, key, value, segment, position
        if mesh is not None:
            axes = [("batch", "tokens", *[None] * (x.ndim - 2)) for x in arrays]
            arrays = to_device(arrays, tuple(sharding_for(mesh, names) for names in axes))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    for split, whole in zip(jax.tree.leaves(run(mesh, implementation)), jax.tree.leaves(run(None, "plain")), strict=True):
        np.testing.assert_allclose(split, whole, atol=2e-5)


def make_examples():
    rng, examples = np.random.default_rng(0), []
    for index, length in enumerate((30, 21, 17, 12, 9, 6, 5, 3, 25, 14)):
        response, prompt = (rng.integers(1, 64, size).astype(np.int32) for size in (length, 1 + index % 4))
        sampler_logprobs, old_logprobs = rng.uniform(-6, -2, (2, length)).astype(np.float32)
        examples.append(Example(prompt, response, sampler_logprobs, old_logprobs, float(rng.normal()), 0.1 / length, 0.01))
    return examples


@functools.cache
def gradients(name):
    """Gradients and figures of one microbatch on a mesh, on the host."""
    model = build(CONFIG, mesh_named(name))
    optimizer = make_optimizer(OptimizerConfig(), decays(CONFIG))
    shardings = build_shardings(model, optimizer)
    loss = LossSettings(
        "dgpo", {"clip_low": 0.2, "clip_high": 0.28}, temperature=0.8, logprob_chunk=6, kl=0.1, entropy=0.1
    )  # fmt: skip
    programs = make_programs(model, optimizer, loss, shardings)
    params = to_device(host_params(), shardings.state.params)
    (batch,) = pack(make_examples(), rows=4, tokens_per_row=48)
    assert batch.segment.max() > 1  # sequences share rows, and cross the borders between devices
    batch = to_device(batch._replace(ref_logprobs=batch.sampler_logprobs), shardings.batch)
    assert batch.tokens.sharding.spec == PartitionSpec(("data", "fsdp"), "context")
    found = programs.accumulate(params, programs.zero(params), batch)
    assert found[0]["embed"]["table"].sharding == shardings.state.params["embed"]["table"]
    return to_host(found)


@pytest.mark.parametrize("name", ["data 2 x context 4", "fsdp 2 x tensor 2 x context 2"])
def test_the_gradient_of_split_rows_is_that_of_whole_rows(name):
    def close(split, whole):
        np.testing.assert_allclose(split, whole, rtol=2e-5, atol=2e-5 * max(np.abs(whole).max(), 1e-2))

    split, whole = gradients(name), gradients("one device")
    assert whole[1].sums["tokens"] == 142  # of the responses of make_examples
    jax.tree.map(close, split, whole)
