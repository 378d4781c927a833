"""Which device holds which part of an array: one mesh, one table of rules, and the only two crossings to it.

Arrays are described by logical axes ("width", "batch"); `RULES` says which mesh axis each of them is split over.
The mesh axes: `data` copies the model and splits the batch, `fsdp` splits the batch and the weights' width, `context`
splits the tokens of a row, `tensor` splits heads, feed-forward width and vocabulary. While decoding there are no rows
of many tokens, and `context` splits the batch too.
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dgpo_jax import activity

# Neighbours in the last axis talk most: in every layer, and wait for it.
MESH_AXES = ("data", "fsdp", "context", "tensor")

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
    "tokens": "context",
    "slots": None,
}

# Mesh axes whose devices decode rows of their own.
REPLICA_AXES = ("data", "fsdp", "context")

# Decoding reads every weight for every token: gathering them over `fsdp` each time would be all it does.
DECODE_RULES = RULES | {"batch": REPLICA_AXES, "tokens": None, "width": None}


def count_decoding(mesh):
    """Groups of devices that decode rows of their own; the devices of one share its heads over `tensor`."""
    return math.prod(mesh.shape[axis] for axis in REPLICA_AXES)


def make_mesh(data=-1, fsdp=1, tensor=1, context=1, devices=None):
    """Arranges the devices as a mesh with the axes of MESH_AXES.

    Args:
        data, fsdp, tensor, context: devices along each axis; one may be -1, which takes what the others leave.
        devices: those to use; None = all that JAX sees.
    Raises:
        ValueError: the sizes do not multiply to the number of devices, or are not positive, or two are -1.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
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
    # As jax.make_mesh does, which lets two axes share one of a slice's on v5e only; v6e:4x4 with tensor=2 needs it too.
    arranged = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


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


def gather(x, mesh, axes, name=""):
    """A weight whole on all devices that split its width; returns it as it is if mesh is None.

    The backward pass of the constraint alone would add the gradient up whole on every device and only then split it.
    Here it is asked for split, which XLA turns into half the traffic.
    """

    @jax.custom_vjp
    def whole(x):
        return constrain(x, mesh, axes, DECODE_RULES, name)

    def forward(x):
        return whole(x), None

    def backward(_, pull):
        return (constrain(pull, mesh, axes, name=name),)

    whole.defvjp(forward, backward)
    return x if mesh is None else whole(x)


def map_shards(function, mesh, in_axes, out_axes, rules=RULES):
    """`function` on each device's part of its arguments: a `shard_map` over the mesh axes that are not manual yet.

    Args:
        in_axes: a tuple of logical axes for each argument, which must divide.
        out_axes: of the result, an array; or a tuple of these for a tuple of arrays.
    """
    context = jax.sharding.get_abstract_mesh()
    manual = context.manual_axes

    def spec(axes):
        return _partition_spec(axes, rules, manual)

    several = bool(out_axes) and isinstance(out_axes[0], tuple)
    # Kernels do not say along which mesh axes their results vary, which check_vma asks for.
    return jax.shard_map(
        function, mesh=context if manual else mesh, in_specs=tuple(spec(axes) for axes in in_axes),
        out_specs=tuple(spec(axes) for axes in out_axes) if several else spec(out_axes),
        axis_names=set(mesh.axis_names) - set(manual), check_vma=False,
    )  # fmt: skip


def abstract(tree, shardings):
    """Shapes and dtypes of the arrays with these shardings, as programs are lowered with.

    Args:
        shardings: a tree like the first, one sharding for all of it, or None for no sharding.
    """
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings), tree)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings)


class InOrder:
    """A jitted function that returns when its results are there."""

    def __init__(self, function):
        self.function, self.lower = function, function.lower

    def __call__(self, *arguments):
        with activity.doing("waiting for the other processes"):
            return jax.block_until_ready(self.function(*arguments))


def in_order(function):
    """The jitted function; as one that is waited for, where processes talk through gloo (CPUs).

    XLA runs programs that do not depend on each other side by side there, and gloo does not tell their messages apart: two processes
    that begin them in another order wait for each other for ever. GPUs and TPUs keep the order in which programs were called.
    """
    return InOrder(function) if jax.process_count() > 1 and jax.default_backend() == "cpu" else function


def rows_here(sharding, shape):
    """The rows (of the first axis) that devices of this process hold a part of; None = all of them."""
    if sharding.is_fully_addressable:
        return None
    slices = (index[0] for index in sharding.addressable_devices_indices_map(shape).values())
    return frozenset(row for part in slices for row in range(*part.indices(shape[0])))


def to_device(tree, shardings=None):
    """Host arrays to the device; explicit, hence allowed under `jax.transfer_guard("disallow")`.

    With several processes each passes the same shapes and puts its own part of every array; what it holds of the others' is not read.

    Args:
        shardings: a tree like `tree`, a prefix of it, or None for the default device.
    """
    if shardings is None or jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(array, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(np.shape(array), sharding, lambda index: np.asarray(array)[index])

    with jax.transfer_guard("allow"):  # making an array from parts counts as an accident there
        return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def to_host(tree):
    """Device arrays to numpy; waits for them to be computed. Several processes get the whole of what they split: all must call."""

    def whole(array):
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return array
        return multihost_utils.process_allgather(array, tiled=True)

    with activity.doing("waiting for the devices"):
        if jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                tree = jax.tree.map(whole, tree)
        return jax.device_get(tree)
