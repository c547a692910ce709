"""GPUs that a program can be compiled for without one, and the roofline of a schedule on them.

A GPU's file, `<name>.txtpb`, holds the public numbers that XLA asks for, each with its source.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean
from hafs_jax.targets.cost import Branch, Kernel, Loop, Part, Products

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Gpu:
    """A GPU by its public numbers. Rates are those of dense products."""

    name: str  # of its file
    architecture: str  # as ptxas names it
    bfloat16: float  # FLOP/s, sums in float32
    tf32: float  # of float32 factors that are rounded to TF32
    float32: float  # of float32 factors that are not, and so without matrix units

    @property
    def target_config(self) -> str:
        """What XLA's compiler is told of it."""
        return (_FOLDER / f"{self.name}.txtpb").read_text(encoding="utf-8")

    @property
    def machine(self) -> Any:
        """The `Machine` on which choices depend."""
        from hafs_jax.fast.plan import Machine  # brings JAX, which the command's help does without

        return Machine("gpu", cores=1, has_amx=False, adds_rows=self.architecture >= "sm_90")

    @property
    def bandwidth(self) -> int:
        """Bytes a second."""
        return self._number("memory_bandwidth")

    @property
    def memory(self) -> int:
        """Bytes."""
        return self._number("device_memory_size")

    @property
    def cache(self) -> int:
        """Bytes of the last cache."""
        return self._number("l2_cache_size")

    def rate(self, products: Products) -> float:
        """FLOP/s of products of these factors."""
        if products.dtype in ("bf16", "f16"):
            return self.bfloat16
        return self.float32 if products.precise or products.dtype == "f64" else self.tf32

    def seconds(self, kernel: Kernel) -> float:
        """The roofline of a kernel: the longer of its traffic and its products."""
        arithmetic = sum(products.flops / self.rate(products) for products in kernel.products)
        return max(kernel.bytes / self.bandwidth, arithmetic)

    def _number(self, field: str) -> int:
        found = re.search(rf"^\s*{field}: (\d+)", self.target_config, flags=re.M)
        assert found is not None
        return int(found.group(1))


GPUS = {
    "h100": Gpu("h100", "sm_90a", bfloat16=989.4e12, tf32=494.7e12, float32=66.9e12),
    "a100": Gpu("a100", "sm_80", bfloat16=312e12, tf32=156e12, float32=19.5e12),
}
"""The GPUs, by name. Rates: NVIDIA's data sheets of the H100 SXM and the A100 SXM, without sparsity."""


def gpu(name: str) -> Gpu:
    """The GPU of that name; `UserError` where there is none."""
    if name not in GPUS:
        raise UserError(f"target {name!r}: expected one of {', '.join(GPUS)}{did_you_mean(name, GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Total:
    """Sums over a schedule. Of a conditional the cheapest alternative counts; a loop of unknown trips does not."""

    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    launches: int = 0

    def __add__(self, other: "Total") -> "Total":
        return Total(
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.launches + other.launches,
        )

    def times(self, count: int) -> "Total":
        return Total(count * self.seconds, count * self.bytes, count * self.flops, count * self.launches)


def total(parts: tuple[Part, ...], on: Gpu) -> Total:
    """The roofline of a schedule's parts, and what it moves and multiplies."""
    found = Total()
    for part in parts:
        if isinstance(part, Kernel):
            found += Total(on.seconds(part), part.bytes, part.flops, 1)
        elif isinstance(part, Branch):
            found += min((total(each, on) for each in part.each), key=lambda one: one.seconds)
        elif isinstance(part, Loop) and part.trips is not None:
            found += total(part.body, on).times(part.trips)
    return found
