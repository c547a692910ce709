"""The choice of how a step is computed, from the config and the machine. No other module asks what machine this is.

- `resolve_products` chooses between dense and sparse products. The two round differently, so the choice is made once,
  before anything compiles, and is saved in the run's config.
- `choose` gives a program its target platform. So a program for a GPU can be lowered on a machine that has none.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax

from hafs_jax.base.errors import UserError, arg
from hafs_jax.config import TrainConfig
from hafs_jax.fast.forms import capacity, form_of
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.ops.axes import Axes

# Sparse products are faster if F / capacity is at least this times (cores + 1).
_LEAST_RATIO, _LEAST_RATIO_AMX = 11, 85
_LEAST_RATIO_GPU = {"bfloat16": 768, "float32": 512}  # of F / capacity, by arithmetic: nothing was measured
_BLOCK_BYTES = {"cpu": 32 << 20}  # of one float32 array [rows per block, F]
_BLOCK_BYTES_ELSEWHERE = 2 << 30  # adding up the gradients of smaller blocks would cost as much as their products


@dataclass(frozen=True)
class Machine:
    """The facts about a machine that a choice may depend on."""

    platform: str  # JAX's name: cpu, gpu or tpu
    cores: int  # CPU cores that this process may use
    has_amx: bool  # the processor has AMX, which multiplies tiles of bfloat16
    adds_rows: bool = False  # a GPU that adds four float32 in one atomic instruction: of compute capability 9.0 on

    @property
    def runs_kernels(self) -> bool:
        """Whether `hafs_jax.fast.kernels` can run here: on a CPU step by step, for tests."""
        return self.platform == "cpu" or self.adds_rows


@dataclass(frozen=True)
class Plan:
    """How one program computes a step. It changes rounding and speed, never what is computed."""

    platform: str
    products: str  # dense or sparse
    block_bytes: int  # largest size of a float32 array [rows per block, F] if a batch is taken in blocks of rows
    kernels: str = "off"  # of sparse products: off, compiled, or on a CPU interpreted
    axes: Axes = Axes()  # the devices over which rows and latents are split

    @property
    def on_cpu(self) -> bool:
        return self.platform == "cpu"


def target(platform: str | None = None) -> str:
    """The platform to compile for: `platform`, or the one that JAX runs on if it is None."""
    return jax.default_backend() if platform is None else platform


def this_machine(platform: str | None = None) -> Machine:
    """The machine that this process runs on, with `platform` as its platform if one is given."""
    where = target(platform)
    return Machine(where, _cores(), _has_amx(), where == "gpu" and _compute_capability() >= 9)


def choose(config: TrainConfig, platform: str | None = None, axes: Axes = Axes()) -> Plan:
    """The plan of a program for `platform` (None: where JAX runs). `products=auto` is dense until it is resolved.

    If latents are split, an SAE with several budgets has dense products: its entries would have to know their ranks.
    """
    where = target(platform)
    sparse = config.products == "sparse" and has_sparse_form(config)
    sparse &= axes.latent == 1 or not ARCHITECTURES[config.sae.architecture].budgets
    kernels = "off" if config.kernels != "on" else "interpreted" if where == "cpu" else "compiled"
    block_bytes = _BLOCK_BYTES.get(where, _BLOCK_BYTES_ELSEWHERE)
    return Plan(where, "sparse" if sparse else "dense", block_bytes, kernels, axes)


def check_kernels(config: TrainConfig, machine: Machine) -> None:
    """Raises `UserError` where the config asks for kernels that the machine cannot run."""
    if config.kernels != "on":
        return
    if not machine.runs_kernels:
        found = "an earlier GPU" if machine.platform == "gpu" else f"a {machine.platform.upper()}"
        raise UserError(
            f"{arg('kernels', 'on')}: expected an NVIDIA GPU of compute capability 9.0 (Hopper) or later, found "
            f"{found}; leave it out, or say {arg('kernels', 'off')}"
        )


def has_sparse_form(config: TrainConfig) -> bool:
    """Whether the config's step can multiply by the active latents alone. It cannot if

    - the architecture has no such form, or
    - a term of the loss needs all pre-activations.
    """
    needs_all = config.penalty.sharing == "cofiring" or config.sparsity.pre_activation > 0
    return form_of(config.sae).select is not None and not needs_all


def resolve_products(config: TrainConfig, machine: Machine) -> str:
    """`dense` or `sparse`: what the config says, or for `auto` the faster one on `machine` by earlier measurements.

    `auto` is sparse where `benchmarks/products.py` measured sparse products to be faster or, with AMX, about as fast.
    That depends on F over the capacity per row:

    - on a CPU from 22 on with one core, from 33 on with two;
    - in bfloat16 on a CPU with AMX from 170 on with one core, from 255 on with two.

    More cores were not measured. Dense products run on all cores and the sums over entries on one, so the least ratio
    is assumed to rise with each further core as it does from one to two. The capacity of ReLU architectures is 1.5 k,
    and for them `auto` is sparse only if a controller brings L0 to k.

    On a GPU nothing was measured, and `auto` goes by arithmetic with an H100's public numbers at D = 2,048. For each
    row, four products of D x F take 8 D F FLOP, and their arrays of F numbers move about 20 F bytes: 22 picoseconds
    for each latent in bfloat16, 39 in TF32. A sparse entry moves two rows of D numbers, and reads and writes up to
    three of D float32 sums: at most 17 and 20 nanoseconds. So sparse products are faster if F / capacity is at least
    about 768 in bfloat16 and 512 in float32. On a GPU before Hopper XLA adds single numbers by compare-and-swap, and
    `auto` is dense, as on other accelerators.
    """
    if config.products != "auto":
        return config.products if has_sparse_form(config) else "dense"
    comes_to_k = config.sparsity.match_l0 or not form_of(config.sae).any_number
    if not (machine.platform == "cpu" or machine.adds_rows) or not has_sparse_form(config) or not comes_to_k:
        return "dense"
    if machine.adds_rows:
        least = _LEAST_RATIO_GPU[config.sae.compute_dtype]
    else:
        fast_products = config.sae.compute_dtype == "bfloat16" and machine.has_amx
        least = (_LEAST_RATIO_AMX if fast_products else _LEAST_RATIO) * (machine.cores + 1)
    return "sparse" if config.sae.F / capacity(config.sae) >= least else "dense"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compute_capability() -> float:
    """That of JAX's first GPU; 0 where there is none."""
    return float(getattr(jax.local_devices()[0], "compute_capability", 0.0))


@cache
def _has_amx() -> bool:
    """Whether Linux reports that the processor has AMX for bfloat16."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
