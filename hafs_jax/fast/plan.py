"""How a step is computed on which machine. The only module that asks what machine this is.

Two things are decided here. `resolve_products` chooses between dense and sparse products, which round differently: the
choice is made once, before anything compiles, and stands in the run's config. `choose` gives a program its target
platform, so that a program for a GPU can be written and compiled on a machine that has none.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax

from hafs_jax.config import TrainConfig
from hafs_jax.fast.forms import capacity, form_of

_LEAST_RATIO, _LEAST_RATIO_AMX = 11, 85  # F / capacity, per core and one more, from which sparse products are faster
_BLOCK_BYTES = {"cpu": 32 << 20}  # of one float32 array [rows of a block, F]
_BLOCK_BYTES_ELSEWHERE = 2 << 30  # smaller blocks' gradients would cost as much to add up as their products


@dataclass(frozen=True)
class Machine:
    """What a choice may depend on."""

    platform: str  # JAX's name: cpu, gpu or tpu
    cores: int  # that this process may use
    has_amx: bool  # the processor multiplies tiles of bfloat16


@dataclass(frozen=True)
class Plan:
    """How one program computes a step. It changes rounding and speed, never what is computed."""

    platform: str
    products: str  # dense or sparse
    block_bytes: int  # largest float32 array [rows of a block, F] of a batch that is taken in blocks of rows

    @property
    def on_cpu(self) -> bool:
        return self.platform == "cpu"


def target(platform: str | None = None) -> str:
    """The platform to compile for: the one named, else the one that JAX runs on."""
    return jax.default_backend() if platform is None else platform


def this_machine(platform: str | None = None) -> Machine:
    """The machine that this process runs on, as seen from `platform`."""
    return Machine(target(platform), _cores(), _has_amx())


def choose(config: TrainConfig, platform: str | None = None) -> Plan:
    """The plan of a program for `platform` (none: where JAX runs). `products=auto` counts as dense until resolved."""
    where = target(platform)
    sparse = config.products == "sparse" and has_sparse_form(config)
    return Plan(where, "sparse" if sparse else "dense", _BLOCK_BYTES.get(where, _BLOCK_BYTES_ELSEWHERE))


def has_sparse_form(config: TrainConfig) -> bool:
    """Whether the config's step can multiply by the active latents alone.

    It cannot where the architecture has no such form, where a loss term needs every pre-activation, and where the
    latents are split over devices.
    """
    needs_all = config.penalty.sharing == "cofiring" or config.sparsity.pre_activation > 0
    return form_of(config.sae).select is not None and not needs_all and config.dictionary_shards == 1


def resolve_products(config: TrainConfig, machine: Machine) -> str:
    """`dense` or `sparse`: what the config says, and for `auto` the faster one, as measured, on `machine`.

    `auto` is sparse where `benchmarks/products.py` measured sparse products to be faster or, with AMX, about as fast.
    What counts is F over the capacity per row: on a CPU of one core from 22 on, of two from 33; in bfloat16 with AMX
    from 170 and 255. Dense products run on all cores and the sums over entries on one, so the ratio is taken to rise
    with further cores as it does from one to two. ReLU has more room than k, and counts only where a controller
    brings L0 to k. Off the CPU nothing was measured, and `auto` is dense.
    """
    if config.products != "auto":
        return config.products if has_sparse_form(config) else "dense"
    comes_to_k = config.sparsity.match_l0 or not form_of(config.sae).any_number
    if machine.platform != "cpu" or not has_sparse_form(config) or not comes_to_k:
        return "dense"
    fast_products = config.sae.compute_dtype == "bfloat16" and machine.has_amx
    least = (_LEAST_RATIO_AMX if fast_products else _LEAST_RATIO) * (machine.cores + 1)
    return "sparse" if config.sae.F / capacity(config.sae) >= least else "dense"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _has_amx() -> bool:
    """Whether Linux says that the processor has AMX for bfloat16."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
