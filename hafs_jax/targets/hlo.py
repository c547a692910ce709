"""The text of a compiled XLA program as objects. Standard library only.

The text is what `compiled.as_text()` returns: one computation after the other, one instruction a line. Only what the
cost of a program depends on is kept: shapes, operands, and attributes as text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


@dataclass(frozen=True)
class Shape:
    """An array's dtype, in XLA's words, and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        """0 for what is no array, such as a token."""
        return self.size * _BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. Several shapes are those of a tuple."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str  # the text between the opcode's brackets
    attributes: str  # the text after them
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def source(self) -> str:
        """Which operation of the traced function it stems from; empty where XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def named(self, *attributes: str) -> list[str]:
        """The computations that the given attributes name, such as `body` or `calls`."""
        found = []
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            found += re.findall(r"[\w.\-]+", match.group(1).replace("%", "")) if match else []
        return found

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute such as `dimensions={1,0}`; none where it is missing."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(number) for number in match.group(1).split(",") if number) if match else ()

    @property
    def trips(self) -> int | None:
        """How often a loop's body runs, where the compiler knows."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        return self.named("branch_computations") or self.named("true_computation", "false_computation")


@dataclass(frozen=True)
class Computation:
    """The instructions of one computation, by name, in the order of the schedule."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters, by their number."""
        return {int(one.arguments): one for one in self.instructions.values() if one.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each instruction, those that read it, and as which of their operands."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for index, operand in enumerate(instruction.operands):
                found.setdefault(operand, []).append((instruction, index))
        return found


@dataclass(frozen=True)
class Program:
    """A compiled program: its computations, and which of them is called first."""

    computations: dict[str, Computation]
    entry: str

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """What a fusion computes: the instructions of its computation, with those of fusions inside it."""
        for name in instruction.named("calls"):
            computation = self.computations[name]
            for inner in computation.instructions.values():
                yield computation, inner
                yield from self.inside(inner) if inner.opcode == "fusion" else ()


def parse(text: str) -> Program:
    """The program that `text` describes. Raises `ValueError` where it is no program."""
    computations: dict[str, Computation] = {}
    entry, lines = "", dict[str, Instruction]()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = {}
            computations[head.group(2)] = Computation(head.group(2), lines)
            entry = head.group(2) if head.group(1) else entry
        elif instruction := _instruction(line):
            lines[instruction.name] = instruction
    if not entry:
        raise ValueError("expected the text of a compiled XLA program, found no ENTRY computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    kind, rest = _bracketed(line[head.end() :]) if line[head.end()] == "(" else line[head.end() :].split(" ", 1)
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return None
    arguments, attributes = _bracketed(rest[opcode.end() - 1 :])
    arguments = arguments[1:-1]
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _SHAPE.findall(kind)
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(head.group(2), opcode.group(1), shapes, operands, arguments, attributes, bool(head.group(1)))


def _bracketed(text: str) -> tuple[str, str]:
    """The text up to the bracket that closes its first one, and what follows it."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    return text, ""
