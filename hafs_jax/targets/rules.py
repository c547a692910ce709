"""What a GPU step's schedule must keep to, checked on its compiled text. Standard library only."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hafs_jax.targets.cost import Array, Branch, Kernel, Loop, Part, Schedule
from hafs_jax.targets.gpus import Gpu, total

WIDEST_SORT = 1_024  # XLA sorts so many in one block's shared memory; wider rows go through memory many times
DEAD_LATENTS = "dead_latents"  # the scope of the branch that revives them, in which loops may depend on data
LARGE_PRODUCT = 10**10  # FLOP
MOST_SPILLED = 16  # bytes of registers of one kernel; reductions that XLA joins spill 8, which costs them nothing


@dataclass(frozen=True)
class Facts:
    """What one compiled step costs, and what there is of it that a fast step has not."""

    gigabytes: float  # moved
    temporary: float  # GB
    milliseconds: float  # by roofline
    teraflops: float
    launches: int
    widest_sort: int
    most_reads: int  # of one float32 array as large as [rows, F]
    open_loops: tuple[str, ...]  # of trips that nobody knows, outside the dead latents' branch
    swaps: int  # compare-and-swap atomics
    unordered: int  # atomics that add floating-point numbers, in whatever order they come
    without_matrix_units: tuple[str, ...]  # large products
    spilled: int  # bytes, of the kernel that spills most


def facts(
    schedule: Schedule, on: Gpu, temporary_bytes: int, rows_by_latents: int, ptx: str = "", spilled: int = 0
) -> Facts:
    """The facts of a schedule. `rows_by_latents`: entries of the array of pre-activations, of a block of rows."""
    whole = total(schedule.parts, on)
    return Facts(
        gigabytes=whole.bytes / 1e9,
        temporary=temporary_bytes / 1e9,
        milliseconds=1e3 * whole.seconds,
        teraflops=whole.flops / 1e12,
        launches=whole.launches,
        widest_sort=max((kernel.sorted for kernel, _ in schedule.kernels() if _passes_memory(kernel, on)), default=0),
        most_reads=max(reads(schedule, rows_by_latents).values(), default=0),
        open_loops=tuple(loop.source or loop.name for loop in _open(schedule.parts)),
        swaps=len(re.findall(r"\batom\.[\w.]*cas\b", ptx)),
        unordered=len(re.findall(r"\b(?:atom|red)\.[\w.:]*add[\w.:]*\.b?f\d", ptx))
        + len(re.findall(r"\b(?:atom|red)\.[\w.:]*f\d+[\w.]*\.add\b", ptx)),
        without_matrix_units=tuple(_slow_products(schedule, ptx)) if ptx else (),
        spilled=spilled,
    )


def _passes_memory(kernel: Kernel, on: Gpu) -> bool:
    """Whether a sort is of many rows, or of one that does not fit into the cache."""
    size = kernel.shapes[0].size if kernel.shapes else 0
    return size > kernel.sorted or sum(shape.bytes for shape in kernel.shapes) > on.cache


def reads(schedule: Schedule, size: int) -> Mapping[Array, int]:
    """How many kernels read each float32 array of at least `size` entries in whole."""
    large = {array for array, shape in schedule.shapes.items() if shape.dtype == "f32" and shape.size >= size}
    found: Counter[Array] = Counter()
    for kernel, _ in schedule.kernels():
        found.update(kernel.whole & large)
    return found


def _open(parts: tuple[Part, ...]) -> Iterator[Loop]:
    """Loops of unknown trips outside the dead latents' branch."""
    for part in parts:
        if not isinstance(part, Kernel) and DEAD_LATENTS in part.source:
            continue
        if isinstance(part, Loop):
            if part.trips is None:
                yield part
            yield from _open(part.body)
        elif isinstance(part, Branch):
            for each in part.each:
                yield from _open(each)


def _slow_products(schedule: Schedule, ptx: str) -> Iterator[str]:
    """Large products whose kernels use no matrix units. Of kernels that share code only one has its own."""
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry |\Z)", ptx, flags=re.S))
    for kernel, _ in schedule.kernels():
        if kernel.flops < LARGE_PRODUCT or kernel.opcode == "custom-call":
            continue
        body = bodies.get(re.sub(r"\W", "_", kernel.name))
        if body is not None and not re.search(r"\b(wgmma|mma\.sync|tcgen05)\b", body):
            yield kernel.name


@dataclass(frozen=True)
class Limits:
    """The most that a program may move, hold and take, and read of one array of pre-activations."""

    gigabytes: float
    temporary: float
    milliseconds: float
    reads: int


def problems(found: Facts, limits: Limits | None, any_order: bool = True) -> list[str]:
    """What is against the rules or over the limits, in words; none where all is well.

    `any_order`: floating-point numbers may be added in any order, so that a second training may round differently.
    """
    said = []
    if found.widest_sort > WIDEST_SORT:
        said.append(f"sorts rows of {found.widest_sort:,}; expected at most {WIDEST_SORT:,}")
    if found.swaps:
        said.append(f"{found.swaps} compare-and-swap atomics; expected none")
    if found.unordered and not any_order:
        said.append(f"{found.unordered} atomics that add floating-point numbers in any order; expected none")
    if found.open_loops:
        said.append(f"loops whose trips depend on data outside the dead latents' branch: {', '.join(found.open_loops)}")
    if found.without_matrix_units:
        said.append(f"large products without matrix units: {', '.join(found.without_matrix_units)}")
    if found.spilled > MOST_SPILLED:
        said.append(f"{found.spilled:,} bytes of registers spilled by a kernel; expected at most {MOST_SPILLED}")
    if limits is None:
        return said
    for what, value, most, unit in (
        ("moves", found.gigabytes, limits.gigabytes, "GB"),
        ("holds", found.temporary, limits.temporary, "GB of temporary memory"),
        ("takes", found.milliseconds, limits.milliseconds, "ms by roofline"),
        ("reads one float32 array of pre-activations", found.most_reads, limits.reads, "times"),
    ):
        if value > most:
            said.append(f"{what} {value:.4g} {unit}; expected at most {most:g}")
    return said
