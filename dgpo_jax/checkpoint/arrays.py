"""The arrays of a checkpoint: their names, whether they are the ones that are wanted, and the weights among them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dgpo_jax.checkpoint.folders import ARRAYS, read_details


def read_params(folder: Path, abstract_params: Any) -> tuple[int, Any]:
    """The weights of a checkpoint, without the optimizer's state.

    Args:
        folder: from `locate`.
        abstract_params: a `jax.ShapeDtypeStruct` with a sharding for every array; any mesh will do.
    Returns:
        (iteration, params).
    Raises:
        ValueError: its weights have other names, shapes or dtypes.
    """
    details = read_details(folder)
    target = {f"params/{name}": leaf for name, leaf in by_name(abstract_params).items()}
    saved = {name: what for name, what in details["arrays"].items() if name.startswith("params/")}
    require_same_arrays(folder, saved, target)
    settings = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder / ARRAYS, args=settings)
    return details["iteration"], jax.tree.unflatten(jax.tree.structure(abstract_params), [arrays[name] for name in target])


def by_name(tree: Any) -> dict[str, Any]:
    """Flattens to {"params/layers/wq": leaf}: Orbax then meets one plain dict, whatever optax nests its state in."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two arrays of the state have the same path once joined by '/'; rename one.")
    return named


def describe(leaf: Any) -> str:
    """`float32[8, 64]`."""
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def require_same_arrays(path: Path, saved: dict[str, str], target: dict[str, Any]) -> None:
    """Raises ValueError unless names, dtypes and shapes agree; Orbax would cast or pad.

    Args:
        saved: name to `describe`d array, from details.json.
        target: name to what has a dtype and a shape.
    """
    wanted = {name: describe(leaf) for name, leaf in target.items()}
    different = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if different:
        name = different[0]
        others = f" ({len(different) - 1} other arrays differ too)" if len(different) > 1 else ""
        raise ValueError(
            f"{path} does not fit this run: {name} is {saved.get(name, 'absent')} in the checkpoint and"
            f" {wanted.get(name, 'absent')} here{others}; use the settings that made it, or another directory."
        )


def read_host_arrays(path: Path) -> dict[str, np.ndarray]:
    """Those of host.npz; none where there is no such file."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
