"""The mesh, the rules and the two crossings between host and device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dgpo_jax.sharding import (
    DECODE_RULES,
    MESH_AXES,
    REPLICA_AXES,
    constrain,
    gather,
    make_mesh,
    map_shards,
    sharding_for,
    to_device,
    to_host,
)


@pytest.mark.parametrize("sizes, expected", [
    ({}, (8, 1, 1, 1)),  # data is -1 by default
    ({"fsdp": 4, "tensor": 2}, (1, 4, 1, 2)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1, 1)),
    ({"data": 1, "fsdp": 2, "context": -1}, (1, 2, 4, 1)),
])
def test_one_axis_of_the_mesh_takes_the_devices_that_are_left(sizes, expected):
    shape = make_mesh(**sizes).shape
    assert tuple(shape) == MESH_AXES == ("data", "fsdp", "context", "tensor")
    assert tuple(shape.values()) == expected


@pytest.mark.parametrize("sizes, message", [
    ({"fsdp": 3}, "3 does not divide the 8 devices"),
    ({"data": 2, "fsdp": 2}, "needs 4 devices and there are 8"),
    ({"data": -1, "fsdp": -1}, "only one may take what is left"),
    ({"tensor": 0}, "mesh.tensor=0: must be at least 1"),
    ({"context": 3}, "data=-1, fsdp=1, context=3, tensor=1.*: 3 does not divide the 8 devices"),
])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_logical_axes_become_mesh_axes():
    mesh = make_mesh(1, 4, 2)
    axes = ("layers", "width", "key_heads", "queries", "head")
    assert sharding_for(mesh, axes).spec == PartitionSpec(None, "fsdp", "tensor", None, None)
    assert sharding_for(mesh, axes, rules=DECODE_RULES).spec == PartitionSpec(None, None, "tensor", None, None)
    assert sharding_for(mesh, ("batch", None)).spec == PartitionSpec(("data", "fsdp"), None)


def test_rows_and_tokens_are_split_in_training_and_rows_alone_while_decoding():
    mesh = make_mesh(1, 2, 2, 2)
    assert sharding_for(mesh, ("batch", "tokens", None)).spec == PartitionSpec(("data", "fsdp"), "context", None)
    assert sharding_for(mesh, ("batch", "tokens", None), rules=DECODE_RULES).spec == PartitionSpec(REPLICA_AXES, None, None)
    with pytest.raises(ValueError, match=r"axis 'tokens' has size 7, which 2 devices .* lower mesh.context"):
        sharding_for(mesh, ("batch", "tokens"), (2, 7))


def test_a_dimension_that_does_not_divide_is_named_with_its_value_and_the_fix():
    mesh = make_mesh(1, 2, 4)
    with pytest.raises(ValueError) as error:
        sharding_for(mesh, ("width", "key_heads"), (64, 2), name="key/kernel")
    assert str(error.value) == (
        "key/kernel: axis 'key_heads' has size 2, which 4 devices on mesh axis 'tensor' do not divide;"
        " lower mesh.tensor or map 'key_heads' to None in sharding.RULES."
    )


def test_arrays_cross_to_the_device_and_back_under_a_transfer_guard():
    mesh = make_mesh()
    tree = {"a": np.arange(16, dtype=np.float32).reshape(8, 2), "b": np.int32(3)}
    shardings = {"a": sharding_for(mesh, ("batch", None)), "b": sharding_for(mesh, ())}
    with jax.transfer_guard("disallow"):
        on_device = to_device(tree, shardings)
        back = to_host(on_device)
    assert on_device["a"].sharding.spec == PartitionSpec(("data", "fsdp"), None)
    assert isinstance(back["a"], np.ndarray)
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert back["b"] == 3


def test_a_constraint_is_the_identity_without_a_mesh_and_drops_manual_axes_in_a_shard_map():
    x = jnp.arange(16.0).reshape(8, 2)
    assert constrain(x, None, ("batch", "vocab")) is x
    mesh = make_mesh(2, 2, 2)
    constrained = jax.jit(lambda x: constrain(x, mesh, ("batch", "vocab")))(x)
    assert constrained.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
    doubled = jax.jit(jax.shard_map(
        lambda x: 2 * constrain(x, mesh, ("batch", "vocab")),  # 2 of the 8 rows are here: not divisible by 4
        mesh=mesh, in_specs=PartitionSpec(("data", "fsdp")), out_specs=PartitionSpec(("data", "fsdp")),
        axis_names={"data", "fsdp"},
    ))(x)
    np.testing.assert_array_equal(doubled, 2 * x)


def test_a_gathered_weight_is_whole_and_its_gradient_is_split_again():
    mesh, axes = make_mesh(1, 4, 2), ("width", "vocab")
    weight = to_device(np.arange(32, dtype=np.float32).reshape(8, 4), sharding_for(mesh, axes))
    x = to_device(np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32), sharding_for(mesh, ("batch", None)))

    def loss(weight):
        whole = gather(weight, mesh, axes)
        return jnp.sum(jnp.square(x @ whole)), whole

    gradient, whole = jax.jit(jax.grad(loss, has_aux=True))(weight)
    assert whole.sharding.spec == PartitionSpec(None, "tensor")
    assert gradient.sharding.spec == PartitionSpec("fsdp", "tensor")
    np.testing.assert_array_equal(whole, weight)
    x, weight = to_host((x, weight))
    np.testing.assert_allclose(gradient, 2 * x.T @ (x @ weight), rtol=1e-5, atol=1e-5)
    assert gather(weight, None, axes) is weight


@pytest.mark.parametrize("replicas", [(), ("data", "context")])
def test_a_function_is_mapped_over_the_axes_that_are_not_manual_yet(replicas):
    mesh = make_mesh(2, 1, 2, 2)
    x = jnp.arange(32.0).reshape(8, 4)

    def largest_of_part(part):
        assert part.shape == (2, 2)  # 8 rows on data and context, 4 entries on tensor
        return jnp.max(part)[None, None], jnp.min(part)[None, None]

    def run(x):
        axes = ("batch", "vocab")
        return map_shards(largest_of_part, mesh, (axes,), (axes, axes), DECODE_RULES)(x)

    if replicas:
        rows = PartitionSpec(replicas)
        run = jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=set(replicas))
    largest, smallest = jax.jit(run)(x)
    np.testing.assert_array_equal(largest, [[5, 7], [13, 15], [21, 23], [29, 31]])
    np.testing.assert_array_equal(smallest, [[0, 2], [8, 10], [16, 18], [24, 26]])
