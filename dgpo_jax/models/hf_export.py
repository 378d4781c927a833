"""Our parameters to Hugging Face folders: config.json, safetensors files, a folder that is whole or not there.

The way back from hf.py, by the same table: what one wrote the other reads, to the bit. Needs no torch and no device.

A safetensors file is the length of a header (8 bytes, little endian), the header (JSON: dtype, shape and place of every
tensor), and the tensors. It is written here and not by the safetensors library because that wants all tensors of a file
in memory at once.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dgpo_jax.config import ModelConfig, require
from dgpo_jax.files import alone_in, make_durable
from dgpo_jax.models.hf import INDEX, SINGLE
from dgpo_jax.models.parameters import Parameter, parameter_count, table

# (qkv_bias, qk_norm) -> the class and model_type in transformers. It has nothing with both.
FAMILIES = {
    (True, False): ("Qwen2ForCausalLM", "qwen2"),
    (False, True): ("Qwen3ForCausalLM", "qwen3"),
    (False, False): ("LlamaForCausalLM", "llama"),
}
OTHER_BYTES = 64 * 2**20  # what the files beside the weights may need: a tokenizer of 150,000 tokens has 11 MB
DTYPES = {"float32": ("F32", np.float32), "bfloat16": ("BF16", ml_dtypes.bfloat16)}  # names in files, and of numpy


class Tensor(NamedTuple):
    """One tensor of a file, before there is one."""

    name: str
    shape: tuple[int, ...]
    size: int  # bytes


def hugging_face_config(model: ModelConfig, dtype: str, positions: int) -> dict:
    """The config.json of a model that was not read from a folder; `config_from_folder` gives the same model back.

    Args:
        dtype: of the weights in the files, a key of DTYPES.
        positions: the longest sequence it was trained on, in tokens; YaRN's own length goes before it.
    Raises:
        ValueError: no architecture of transformers is like it.
    """
    family = FAMILIES.get((model.qkv_bias, model.qk_norm))
    require(
        family is not None, "model.qkv_bias, model.qk_norm", (model.qkv_bias, model.qk_norm),
        "transformers has no architecture with both", "train a model with one of them to export it",
    )  # fmt: skip
    settings = {
        "architectures": [family[0]],
        "model_type": family[1],
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.initializer_std,
        "use_cache": True,
    }
    if model.rope_scaling == "none":
        return settings
    yarn = {"rope_type": "yarn", "factor": model.rope_factor, "original_max_position_embeddings": model.rope_original_length}
    return settings | {"rope_scaling": yarn, "max_position_embeddings": int(model.rope_factor * model.rope_original_length)}


def write_weights(folder: Path, model: ModelConfig, read: Callable[[str], np.ndarray], dtype: str, shard_bytes: int) -> list[Path]:
    """Writes model.safetensors, or several files of at most `shard_bytes` and their index.

    In memory are one parameter (all its layers) and one tensor of it in `dtype`, whatever the size of a file.

    Args:
        read: gives the parameter of this name, f32 of the shape in the table; called once for each, in its order.
        dtype: a key of DTYPES; f32 is written as it is, bf16 rounded to nearest, ties to even.
        shard_bytes: of tensors in a file; a larger tensor has a file to itself.
    Returns:
        The files of weights.
    Raises:
        OSError: the disk is full, or the folder cannot be written.
        ValueError: a NaN or an infinity in a tensor.
    """
    shards = plan_shards(model, np.dtype(DTYPES[dtype][1]).itemsize, shard_bytes)
    count = len(shards)
    files = [folder / (f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE) for i in range(count)]
    tensors = _tensors(model, read, DTYPES[dtype][1])
    for path, shard in zip(files, shards, strict=True):
        with open(path, "wb") as file:
            file.write(_header(shard, DTYPES[dtype][0]))
            for _ in shard:
                file.write(next(tensors))  # held by no name, so that it is gone when the next parameter is read
    if count > 1:
        total = sum(tensor.size for shard in shards for tensor in shard)
        places = {tensor.name: path.name for path, shard in zip(files, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / INDEX, index)
    return files


def plan_shards(model: ModelConfig, item_bytes: int, shard_bytes: int) -> list[list[Tensor]]:
    """Which tensors go to which file, in the order in which they are written: that of the table, then of layers."""
    shards, room = [], 0
    for row in table(model).values():
        shape = row.hugging_face_shape
        size = int(np.prod(shape, dtype=np.int64)) * item_bytes
        for layer in range(row.shape[0] if row.stacked else 1):
            if not shards or size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(Tensor(row.hugging_face.format(layer=layer), shape, size))
            room -= size
    return shards


def hugging_face_tensor(row: Parameter, values: np.ndarray) -> np.ndarray:
    """One layer's parameter as Hugging Face has it: axes in the order of `row.layout`, those of one group made one."""
    axes = row.axes[int(row.stacked) :]
    order = " ".join(row.layout).split()
    return values.transpose([axes.index(axis) for axis in order]).reshape(row.hugging_face_shape)


def _tensors(model: ModelConfig, read: Callable[[str], np.ndarray], dtype) -> Iterator[np.ndarray]:
    # The bytes of each, in the order of plan_shards.
    for name, row in table(model).items():
        values = read(name)
        for layer in range(row.shape[0]) if row.stacked else [...]:
            tensor = np.ascontiguousarray(hugging_face_tensor(row, values[layer]), dtype)
            refuse_non_finite(row.hugging_face.format(layer=layer), tensor)
            yield tensor.view(np.uint8)
            del tensor
        del values  # else two parameters are in memory while the next one is read


def refuse_non_finite(name: str, tensor: np.ndarray) -> None:
    """Raises ValueError if there is a NaN or an infinity: such a model answers nothing, and `load_parameters` refuses it."""
    finite = np.isfinite(tensor)
    if not finite.all():
        raise ValueError(
            f"{name} has {finite.size - np.count_nonzero(finite)} values of {finite.size} that are NaN or infinite;"
            " export an earlier checkpoint."
        )


def _header(shard: Sequence[Tensor], dtype: str) -> bytes:
    header, start = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses files that do not say so
    for tensor in shard:
        header[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [start, start + tensor.size]}
        start += tensor.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8, so that files can be mapped into memory
    return len(text).to_bytes(8, "little") + text


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Of all files of weights, the headers apart."""
    return parameter_count(model) * np.dtype(DTYPES[dtype][1]).itemsize


def refuse_existing(output: Path) -> None:
    """Raises ValueError if there is something in the way of the folder."""
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output {output} is a folder with files in it, and an export replaces none; give a new name, or delete it.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file, and an export is a folder; give another name.")


@contextlib.contextmanager
def written_whole(output: Path, size: int) -> Iterator[Path]:
    """Gives OUTPUT.partial, empty, to write to; renames it at the end, or deletes it if that is not reached.

    Args:
        size: bytes that will be written, small files apart.
    Raises:
        ValueError: the disk is or becomes full, the place cannot be written, another export is at work there, or there is a
            folder of that name that no export made.
    """
    partial = output.with_name(f"{output.name}.partial")
    try:
        refuse_foreign(partial)
        partial.mkdir(parents=True, exist_ok=True)
        with alone_in(partial):
            empty(partial)  # of an export that was killed
            try:
                require_room(output, size)
                yield partial
                make_durable(*partial.iterdir())
                (partial / "lock").unlink()  # last: without it nobody would know for an export's what a kill leaves here
                make_durable(partial)
                os.rename(partial, output)  # an empty folder of that name gives way
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        make_durable(output.parent)
    except OSError as error:
        raise ValueError(f"--output {output} was not written: {error}; make room, or choose another place.") from None


def refuse_foreign(partial: Path) -> None:
    """Raises ValueError if the folder has files in it that no export left there: those of an export have its lock beside them."""
    if partial.is_dir() and any(partial.iterdir()) and not (partial / "lock").is_file():
        raise ValueError(
            f"{partial} has files in it that no export made, and would be emptied; move it away, or give another --output."
        )


def empty(folder: Path) -> None:
    """Deletes what is in the folder, but for the lock that this process holds."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def require_room(output: Path, size: int) -> None:
    """Raises ValueError if the disk has too little room."""
    free = shutil.disk_usage(output.parent).free
    if size + OTHER_BYTES > free:
        raise ValueError(
            f"--output {output}: {(size + OTHER_BYTES) / 1e9:.2f} GB will be written and {free / 1e9:.2f} GB are free;"
            " make room, choose another place, or halve it with --dtype=bfloat16."
        )


def write_json(path: Path, settings: dict) -> None:
    """UTF-8, keys in the order of the dict; ValueError for NaN and infinities, which JSON has not."""
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
