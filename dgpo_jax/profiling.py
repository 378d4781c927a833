"""Traces of single iterations, for TensorBoard's profile plugin, xprof, or https://ui.perfetto.dev."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from dgpo_jax.config import Config, parse_iterations
from dgpo_jax.session import say


@contextlib.contextmanager
def profiled(config: Config, workdir: Path, iteration: int) -> Iterator[None]:
    """Traces what is done within, if config.profile names the iteration; changes nothing but the time it takes.

    The trace is in workdir/profile/iteration_000003/. It shows the parts of the iteration by the names of the
    stopwatch (rollout, verify, update), and inside the programs the names of `jax.named_scope`.
    """
    if not any(iteration in wanted for wanted in parse_iterations(config.profile)):
        yield
        return
    folder = workdir / "profile" / f"iteration_{iteration:06d}"
    with jax.profiler.trace(str(folder)), jax.profiler.StepTraceAnnotation("iteration", step_num=iteration):
        yield
    say(f"profile of iteration {iteration} in {folder}: tensorboard --logdir {workdir}/profile, or open its trace.json.gz in ui.perfetto.dev")
