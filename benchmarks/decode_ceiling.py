"""How near sampling comes to what the machine can do: shares of its measured matrix-product rate and memory bandwidth.

    python benchmarks/decode_ceiling.py [--batch=64] [--rounds=7]

Takes about two minutes on two CPU cores. Two models in f32, the tiny one of tiny_model.py and one of 30 M parameters, sample
64 responses of 128 tokens to 8 prompts of 64; what is timed is the sampler's whole call, prefill included. The rates are
measured between the rounds, so that a busy machine lowers both. FLOPs are those of the mathematics (models/flops.py).
Traffic is what every step has to read: all weights of the layers and the output matrix, and the keys and values that
it attends; a model that fits the processor's cache need not read it from memory. "ideal" is the longer of the two times at
the measured rates.
"""

import argparse
import statistics

import jax
import numpy as np
from machine import bandwidth, describe, matmul_rate, timed
from turns import spread

from dgpo_jax.config import ModelConfig
from dgpo_jax.models import Model
from dgpo_jax.models.flops import rollout_flops
from dgpo_jax.models.parameters import parameter_count, table
from dgpo_jax.rl.drawing import Draw, Sampling
from dgpo_jax.rl.sampler import make_sampler
from dgpo_jax.types import Prompts

MODELS = {
    "tiny": ModelConfig(
        vocab_size=4096, layers=4, width=256, heads=8, key_heads=2, head_width=32, mlp_width=1024, tied_embeddings=False, dtype="float32"
    ),
    "30M": ModelConfig(
        vocab_size=4096, layers=8, width=512, heads=8, key_heads=2, head_width=64, mlp_width=2048, tied_embeddings=False, dtype="float32"
    ),
}


def weight_bytes(config: ModelConfig) -> float:
    """Read by every step: the layers and the output matrix, f32."""
    numbers = parameter_count(config)
    return 4.0 * (numbers if config.tied_embeddings else numbers - np.prod(table(config)["embed/table"].shape))


def cache_bytes(config: ModelConfig, contexts) -> float:
    """Keys and values that tokens with so many others before them attend, f32."""
    return 4.0 * 2 * config.layers * config.key_heads * config.head_width * float(np.sum(contexts))


def main(batch: int, prompt_tokens: int, new_tokens: int, rounds: int, models: list[str], size: int) -> None:
    """Measures and prints a Markdown table."""
    print(describe(), f"batch {batch}, {prompt_tokens}+{new_tokens} tokens, {rounds} rounds\n", sep="; ")
    print("| model | parameters | tokens/s | of the matrix-product rate | of the memory bandwidth | of the ideal |\n|---|---|---|---|---|---|")
    for name in models:
        config = MODELS[name]
        sample, flops, traffic = prepare(config, batch, prompt_tokens, new_tokens)
        for warm_up in range(2):
            timed(sample, warm_up)
        seconds, products, memory, ideal = [], [], [], []
        for number in range(rounds):
            rate, width = matmul_rate(size=size, repeats=2), bandwidth(0.25, repeats=2)
            seconds.append(timed(sample, 2 + number))
            products.append(100 * flops / rate / seconds[-1])
            memory.append(100 * traffic / width / seconds[-1])
            ideal.append(100 * max(flops / rate, traffic / width) / seconds[-1])
        speed = batch * new_tokens / statistics.median(seconds)
        shares = " | ".join(f"{spread(values, 0)} %" for values in (products, memory, ideal))
        print(f"| {name} | {parameter_count(config) / 1e6:.1f} M | {speed:.0f} | {shares} |", flush=True)
    print(f"\nlast measured: {rate / 1e9:.0f} GFLOP/s, {width / 1e9:.1f} GB/s")


def prepare(config: ModelConfig, batch: int, prompt_tokens: int, new_tokens: int):
    """(function of a round's number, FLOPs, bytes) of one call of the sampler."""
    size = 8
    model = Model(config)
    params = model.init(jax.random.key(0))
    sampler = make_sampler(model, Sampling(size, new_tokens, (), 0), slots=batch, max_prompt=prompt_tokens)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (batch // size, prompt_tokens)).astype(np.int32)
    prompts = Prompts(tokens, np.ones_like(tokens, bool))
    flops = rollout_flops(config, np.full(len(tokens), prompt_tokens), np.full(batch, new_tokens))
    contexts = prompt_tokens + np.arange(new_tokens)
    traffic = new_tokens * weight_bytes(config) + batch * cache_bytes(config, contexts)
    return lambda number: sampler(params, prompts, Draw(0, 0, number, 0)).rollout.response, flops, traffic


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="responses; a multiple of 8")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default="tiny,30M", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--matrix", type=int, default=2048, help="size of the matrices that the rate is measured with")
    chosen = parser.parse_args()
    main(chosen.batch, chosen.prompt, chosen.new, chosen.rounds, chosen.models.split(","), chosen.matrix)
