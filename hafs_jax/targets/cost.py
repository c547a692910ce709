"""The cost of a compiled program: bytes, products, loops and sorts of its kernels. Standard library only.

Bytes are those that a kernel must move at least. A kernel that reads slices or gathers rows reads these; one that
updates a part of an array writes that part; a table that fits into the cache is read once. So a time from these bytes
is a roofline: no device was asked, and a kernel may be slower.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from hafs_jax.targets.hlo import Computation, Instruction, Program, Shape

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "copy-done", "async-done", "async-update", "domain", "add-dependency",
}  # fmt: skip
_MOSAIC, _PIECES, _UPDATE = 'custom_call_target="mosaic_gpu', "segment_pieces", "adam_of_rows"
_SLICES = {"slice", "dynamic-slice"}
Array = tuple[str, str, int]
"""An array: the computation, the instruction and the number of its output that made it."""


@dataclass(frozen=True)
class Products:
    """The floating-point operations of a kernel's matrix products, and how they are rounded."""

    flops: int
    dtype: str  # of the factors
    precise: bool = False  # float32 factors are not rounded to fewer bits


@dataclass(frozen=True)
class Kernel:
    """One launch on a device."""

    name: str
    opcode: str
    source: str
    read: int  # bytes
    written: int  # bytes
    products: tuple[Products, ...] = ()
    whole: frozenset[Array] = frozenset()  # the arrays that it reads in whole
    sorted: int = 0  # the width of what it sorts
    shapes: tuple[Shape, ...] = ()

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def flops(self) -> int:
        return sum(of.flops for of in self.products)


@dataclass(frozen=True)
class Loop:
    """A loop: its body, and how often that runs, where the compiler knows."""

    name: str
    source: str
    trips: int | None
    body: "tuple[Part, ...]"


@dataclass(frozen=True)
class Branch:
    """A conditional: its alternatives, of which one runs."""

    name: str
    source: str
    each: "tuple[tuple[Part, ...], ...]"


Part = Kernel | Loop | Branch
"""A part of a schedule."""


@dataclass
class _Walk:
    """Collects the parts of a program's schedule."""

    program: Program
    cache: int  # bytes: a table of at most this size is read once, however often its rows are gathered
    made: dict[Array, Shape] = field(default_factory=dict)

    def parts(self, name: str) -> tuple[Part, ...]:
        computation = self.program.computations[name]
        found: list[Part] = []
        for instruction in computation.instructions.values():
            found += self._part(computation, instruction)
        return tuple(found)

    def _part(self, computation: Computation, instruction: Instruction) -> tuple[Part, ...]:
        opcode = instruction.opcode
        if opcode in _FREE:
            return ()
        if opcode == "while":
            (body,) = instruction.named("body")
            return (Loop(instruction.name, instruction.source, instruction.trips, self.parts(body)),)
        if opcode == "conditional":
            each = tuple(self.parts(name) for name in instruction.branches)
            return (Branch(instruction.name, instruction.source, each),)
        if opcode == "call":
            return self.parts(instruction.named("to_apply")[0])
        if opcode == "async-start":
            return tuple(part for name in instruction.named("calls") for part in self.parts(name))
        return (self._kernel(computation, instruction),)

    def _kernel(self, computation: Computation, instruction: Instruction) -> Kernel:
        read, whole = 0, set[Array]()
        for index, operand in enumerate(instruction.operands):
            source = computation.instructions.get(operand)
            if source is None:
                continue
            if _MOSAIC in instruction.attributes:
                streamed, gathered = self._taken_by_kernel(computation, instruction, source)
            else:
                streamed, gathered = self._taken(instruction, index, source.bytes)
            read += streamed + gathered
            if streamed >= source.bytes > 0:
                array = _origin(computation, operand)
                whole.add(array)
                self.made.setdefault(array, source.shapes[0])
        written = self._written(instruction)
        read += self._updated(instruction)
        return Kernel(
            instruction.name, instruction.opcode, instruction.source, read, written,
            tuple(self._products(computation, instruction)), frozenset(whole), self._sorted(computation, instruction),
            instruction.shapes,
        )  # fmt: skip

    def _taken(self, instruction: Instruction, index: int, size: int) -> tuple[int, int]:
        """The bytes that an instruction reads of its operand `index` of `size` bytes: in order, and row by row."""
        opcode = instruction.opcode
        if opcode == "fusion":
            inner = self.program.computations[instruction.named("calls")[0]]
            parameter = inner.parameters.get(index)
            if parameter is None:
                return size, 0
            streamed, gathered = self._used(inner, parameter.name, size)
            return min(size, streamed), min(size, gathered) if size <= self.cache else gathered
        if opcode in _SLICES and index == 0:
            return instruction.bytes, 0
        if opcode == "gather" and index == 0:
            return 0, min(size, instruction.bytes) if size <= self.cache else instruction.bytes
        if opcode in ("dynamic-update-slice", "scatter") and index == 0:
            return 0, 0
        return size, 0

    def _taken_by_kernel(self, computation: Computation, kernel: Instruction, operand: Instruction) -> tuple[int, int]:
        """The same for a kernel of this package. If it takes rows of tables, the list of entries is before the first.

        An update takes every row once.

        A kernel of pieces adds what a latent has beyond its first entries. The rows that it takes are among those of
        the kernel of the sums, which is charged for all.
        """
        size, shape = operand.bytes, operand.shapes[0]
        shapes = [computation.instructions[name].shapes[0] for name in kernel.operands]
        table = next((number for number, one in enumerate(shapes) if len(one.dims) == 2), 0)
        if len(shape.dims) < 2 or table == 0 or _UPDATE in kernel.source:
            return size, 0
        if _PIECES in kernel.source:
            return 0, 0
        gathered = shapes[table - 1].size * size // shape.dims[0]
        return 0, min(size, gathered) if size <= self.cache else gathered

    def _used(self, computation: Computation, name: str, size: int) -> tuple[int, int]:
        """The bytes that the users of a fusion's parameter read of it: in order, and row by row."""
        streamed, gathered = 0, 0
        for user, index in computation.users.get(name, []):
            if user.opcode == "tuple":
                continue
            behind = user.opcode in ("bitcast", "reshape", "get-tuple-element")
            more = self._used(computation, user.name, size) if behind else self._taken(user, index, size)
            streamed, gathered = streamed + more[0], gathered + more[1]
        return streamed, gathered

    def _results(self, instruction: Instruction) -> Iterator[tuple[Computation | None, Instruction]]:
        """The instructions that make an instruction's outputs, behind fusions, tuples and bitcasts."""
        if instruction.opcode != "fusion":
            yield None, instruction
            return
        inner = self.program.computations[instruction.named("calls")[0]]
        waiting = [inner.root]
        while waiting:
            one = waiting.pop()
            if one.opcode == "tuple":
                waiting += [inner.instructions[name] for name in one.operands]
            elif one.opcode == "bitcast":
                waiting.append(inner.instructions[one.operands[0]])
            else:
                yield inner, one

    def _written(self, instruction: Instruction) -> int:
        total = 0
        for inner, one in self._results(instruction):
            if one.opcode == "dynamic-update-slice" and inner is not None:
                total += inner.instructions[one.operands[1]].bytes
            elif one.opcode == "scatter":
                total += self._scattered(inner, one)
            else:
                total += one.bytes
        return total

    def _updated(self, instruction: Instruction) -> int:
        """The bytes that a scatter reads of the array that it adds to."""
        return sum(self._scattered(inner, one) for inner, one in self._results(instruction) if one.opcode == "scatter")

    def _scattered(self, inner: Computation | None, scatter: Instruction) -> int:
        if inner is None:
            return scatter.bytes
        addends = inner.instructions[scatter.operands[-1]].bytes
        return min(addends, scatter.bytes) if scatter.bytes <= self.cache else addends

    def _products(self, computation: Computation, instruction: Instruction) -> Iterator[Products]:
        found = [(computation, instruction)] if instruction.opcode in ("dot", "custom-call") else []
        if instruction.opcode == "fusion":
            found = [pair for pair in self.program.inside(instruction) if pair[1].opcode == "dot"]
        for where, one in found:
            contracted = one.numbers("lhs_contracting_dims")
            if one.opcode == "custom-call":
                if "cublas" not in one.attributes:
                    continue
                dims = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
                contracted = tuple(int(dim) for dim in re.findall(r"\d+", dims.group(1))) if dims else ()
            left = where.instructions[one.operands[0]].shapes[0]
            flops = 2 * one.shapes[0].size * prod(left.dims[dim] for dim in contracted)
            yield Products(flops, left.dtype, "highest" in one.attributes.lower())

    def _sorted(self, computation: Computation, instruction: Instruction) -> int:
        """The width of the rows that the instruction sorts; 0 where it sorts none."""
        inside = (one for _, one in self.program.inside(instruction)) if instruction.opcode == "fusion" else ()
        for one in (instruction, *inside):
            if one.opcode == "sort":
                return one.shapes[0].dims[(one.numbers("dimensions") or (0,))[0]]
        if instruction.opcode == "custom-call" and re.search(r'target="[^"]*([Ss]ort|TopK)', instruction.attributes):
            dims = computation.instructions[instruction.operands[0]].shapes[0].dims
            return dims[-1] if dims else 0
        return 0


def _origin(computation: Computation, name: str) -> Array:
    """The array that `name` is, behind bitcasts and elements of tuples."""
    number = 0
    while True:
        one = computation.instructions[name]
        if one.opcode == "bitcast":
            name = one.operands[0]
        elif one.opcode == "get-tuple-element":
            number = int(re.search(r"\bindex=(\d+)", one.attributes).group(1))  # type: ignore[union-attr]
            name = one.operands[0]
            inner = computation.instructions[name]
            if inner.opcode == "tuple":
                name, number = inner.operands[number], 0
                continue
            return computation.name, name, number
        else:
            return computation.name, name, number


@dataclass(frozen=True)
class Schedule:
    """A program's parts in the order in which they run, and the shapes of the arrays that kernels read in whole."""

    parts: tuple[Part, ...]
    shapes: Mapping[Array, Shape]

    def kernels(self, known_loops_only: bool = False) -> Iterator[tuple[Kernel, int]]:
        """Every kernel, and how often it runs; of a loop whose trips nobody knows, once."""
        return _flat(self.parts)

    def loops(self) -> list[Loop]:
        """Every loop, those inside others too."""
        return [part for part in _every(self.parts) if isinstance(part, Loop)]

    def branches(self) -> list[Branch]:
        """Every conditional, those inside others too."""
        return [part for part in _every(self.parts) if isinstance(part, Branch)]


def schedule(program: Program, cache: int = 0) -> Schedule:
    """The schedule of a program. `cache`: bytes of the target's last cache."""
    walk = _Walk(program, cache)
    return Schedule(walk.parts(program.entry), walk.made)


def _flat(parts: tuple[Part, ...], times: int = 1) -> Iterator[tuple[Kernel, int]]:
    for part in parts:
        if isinstance(part, Kernel):
            yield part, times
        elif isinstance(part, Loop):
            yield from _flat(part.body, times * (1 if part.trips is None else part.trips))
        else:
            for each in part.each:
                yield from _flat(each, times)


def _every(parts: tuple[Part, ...]) -> Iterator[Part]:
    for part in parts:
        yield part
        for inner in (part.body,) if isinstance(part, Loop) else part.each if isinstance(part, Branch) else ():
            yield from _every(inner)
