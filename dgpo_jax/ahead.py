"""Programs known by their shapes alone, and compiling them before they are needed.

A `Program` is a jitted function with the shapes, dtypes and shardings that a run will call it with. From a list of them
a dry run says what a run would take, and a run compiles them all at its start: several at once, and with a line for
each, instead of one by one whenever the first call happens to come.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from dgpo_jax import activity
from dgpo_jax.metrics import progress


class Program(NamedTuple):
    """One compiled program of a run."""

    name: str  # such as "decode 64"
    phase: str  # "rollout" or "update"
    function: Any  # jitted
    arguments: tuple  # trees of jax.ShapeDtypeStruct with shardings, as function.lower takes them
    count: float = 1  # calls per iteration, as planned


def compile_program(program: Program) -> Any:
    """The compiled program (jax.stages.Compiled), from the persistent cache if it is there.

    jax keeps the executable with the function: a later ordinary call with arrays of these shapes, dtypes and shardings
    finds it and compiles nothing.

    Raises:
        RuntimeError: the compiler refuses, mostly for want of memory; begins with the program's name.
    """
    try:
        return program.function.lower(*program.arguments).compile()
    except RuntimeError as error:  # jax.errors.JaxRuntimeError is one
        raise RuntimeError(f"program {program.name!r} does not compile: {error}") from error


def compile_ahead(
    programs: Sequence[Program], threads: int = 2, report: Callable[[str, float], object] = lambda name, seconds: None
) -> list[tuple[str, float]]:
    """Compiles all programs, `threads` at a time, in the order given.

    Tracing holds Python's lock and so goes one at a time; the compiler itself does not.

    Args:
        report: told (name, seconds) of each as it is done.
    Returns:
        (name, seconds) in the order in which they were done. They overlap: their sum is more than the time it took.
    Raises:
        RuntimeError: as `compile_program`, of the first that fails; those not yet begun are left.
    """

    def timed(program: Program) -> tuple[str, float]:
        began = time.perf_counter()
        with activity.doing(f"compiling {program.name!r}"):
            compile_program(program)
        return program.name, time.perf_counter() - began

    finished, pool = [], ThreadPoolExecutor(threads)
    try:
        with progress("compiling", len(programs)) as advance:
            for done in as_completed([pool.submit(timed, program) for program in programs]):
                finished.append(done.result())
                report(*finished[-1])
                advance()
    finally:  # of one that fails or is interrupted those under way are not waited for: they cannot be called back
        pool.shutdown(wait=False, cancel_futures=True)
    return finished
