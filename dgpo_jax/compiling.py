"""The programs of a run, known before it starts, and compiled then: all of them, several at once, with a line for each."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dgpo_jax.ahead import Program, compile_ahead
from dgpo_jax.build import DecodeParams, Parts, abstract_state
from dgpo_jax.config import Config
from dgpo_jax.learning import row_shape
from dgpo_jax.rl.packing import empty_batch
from dgpo_jax.rl.update import Programs
from dgpo_jax.session import say
from dgpo_jax.sharding import abstract

WORTH_A_LINE_S = 10.0  # a program that takes longer to compile is named when it is done
MOST_AT_ONCE = 8  # each compilation takes memory of its own, a few GiB for a large model


def update_programs(config: Config, parts: Parts, programs: Programs) -> list[Program]:
    """What the updates of an iteration call, one microbatch each; of a resolved config."""
    state, scalar = abstract_state(parts), parts.shardings.scalar
    batch = abstract(empty_batch(**row_shape(config, parts)), parts.shardings.batch)
    gradients, totals = jax.eval_shape(programs.zero, state.params)
    carry = (abstract(gradients, parts.shardings.state.params), abstract(totals, scalar))
    rate = jax.ShapeDtypeStruct((), "float32", sharding=scalar)
    listed = [
        Program("accumulate", "update", programs.accumulate, (state.params, carry, batch)),
        Program("score", "update", programs.score, (state.params, batch)),
        Program("complete", "update", programs.complete, (batch, batch.old_logprobs)),
        Program("zero", "update", programs.zero, (state.params,)),
        Program("norm", "update", programs.norm, carry[:1]),
        Program("apply", "update", programs.apply, (state, *carry, rate)),
    ]
    compute = parts.model.compute_dtype
    if config.kl.coefficient and compute != "float32":  # else it is the same program as "score"
        reference = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, compute, sharding=leaf.sharding), state.params)
        listed.append(Program("score the reference", "update", programs.score, (reference, batch)))
    return listed


def rollout_programs(parts: Parts, decode_params: DecodeParams, samplers: Mapping[str, Any], int8: bool = False) -> list[Program]:
    """What sampling calls: the copy of the weights, and what each sampler has.

    Args:
        int8: as of `build.make_decode_params`.
        samplers: by what they are for, such as "greedy", which then begins the names of their programs; "" = training.
    """
    params = abstract_state(parts).params
    weights = abstract(jax.eval_shape(decode_params.program, params), decode_params.shardings)
    name = "decode params in int8" if int8 else "decode params"
    return [Program(name, "rollout", decode_params.program, (params,))] + [
        program._replace(name=f"{purpose} {program.name}".lstrip())
        for purpose, sampler in samplers.items()
        for program in sampler.programs(weights)
    ]


def compile_run(parts: Parts, programs: Sequence[Program]) -> float:
    """Compiles the programs and says so, before the first of them is needed.

    Returns:
        Seconds that it took.
    Raises:
        RuntimeError: one does not compile; the run would have ended there, only later.
    """
    for phase in dict.fromkeys(program.phase for program in programs):
        say(f"to compile, {phase}: {', '.join(program.name for program in programs if program.phase == phase)}")

    def report(name: str, seconds: float) -> None:
        if seconds >= WORTH_A_LINE_S:
            say(f"  {name:<20} {seconds:6.1f} s")

    began = time.perf_counter()
    compile_ahead(programs, count_threads(parts), report)
    seconds = time.perf_counter() - began
    say(f"compiled {len(programs)} programs in {seconds:.1f} s")
    return seconds


def count_threads(parts: Parts) -> int:
    """Programs to compile at once: one per core, but one on CPUs.

    XLA splits what it compiles for a CPU over all cores by itself: two at once took 1.4, 1.1 and 1.4 times as long
    as one after the other (three pairs on 2 cores, the updates of configs/smoke.py).
    """
    if parts.mesh.devices.flat[0].platform == "cpu":
        return 1
    return min(MOST_AT_ONCE, os.cpu_count() or 1)
