"""Which device holds which part of an array: one mesh, one table of rules, and the only two crossings to it.

Arrays are described by logical axes ("width", "batch"); `RULES` says which mesh axis each of them is split over.
The mesh axes: `data` copies the model and splits the batch, `fsdp` splits the batch and the weights' width,
`tensor` splits heads, feed-forward width and vocabulary.
"""

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis, or several of them, or None (every device holds all of it).
RULES = {
    "batch": ("data", "fsdp"),
    "width": "fsdp",
    "key_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "queries": None,
    "head": None,
    "tokens": None,
    "slots": None,
}

# Decoding reads every weight for every token: gathering them over `fsdp` each time would be all it does.
DECODE_RULES = RULES | {"width": None}


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
    """Arranges the devices as a mesh with the axes data, fsdp and tensor.

    Args:
        data, fsdp, tensor: devices along each axis; one of them may be -1, which takes what the others leave.
        devices: those to use; None = all that JAX sees.
    Raises:
        ValueError: the sizes do not multiply to the number of devices, or are not positive, or two are -1.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh.{axis}={size}: must be at least 1, or -1 for the devices that are left.")
    if len(free) > 1:
        raise ValueError(
            f"mesh.{free[0]} and mesh.{free[1]} are both -1: only one may take what is left; give the other a number."
        )
    taken = math.prod(size for size in sizes.values() if size != -1)
    described = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if free:
        if len(devices) % taken:
            raise ValueError(
                f"mesh ({described}): {taken} does not divide the {len(devices)} devices; choose sizes whose product"
                f" divides {len(devices)}."
            )
        sizes[free[0]] = len(devices) // taken
    elif taken != len(devices):
        raise ValueError(
            f"mesh ({described}): needs {taken} devices and there are {len(devices)}; set one of the sizes to -1."
        )
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _as_tuple(mesh_axes):
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def _partition_spec(axes, rules, without=()):
    parts = []
    for axis in axes:
        kept = tuple(name for name in _as_tuple(rules[axis] if axis is not None else None) if name not in without)
        parts.append(kept if len(kept) > 1 else (kept[0] if kept else None))
    return PartitionSpec(*parts)


def sharding_for(mesh, axes, shape=None, name="", rules=RULES):
    """The sharding of an array with these logical axes.

    Args:
        axes: one logical axis of `rules`, or None (not split), for each dimension.
        shape: checked to divide if given.
        name: of the array, for the error.
    Raises:
        ValueError: a dimension that its devices do not divide; JAX would refuse it later, and more obscurely.
    """
    for axis, size in zip(axes, shape or (), strict=shape is not None):
        mesh_axes = _as_tuple(rules[axis] if axis is not None else None)
        devices = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % devices:
            lowered = " or ".join(f"mesh.{mesh_axis}" for mesh_axis in mesh_axes)
            raise ValueError(
                f"{name or 'array'}: axis {axis!r} has size {size}, which {devices} devices on mesh axis"
                f" {'+'.join(mesh_axes)!r} do not divide; lower {lowered} or map {axis!r} to None in sharding.RULES."
            )
    return NamedSharding(mesh, _partition_spec(axes, rules))


def constrain(x, mesh, axes, rules=RULES, name=""):
    """Pins `x` to the sharding of its logical axes; returns it as it is if mesh is None.

    Inside a `shard_map` the axes that are manual there are left out: along them `x` is already one device's part.
    """
    if mesh is None:
        return x
    context = jax.sharding.get_abstract_mesh()
    manual = context.manual_axes
    if manual:
        return jax.lax.with_sharding_constraint(x, NamedSharding(context, _partition_spec(axes, rules, manual)))
    return jax.lax.with_sharding_constraint(x, sharding_for(mesh, axes, x.shape, name, rules))


def to_device(tree, shardings=None):
    """Host arrays to the device; explicit, hence allowed under `jax.transfer_guard("disallow")`.

    Args:
        shardings: a tree like `tree`, a prefix of it, or None for the default device.
    """
    return jax.device_put(tree, shardings)


def to_host(tree):
    """Device arrays to numpy; waits for them to be computed. Every host must hold all of each array."""
    return jax.device_get(tree)
