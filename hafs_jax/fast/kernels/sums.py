"""Sums of rows of a matrix over sorted entries: the decoder's product, and the gradients of both matrices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from hafs_jax.fast.kernels.calls import blocks_of_columns, call, spread, widened

_MOST = 256  # entries that one program adds; a segment of more is cut, and then the sums of its pieces are added


class Segments(struct.PyTreeNode):
    """An order of entries in which those of one output lie together: those of output s from starts[s] to ends[s]."""

    order_N: Int[Array, " N"]
    starts_S: Int[Array, " S"]
    ends_S: Int[Array, " S"]


def sorted_by(into_N: Int[Array, " N"], size: int, count: Int[Array, ""]) -> Segments:
    """The first `count` entries, sorted by their output, of which there are `size`; entries of one keep their order."""
    N = len(into_N)
    numbers_N = jnp.arange(N, dtype=jnp.int32)
    keys_N = jnp.where(numbers_N < count, into_N, size)
    keys_N, order_N = jax.lax.sort((keys_N, numbers_N), num_keys=1, is_stable=True)
    ends_S1 = jnp.searchsorted(keys_N, jnp.arange(-1, size), side="right", method="scan_unrolled").astype(jnp.int32)
    return Segments(order_N, ends_S1[:-1], ends_S1[1:])


def equal_segments(into_N: Int[Array, " N"], k: int) -> Segments:
    """The segments of entries that lie together already, `k` for each output, every output once."""
    N = len(into_N)
    first_S = k * jnp.arange(N // k, dtype=jnp.int32)
    starts_S = jnp.zeros_like(first_S).at[into_N[::k]].set(first_S, unique_indices=True)
    return Segments(jnp.arange(N, dtype=jnp.int32), starts_S, starts_S + k)


def segment_sums(
    segments: Segments,
    weights_N: Float[Array, " N"],
    from_N: Int[Array, " N"],
    source: Float[Array, "M D"],
    interpret: bool,
    most: int | None = None,
) -> Float[Array, "S D"]:
    """For each segment the sum over its entries n of weights[n] * source[from[n]], in float32, in the entries' order.

    Each segment's first 256 entries are added, and then the sums of its further pieces of 256. `most`: the entries of
    the longest segment, where that is known.
    """
    starts_S, ends_S = segments.starts_S, segments.ends_S
    entries = (weights_N[segments.order_N], from_N[segments.order_N], widened(source))
    pieces = len(weights_N) // _MOST if most is None or most > _MOST else 0
    if pieces == 0:
        return _sums("segment_sums", interpret, starts_S, ends_S, *entries)[:, : source.shape[1]]
    more_S = jnp.maximum(-(-(ends_S - starts_S) // _MOST) - 1, 0)  # pieces behind the first
    last_S = jnp.cumsum(more_S, dtype=jnp.int32)
    numbers_P = jnp.arange(pieces, dtype=jnp.int32)
    of_P = jnp.searchsorted(last_S, numbers_P, side="right", method="scan_unrolled")  # past the end for unused ones
    at_P = starts_S[of_P] + _MOST * (1 + numbers_P - (last_S - more_S)[of_P])
    starts_P = jnp.where(numbers_P < last_S[-1], at_P, 0)
    ends_P = jnp.where(numbers_P < last_S[-1], jnp.minimum(at_P + _MOST, ends_S[of_P]), 0)
    pieces_PD = _sums("segment_pieces", interpret, starts_P, ends_P, *entries)
    first_S = jnp.minimum(ends_S, starts_S + _MOST)
    further = (last_S - more_S, last_S, pieces_PD)
    sums_SD = _sums("segment_sums", interpret, starts_S, first_S, *entries, *further)
    return sums_SD[:, : source.shape[1]]


def _sums(name: str, interpret: bool, starts_S: Array, *arrays: Array) -> Float[Array, "S D"]:
    """The sums of entries starts[s] to ends[s] and, where they are given, of pieces firsts[s] to lasts[s]."""
    S, D = len(starts_S), arrays[3].shape[1]
    blocks = blocks_of_columns(D)
    kernel = partial(_add, width=D // blocks, blocks=blocks, interpret=interpret)
    return call(name, kernel, S * blocks, jax.ShapeDtypeStruct((S, D), jnp.float32), (starts_S, *arrays), interpret)


def _add(*refs: Any, width: int, blocks: int, interpret: bool) -> None:
    starts_ref, ends_ref, weights_ref, from_ref, source_ref, *pieces, out_ref = refs
    s, columns = pl.program_id(0) // blocks, pl.ds(pl.program_id(0) % blocks * width, width)

    def add_entry(n: Array, sum_D: Array) -> Array:
        row_D = spread(source_ref[from_ref[n], columns], interpret)
        return sum_D + weights_ref[n] * row_D.astype(jnp.float32)

    def add_piece(p: Array, sum_D: Array) -> Array:
        return sum_D + spread(pieces[2][p, columns], interpret)

    sum_D = spread(jnp.zeros(width, jnp.float32), interpret)
    sum_D = jax.lax.fori_loop(starts_ref[s], ends_ref[s], add_entry, sum_D)
    if pieces:
        sum_D = jax.lax.fori_loop(pieces[0][s], pieces[1][s], add_piece, sum_D)
    out_ref[s, columns] = sum_D
