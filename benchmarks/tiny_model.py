"""The model, prompts and reward that all sides of a comparison share; needs numpy, safetensors and transformers only.

5.9 M parameters, f32: 4 layers, width 256, feed-forward 1024, 8 query and 2 key heads of 32, vocabulary 4096, untied.
A folder as Hugging Face has it, which every trainer reads, with random weights but for one thing: the chance that the
next token is the stop token is the same everywhere, and can be chosen. So lengths are geometric, or all responses have as
many tokens as fit, and every side samples from the very same distribution without being told anything else:

- coordinate 0 of every embedding is 30, and no layer writes to it: among the rest, which sums up to about 11 squared, it is
  nearly all of the residual stream, so that after the final norm it is nearly 16, the root of the width;
- the output matrix reads coordinate 0 for two tokens only: the stop token's logit is what gives it its chance, the padding's
  is -20, and so is the stop token's if nothing is ever to stop.
"""

import json
import math
import random
from pathlib import Path

PAD, STOP = 0, 1
LAYERS, WIDTH, MLP, HEADS, KEY_HEADS, HEAD, VOCABULARY = 4, 256, 1024, 8, 2, 32, 4096
CONSTANT, AROUND = 30.0, 11.0  # coordinate 0 of the residual stream, and about the sum of squares of the others


def write_folder(folder: Path, stop: float, layers: int = LAYERS, width: int = WIDTH) -> Path:
    """Writes config.json, weights, tokenizer, and a file of problems.

    Args:
        stop: chance of the stop token at every token; 0 = never.
        width: a multiple of 128; feed-forward, heads and key heads grow with it.
    """
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "hidden_size": width, "intermediate_size": MLP * width // WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": HEADS * width // WIDTH, "num_key_value_heads": KEY_HEADS * width // WIDTH,
        "vocab_size": VOCABULARY,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 32768, "torch_dtype": "float32",
        "bos_token_id": None, "eos_token_id": STOP, "pad_token_id": PAD, "use_sliding_window": False,
    }))  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP, "pad_token_id": PAD}))
    rng = np.random.default_rng(0)
    tensors = {name: _values(rng, name, shape) for name, shape in _shapes(sizes).items()}
    for name, values in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values[0] = 0  # rows are outputs
    tensors["model.embed_tokens.weight"][:, 0] = CONSTANT
    output, read = tensors["lm_head.weight"], CONSTANT * math.sqrt(width / (CONSTANT**2 + AROUND))
    output[:, 0] = 0
    output[PAD, 0] = -20 / read
    output[STOP, 0] = (math.log(stop / (1 - stop) * (VOCABULARY - 2)) if stop else -20) / read
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder / "tokenizer")
    (folder / "problems.jsonl").write_text(json.dumps({"problem": "2", "answer": "2"}) + "\n")
    return folder


def _shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    width, mlp = sizes["hidden_size"], sizes["intermediate_size"]
    heads, key_heads = sizes["num_attention_heads"] * HEAD, sizes["num_key_value_heads"] * HEAD
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width), "lm_head.weight": (VOCABULARY, width), "model.norm.weight": (width,)}
    for number in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes |= {f"{layer}{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        for name, outputs in {"q": heads, "k": key_heads, "v": key_heads}.items():
            shapes |= {f"{layer}self_attn.{name}_proj.weight": (outputs, width), f"{layer}self_attn.{name}_proj.bias": (outputs,)}
        shapes |= {f"{layer}self_attn.o_proj.weight": (width, heads), f"{layer}mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
    return shapes


def _values(rng, name: str, shape: tuple[int, ...]):
    if len(shape) == 2:
        return (0.02 * rng.standard_normal(shape)).astype("float32")
    return rng.standard_normal(shape).astype("float32") * 0 + (not name.endswith("bias"))  # norms 1, biases 0


def _write_tokenizer(folder: Path) -> None:
    """Words are numbers: the text "17 4011" is the tokens 17 and 4011.

    In a folder of its own: beside a config.json of Qwen2 transformers would make a Qwen2 tokenizer of it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<stop>": STOP} | {str(number): number for number in range(2, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<stop>", unk_token="<pad>", clean_up_tokenization_spaces=False,
        padding_side="left",
    ).save_pretrained(folder)  # fmt: skip


def prompts(case, seed: int) -> list[str]:
    """Q texts of P random tokens, other ones for every seed."""
    numbers = random.Random(f"{case.name} {seed}")
    return [" ".join(str(numbers.randrange(2, VOCABULARY)) for _ in range(case.prompt_tokens)) for _ in range(case.prompts)]


def reward(text: str) -> float:
    """The mean of a response's numbers: no two responses are alike, so that every one of them is learned from."""
    numbers = [int(word) for word in text.split() if word.isdigit()]
    return sum(numbers) / (VOCABULARY * len(numbers)) if numbers else 0.0
