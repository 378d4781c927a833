"""XLA flags per backend: the one place where they are set, what each is for, and who says so. Never imports JAX.

Commands set them before the backend starts (`session.run_command`); the backend reads the environment then and never
again. A flag that is in the environment already keeps its value: yours always win. DGPO_JAX_FLAGS=0 sets none.

Only flags that their makers document as a gain and that are not the default yet (read in XLA of jaxlib 0.10.2):
nothing for one CPU or GPU; on several devices they let collectives run behind computation.

An XLA that does not know a flag ends the process. TPU flags therefore come with `--undefok`, by which libtpu passes
over names it does not know; for GPUs a name that is nowhere in jaxlib's library is left out.
"""

import importlib.util
import mmap
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Flag(NamedTuple):
    """One flag of XLA."""

    name: str
    value: str
    purpose: str


# Sources: https://openxla.org/xla/flags_guidance ("Suggested Values"), and for GPUs https://openxla.org/xla/gpu_optimization_levels
# (what -O1 switches on) with https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance. Already on by
# default, and so not here: TPU's latency-hiding scheduler and asynchronous all-gathers; Triton matrix products, command
# buffers and pipelined reduce-scatters on GPUs.
#
# Suggested there too, and left to you: xla_tpu_enable_async_all_to_all, with which an update does not compile for v5e:16x16
# ("not supported on limited ICI"); and xla_tpu_enable_ici_ag_pipelining with xla_should_allow_loop_variant_parameter_in_chain
# and xla_should_add_loop_invariant_op_in_chain gather a layer's weights during the layer before. Compiled for v5e:2x4 (a
# gradient over 4 layers, fsdp 8) they take 1.7 times the compiler's work and 475 MiB of temporaries instead of 415. Without
# them the gathers already run asynchronously within a layer; what they gain could not be measured without a TPU.
FLAGS = {
    "tpu": (
        Flag("xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true", "gradients are summed behind computation"),
    ),
    "gpu": (
        Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "orders collectives so that computation hides them"),
        Flag("xla_gpu_enable_pipelined_all_gather", "true", "gathers a layer's weights while the one before is computed"),
        Flag("xla_gpu_enable_pipelined_all_reduce", "true", "the same for sums over data replicas"),
    ),
}

# What config.deterministic adds. https://openxla.org/xla/determinism; it also turns off autotuning, whose choice is by time.
DETERMINISTIC = {"gpu": (Flag("xla_gpu_deterministic_ops", "true", "the same bits in every run"),), "tpu": ()}

VARIABLES = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}
GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def set_flags(
    backends: Sequence[str] | None = None, environment: MutableMapping[str, str] = os.environ, deterministic: bool = False
) -> dict[str, list[str]]:
    """Adds the flags of these backends to the environment, those left out that are in it already.

    Args:
        backends: of "tpu" and "gpu"; None = those that JAX could start here, see `installed_backends`.
        deterministic: also those of DETERMINISTIC, even where DGPO_JAX_FLAGS is 0.
    Returns:
        What was added: {variable: ["--name=value", ...]}, empty if nothing was.
    """
    fast = environment.get("DGPO_JAX_FLAGS") != "0"
    added = {}
    for backend in installed_backends(environment) if backends is None else backends:
        variable = VARIABLES[backend]
        present = environment.get(variable, "")
        wanted = [*(FLAGS[backend] if fast else ()), *(DETERMINISTIC[backend] if deterministic else ())]
        flags = [flag for flag in wanted if flag.name not in names_in(present)]
        if backend == "gpu":
            flags = known_to_jaxlib(flags)
        if not flags:
            continue
        added[variable] = [f"--{flag.name}={flag.value}" for flag in flags]
        undefok = [f"--undefok={','.join(flag.name for flag in flags)}"] if backend == "tpu" else []
        environment[variable] = " ".join([*undefok, *added[variable], *present.split()])
    return added


def names_in(arguments: str) -> set[str]:
    """Names of the flags in such a variable: "--a=1 -b --noc" gives a, b and c (and noc)."""
    names = {argument.lstrip("-").partition("=")[0] for argument in arguments.split()}
    return names | {name.removeprefix("no") for name in names}


def installed_backends(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Those that have a plugin here and that JAX_PLATFORMS does not rule out."""
    allowed = [name for name in environment.get("JAX_PLATFORMS", "").split(",") if name]
    found = {
        "tpu": _installed("libtpu") and (not allowed or "tpu" in allowed),
        "gpu": any(map(_installed, GPU_PLUGINS)) and (not allowed or bool({"gpu", "cuda"} & set(allowed))),
    }
    return [backend for backend, here in found.items() if here]


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def known_to_jaxlib(flags: Sequence[Flag]) -> list[Flag]:
    """Those whose names occur in jaxlib's library; all of them where that is not a file of its usual name."""
    package = importlib.util.find_spec("jaxlib")
    library = Path(package.origin).parent / "libjax_common.so" if package and package.origin else None
    if library is None or not library.is_file():
        return list(flags)
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [flag for flag in flags if content.find(flag.name.encode()) >= 0]
