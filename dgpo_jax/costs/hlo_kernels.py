"""What this package's TPU kernels cost: XLA cannot look into them, and how much they do depends on data."""

import json
import math
import re
from typing import NamedTuple

from dgpo_jax.costs.hlo import Array, Instruction

SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
WRITTEN_SLOTS = 16  # that `decode_attention.write` reads and writes for one of them


class KernelCosts(NamedTuple):
    """Of one call."""

    flops: float
    bytes: float | None  # of main memory; None = all that goes in and comes out


def kernel_costs(instruction: Instruction, operands: list[Array], share: float) -> KernelCosts:
    """Of a custom call.

    Args:
        share: of the scores that attention computes: of the causal half of a row (splash attention), or of the slots
            of a cache (decoding).
    """
    if 'custom_call_target="tpu_custom_call"' not in instruction.rest:
        return KernelCosts(0.0, None)
    name = re.search(r"splash_m[hq]a_(fwd|dq|dkv)|decode_attention|write_to_cache", instruction.name + instruction.rest)
    if name is None:
        return KernelCosts(_estimate(instruction), None)
    if name.group() == "write_to_cache":
        new = next(array for array in operands if len(array.dims) == 3)  # [B, K, H], of keys; values are as many
        return KernelCosts(0.0, 2.0 * 2 * WRITTEN_SLOTS * new.bytes)
    if name.group() == "decode_attention":
        query = next(array for array in operands if len(array.dims) == 4)  # [B, K, M, H]
        cache = next(array for array in operands if len(array.dims) == 5)  # [L, C, K, S, H], of keys
        read = cache.bytes / cache.dims[0] / cache.dims[1] * query.dims[0]  # a layer of the first B rows
        return KernelCosts(2 * 2.0 * query.size * cache.dims[3] * share, 2 * read * share + 2 * query.bytes)
    # Two products forward; for the queries' gradient, and for that of keys and values, the scores once more and theirs.
    query, key = [array.dims for array in operands if len(array.dims) == 3 and array.dtype in ("bf16", "f32")][:2]
    return KernelCosts(SPLASH_PRODUCTS[name.group(1)] * 2.0 * math.prod(query) * key[1] / 2 * share, None)


def _estimate(instruction: Instruction) -> float:
    """FLOPs that a Pallas kernel was declared to take; 0 where nothing was declared."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.rest)
    return float(json.loads(found.group(1)).get("flops", 0)) if found else 0.0
