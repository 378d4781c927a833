"""Reads the text of a compiled program (optimised HLO) as computations of instructions.

    module = parse(compiled.as_text())
    module.entry                     # name of the computation that is run
    module.computations["body"]      # its instructions, in order

Only what counting costs needs: shapes, operands, which computations are called, and the rest of the line as text.
"""

import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}  # others end in their number of bits, as bf16, f8e4m3fn
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation|async_computation)=%([\w.\-]+)")
_ENDS = re.compile(r"\}(, execution_thread=.*)?$")  # of a computation
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Array(NamedTuple):
    """Shape and place of one array."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # memory it lies in: 0 = the device's main memory, others are on the chip or the host

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """What it takes, padding of its layout left out; half a byte per number of four bits."""
        return self.size * bytes_of(self.dtype)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]  # of a tuple its arrays, nested ones flattened
    operands: tuple[str, ...]  # names of instructions of the same computation
    literal: str  # what stands between the parentheses: of a constant its value, of a parameter its number
    rest: str  # attributes, as they stand

    @property
    def called(self) -> dict[str, str]:
        """Computations it refers to, by attribute: {"body": ..., "condition": ...}."""
        return dict(_CALLED.findall(self.rest))

    @property
    def branches(self) -> list[str]:
        """Of a conditional, its computations."""
        listed = _BRANCHES.search(self.rest)
        if listed:
            return _NAME.findall(listed.group(1))
        return [name for kind, name in self.called.items() if kind in ("true_computation", "false_computation")]


class Computation(NamedTuple):
    """Instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction]
    root: str  # name of the one that is the result

    def operands_of(self, instruction: Instruction) -> list[Array]:
        """Arrays of all its operands, tuples flattened."""
        return [array for name in instruction.operands for array in self.instructions[name].result]

    def parameters(self) -> list[Instruction]:
        """In the order of their numbers."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.literal))


class Module(NamedTuple):
    """A whole program."""

    computations: dict[str, Computation]
    entry: str


def bytes_of(dtype: str) -> float:
    """Bytes of one number: 2 of bf16, 0.5 of s4.

    Raises:
        ValueError: no such dtype is known.
    """
    if dtype in BYTES:
        return BYTES[dtype]
    bits = re.match(r"(?:bf|f|s|u)(\d+)", dtype)
    if not bits:
        raise ValueError(f"HLO dtype {dtype!r} is unknown; add it to hlo.BYTES.")
    return int(bits.group(1)) / 8


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry, name = {}, None, None
    for line in _whole_lines(text):
        header = re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line)
        if header:
            name, instructions, root = header.group(2), {}, ""
            entry = name if header.group(1) else entry
        elif _ENDS.match(line):
            if name is not None:
                computations[name] = Computation(name, instructions, root)
            name = None
        elif name is not None and (read := _instruction(line)):
            is_root, instruction = read
            instructions[instruction.name] = instruction
            root = instruction.name if is_root else root
    if entry not in computations:
        raise ValueError(f"HLO text without an ENTRY computation: {text[:80]!r}; give the text of a compiled program.")
    return Module(computations, entry)


def _whole_lines(text: str) -> list[str]:
    """Lines, with the attributes of a kernel that go over several of them joined."""
    whole: list[str] = []
    for line in text.splitlines():
        if whole and not (_ENDS.match(line) or _ENDS.match(whole[-1]) or re.match(r"\s+(ROOT )?%|ENTRY |%|$", line)):
            whole[-1] += line
        else:
            whole.append(line)
    return whole


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a shape as it stands: "bf16[2,3]{1,0:S(1)}" or a tuple of such."""
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), _space(layout))
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _space(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found.group(1)) if found else 0


def _instruction(line: str) -> tuple[bool, Instruction] | None:
    start = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if not start:
        return None
    after_shape = _closing(line, start.end()) if line[start.end()] == "(" else line.index(" ", start.end())
    shape, rest = line[start.end() : after_shape], line[after_shape:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing - 1]
    opcode = rest[:opening]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(literal))
    return bool(start.group(1)), Instruction(start.group(2), opcode, arrays_of(shape), operands, literal, rest[closing:])


def _closing(text: str, opening: int) -> int:
    """Index behind the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)
