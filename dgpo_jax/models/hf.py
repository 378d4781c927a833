"""Hugging Face folders: config.json to our settings, safetensors files to sharded parameters. Needs no torch."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dgpo_jax import activity
from dgpo_jax.files import require_regular
from dgpo_jax.models.files import PATTERNS
from dgpo_jax.models.hf_config import config_from_folder, read_object
from dgpo_jax.models.parameters import nest, table
from dgpo_jax.sharding import RULES, sharding_for

__all__ = ["config_from_folder", "load_parameters", "resolve_folder"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
READABLE = ("F32", "F16", "BF16")

# In files of some older models; computed here from the config.
DERIVED = ("rotary_emb.inv_freq",)


def resolve_folder(path):
    """The local folder of a model: `path` itself, or else a download of that name from the Hugging Face hub.

    Raises:
        ValueError: neither a folder nor a name that the hub (or its cache on this machine) can give.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download  # imported late: costs time, and only names need it
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(PATTERNS)))
    # The hub's client raises errors of its own, of its HTTP library and of the system; all of them mean one thing.
    except (HFValidationError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"model.path={str(path)!r}: not a folder here, and the Hugging Face hub did not give it"
            f" ({type(error).__name__}); give an existing folder, or check the name and the network."
        ) from None


def load_parameters(folder, config, mesh=None, dtype="float32", rules=RULES):
    """Reads all parameters, one after the other, each straight into its sharding.

    The host holds one parameter (all its layers, this host's part) at a time.

    Args:
        folder: a local folder with model.safetensors, or several files and their index.
        config: the ModelConfig of that folder.
        mesh: None puts everything on the default device.
        dtype: of the result; the files may be f32, f16 or bf16.
    Returns:
        The nested dict of parameters.py.
    Raises:
        ValueError: a file or tensor that is missing, unknown, of the wrong shape or of an unreadable dtype; a NaN or an
            infinity in a tensor.
    """
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(Path(folder), stack)
        _check_names(folder, tensors, config)
        params = {}
        for name, row in table(config).items():
            _check_tensors(folder, tensors, row)
            params[name] = _read_parameter(folder, tensors, name, row, mesh, jnp.dtype(dtype), rules)
        return nest(params)


def _open_tensors(folder, stack):
    # {tensor name: the open file that holds it}; opening reads headers only.
    tensors = {}
    for file in _weight_files(folder):
        try:
            require_regular(folder / file)  # safe_open would wait for a pipe
            opened = stack.enter_context(safe_open(folder / file, framework="np"))
        except FileNotFoundError:
            raise ValueError(f"{folder}: {file} is missing; download the model again.") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file}: not a complete safetensors file ({_one_line(error)}); download it again.") from None
        twice = tensors.keys() & set(opened.keys())
        if twice:
            raise ValueError(f"{folder / file}: holds {_listed(twice)}, which another file holds too; download the model again.")
        tensors |= dict.fromkeys(opened.keys(), opened)
    return tensors


def _weight_files(folder):
    index = folder / INDEX
    if not index.exists():
        return [SINGLE]
    listed = read_object(index).get("weight_map")
    files = set(listed.values()) if isinstance(listed, dict) and all(isinstance(file, str) for file in listed.values()) else set()
    if not files:
        raise ValueError(f"{index}: its weight_map is not an object of tensor and file names; download it again.")
    # Written by others: it may not have us read a file that is none of the model's.
    outside = sorted(file for file in files if file in ("", ".", "..") or Path(file).name != file or not file.isprintable())
    if outside:
        raise ValueError(f"{index}: {outside[0][:200]!r} is not a file of its own folder; download the model again.")
    return sorted(files)


def _one_line(text):
    return " ".join(str(text).split())[:200]


def _listed(names):
    names = sorted(names)
    return ", ".join(_one_line(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _layer_names(row):
    return [row.hugging_face.format(layer=layer) for layer in range(row.shape[0] if row.stacked else 1)]


def _check_names(folder, tensors, config):
    wanted = {name for row in table(config).values() for name in _layer_names(row)}
    missing = wanted - set(tensors)
    if missing:
        raise ValueError(
            f"{folder}: lacks {_listed(missing)}; the files must match config.json: check model.layers,"
            " model.qkv_bias, model.qk_norm and model.tied_embeddings."
        )
    extra = {name for name in set(tensors) - wanted if not name.endswith(DERIVED)}
    if config.tied_embeddings:
        extra.discard("lm_head.weight")  # some files keep a copy of the tied matrix; transformers ignores it too
    if extra:
        raise ValueError(
            f"{folder}: holds {_listed(extra)}, which this model does not have; the files must match config.json."
        )


def _check_tensors(folder, tensors, row):
    for name in _layer_names(row):
        header = tensors[name].get_slice(name)  # this and what follows read no values
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if shape != row.hugging_face_shape:
            raise ValueError(
                f"{folder}: {name} has shape {shape} and config.json says {row.hugging_face_shape}; make them match."
            )
        if dtype not in READABLE:
            raise ValueError(
                f"{folder}: {name} has dtype {dtype}, readable are {', '.join(READABLE)}; quantised models must be"
                " converted first."
            )


def _read_parameter(folder, tensors, name, row, mesh, dtype, rules):
    if mesh is None:
        return jax.device_put(_read_block(folder, tensors, row, tuple(slice(0, size) for size in row.shape), dtype))
    blocks = {}  # devices that hold the same part share one read

    def part(index):
        whole = tuple(slice(*cut.indices(size)) for cut, size in zip(index, row.shape, strict=True))
        place = tuple((cut.start, cut.stop) for cut in whole)
        if place not in blocks:
            blocks[place] = _read_block(folder, tensors, row, whole, dtype)
        return blocks[place]

    sharding = sharding_for(mesh, row.axes, row.shape, name, rules)
    return jax.make_array_from_callback(row.shape, sharding, part)


def _read_block(folder, tensors, row, index, dtype):
    # The part [index] of the parameter, from the layers it covers.
    def read(name, index):
        values = _read_tensor(tensors[name].get_slice(name), row, index, dtype)
        finite = np.isfinite(values)  # a twentieth of the time it takes to read them
        if not finite.all():
            raise ValueError(
                f"{folder}: {name} has {finite.size - np.count_nonzero(finite)} values of {finite.size} that are NaN or infinite;"
                " download the model again, or take the weights of an earlier checkpoint."
            )
        return values

    names = _layer_names(row)
    if not row.stacked:
        return read(names[0], index)
    block = np.empty([cut.stop - cut.start for cut in index], dtype)
    for place, layer in enumerate(range(index[0].start, index[0].stop)):
        block[place] = read(names[layer], index[1:])
        activity.beat()
    return block


def _read_tensor(tensor, row, index, dtype):
    """The part [index] of one layer's parameter, from the Hugging Face tensor that `row.layout` describes.

    Only the file's rows and columns that are needed are read. A dimension made of several axes, such as
    "key_heads queries head", is cut along the first of them in the file and along the others in memory.
    """
    axes = row.axes[1:] if row.stacked else row.axes
    size = dict(zip(row.axes, row.shape, strict=True))
    cut = dict(zip(axes, index, strict=True))
    ranges, shape, inner = [], [], []
    for group in row.layout:
        first, *others = group.split()
        stride = int(np.prod([size[axis] for axis in others], dtype=int))
        ranges.append(slice(cut[first].start * stride, cut[first].stop * stride))
        shape += [cut[first].stop - cut[first].start, *(size[axis] for axis in others)]
        inner += [slice(None), *(cut[axis] for axis in others)]
    order = " ".join(row.layout).split()
    values = tensor[tuple(ranges)].reshape(shape)[tuple(inner)]
    return values.transpose([order.index(axis) for axis in axes]).astype(dtype)
