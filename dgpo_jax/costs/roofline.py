"""What a compiled program needs of a device's memory, and how long it takes at least.

A program's time is bounded from below by each of three rates: its FLOPs by the chip's peak, the bytes of its memory by
the memory's bandwidth, the bytes of its collectives by the links. The longest is the estimate, as if the other two were
hidden behind it; real programs come near it, never below.
"""

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from dgpo_jax.ahead import Program
from dgpo_jax.costs.hlo_costs import Costs
from dgpo_jax.hardware import GIB, Chip

# GiB that programs get of a device's memory, from the compiler's own words on one that is too large (libtpu of
# jaxlib 0.10.2): the rest is its own.
USABLE_GIB = {"TPU v4": 15.25, "TPU v5e": 15.75, "TPU v5p": 95.73, "TPU v6e": 31.24}


class Memory(NamedTuple):
    """Bytes on one device while a program runs."""

    arguments: int
    temporaries: int
    outputs: int  # those in the place of donated arguments included
    aliased: int  # outputs that take such a place
    code: int
    beside: int  # what is in memory without being an argument

    @property
    def total(self) -> int:
        """All of it, what is in one place counted once."""
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.code + self.beside


class Times(NamedTuple):
    """Seconds that one run takes at least, by each rate."""

    flops: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The longest."""
        return max(self)

    @property
    def bound(self) -> str:
        """Name of the longest."""
        return max(zip(self, self._fields, strict=True))[1]


class Refusal(NamedTuple):
    """The compiler's answer to a program that is too large."""

    needed: float  # bytes
    available: float  # bytes


def capacity(device: Any, chip: Chip | None) -> float | None:
    """Bytes of a device's memory that programs get; None on a CPU, and where nothing is known.

    Args:
        chip: what this one device has of it.
    """
    if device.platform == "gpu":
        return float((device.memory_stats() or {}).get("bytes_limit", 0)) or None
    return USABLE_GIB[chip.name] * GIB if chip is not None and chip.name in USABLE_GIB else None


def memory_of(compiled: Any, beside: int) -> Memory:
    """Of a `jax.stages.Compiled`."""
    sizes = compiled.memory_analysis()
    return Memory(
        sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, sizes.output_size_in_bytes, sizes.alias_size_in_bytes,
        sizes.generated_code_size_in_bytes, beside,
    )  # fmt: skip


def compile_with_text(program: Program, platform: str) -> tuple[Any, str]:
    """(jax.stages.Compiled, its optimised HLO).

    On TPU the text is a dump of the compiler's: `as_text` fails on programs with instructions that libtpu knows and
    jaxlib does not yet (gathers of a SparseCore, with libtpu 0.0.52 and jaxlib 0.10.2).

    Raises:
        RuntimeError: the compiler refuses; see `read_refusal`.
    """
    lowered = program.function.lower(*program.arguments)
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        dumps = sorted(Path(folder).glob("*after_optimizations.txt"))
        return compiled, dumps[-1].read_text() if dumps else compiled.as_text()


def times_of(spent: Costs, chip: Chip) -> Times:
    """What the chip needs for that."""
    return Times(spent.flops / chip.flops, spent.bytes / chip.bandwidth, spent.link_bytes / chip.link)


def read_refusal(message: str) -> Refusal | None:
    """What the compiler said it lacks; None if that was not its complaint."""
    sizes = r"([\d.]+)([KMGT]?)"
    patterns = (rf"\({sizes}\) exceeds available HBM \({sizes}\)", rf"[Uu]sed {sizes} of {sizes} hbm")
    found = next(filter(None, (re.search(pattern, message) for pattern in patterns)), None)
    if found is None:
        return None
    needed, needed_unit, available, available_unit = found.groups()
    return Refusal(_bytes(needed, needed_unit), _bytes(available, available_unit))


def _bytes(number: str, unit: str) -> float:
    return float(number) * 1024 ** " KMGT".index(unit or " ")
