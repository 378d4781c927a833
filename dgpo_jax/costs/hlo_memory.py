"""Bytes of main memory that one instruction of a compiled program reads and writes."""

import math
import re

from dgpo_jax.costs.hlo import Array, Computation, Instruction, Module

# Name things, or end what has been counted where it began: they move nothing.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "domain", "iota",
}  # fmt: skip
FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding", "AsyncCollectiveStart", "AsyncCollectiveDone"}
SLICES = {"dynamic-slice", "slice", "gather"}
VIEWS = {"bitcast", "get-tuple-element", "reshape", "convert"}


def moved_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Main memory that an instruction reads and writes."""
    opcode = instruction.opcode
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    if opcode in FREE or opcode.endswith(("-done", "-update")) or (target and target.group(1) in FREE_CALLS):
        return 0.0
    if opcode == "fusion":
        return _fusion_bytes(module, computation, instruction)
    if opcode in ("copy-start", "slice-start"):  # (to, from, ...): what the second operand of the pair is, is the first again
        return _main(instruction.result[:1]) + sum(min(_main([array]), instruction.result[0].bytes) for array in computation.operands_of(instruction)[:1])
    operands = computation.operands_of(instruction)
    if opcode in SLICES or (opcode == "custom-call" and '/gather"' in instruction.rest):  # the latter by a SparseCore
        source = instruction.result[0].bytes if _main(operands[:1]) else 0.0
        return source + _main(operands[1:]) + _main(instruction.result)
    if opcode in ("dynamic-update-slice", "scatter"):
        updates = operands[1:2] if opcode == "dynamic-update-slice" else operands[-1:]
        written = updates[0].bytes if _main(operands[:1]) else 0.0
        return written + _main(updates)
    return _main(operands) + _main(instruction.result)


def _main(arrays) -> float:
    return float(sum(array.bytes for array in arrays if array.space == 0))


def _fusion_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    inner = module.computations[instruction.called["calls"]]
    total = 0.0
    for parameter, name in zip(inner.parameters(), instruction.operands, strict=True):
        given = computation.instructions[name].result
        total += min(_main(given), _read(module, inner, parameter.name)) if len(given) == 1 else _main(given)
    return total + _written(inner, inner.root, instruction.result)


def _read(module: Module, inner: Computation, name: str) -> float:
    """Bytes that a fusion reads of one of its arrays: its slices, if nothing but slices are used."""
    total = 0.0
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode in SLICES and user.operands[0] == name:
            total += user.result[0].bytes
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            continue  # written in place
        elif user.opcode == "tuple":
            continue  # passed on
        elif user.opcode in VIEWS:
            total += _read(module, inner, user.name)
        elif user.opcode == "fusion":
            nested = module.computations[user.called["calls"]]
            for parameter, given in zip(nested.parameters(), user.operands, strict=True):
                if given == name:
                    total += _read(module, nested, parameter.name)
        else:
            return math.inf
    return total


def _written(inner: Computation, root: str, results: tuple[Array, ...]) -> float:
    """Bytes that a fusion writes: of an array updated in place only the update, of one passed on nothing."""
    producer = inner.instructions[root]
    if producer.opcode == "tuple":
        parts = [(name, inner.instructions[name].result) for name in producer.operands]
        if len(results) != len(parts):
            return _main(results)
        return sum(_written(inner, name, (result,)) for (name, _), result in zip(parts, results, strict=True))
    while producer.opcode in VIEWS and producer.opcode != "convert":
        producer = inner.instructions[producer.operands[0]]
    if producer.opcode == "parameter":
        return 0.0
    if producer.opcode in ("dynamic-update-slice", "scatter") and _main(results):
        update = producer.operands[1 if producer.opcode == "dynamic-update-slice" else -1]
        return inner.instructions[update].result[0].bytes
    return _main(results)
