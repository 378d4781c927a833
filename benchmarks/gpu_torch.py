"""What `transformers` and torch do of the measurements of gpu.py, which starts this; needs no JAX."""

import statistics
import time

import torch
import transformers
from gpu import MICROBATCHES, MODELS, attempt, sizes


class Bench:
    """The model on the device, and what is measured of it."""

    def __init__(self, options):
        self.options, self.shape = options, MODELS[options.model]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = self.shape
        config = transformers.Qwen2Config(
            vocab_size=shape["vocab_size"], hidden_size=shape["width"], intermediate_size=shape["mlp_width"],
            num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["key_heads"],
            tie_word_embeddings=True, max_position_embeddings=32768, eos_token_id=None, bos_token_id=None, pad_token_id=0,
            dtype=torch.bfloat16 if self.device == "cuda" else torch.float32, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device(self.device):
            self.model = transformers.AutoModelForCausalLM.from_config(config)

    def random_tokens(self, *size: int):
        """None of them 0, the padding."""
        return torch.randint(1, self.shape["vocab_size"], size, device=self.device)

    def timed(self, function, *arguments) -> float:
        """Seconds of one call."""
        synchronize = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        synchronize()
        began = time.perf_counter()
        function(*arguments)
        synchronize()
        return time.perf_counter() - began

    def decode(self, batch: int, context: int) -> dict:
        """Seconds of a step: of two calls of `generate`, whose prefill is the same and so is not in their difference."""
        tokens, steps = self.random_tokens(batch, context - self.options.steps), self.options.steps

        def generate(new: int) -> None:
            with torch.inference_mode():
                self.model.generate(
                    tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new
                )

        few = max(1, steps // 8)
        self.model.eval()
        self.timed(generate, few)
        return {"seconds": (self.timed(generate, steps) - self.timed(generate, few)) / (steps - few)}

    def update(self, rows: int, tokens: int) -> dict:
        """Seconds of an optimizer step; a row is two sequences here too, each by itself."""
        self.model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=self.device == "cuda")
        batch = self.random_tokens(2 * rows, tokens // 2)
        self.model.train()

        def step() -> None:
            for _ in range(MICROBATCHES):
                self.model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        self.timed(step)
        return {"seconds": statistics.median(self.timed(step) for _ in range(self.options.rounds))}

    def all(self, measure, text: str) -> list[dict]:
        """Of each size, with the memory of the one before given back."""
        results = []
        for size in sizes(text):
            results.append(attempt(measure, *size))
            self.model.zero_grad()
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return results


def measure_torch(options) -> dict:
    """{"device": ..., "decode": [...], "update": [...]}, as gpu.py has it of ours."""
    bench = Bench(options)
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    return {
        "device": f"{name}, torch {torch.__version__}, transformers {transformers.__version__}",
        "decode": bench.all(bench.decode, options.decode), "update": bench.all(bench.update, options.update),
    }  # fmt: skip
