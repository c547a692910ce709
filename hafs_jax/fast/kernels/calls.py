"""How a kernel is called, and how it takes a row of a matrix."""

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

THREADS = 128  # of a program; a row lies in their registers, so its width must be a multiple
WIDEST = 2_048  # columns that one program takes, 16 numbers a thread

PREFIX = "hafs_"
"""The names of kernels in a compiled program begin with it."""


def call(
    name: str,
    kernel: Callable[..., None],
    programs: int,
    out: Any,
    arrays: tuple[Array, ...],
    interpret: bool,
    in_place: Mapping[int, int] = {},
) -> Any:
    """The outputs, of `out`'s shapes, of `programs` programs of a kernel. Its arrays stay in the GPU's memory.

    `in_place` is {number of an array: number of the output that takes its place}. What a program does not write there
    is as it was. Under `vmap` it runs for one member after the other.
    """
    memory = pl.BlockSpec(memory_space=mosaic_gpu.GMEM)
    run = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=out,
        in_specs=[memory] * len(arrays),
        out_specs=jax.tree.map(lambda _: memory, out),
        compiler_params=mosaic_gpu.CompilerParams(dimension_semantics=["parallel"]),
        input_output_aliases=dict(in_place),
        interpret=interpret,
        name=PREFIX + name,
    )
    return sequential_vmap(run)(*arrays)


def spread(row: Array, interpret: bool) -> Array:
    """A row of numbers in the registers of a program's threads: up to four neighbours in each, then the next thread's.

    The same for all dtypes, so that rows can be added. In interpret mode there are no registers.
    """
    if interpret:
        return row
    neighbours = gcd(4, row.shape[0] // THREADS)
    return mosaic_gpu.layout_cast(row, mosaic_gpu.Layout.WG_STRIDED(row.shape, vec_size=neighbours))


def widened(matrix: Array, value: float = 0.0) -> Array:
    """The matrix with columns of `value` behind it, so that equal blocks of columns fit the programs' threads."""
    blocks = blocks_of_columns(matrix.shape[1])
    return jnp.pad(matrix, ((0, 0), (0, -matrix.shape[1] % (THREADS * blocks))), constant_values=value)


def blocks_of_columns(width: int) -> int:
    """The number of equal blocks of columns in which programs take a matrix `width` wide, once it is widened."""
    return -(-width // WIDEST)
