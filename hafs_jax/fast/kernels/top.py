"""The largest entries of each row."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from hafs_jax.fast.kernels.calls import call, spread, widened
from hafs_jax.ops.selection import top_of_groups

WIDEST = 1_024  # entries of a row, 8 in the registers of each thread


def largest(
    values_BF: Float[Array, "B F"], most: int, interpret: bool
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`jax.lax.top_k` of finite values, found among groups."""
    return top_of_groups(values_BF, most, partial(_top_of_narrow, interpret=interpret))


def _top_of_narrow(
    values_BN: Float[Array, "B N"], most: int, interpret: bool
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`jax.lax.top_k`, by the kernel for rows that fit into the registers of a program.

    A program picks a row's largest entry, then the largest of the others, and so on. Entries must be finite. Of a row
    with NaN the values are NaN and the columns any of its own.
    """
    if values_BN.shape[1] > WIDEST:
        return jax.lax.top_k(values_BN, most)
    (B, N), padded = values_BN.shape, widened(values_BN, -jnp.inf)
    width = padded.shape[1]

    def kernel(values_ref, largest_ref, columns_ref) -> None:  # type: ignore[no-untyped-def]
        row = pl.program_id(0)
        numbers_N = spread(jax.lax.iota(jnp.int32, width), interpret)

        def pick(rank: Array, left_N: Array) -> Array:
            largest = jnp.max(left_N)
            column = jnp.minimum(jnp.min(jnp.where(left_N == largest, numbers_N, width)), N - 1)
            largest_ref[row, rank] = largest
            columns_ref[row, rank] = column
            return jnp.where(numbers_N == column, -jnp.inf, left_N)

        jax.lax.fori_loop(0, most, pick, spread(values_ref[row, :], interpret))

    out = (jax.ShapeDtypeStruct((B, most), jnp.float32), jax.ShapeDtypeStruct((B, most), jnp.int32))
    return call("top_k", kernel, B, out, (padded,), interpret)
