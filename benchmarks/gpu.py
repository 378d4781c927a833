"""How near a GPU's limits sampling and updates come, for a model of the shape of Qwen2.5-1.5B with random weights, in bf16.

    python benchmarks/gpu.py [--decode=64x1024,256x1024,512x1024,64x8192,256x8192] [--update=4x8192,1x32768] [--torch=auto]

Runs in one call of under 8 minutes on an 80 GB card and prints one table:

- decode BATCHxCONTEXT: the sampler's own program decodes a chunk of tokens for that many responses, whose contexts end at
  CONTEXT tokens (the cache holds zeros; what it holds costs nothing). Share of the measured memory bandwidth: what a step must
  read is all weights once, and every response's keys and values.
- update ROWSxTOKENS: a whole optimizer step over four microbatches of packed rows, two sequences a row, as `learn` does
  it. Share of the measured bf16 matrix-product rate: FLOPs of the mathematics (models/flops.py), recomputation not counted.
- the same with `transformers` and torch, where torch with CUDA is installed: `generate` (its prefill taken off), and
  forward, backward and AdamW in bf16 with gradient checkpointing, one microbatch after the other.

Every part runs in a process of its own, so that each has the card's memory for itself. What does not fit is said to be so.
Without a GPU it refuses, unless --model=tiny, which takes seconds on a CPU and shows that it runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

DECODE, UPDATE = "64x1024,256x1024,512x1024,64x8192,256x8192", "4x8192,1x32768"
MODELS = {
    "1.5B": {
        "vocab_size": 151936, "layers": 28, "width": 1536, "heads": 12, "key_heads": 2, "head_width": 128, "mlp_width": 8960,
        "rope_theta": 1e6, "dtype": "bfloat16",
    },
    "tiny": {"vocab_size": 256, "layers": 2, "width": 64, "heads": 4, "key_heads": 2, "head_width": 16, "mlp_width": 128},
}  # fmt: skip
MICROBATCHES = 4  # of an update
PROMPT_SHARE = 8  # a sequence of an update is this part prompt


def sizes(text: str) -> list[tuple[int, int]]:
    """'64x1024,4x8' -> [(64, 1024), (4, 8)]."""
    return [tuple(int(number) for number in part.split("x")) for part in text.split(",") if part]


def attempt(measure, *arguments) -> dict:
    """What was measured, or why not: most likely the memory."""
    try:
        return measure(*arguments)
    except Exception as error:  # the other sizes may still fit
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def measure_ours(options) -> dict:
    """{"device": ..., "rate": FLOP/s, "bandwidth": bytes/s, "decode": [...], "update": [...]}."""
    from machine import bandwidth, describe, matmul_rate

    small = options.model == "tiny"
    rates = {"device": describe(), "rate": matmul_rate(options.dtype, 256 if small else 8192), "bandwidth": bandwidth(0.01 if small else 4)}
    decodes = [attempt(measure_decode, options, *size) for size in sizes(options.decode)]
    return rates | {"decode": decodes, "update": [attempt(measure_update, options, *size) for size in sizes(options.update)]}


def measure_decode(options, batch: int, context: int) -> dict:
    """Seconds of a step, and the bytes that it must read."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from dgpo_jax.config import ModelConfig
    from dgpo_jax.models import Model
    from dgpo_jax.models.parameters import parameter_count, table
    from dgpo_jax.rl.drawing import Sampling
    from dgpo_jax.rl.slots import decode, empty_slots

    config = ModelConfig(**MODELS[options.model])
    model = Model(config)
    params = jax.jit(lambda key: model.cast(model.init(key)))(jax.random.key(0))
    chunk = options.steps
    sampling = Sampling(1, 2**30, (), 0)  # no response ends
    program = jax.jit(functools.partial(decode, model, rows=batch, chunk=chunk, sampling=sampling), donate_argnums=1)
    slots = jax.jit(lambda: empty_slots(model, batch, context, int8_cache=False))()
    full = jnp.full(batch, context - chunk, jnp.int32)
    seconds = []
    for _ in range(options.rounds + 2):
        slots = slots._replace(active=jnp.ones(batch, bool), position=full + 0, count=full + 0)
        jax.block_until_ready(slots)
        began = time.perf_counter()
        slots, drawn = program(params, slots, np.int32(0))
        jax.block_until_ready((slots, drawn))
        seconds.append((time.perf_counter() - began) / chunk)
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    embedding = 0 if config.tied_embeddings else int(np.prod(table(config)["embed/table"].shape))
    cache = 2 * config.layers * config.key_heads * config.head_width * batch * (context - chunk / 2)
    return {"seconds": statistics.median(seconds[2:]), "bytes": itemsize * (parameter_count(config) - embedding + cache)}


def measure_update(options, rows: int, tokens: int) -> dict:
    """Seconds of an optimizer step of four microbatches, its tokens and its FLOPs."""
    import tempfile
    from pathlib import Path

    import jax
    import numpy as np

    from dgpo_jax.build import build_parts, build_programs, build_state
    from dgpo_jax.config import Config, DataConfig, ModelConfig, RolloutConfig, UpdateConfig
    from dgpo_jax.learning import compute_advantages, learn
    from dgpo_jax.models.flops import training_flops
    from dgpo_jax.recipe import resolve
    from dgpo_jax.types import Experience, Prompts, Rollout

    length, sequences = tokens // 2, MICROBATCHES * rows * 2
    prompt = length // PROMPT_SHARE
    response = length - prompt
    problems = Path(tempfile.mkdtemp(), "problems.jsonl")  # read, since a config names one, and never asked
    problems.write_text(json.dumps({"problem": "2", "answer": "2"}) + "\n")
    config = resolve(Config(
        model=ModelConfig(**MODELS[options.model], remat=options.remat),
        data=DataConfig(train=str(problems), tokenizer="builtin:words", template="plain", held_out=""),
        rollout=RolloutConfig(prompts=sequences // 2, group_size=2, max_prompt=prompt, max_response=response),
        update=UpdateConfig(updates=1, tokens_per_row=tokens, tokens_per_device=rows * tokens, logprob_chunk=min(512, tokens), old_logprobs="sampler"),
    ))  # fmt: skip
    parts = build_parts(config)
    programs, state = build_programs(config, parts), build_state(config, parts)
    rng = np.random.default_rng(0)
    rewards = np.arange(sequences, dtype=np.float32)  # no two of a group alike
    shape = (sequences, response)
    rollout = Rollout(
        rng.integers(1, config.model.vocab_size, shape).astype(np.int32), np.ones(shape, bool), np.full(shape, -10, np.float32), np.zeros(sequences, bool)
    )
    tokens_of = rng.integers(1, config.model.vocab_size, (sequences // 2, prompt)).astype(np.int32)
    prompts = Prompts(tokens_of, np.ones_like(tokens_of, bool))
    experience = Experience(prompts, rollout, rollout.logprobs, rewards, rewards, np.ones(sequences // 2, np.int32))
    advantages = compute_advantages(config, experience)
    seconds = []
    for number in range(options.rounds + 1):
        began = time.perf_counter()
        state, figures = learn(config, parts, programs, state, experience, advantages, number + 1)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(seconds[1:]), "microbatches": figures["update/microbatches"], "tokens": sequences * length,
        "flops": training_flops(parts.model.config, np.full(sequences, prompt), np.full(sequences, response)),
    }  # fmt: skip


def run_part(options, part: str) -> dict:
    """One part in a process of its own; its JSON is the last line that it prints."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    python = options.python or sys.executable if part == "torch" else sys.executable
    done = subprocess.run([python, __file__, *options.arguments, f"--part={part}"], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        return {"failed": f"its process ended with code {done.returncode}; its own messages are above"}
    return json.loads(done.stdout.splitlines()[-1])


def has_torch(options) -> bool:
    """Whether there is a torch that can measure where we do."""
    wanted = "True" if options.model == "tiny" else "torch.cuda.is_available()"
    code = f"import torch, transformers; raise SystemExit(not {wanted})"
    return not subprocess.run([options.python or sys.executable, "-c", code], capture_output=True).returncode


def main(options) -> None:
    """Measures all parts and prints the table."""
    ours = run_part(options, "ours")
    if "failed" in ours:
        sys.exit(f"no figures: {ours['failed']}")
    peer = run_part(options, "torch") if options.torch == "yes" or (options.torch == "auto" and has_torch(options)) else {}
    print(f"{options.model}; {ours['device']}; {ours['rate'] / 1e12:.3g} TFLOP/s in {options.dtype} products and {ours['bandwidth'] / 1e9:.0f} GB/s measured")
    print(f"peer: {peer.get('device') or peer.get('failed') or 'none: no torch with CUDA here'}\n")
    print("| what | ours, tokens/s | share of the measured limit | transformers, tokens/s | ratio |\n|---|---|---|---|---|")
    for kind, names in (("decode", sizes(options.decode)), ("update", sizes(options.update))):
        others = peer.get(kind) or [{}] * len(names)
        for (count, tokens), own, other in zip(names, ours[kind], others, strict=True):
            print(line(f"{kind} {count} x {tokens}", count, own, other, ours))


def line(what: str, batch: int, own: dict, other: dict, rates: dict) -> str:
    """One line of the table."""
    failed = "failed" in own
    amount = own.get("tokens", batch)  # of a step
    speed = 0 if failed else amount / own["seconds"]
    limit = own["bytes"] / rates["bandwidth"] if "bytes" in own else own.get("flops", 0) / rates["rate"]
    share = "-" if failed else f"{100 * limit / own['seconds']:.0f} % of the {'bandwidth' if 'bytes' in own else 'matrix-product rate'}"
    theirs = amount / other["seconds"] if "seconds" in other else 0
    ratio = f"{speed / theirs:.2f}" if speed and theirs else "-"
    return f"| {what} | {own['failed'] if failed else f'{speed:.0f}'} | {share} | {f'{theirs:.0f}' if theirs else other.get('failed', '-')} | {ratio} |"


def read_options(arguments: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: no GPU and a model that needs one.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1.5B")
    parser.add_argument("--decode", default=DECODE, help="BATCHxCONTEXT, by commas")
    parser.add_argument("--update", default=UPDATE, help="ROWSxTOKENS of a microbatch, by commas")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", default="full", help="model.remat of the update")
    parser.add_argument("--torch", choices=("auto", "yes", "no"), default="auto", help="measure transformers too; auto = if it can use the GPU")
    parser.add_argument("--python", default="", help="an interpreter with torch and transformers; empty = this one")
    parser.add_argument("--part", choices=("ours", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.arguments, options.dtype = arguments, MODELS[options.model].get("dtype", "float32")
    if not options.part and options.model != "tiny":
        found = subprocess.run([sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True).stdout.strip()
        if not found.endswith("gpu"):
            sys.exit(f"JAX finds no GPU here (its backend is {found!r}); give --model=tiny and small sizes to try the script, or install jax[cuda13].")
    return options


if __name__ == "__main__":
    given = read_options(sys.argv[1:])
    if given.part:
        if given.part == "torch":
            from gpu_torch import (
                measure_torch as measure_ours,  # only here, for only the peer's interpreter needs torch
            )
        print(json.dumps(measure_ours(given)))
    else:
        main(given)
