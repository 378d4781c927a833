"""How near an update comes to the matrix products it is made of: its share of the rate that the machine reaches on them.

    python benchmarks/update_ceiling.py [--sizes=smoke,tiny,30m] [--rounds=5] [--remat=full]

An update is two microbatches and the optimizer's step, as in a run. It and a few products of two 2048 x 2048 matrices,
f32 on CPU and bf16 elsewhere, are timed in turns, so that whatever else the machine does slows both alike; the share is
the median over the rounds of their ratio.

What counts as work, with nothing that is computed twice and no padding:

    forward   2 * (numbers in the layers' matrices)   for each token
              2 * D * V                               for each response token
              2 * L * heads * H * t * (t + 1)         for each sequence of t tokens: queries by keys, then weights by values
    update    3 times that: the backward pass has two products for each of them

Prints them for the update and for `score`, which is the forward pass alone: by the clock, and by processor time, which
other processes disturb less.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from random_examples import random_examples

from dgpo_jax.build import build_shardings
from dgpo_jax.config import ModelConfig, OptimizerConfig
from dgpo_jax.models import Model
from dgpo_jax.models.flops import causal_pairs, forward_flops
from dgpo_jax.models.parameters import decays, parameter_count
from dgpo_jax.rl.optimizer import make_optimizer
from dgpo_jax.rl.packing import pack
from dgpo_jax.rl.update import LossSettings, make_programs, take_update
from dgpo_jax.sharding import make_mesh, to_device
from dgpo_jax.types import TrainState

PRODUCT = 2048  # rows and columns of the matrices that are multiplied for comparison
MICROBATCHES = 2  # of an update


class Case(NamedTuple):
    """A model and the microbatch it is given: rows that are full of sequences of one length."""

    model: ModelConfig
    rows: int
    tokens_per_row: int
    prompt: int
    response: int
    chunk: int  # update.logprob_chunk


CASES = {
    # 1 M parameters, as in configs/smoke.py.
    "smoke": Case(
        ModelConfig(vocab_size=192, width=128, layers=4, heads=4, key_heads=2, head_width=32, mlp_width=512),
        rows=20, tokens_per_row=128, prompt=32, response=32, chunk=2560,
    ),
    # 5.9 M parameters, of which 1 M are only looked up: the model that other libraries were measured with.
    "tiny": Case(
        ModelConfig(
            vocab_size=4096, width=256, layers=4, heads=8, key_heads=2, head_width=32, mlp_width=1024,
            tied_embeddings=False,
        ),
        rows=32, tokens_per_row=128, prompt=64, response=64, chunk=1024,
    ),
    "30m": Case(
        ModelConfig(vocab_size=8192, width=512, layers=8, heads=8, key_heads=2, head_width=64, mlp_width=1536),
        rows=8, tokens_per_row=256, prompt=128, response=128, chunk=1024,
    ),
}  # fmt: skip


def main() -> None:
    """Measures the cases one after the other and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(CASES), help="which cases")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each")
    parser.add_argument("--remat", default="full", choices=["none", "dots", "full"], help="as model.remat")
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, one device, remat={options.remat}, median of {options.rounds} rounds\n")
    print("| model | parameters | part | seconds | tokens/s | TFLOP/s | share of the product's rate | by processor time |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.sizes.split(","):
        measure(name, CASES[name], options.rounds, options.remat)


def measure(name: str, case: Case, rounds: int, remat: str) -> None:
    """Prints the rows of one case."""
    model, state, programs, batches, rate = build(case, remat)
    tokens = MICROBATCHES * case.rows * case.tokens_per_row
    work = {"update": 3 * MICROBATCHES * forward_work(case), "score": MICROBATCHES * forward_work(case)}
    multiply, matrix = jax.jit(jnp.matmul), jnp.ones((PRODUCT, PRODUCT), model.compute_dtype)
    holder = [state]

    def update():
        holder[0], totals, figures = take_update(programs, holder[0], batches, rate)
        return totals, figures

    parts = {
        "update": update,
        "score": lambda: [programs.score(holder[0].params, batch) for batch in batches],
        "product": lambda: [multiply(matrix, matrix) for _ in range(4)],
    }
    seconds = {part: [] for part in parts}
    for round_number in range(rounds + 2):
        for part, function in parts.items():
            taken = timed(function)
            if round_number >= 2:  # the first compile and warm up
                seconds[part].append(taken)
    product = 4 * 2 * PRODUCT**3
    parameters = parameter_count(model.config) / 1e6
    for part, flops in work.items():
        wall = statistics.median(own for own, _ in seconds[part])
        pairs = list(zip(seconds[part], seconds["product"], strict=True))
        shares = [statistics.median(flops / own[clock] * other[clock] / product for own, other in pairs) for clock in (0, 1)]
        print(
            f"| {name} | {parameters:.1f} M | {part} | {wall:.3f} | {tokens / wall:.0f} | {flops / wall / 1e12:.3f} |"
            f" {shares[0]:.0%} | {shares[1]:.0%} |", flush=True,
        )  # fmt: skip


def timed(function) -> tuple[float, float]:
    """(seconds by the clock, seconds of processor time over all cores) until the result is there."""
    began, busy = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - began, time.process_time() - busy


def build(case: Case, remat: str):
    """(model, state, programs, microbatches on the device, learning rate)."""
    config = replace(case.model, remat=remat)
    model = Model(config, make_mesh(devices=jax.devices()[:1]))
    optimizer = make_optimizer(OptimizerConfig(), decays(config))
    shardings = build_shardings(model, optimizer)
    loss = LossSettings("dgpo", {}, temperature=1.0, logprob_chunk=case.chunk)
    programs = make_programs(model, optimizer, loss, shardings)
    params = model.init(jax.random.key(0))
    state = jax.jit(optimizer.init, out_shardings=shardings.state.opt_state)(params)
    batches = [to_device(batch, shardings.batch) for batch in make_batches(case)]
    update, rate = to_device(np.int32(0), shardings.scalar), to_device(np.float32(1e-6), shardings.scalar)
    return model, TrainState(update, params, state), programs, batches, rate


def make_batches(case: Case) -> list:
    """Microbatches full of random sequences."""
    examples = random_examples(MICROBATCHES * sequences(case), case.prompt, case.response, case.model.vocab_size)
    return pack(examples, rows=case.rows, tokens_per_row=case.tokens_per_row)


def sequences(case: Case) -> int:
    """In a microbatch."""
    return case.rows * (case.tokens_per_row // (case.prompt + case.response))


def forward_work(case: Case) -> float:
    """FLOPs of one microbatch, by the formula above."""
    count, length = sequences(case), case.prompt + case.response
    return forward_flops(case.model, count * length, count * causal_pairs(length), count * case.response)


if __name__ == "__main__":
    main()
