"""Choosing the largest entries of an array without sorting it. Pure functions."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

_SAMPLE = 4_096  # entries sorted to bracket the threshold; 4 standard errors of its rank either side
_GROUP = 16  # neighbours whose maximum stands for them
_TINY = np.float32(np.finfo(np.float32).tiny)
_TOP = np.float32(np.finfo(np.float32).max)


class Entries(struct.PyTreeNode):
    """Some entries of an array [B, F], row by row; a slot that is not real is to be ignored."""

    rows_N: Int[Array, " N"]
    columns_N: Int[Array, " N"]
    real_N: Bool[Array, " N"]
    whole: Bool[Array, ""]  # whether there was a slot for each of those that were looked for


def largest_of_rows(
    values_BF: Float[Array, "B F"], offset_F: Float[Array, " F"], most: int, count: Int[Array, ""] | int
) -> Entries:
    """The `count` largest positive entries of each row of values + offset, `count` <= `most`; N = B * most.

    Of ties the first are taken.
    """
    largest_BK, columns_BK = top_of_rows(values_BF, most, offset_F)
    return Entries(
        rows_N=jnp.repeat(jnp.arange(len(values_BF), dtype=jnp.int32), most),
        columns_N=columns_BK.astype(jnp.int32).reshape(-1),
        real_N=((largest_BK > 0) & (jnp.arange(most) < count)[None]).reshape(-1),
        whole=jnp.bool_(True),
    )


def top_of_rows(
    values_BF: Float[Array, "B F"], most: int, offset_F: Float[Array, " F"] | None = None
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`jax.lax.top_k` of values + offset, K = `most`: the largest of each row, falling, and their columns.

    They lie in the `most` groups of neighbours with the largest maxima: one pass over all values finds those, and the
    rest is done on 16 entries of each. The sum is never written.
    """
    B, F = values_BF.shape
    offset_F = jnp.zeros(F, values_BF.dtype) if offset_F is None else offset_F
    if 4 * _GROUP * most > F:
        return _top_k(values_BF + offset_F[None], most)
    maxima_BT = jnp.max(_grouped(values_BF) + _grouped(offset_F)[None], axis=2)
    _, groups_BK = _top_k(maxima_BT, most)
    near_BKG = jnp.take_along_axis(_grouped(values_BF), groups_BK[:, :, None], axis=1)
    near_BKG += _grouped(offset_F)[groups_BK]
    largest_BK, at_BK = _top_k(near_BKG.reshape(B, -1), most)
    return largest_BK, jnp.take_along_axis(groups_BK, at_BK // _GROUP, axis=1) * _GROUP + at_BK % _GROUP


def _top_k(values_BF: Float[Array, "B F"], most: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`jax.lax.top_k`. Where a part of its result is used, XLA would sort whole rows instead, ten times slower."""
    return cast(tuple[Array, Array], tuple(jax.lax.optimization_barrier(jax.lax.top_k(values_BF, most))))


def kth_largest_of_rows(values_BF: Float[Array, "B F"], k: int) -> Float[Array, " B"]:
    """The `k`-th largest of each row of numbers that are not negative, by bisection of its 31 bits.

    For a k of hundreds; below, `top_of_rows` is the faster.
    """
    bits_BF = _bits(values_BF.astype(jnp.float32))

    def narrow(step: Array, low_B: Array) -> Array:
        tried_B = low_B | (1 << (30 - step))
        return jnp.where(jnp.sum(bits_BF >= tried_B[:, None], axis=1) >= k, tried_B, low_B)

    kth_B = jax.lax.fori_loop(0, 31, narrow, jnp.zeros(len(values_BF), jnp.int32))
    return jax.lax.bitcast_convert_type(kth_B, jnp.float32)


def largest_of_all(
    values_BF: Float[Array, "B F"], offset_F: Float[Array, " F"], most: int, count: Int[Array, ""] | int
) -> Entries:
    """The `count` largest positive entries of values + offset, `count` <= `most` = N; found as in `largest_of_rows`."""
    groups_NG, numbers_N = largest_groups(values_BF, offset_F, most)
    kept_NG = groups_NG >= jnp.maximum(count_threshold(groups_NG, count), _TINY)
    return _entries(kept_NG, numbers_N, most, values_BF.shape[1], jnp.bool_(True))


def positive(values_BF: Float[Array, "B F"], offset_F: Float[Array, " F"], most: int) -> Entries:
    """The positive entries of values + offset; N = `most`. Not `whole` where there are more, or what is no number."""
    values_BTG, offset_TG = _grouped(values_BF), _grouped(offset_F)
    largest_T = jnp.max(values_BTG + offset_TG[None], axis=2).reshape(-1)
    groups_NG, numbers_N = _groups_where(largest_T > 0, values_BTG, offset_TG, most)
    kept_NG = groups_NG > 0
    whole = (jnp.sum(largest_T > 0) <= most) & (jnp.sum(kept_NG) <= most) & ~jnp.any(jnp.isnan(largest_T))
    return _entries(kept_NG, numbers_N, most, values_BF.shape[1], whole)


def _entries(
    kept_NG: Bool[Array, "M G"], numbers_N: Int[Array, " M"], most: int, F: int, whole: Bool[Array, ""]
) -> Entries:
    """The kept ones of M groups of neighbours in rows of F; N = `most`."""
    at_N = where_true(kept_NG.reshape(-1), most)
    number_N, per_row = numbers_N[at_N // _GROUP], -(-F // _GROUP)
    return Entries(
        rows_N=number_N // per_row,
        columns_N=number_N % per_row * _GROUP + at_N % _GROUP,
        real_N=jnp.arange(most) < jnp.sum(kept_NG),
        whole=whole,
    )


def batch_threshold(values_BF: Float[Array, "B F"], most: int, count: Int[Array, ""] | int) -> Float[Array, ""]:
    """`count_threshold` of a large array of which few entries are wanted: `count` <= `most`."""
    if values_BF.size < 2 * _GROUP * most:
        return count_threshold(values_BF, count)
    groups_NG, _ = largest_groups(values_BF, jnp.zeros(values_BF.shape[1]), most)
    kept_NG = groups_NG >= count_threshold(groups_NG, count)
    return jnp.min(jnp.where(kept_NG, groups_NG, jnp.inf))  # the value itself: the next may lie in another group


def largest_groups(
    values_BF: Float[Array, "B F"], offset_F: Float[Array, " F"], most: int
) -> tuple[Float[Array, "N G"], Int[Array, " N"]]:
    """The `most` groups of neighbours in a row of relu(values + offset) with the largest maxima, and their numbers.

    All of them, where there are fewer groups; zeros in place of groups without a positive entry.
    """
    values_BTG, offset_TG = _grouped(values_BF), _grouped(offset_F)
    largest_T = jax.nn.relu(jnp.max(values_BTG + offset_TG[None], axis=2)).reshape(-1)
    most = min(most, len(largest_T))
    wanted_T = largest_T >= jnp.maximum(count_threshold(largest_T, most), _TINY)
    return _groups_where(wanted_T, values_BTG, offset_TG, most)


def _groups_where(
    wanted_M: Bool[Array, " M"], values_BTG: Float[Array, "B T G"], offset_TG: Float[Array, "T G"], most: int
) -> tuple[Float[Array, "N G"], Int[Array, " N"]]:
    """The wanted groups of relu(values + offset), `most` at most, zeros in what slots remain; and their numbers."""
    most = min(most, len(wanted_M))
    numbers_N = where_true(wanted_M, most)
    found_N1 = (jnp.arange(most) < jnp.sum(wanted_M))[:, None]
    groups_NG = values_BTG.reshape(-1, _GROUP)[numbers_N] + offset_TG[numbers_N % len(offset_TG)]
    return jnp.where(found_N1, jax.nn.relu(groups_NG), 0.0), numbers_N


def _grouped(values: Float[Array, "*rows F"]) -> Float[Array, "*rows T G"]:
    """The last axis in groups of neighbours; the last one is filled up with what is never the largest."""
    F = values.shape[-1]
    missing = -F % _GROUP
    if missing:
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=-_TOP / 4)
    return values.reshape(*values.shape[:-1], -1, _GROUP)


def where_true(mask_T: Bool[Array, " T"], size: int) -> Int[Array, " N"]:
    """The places of the first `size` true entries, rising; 0 in what slots remain.

    `jnp.nonzero` scatters all T entries one by one, ten times as long on a CPU. Here words of 32 are counted, and each
    slot finds its word, by the largest number of one that begins at or before the slot, and its bit in it by halves.
    """
    bits_WB = jnp.pad(mask_T, (0, -len(mask_T) % 32)).reshape(-1, 32).astype(jnp.uint32)
    words_W = jnp.sum(bits_WB << jnp.arange(32, dtype=jnp.uint32)[None], axis=1, dtype=jnp.uint32)
    counts_W, numbers_W = _ones(words_W), jnp.arange(len(words_W), dtype=jnp.int32)
    before_W = jnp.cumsum(counts_W) - counts_W
    word_N = jax.lax.cummax(jnp.zeros(size, jnp.int32).at[before_W].max(numbers_W, mode="drop"))
    slots_N = jnp.arange(size, dtype=jnp.int32)
    bits_N, skipped_N, place_N = words_W[word_N], slots_N - before_W[word_N], 32 * word_N
    for width in (16, 8, 4, 2, 1):
        lower_N = _ones(bits_N & jnp.uint32((1 << width) - 1))
        higher_N = skipped_N >= lower_N
        skipped_N = jnp.where(higher_N, skipped_N - lower_N, skipped_N)
        bits_N = jnp.where(higher_N, bits_N >> width, bits_N)
        place_N = jnp.where(higher_N, place_N + width, place_N)
    return jnp.where(slots_N < jnp.sum(counts_W), place_N, 0)


def _ones(words: UInt32[Array, "..."]) -> Int[Array, "..."]:
    """How many bits of each word are set."""
    return jax.lax.population_count(words).astype(jnp.int32)


def count_threshold(values: Float[Array, "..."], count: Int[Array, ""] | int) -> Float[Array, ""]:
    """The largest t for which at least `count` entries are >= t; exactly `count` where the entries don't tie at t.

    `values` are finite and not negative, so their float32 bit patterns order as they do. A sorted sample brackets t;
    then interpolation on the counts, with every third step a bisection, closes the bracket in some 8 passes over
    the values (a bisection of the 31 bits alone takes 31, a full sort is 40 times slower on a CPU).
    The loop stops as soon as the count is exact: t then lies between the `count`-th value and the next.
    """
    flat = values.astype(jnp.float32).reshape(-1)
    total = flat.size
    count = jnp.asarray(count, jnp.int32)

    def at_least(threshold: Float[Array, ""]) -> Array:
        return jnp.sum(flat >= threshold, dtype=jnp.int32)

    low, high = _bracket(flat, count)
    count_low, count_high = at_least(low), at_least(high)
    good_low, good_high = count_low >= count, count_high < count
    low, count_low = jnp.where(good_low, low, 0.0), jnp.where(good_low, count_low, total)
    high, count_high = jnp.where(good_high, high, _TOP), jnp.where(good_high, count_high, 0)

    def unfinished(state: tuple[Array, ...]) -> Array:
        _, low, high, count_low, _ = state
        return (count_low != count) & (_bits(high) - _bits(low) > 1)

    def narrow(state: tuple[Array, ...]) -> tuple[Array, ...]:
        step, low, high, count_low, count_high = state
        width = _bits(high) - _bits(low)
        fraction = (count_low - count).astype(jnp.float32) / (count_low - count_high).astype(jnp.float32)
        interpolated = (width.astype(jnp.float32) * fraction).astype(jnp.int32)
        offset = jnp.clip(jnp.where(step % 3 == 2, width // 2, interpolated), 1, width - 1)
        middle = jax.lax.bitcast_convert_type(_bits(low) + offset, jnp.float32)
        found = at_least(middle)
        up = found >= count
        return (
            step + 1,
            jnp.where(up, middle, low),
            jnp.where(up, high, middle),
            jnp.where(up, found, count_low),
            jnp.where(up, count_high, found),
        )

    start: tuple[Array, ...] = (jnp.int32(0), low, high, count_low, count_high)
    return jnp.where(count >= total, 0.0, jax.lax.while_loop(unfinished, narrow, start)[1])


def _bits(value: Float[Array, "..."]) -> Array:
    return jax.lax.bitcast_convert_type(value, jnp.int32)


def _bracket(flat: Float[Array, " n"], count: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Two thresholds that very likely have at least `count` and fewer than `count` entries above them."""
    sample = jnp.sort(flat[:: max(1, flat.size // _SAMPLE)])
    rank = count.astype(jnp.float32) / flat.size * sample.size
    spread = 4 * jnp.sqrt(jnp.maximum(rank, 1.0)) + 2
    below = (sample.size - 1 - (rank + spread)).astype(jnp.int32)
    above = (sample.size - 1 - (rank - spread)).astype(jnp.int32)
    low = jnp.where(below >= 0, sample[jnp.maximum(below, 0)], 0.0)
    high = jnp.where(above < sample.size, sample[jnp.clip(above, 0, sample.size - 1)], _TOP)
    return low, high
