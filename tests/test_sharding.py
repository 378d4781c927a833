"""The mesh, the rules and the two crossings between host and device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dgpo_jax.sharding import DECODE_RULES, constrain, make_mesh, sharding_for, to_device, to_host


@pytest.mark.parametrize("sizes, expected", [
    ({}, (8, 1, 1)),  # data is -1 by default
    ({"fsdp": 4, "tensor": 2}, (1, 4, 2)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1)),
])
def test_one_axis_of_the_mesh_takes_the_devices_that_are_left(sizes, expected):
    assert tuple(make_mesh(**sizes).shape.values()) == expected


@pytest.mark.parametrize("sizes, message", [
    ({"fsdp": 3}, "3 does not divide the 8 devices"),
    ({"data": 2, "fsdp": 2}, "needs 4 devices and there are 8"),
    ({"data": -1, "fsdp": -1}, "only one may take what is left"),
    ({"tensor": 0}, "mesh.tensor=0: must be at least 1"),
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
