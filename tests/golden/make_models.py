"""Makes the golden model folders: random tiny models and the logits that transformers computes for them.

Last run with torch 2.13.0 (CPU), transformers 5.23.0, on x86-64:

    python tests/golden/make_models.py            # writes tests/golden/<name>/ for every name below

Each folder holds config.json, model.safetensors (one in several files with their index) and logits.npz with
tokens i32[2, 24] and logits f32[2, 24, 64], computed in f32 from the weights as stored.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
# 8 trained positions, so that the 24 tokens below reach where YaRN matters.
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}

# name -> (architecture, settings, dtype of the file, largest file)
MODELS = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": PLAIN}, "float32", "30KB"),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": PLAIN}, "bfloat16", "1MB"),
    "qwen2_yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}, "bfloat16", "1MB"),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 12, "rope_parameters": PLAIN}, "bfloat16", "1MB"),
    "llama": ("Llama", {"tie_word_embeddings": False, "rope_parameters": PLAIN}, "float16", "1MB"),
}


def random_model(architecture, settings):
    """A model whose every parameter matters: fresh weights would have zero biases and norms of exactly one."""
    config = getattr(transformers, f"{architecture}Config")(**SIZES, **settings)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def write_model(name, seed):
    """Writes one folder."""
    architecture, settings, dtype, shard = MODELS[name]
    torch.manual_seed(seed)
    folder = HERE / name
    model = random_model(architecture, settings).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "llama":
        _write_the_old_way(folder / "config.json")
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 24))
    # Loaded again: `.to(bfloat16)` above has rounded the rotary frequencies as well, which real use does not.
    reloaded = getattr(transformers, f"{architecture}ForCausalLM").from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = reloaded.eval()(tokens).logits
    np.savez(folder / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    print(name, f"largest logit {logits.abs().max():.2f}")


def _write_the_old_way(path):
    # As transformers 4 wrote it: rope_theta on its own.
    settings = json.loads(path.read_text())
    settings["rope_theta"] = settings.pop("rope_parameters")["rope_theta"]
    settings["rope_scaling"] = None
    path.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}")
    for number, model_name in enumerate(MODELS):
        write_model(model_name, number)
