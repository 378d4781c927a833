"""Reads a Hugging Face config.json; refuses what this model would compute differently."""

import json
from pathlib import Path

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
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; give the folder of a Hugging Face model.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again.") from None
    architecture = (settings.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture} is not covered; choose one of {', '.join(ARCHITECTURES)}.")
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
        "tied_embeddings": bool(settings.get("tie_word_embeddings", False)),
        "norm_eps": float(settings.get("rms_norm_eps", 1e-6)),
        "initializer_std": float(settings.get("initializer_range", 0.02)),
    }
    return fields | _rope_fields(path, settings) | overrides


def _default_head_width(architecture, width, heads):
    return 128 if architecture == "Qwen3ForCausalLM" else width // heads


def _size(path, settings, name, default=None):
    value = settings.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {name}={value!r}; it must be a positive whole number, add it.")
    return value


def _check_settings(path, settings):
    for name, allowed in EXPECTED.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{path}: {name}={settings[name]!r} is not covered, only {allowed[0]!r}; choose another model."
            )
    kinds = set(settings.get("layer_types") or []) - {"full_attention"}
    if kinds:
        raise ValueError(f"{path}: layer_types has {sorted(kinds)}, only full_attention is covered; choose another model.")


def _rope_fields(path, settings):
    # transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling beside it.
    rope = (settings.get("rope_scaling") or {}) | (settings.get("rope_parameters") or {})
    theta = rope.get("rope_theta", settings.get("rope_theta", 10000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    fields = {"rope_theta": float(theta), "rope_scaling": "none"}
    if kind not in ("default", "yarn"):
        raise ValueError(f"{path}: rope type {kind!r} is not covered, only 'default' and 'yarn'; choose another model.")
    partial = {"partial_rotary_factor": settings.get("partial_rotary_factor", 1.0)}
    for name, value in (partial | rope).items():
        if value not in EXPECTED_ROPE.get(name, (value,)):
            raise ValueError(
                f"{path}: rope setting {name}={value!r} is not covered, only {EXPECTED_ROPE[name][-1]!r}; remove it."
            )
    if kind == "default":
        return fields
    original = rope.get("original_max_position_embeddings") or settings.get("max_position_embeddings")
    if not rope.get("factor") or not original:
        raise ValueError(f"{path}: yarn needs factor and original_max_position_embeddings; add them.")
    return fields | {
        "rope_scaling": "yarn",
        "rope_factor": float(rope["factor"]),
        "rope_original_length": int(original),
    }
