"""What this machine's first device can do: the rates that benchmarks state their figures as shares of."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def timed(function: Callable, *arguments) -> float:
    """Seconds of one call, its results awaited."""
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def matmul_rate(dtype: str = "float32", size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of a product of square matrices, the fastest of several measurements of 8 products each."""

    def products(x, y):
        for _ in range(8):
            x = jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)
        return x

    x = jnp.full((size, size), 1 / size, dtype)
    function = jax.jit(products)
    timed(function, x, x)
    return 8 * 2 * size**3 / min(timed(function, x, x) for _ in range(repeats))


def bandwidth(gib: float = 0.5, repeats: int = 5) -> float:
    """Bytes/s to and from memory, the fastest of several measurements: one read and one write of an array this large.

    In place: on a CPU a new array would mostly measure how fast the kernel gives out pages.
    """
    x = jnp.zeros(int(gib * 2**30) // 4, jnp.float32)
    function = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        x = jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - began)
    return 2 * x.nbytes / min(seconds[1:])


def describe() -> str:
    """The device in words."""
    device = jax.devices()[0]
    return f"{device.device_kind} ({device.platform}), jax {jax.__version__}"
