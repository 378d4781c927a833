"""What a method costs: the time of one update under each of them, in one run.

    python benchmarks/method_cost.py [--config.model.width=256 ...]

Every method takes the same batches of random tokens, in turns, so that whatever else the machine does slows all alike.
Prints the median of each and its ratio to `reinforce`, which looks at no ratio and no region; and, free of noise, how the
floating-point operations and the memory traffic that XLA counts in one microbatch compare. The sizes are those of
configs/smoke.py unless the command line says otherwise.
"""

import statistics
import sys
import time
from dataclasses import replace

import jax
import numpy as np
from random_examples import random_examples

from dgpo_jax.build import build_parts, build_programs, build_state
from dgpo_jax.config import Config, load
from dgpo_jax.learning import row_shape
from dgpo_jax.recipe import resolve
from dgpo_jax.rl.losses import METHODS
from dgpo_jax.rl.packing import pack
from dgpo_jax.rl.update import take_update
from dgpo_jax.sharding import to_device

ROUNDS = 60  # timed updates of each method, after two that compile and warm up


def main(arguments: list[str]) -> None:
    """Times the updates and prints a Markdown table."""
    base = load(["--config=configs/smoke.py", "--config.rollout.dynamic_sampling=False", *arguments])
    parts = build_parts(resolve(base))
    state = build_state(base, parts)
    batches = [to_device(batch, parts.shardings.batch) for batch in make_batches(base, parts)]
    rate = to_device(np.float32(1e-6), parts.shardings.scalar)
    programs = {name: build_programs(resolve(with_method(base, name)), parts) for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    order = np.random.default_rng(0)
    for round_number in range(ROUNDS + 2):
        for name in order.permutation(list(METHODS)):  # no method always after the same other
            began = time.perf_counter()
            state, _, figures = take_update(programs[name], state, batches, rate)
            jax.block_until_ready((state, figures))
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - began)
    print(f"{len(batches)} microbatches of {batches[0].tokens.shape}, median of {ROUNDS} updates in turns\n")
    counted = {name: count(programs[name], state.params, batches[0]) for name in METHODS}
    print("| method | milliseconds | to reinforce: median of the paired ratios | middle half of them | operations | traffic |")
    print("|---|---|---|---|---|---|")
    for name, times in seconds.items():
        ratios = [own / other for own, other in zip(times, seconds["reinforce"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        operations, traffic = (own / other for own, other in zip(counted[name], counted["reinforce"], strict=True))
        print(
            f"| {name} | {1000 * statistics.median(times):.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |"
            f" {operations:.4f} | {traffic:.4f} |"
        )


def count(programs, params, batch) -> tuple[float, float]:
    """(floating-point operations, bytes of memory traffic) of one microbatch, as XLA counts them."""
    compiled = programs.accumulate.lower(params, programs.zero(params), batch).compile()
    costs = compiled.cost_analysis()
    return costs["flops"], costs["bytes accessed"]


def with_method(config: Config, name: str) -> Config:
    """The config with another method, everything else the same."""
    return replace(config, loss=replace(config.loss, method=name))


def make_batches(config: Config, parts) -> list:
    """Microbatches full of responses whose ratios reach every region."""
    rows = row_shape(config, parts)
    prompt, response = config.rollout.max_prompt, config.rollout.max_response
    count = rows["rows"] * (rows["tokens_per_row"] // (prompt + response))
    return pack(random_examples(count, prompt, response, parts.model.config.vocab_size), **rows)


if __name__ == "__main__":
    main(sys.argv[1:])
