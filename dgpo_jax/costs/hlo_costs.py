"""What one run of a compiled program costs one device: FLOPs, bytes of memory, bytes over links.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count, and a model whose layers are scanned
by their number too little. Here the text of the program is walked from its entry, and what is in a loop counts as
often as the loop runs:

    while         its trip count, from XLA's own note (known_trip_count) or from the bound that its condition compares
                  with; where both are data, `unknown_trips` times
    conditional   its costliest branch
    call, async   what they call
    fusion        matrix products inside; of memory only what goes in and comes out

FLOPs are those of matrix products: dot, convolution, those of libraries, and kernels, which XLA cannot look into; others are
too few to matter, and TPUs do them beside the products. Bytes are those of main memory: what the compiler keeps on the chip is free, and of an
array that is read or written in slices only the slices count. Bytes over links are what a device receives when every
collective goes around a ring, which no algorithm undercuts: of n devices, all-gather (n - 1) times its operand,
reduce-scatter and all-to-all (n - 1) / n, all-reduce twice that, collective-permute all of it.
"""

import math
import re
from typing import NamedTuple

from dgpo_jax.costs.hlo import Array, Computation, Instruction, Module
from dgpo_jax.costs.hlo_flops import convolution_flops, dot_flops, library_flops
from dgpo_jax.costs.hlo_kernels import kernel_costs
from dgpo_jax.costs.hlo_memory import moved_bytes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Costs(NamedTuple):
    """Of one device and one run; all floats."""

    products: float = 0.0  # FLOPs of matrix products
    kernels: float = 0.0  # FLOPs of kernels such as splash attention
    bytes: float = 0.0  # read from and written to the device's main memory
    collectives: dict[str, float] = {}  # noqa: RUF012 -- bytes that a device receives, by kind; never written to
    unknown_loops: int = 0  # loops whose trip count is data

    @property
    def flops(self) -> float:
        """All of them."""
        return self.products + self.kernels

    @property
    def link_bytes(self) -> float:
        """Of all collectives."""
        return sum(self.collectives.values())

    def times(self, count: float) -> "Costs":
        """Of `count` runs."""
        links = {kind: count * size for kind, size in self.collectives.items()}
        return Costs(count * self.products, count * self.kernels, count * self.bytes, links, self.unknown_loops)

    def plus(self, other: "Costs") -> "Costs":
        """Of both."""
        kinds = self.collectives | other.collectives
        links = {kind: self.collectives.get(kind, 0.0) + other.collectives.get(kind, 0.0) for kind in kinds}
        return Costs(
            self.products + other.products, self.kernels + other.kernels, self.bytes + other.bytes, links,
            self.unknown_loops + other.unknown_loops,
        )  # fmt: skip


def costs(module: Module, *, unknown_trips: float = 1.0, attended: float = 1.0) -> Costs:
    """Of one run of the program on one device.

    Args:
        unknown_trips: how often a loop runs whose trip count is data.
        attended: share of the scores that attention kernels compute; see `hlo_kernels.kernel_costs`.
    """
    return _Walk(module, unknown_trips, attended).of(module.entry)


class _Walk:
    """One pass over a module; computations that are called twice are counted once and remembered."""

    def __init__(self, module: Module, unknown_trips: float, attended: float):
        self.module, self.unknown_trips, self.attended = module, unknown_trips, attended
        self.known: dict[str, Costs] = {}

    def of(self, name: str) -> Costs:
        """Costs of running the computation once."""
        if name not in self.known:
            computation, total = self.module.computations[name], Costs()
            for instruction in computation.instructions.values():
                total = total.plus(self.one(computation, instruction))
            self.known[name] = total
        return self.known[name]

    def one(self, computation: Computation, instruction: Instruction) -> Costs:
        opcode, called = instruction.opcode, instruction.called
        if opcode == "while":
            trips = trip_count(self.module, computation, instruction)
            body = self.of(called["body"]).times(self.unknown_trips if trips is None else trips)
            return body if trips is not None else body._replace(unknown_loops=body.unknown_loops + 1)
        if opcode == "conditional":
            branches = [self.of(name) for name in instruction.branches]
            return max(branches, key=lambda branch: (branch.flops, branch.bytes))
        if opcode == "call" or opcode == "async-start":
            return self.of(called.get("to_apply") or called.get("calls") or called["async_computation"])
        moved = Costs(bytes=moved_bytes(self.module, computation, instruction))
        if opcode == "fusion":
            inside = self.of(called["calls"])
            return inside._replace(bytes=moved.bytes)
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES and is_counted(computation, instruction):
            kind = "reduce-scatter" if computation.name.startswith("all-reduce-scatter") else kind
            received = received_bytes(kind, computation.operands_of(instruction), group_size(instruction.rest))
            return moved._replace(collectives={kind: received})
        if opcode == "dot":
            return moved._replace(products=dot_flops(computation, instruction))
        if opcode == "convolution":
            return moved._replace(products=convolution_flops(computation, instruction))
        if opcode == "custom-call":
            return self.custom_call(computation, instruction, moved)
        return moved

    def custom_call(self, computation: Computation, instruction: Instruction, moved: Costs) -> Costs:
        operands = computation.operands_of(instruction)
        if re.search(r'custom_call_target="__(cublas|onednn)\$', instruction.rest):
            return moved._replace(products=library_flops(operands, instruction))
        flops, moved_by_kernel = kernel_costs(instruction, operands, self.attended)
        return moved._replace(kernels=flops, bytes=moved.bytes if moved_by_kernel is None else moved_by_kernel)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where that is data."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called["condition"]]
    compared = _comparison(module, condition)
    if compared is None:
        return None
    index, bound = compared
    start, step = _initial(computation, loop, index), _step(module, module.computations[loop.called["body"]], index)
    return None if start is None else max(math.ceil((bound - start) / step), 0)


def _comparison(module: Module, condition: Computation) -> tuple[int, int] | None:
    """(index in the loop's tuple, bound) of a condition `tuple[index] < bound`."""
    root = condition.instructions[condition.root]
    inputs = [condition.instructions[name] for name in root.operands]
    if root.opcode == "fusion":
        inner = module.computations[root.called["calls"]]
        given = dict(zip((one.name for one in inner.parameters()), inputs, strict=True))
        root = inner.instructions[inner.root]
        inputs = [given.get(name, inner.instructions[name]) for name in root.operands]
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    counter, bound = inputs
    index = re.search(r"index=(\d+)", counter.rest) if counter.opcode == "get-tuple-element" else None
    if index is None or bound.opcode != "constant":
        return None
    return int(index.group(1)), int(bound.literal)


def _initial(computation: Computation, loop: Instruction, index: int) -> int | None:
    """The constant that a loop's counter starts from."""
    given = computation.instructions[loop.operands[0]]
    if given.opcode != "tuple":
        return None
    start = computation.instructions[given.operands[index]]
    while start.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        start = computation.instructions[start.operands[0]]
    return int(start.literal) if start.opcode == "constant" else None


def is_counted(computation: Computation, instruction: Instruction) -> bool:
    """Whether a collective is one of its own: TPUs repeat an asynchronous one in every fusion that it runs beside."""
    if '"async_collective_fusion_config"' not in instruction.rest:
        return True
    return any('"AsyncCollectiveStart"' in one.rest for one in computation.instructions.values())


def _step(module: Module, body: Computation, index: int) -> int:
    """What a loop's counter grows by at every trip: not 1 where the compiler has unrolled the loop."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return 1
    total, place, name = 0, body, root.operands[index]
    while True:
        producer = place.instructions[name]
        if producer.opcode == "fusion" and place is body:
            inner = module.computations[producer.called["calls"]]
            if inner.instructions[inner.root].opcode != "add":
                break
            given = {one.name: operand for one, operand in zip(inner.parameters(), producer.operands, strict=True)}
            added = [inner.instructions[operand] for operand in inner.instructions[inner.root].operands]
            added = [body.instructions[given[one.name]] if one.name in given else one for one in added]
        elif producer.opcode == "add":
            added = [place.instructions[operand] for operand in producer.operands]
        elif producer.opcode in ("copy", "bitcast"):
            name = producer.operands[0]
            continue
        else:
            break
        numbers = [int(one.literal) for one in added if one.opcode == "constant"]
        others = [one.name for one in added if one.opcode != "constant"]
        if len(numbers) != 1 or others[0] not in body.instructions:
            break
        total, name = total + numbers[0], others[0]
    return max(total, 1)


def received_bytes(kind: str, operands: list[Array], devices: int) -> float:
    """Of a collective of so many devices, by one of them."""
    size = sum(array.bytes for array in operands)
    others = devices - 1
    share = {
        "all-gather": others, "reduce-scatter": others / devices, "all-to-all": others / devices,
        "all-reduce": 2 * others / devices, "collective-permute": 1,
    }  # fmt: skip
    return size * share[kind]


def group_size(attributes: str) -> int:
    """Devices that take part in a collective together: {{0,1},{2,3}}, [2,4]<=[8], or mesh['a'=2,'b'=4] {'b'}."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed.group(1).split(","))
    arranged = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if arranged:
        return int(arranged.group(1))
    named = re.search(r"replica_groups=(?:@\w+)?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", named.group(1)))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", named.group(2)))
    return 2  # collective-permute names pairs, and its share does not depend on their number
