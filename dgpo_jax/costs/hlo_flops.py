"""FLOPs of one instruction of a compiled program, where it multiplies matrices: two per multiplication and addition."""

import math
import re

import numpy as np

from dgpo_jax.costs.hlo import Array, Computation, Instruction


def dot_flops(computation: Computation, instruction: Instruction) -> float:
    """2 per multiplication and addition."""
    left = computation.operands_of(instruction)[0].dims
    contracted = _numbers(instruction.rest, r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2.0 * instruction.result[0].size * math.prod(left[axis] for axis in contracted)


def library_flops(operands: list[Array], instruction: Instruction) -> float:
    """Of a product that a library does (cuBLAS, oneDNN)."""
    contracted = re.search(r'"lhs_contracting_dimensions":\["?(\d+)', instruction.rest)
    axis = int(contracted.group(1)) if contracted else -1
    return 2.0 * instruction.result[0].size * operands[0].dims[axis]


def convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Of a convolution, which on TPUs is what becomes of most products of matrices; padding and holes are not multiplied."""
    left, right = (array.dims for array in computation.operands_of(instruction)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    at = [{label: size for label, size in zip(names, dims, strict=True)} for names, dims in zip(labels, (left, right, instruction.result[0].dims), strict=True)]
    spatial = sorted(label for label in labels[0] if label.isdigit())
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    window = dict(part.split("=") for part in window.group(1).split()) if window else {}
    pairs = 1.0
    for axis, label in enumerate(spatial):
        low = int(_part(window, "pad", axis, "0_0").split("_")[0])
        stride, lhs_dilate, rhs_dilate = (int(_part(window, name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        pairs *= _valid_pairs(at[2][label], at[1][label], at[0][label], low, stride, lhs_dilate, rhs_dilate)
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    return 2.0 * pairs * at[2]["b"] * at[2]["f"] * at[1]["i"] / (int(groups.group(1)) if groups else 1)


def _part(window: dict[str, str], name: str, axis: int, default: str) -> str:
    return window[name].split("x")[axis] if name in window else default


def _valid_pairs(outputs: int, taps: int, inputs: int, low: int, stride: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of an output and a tap of the kernel that meet a number of the input."""
    if taps > outputs:  # only to loop over the fewer
        place = lambda few, many: few * stride + many * rhs_dilate - low  # noqa: E731
        few, many = outputs, np.arange(taps)
    else:
        place = lambda few, many: many * stride + few * rhs_dilate - low  # noqa: E731
        few, many = taps, np.arange(outputs)
    total = 0
    for one in range(few):
        at = place(one, many)
        total += int(np.sum((at >= 0) & (at <= (inputs - 1) * lhs_dilate) & (at % lhs_dilate == 0)))
    return total


def _numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(number) for number in found.group(1).split(",") if number] if found else []
