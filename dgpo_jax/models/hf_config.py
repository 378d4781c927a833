"""Reads a Hugging Face config.json; refuses what this model would compute differently."""

import json
from pathlib import Path

from dgpo_jax.config import ModelConfig
from dgpo_jax.files import read_regular
from dgpo_jax.rules import SMALLEST

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")

# Settings that change the computation, and the only values that it is written for.
EXPECTED = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_bias": (False,),  # would add a bias to the output projection too; Qwen2's QKV bias is no setting
    "use_sliding_window": (False,),
    "quantization_config": (None,),
}
EXPECTED_ROPE = {
    "partial_rotary_factor": (1.0,),
    "attention_factor": (None,),
    "beta_fast": (None, 32),
    "beta_slow": (None, 1),
    "mscale": (None,),
    "mscale_all_dim": (None,),
    "truncate": (True,),
}

# Larger ones are damage: they would be found when the memory for them is asked for, or when a list of that many layers is made.
LARGEST = {"num_hidden_layers": 1000, "original_max_position_embeddings": 2**40}
LARGEST_WIDTH = 2**24  # of any other size; vocabularies have some 2**18
LARGEST_NUMBER = 1e30  # of a base, a factor or an epsilon: float32 holds it


def config_from_folder(folder, **overrides):
    """The fields of ModelConfig that config.json decides.

    Args:
        overrides: fields to set differently, or that config.json does not decide (dtype, remat, ...).
    Returns:
        A dict: ModelConfig(**config_from_folder(folder)).
    Raises:
        ValueError: no config.json, a missing size, an unknown architecture, or a setting not covered here.
    """
    path = Path(folder) / "config.json"
    settings = read_object(path)
    architecture = _architecture(path, settings)
    _check_settings(path, settings)
    heads, width = _size(path, settings, "num_attention_heads"), _size(path, settings, "hidden_size")
    # Llama's only: what transformers takes for an absent value differs between the architectures.
    default_key_heads = heads if architecture == "LlamaForCausalLM" else None
    fields = {
        "path": str(folder),
        "vocab_size": _size(path, settings, "vocab_size"),
        "layers": _size(path, settings, "num_hidden_layers"),
        "width": width,
        "heads": heads,
        "key_heads": _size(path, settings, "num_key_value_heads", default_key_heads),
        "head_width": _size(path, settings, "head_dim", _default_head_width(architecture, width, heads)),
        "mlp_width": _size(path, settings, "intermediate_size"),
        "qkv_bias": architecture == "Qwen2ForCausalLM",
        "qk_norm": architecture == "Qwen3ForCausalLM",
        "tied_embeddings": _switch(path, settings, "tie_word_embeddings"),
        "norm_eps": _number(path, settings, "rms_norm_eps", 1e-6),
        "initializer_std": _number(path, settings, "initializer_range", 0.02),
    }
    fields |= _rope_fields(path, settings)
    try:
        ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return fields | overrides


def read_object(path):
    """The object in a JSON file of a model's folder.

    Raises:
        ValueError: the file is missing, cannot be read, or holds something else.
    """
    try:
        value = json.loads(read_regular(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; give the folder of a Hugging Face model.") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); download it again.") from None
    except (ValueError, RecursionError) as error:  # bytes that are no text, text that is no JSON, numbers of 5000 digits
        raise ValueError(f"{path}: not JSON ({error}); download it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {_shown(value)} and no object; download it again.")
    return value


def _shown(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _architecture(path, settings):
    listed = settings.get("architectures") or ["(none)"]
    architecture = listed[0] if isinstance(listed, list) else listed
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {_shown(architecture).strip(chr(39))} is not covered; choose one of {', '.join(ARCHITECTURES)}."
        )
    return architecture


def _default_head_width(architecture, width, heads):
    return 128 if architecture == "Qwen3ForCausalLM" else width // heads


def _size(path, settings, name, default=None):
    value = settings.get(name)
    value = default if value is None else value
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{path}: {name}={_shown(value)}; it must be a positive whole number, add it.")
    largest = LARGEST.get(name, LARGEST_WIDTH)
    if value > largest:
        raise ValueError(f"{path}: {name}={_shown(value)}, and no known model has more than {largest}; download the file again.")
    return value


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _number(path, settings, name, default):
    """A positive number, in 32 bits too; the key may lie in any object, `name` is what it is called there."""
    value = settings.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not SMALLEST < value < LARGEST_NUMBER:
        raise ValueError(f"{path}: {name}={_shown(value)}; it must be a positive number that float32 holds, download the file again.")
    return float(value)


def _switch(path, settings, name):
    value = settings.get(name)
    if value not in (None, True, False):
        raise ValueError(f"{path}: {name}={_shown(value)}; it must be true or false, download the file again.")
    return bool(value)


def _check_settings(path, settings):
    for name, allowed in EXPECTED.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path}: {name}={_shown(settings[name])} is not covered, only {allowed[0]!r}; choose another model."
            )
    kinds = [kind for kind in _as_list(settings.get("layer_types")) if kind != "full_attention"]
    if kinds:
        raise ValueError(f"{path}: layer_types has {_shown(kinds[0])}, only full_attention is covered; choose another model.")


def _as_list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def _rope_fields(path, settings):
    # transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling beside it.
    rope = _object(path, settings, "rope_scaling") | _object(path, settings, "rope_parameters")
    theta = rope.get("rope_theta", settings.get("rope_theta"))
    fields = {"rope_theta": _number(path, {"rope_theta": theta}, "rope_theta", 10000.0), "rope_scaling": "none"}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise ValueError(f"{path}: rope type {_shown(kind)} is not covered, only 'default' and 'yarn'; choose another model.")
    partial = {"partial_rotary_factor": settings.get("partial_rotary_factor", 1.0)}
    for name, value in (partial | rope).items():
        if value not in EXPECTED_ROPE.get(name, (value,)):
            raise ValueError(
                f"{path}: rope setting {name}={_shown(value)} is not covered, only {EXPECTED_ROPE[name][-1]!r}; remove it."
            )
    if kind == "default":
        return fields
    original = rope.get("original_max_position_embeddings") or settings.get("max_position_embeddings")
    if not rope.get("factor") or not original:
        raise ValueError(f"{path}: yarn needs factor and original_max_position_embeddings; add them.")
    length = "original_max_position_embeddings"
    return fields | {
        "rope_scaling": "yarn",
        "rope_factor": _number(path, rope, "factor", None),
        "rope_original_length": _size(path, {length: original}, length),
    }


def _object(path, settings, name):
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name}={_shown(value)}; it must be an object, download the file again.")
    return value
