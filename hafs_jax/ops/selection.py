"""Selection of the largest entries of an array without sorting it. Pure functions."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from hafs_jax.ops.axes import Axes

_SAMPLE = 4_096  # entries that are sorted to bracket the threshold
_GROUP = 16  # neighbouring entries of a row, represented by their maximum
_WIDEST = 1_024  # entries of a row that an accelerator sorts without passing them through memory several times
_DIGIT = 3  # bits of the threshold that one pass on an accelerator finds
_MOST = 2**31 - 1  # the largest number of 31 bits
_TINY = np.float32(np.finfo(np.float32).tiny)
_TOP = np.float32(np.finfo(np.float32).max)


TopK = Callable[[Float[Array, "B F"], int], tuple[Float[Array, "B K"], Int[Array, "B K"]]]
"""(values_BF, K) -> each row's K largest entries, falling, and their columns: `jax.lax.top_k` or another form of it."""


class Entries(struct.PyTreeNode):
    """A list of N selected entries of an array [B, F], row by row; on several devices of this device's part of it."""

    rows_N: Int[Array, " N"]
    columns_N: Int[Array, " N"]
    real_N: Bool[Array, " N"]  # False for padding
    complete: Bool[Array, ""]  # whether all the entries that were looked for fitted into N


def largest_of_rows(
    values_BF: Float[Array, "B F"],
    offset_F: Float[Array, " F"],
    most: int,
    count: Int[Array, ""] | int,
    axes: Axes = Axes(),
    top_k: TopK | None = None,
) -> Entries:
    """The `count` largest positive entries of each row of values + offset, with `count` <= `most` and N = B * most.

    Among equal entries the first ones are taken. N is smaller if this device has fewer than `most` latents. `top_k` is
    another form of `jax.lax.top_k` than that of the platform.
    """
    most = min(most, values_BF.shape[1])
    largest_BK, columns_BK = top_of_rows(values_BF, most, offset_F, top_k)
    return Entries(
        rows_N=jnp.repeat(jnp.arange(len(values_BF), dtype=jnp.int32), most),
        columns_N=columns_BK.astype(jnp.int32).reshape(-1),
        real_N=((largest_BK > 0) & (_ranks(largest_BK, axes) < count)).reshape(-1),
        complete=jnp.bool_(True),
    )


def _ranks(falling_BK: Float[Array, "B K"], axes: Axes) -> Int[Array, "#B K"]:
    """The place, from 0, of each of the K largest entries of a row among those of all devices, falling.

    Among equal entries the one of the smaller column comes first.
    """
    K = falling_BK.shape[1]
    if axes.latent == 1:
        return jnp.arange(K, dtype=jnp.int32)[None]
    order_BN = jnp.argsort(axes.beside(falling_BK), axis=1, stable=True, descending=True)
    places_BN = jnp.broadcast_to(jnp.arange(order_BN.shape[1], dtype=jnp.int32)[None], order_BN.shape)
    ranks_BN = jnp.put_along_axis(jnp.zeros_like(places_BN), order_BN, places_BN, axis=1, inplace=False)
    return jax.lax.dynamic_slice_in_dim(ranks_BN, axes.first_latent(K), K, axis=1)


def largest_values(values_BF: Float[Array, "B F"], most: int, axes: Axes = Axes()) -> Float[Array, "B K"]:
    """Each row's K = `most` largest values over all latents, falling."""
    largest_BN, _ = top_of_rows(values_BF, min(most, values_BF.shape[1]))
    return largest_BN if axes.latent == 1 else _top_k(axes.beside(largest_BN), most)[0]


def top_of_rows(
    values_BF: Float[Array, "B F"],
    most: int,
    offset_F: Float[Array, " F"] | None = None,
    top_k: TopK | None = None,
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`jax.lax.top_k` of values + offset with K = `most`: each row's largest entries, falling, and their columns.

    These entries lie in the `most` groups of neighbours with the largest maxima. One pass over all values finds the
    groups. The selection then reads only the 16 entries of each group, and values + offset is never written out.
    """
    (B, F), top_k = values_BF.shape, top_k or _top_k
    offset_F = jnp.zeros(F, values_BF.dtype) if offset_F is None else offset_F
    if 4 * _GROUP * most > F:
        return top_k(values_BF + offset_F[None], most)
    maxima_BT = jnp.max(_grouped(values_BF) + _grouped(offset_F)[None], axis=2)
    _, groups_BK = top_k(maxima_BT, most)
    near_BKG = jnp.take_along_axis(_grouped(values_BF), groups_BK[:, :, None], axis=1)
    near_BKG += _grouped(offset_F)[groups_BK]
    largest_BK, at_BK = top_k(near_BKG.reshape(B, -1), most)
    return largest_BK, jnp.take_along_axis(groups_BK, at_BK // _GROUP, axis=1) * _GROUP + at_BK % _GROUP


def _top_k(values_BF: Float[Array, "B F"], most: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`jax.lax.top_k`; elsewhere than on a CPU without sorting wide rows."""

    def on_cpu(values_BF: Array) -> tuple[Array, Array]:
        # Without the barrier, if only a part of the result is used, XLA sorts entire rows, ten times slower. A barrier
        # right behind the operation ends the process where XLA compiles for several devices: so the minimum.
        values_BK, columns_BK = jax.lax.top_k(values_BF, most)
        columns_BK = jnp.minimum(columns_BK, values_BF.shape[1] - 1)
        return cast(tuple[Array, Array], tuple(jax.lax.optimization_barrier((values_BK, columns_BK))))

    def elsewhere(values_BF: Array) -> tuple[Array, Array]:
        return top_of_groups(values_BF, most)

    return cast(tuple[Array, Array], jax.lax.platform_dependent(values_BF, cpu=on_cpu, default=elsewhere))


def top_of_groups(
    values_BF: Float[Array, "B F"], most: int, top_k: TopK | None = None
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`jax.lax.top_k`, found among groups, whose maxima are found among groups of groups, and so on.

    So no row of more than `_WIDEST` entries is sorted, except where `most` is over half of that. Among equal entries
    the first ones are taken, as the chosen groups are put in order. `top_k` is another form of `jax.lax.top_k`.
    """
    (B, F), top_k = values_BF.shape, top_k or jax.lax.top_k
    size = min(_GROUP, _WIDEST // most)
    if F <= _WIDEST or size < 2:
        values_BK, columns_BK = top_k(values_BF, most)
        return values_BK, columns_BK.astype(jnp.int32)
    groups_BTG = _grouped(values_BF, size)
    _, chosen_BK = top_of_groups(jnp.max(groups_BTG, axis=2), most, top_k)
    chosen_BK = jnp.sort(chosen_BK, axis=1)
    near_BN = jnp.take_along_axis(groups_BTG, chosen_BK[:, :, None], axis=1).reshape(B, -1)
    values_BK, at_BK = top_k(near_BN, most)
    columns_BK = jnp.take_along_axis(chosen_BK, at_BK // size, axis=1) * size + at_BK % size
    return values_BK, columns_BK.astype(jnp.int32)


def kth_largest_of_rows(values_BF: Float[Array, "B F"], k: int, axes: Axes = Axes()) -> Float[Array, " B"]:
    """The `k`-th largest entry of each row, by bisection of its 31 bits. No entry may be negative.

    Use it for a k in the hundreds. For smaller k, `top_of_rows` is faster.
    """
    bits_BF = _bits(values_BF.astype(jnp.float32))

    def narrow(step: Array, low_B: Array) -> Array:
        tried_B = low_B | (1 << (30 - step))
        reach_B = axes.sum_of_latents(jnp.sum(bits_BF >= tried_B[:, None], axis=1))
        return jnp.where(reach_B >= k, tried_B, low_B)

    kth_B = jax.lax.fori_loop(0, 31, narrow, jnp.zeros(len(values_BF), jnp.int32))
    return jax.lax.bitcast_convert_type(kth_B, jnp.float32)


def largest_of_all(
    values_BF: Float[Array, "B F"],
    offset_F: Float[Array, " F"],
    most: int,
    count: Int[Array, ""] | int,
    axes: Axes = Axes(),
    here: int | None = None,
) -> Entries:
    """The `count` largest positive entries of values + offset, with `count` <= `most` = N.

    They are found in groups of neighbours, as in `top_of_rows`. On several devices `most` and `count` are of all
    entries, and N = `here` for this device's. They are not `complete` if it has more.
    """
    groups_NG, numbers_N = largest_groups(values_BF, offset_F, most)
    kept_NG = groups_NG >= jnp.maximum(count_threshold(groups_NG, count, axes), _TINY)
    complete = jnp.bool_(True) if here is None else jnp.sum(kept_NG) <= here
    return _entries(kept_NG, numbers_N, most if here is None else here, values_BF.shape[1], complete)


def positive(values_BF: Float[Array, "B F"], offset_F: Float[Array, " F"], most: int) -> Entries:
    """The positive entries of values + offset, with N = `most`. Not `complete` if there are more, or if one is NaN."""
    values_BTG, offset_TG = _grouped(values_BF), _grouped(offset_F)
    largest_T = jnp.max(values_BTG + offset_TG[None], axis=2).reshape(-1)
    groups_NG, numbers_N = _groups_where(largest_T > 0, values_BTG, offset_TG, most)
    kept_NG = groups_NG > 0
    complete = (jnp.sum(largest_T > 0) <= most) & (jnp.sum(kept_NG) <= most) & ~jnp.any(jnp.isnan(largest_T))
    return _entries(kept_NG, numbers_N, most, values_BF.shape[1], complete)


def _entries(
    kept_NG: Bool[Array, "M G"], numbers_N: Int[Array, " M"], most: int, F: int, complete: Bool[Array, ""]
) -> Entries:
    """The entries that `kept_NG` marks in M groups of neighbours, with N = `most`.

    `numbers_N` are the numbers of the groups. A row of F entries has F / 16 groups, rounded up.
    """
    at_N = where_true(kept_NG.reshape(-1), most)
    number_N, per_row = numbers_N[at_N // _GROUP], -(-F // _GROUP)
    return Entries(
        rows_N=number_N // per_row,
        columns_N=number_N % per_row * _GROUP + at_N % _GROUP,
        real_N=jnp.arange(most) < jnp.sum(kept_NG),
        complete=complete,
    )


def batch_threshold(
    values_BF: Float[Array, "B F"], most: int, count: Int[Array, ""] | int, axes: Axes = Axes()
) -> Float[Array, ""]:
    """`count_threshold` of a large array of which only a few entries are selected: `count` <= `most`."""
    if values_BF.size < 2 * _GROUP * most:
        return count_threshold(values_BF, count, axes)
    groups_NG, _ = largest_groups(values_BF, jnp.zeros(values_BF.shape[1]), most)
    kept_NG = groups_NG >= count_threshold(groups_NG, count, axes)
    least = jnp.min(jnp.where(kept_NG, groups_NG, jnp.inf))  # exact: the next smaller value may lie in another group
    return axes.least(least)


def largest_groups(
    values_BF: Float[Array, "B F"], offset_F: Float[Array, " F"], most: int
) -> tuple[Float[Array, "N G"], Int[Array, " N"]]:
    """The `most` groups of neighbours in a row of relu(values + offset) with the largest maxima, and their numbers.

    If there are fewer groups than `most`, all of them. A group without a positive entry comes back as zeros.
    """
    values_BTG, offset_TG = _grouped(values_BF), _grouped(offset_F)
    largest_T = jax.nn.relu(jnp.max(values_BTG + offset_TG[None], axis=2)).reshape(-1)
    most = min(most, len(largest_T))
    wanted_T = largest_T >= jnp.maximum(count_threshold(largest_T, most), _TINY)
    return _groups_where(wanted_T, values_BTG, offset_TG, most)


def _groups_where(
    wanted_M: Bool[Array, " M"], values_BTG: Float[Array, "B T G"], offset_TG: Float[Array, "T G"], most: int
) -> tuple[Float[Array, "N G"], Int[Array, " N"]]:
    """The first `most` wanted groups of relu(values + offset), padded with zeros, and their numbers."""
    most = min(most, len(wanted_M))
    numbers_N = where_true(wanted_M, most)
    found_N1 = (jnp.arange(most) < jnp.sum(wanted_M))[:, None]
    groups_NG = values_BTG.reshape(-1, _GROUP)[numbers_N] + offset_TG[numbers_N % len(offset_TG)]
    return jnp.where(found_N1, jax.nn.relu(groups_NG), 0.0), numbers_N


def _grouped(values: Float[Array, "*rows F"], size: int = _GROUP) -> Float[Array, "*rows T G"]:
    """The last axis split into groups of `size` neighbours. Its padding is never the largest."""
    F = values.shape[-1]
    missing = -F % size
    if missing:
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=-_TOP / 4)
    return values.reshape(*values.shape[:-1], -1, size)


def where_true(mask_T: Bool[Array, " T"], size: int) -> Int[Array, " N"]:
    """The places of the first `size` true entries, rising, padded with 0.

    `jnp.nonzero` scatters all T entries one by one, which takes ten times as long on a CPU. Here the mask is packed
    into words of 32 bits, and the set bits of each word are counted. Output n (from 0) then finds the word of its bit:
    the last word with at most n set bits before it. The bit in the word is found by halving.
    """
    bits_WB = jnp.pad(mask_T, (0, -len(mask_T) % 32)).reshape(-1, 32).astype(jnp.uint32)
    words_W = jnp.sum(bits_WB << jnp.arange(32, dtype=jnp.uint32)[None], axis=1, dtype=jnp.uint32)
    counts_W, numbers_W = _ones(words_W), jnp.arange(len(words_W), dtype=jnp.int32)
    before_W = jnp.cumsum(counts_W) - counts_W
    word_N = jax.lax.cummax(jnp.zeros(size, jnp.int32).at[before_W].max(numbers_W, mode="drop"))
    ranks_N = jnp.arange(size, dtype=jnp.int32)
    bits_N, skipped_N, place_N = words_W[word_N], ranks_N - before_W[word_N], 32 * word_N
    for width in (16, 8, 4, 2, 1):
        lower_N = _ones(bits_N & jnp.uint32((1 << width) - 1))
        higher_N = skipped_N >= lower_N
        skipped_N = jnp.where(higher_N, skipped_N - lower_N, skipped_N)
        bits_N = jnp.where(higher_N, bits_N >> width, bits_N)
        place_N = jnp.where(higher_N, place_N + width, place_N)
    return jnp.where(ranks_N < jnp.sum(counts_W), place_N, 0)


def _ones(words: UInt32[Array, "..."]) -> Int[Array, "..."]:
    """The number of set bits in each word."""
    return jax.lax.population_count(words).astype(jnp.int32)


def count_threshold(values: Float[Array, "..."], count: Int[Array, ""] | int, axes: Axes = Axes()) -> Float[Array, ""]:
    """A threshold t with exactly `count` entries >= t, or more of them if entries tie at t; 0 if there are fewer.

    `values` must be finite and not negative. Their float32 bit patterns then have the same order as they do. On several
    devices `count` is of the entries of all of them.
    """
    flat, count = values.astype(jnp.float32).reshape(-1), jnp.asarray(count, jnp.int32)
    if axes.devices > 1:  # the number of passes must not depend on what one device has
        return threshold_by_digits(flat, count, axes)
    return cast(Array, jax.lax.platform_dependent(flat, count, cpu=_by_interpolation, default=threshold_by_digits))


def threshold_by_digits(flat: Float[Array, " n"], count: Int[Array, ""], axes: Axes = Axes()) -> Float[Array, ""]:
    """`count_threshold` in 11 passes over the values, whatever they are: the `count`-th largest of them.

    Each pass finds 3 of the 31 bits, the first one 1, by counting the values above 7 numbers. XLA counts for so many in
    one kernel. A loop whose end depends on the data would let an accelerator wait for the host at every turn.
    """
    bits_n, passes, digits = _bits(flat), -(-31 // _DIGIT), jnp.arange(1, 1 << _DIGIT)

    def narrow(turn: Array, low: Array) -> Array:
        shift = _DIGIT * (passes - 1 - turn)
        fits = digits <= (jnp.int32(_MOST) - low) >> shift  # the first pass has fewer bits
        tries = low | (jnp.where(fits, digits, 0) << shift)
        reach = jnp.stack([jnp.sum(bits_n >= tries[n], dtype=jnp.int32) for n in range(len(digits))])
        found = axes.sum_of_all(reach) >= count
        return low | (jnp.sum(found & fits, dtype=jnp.int32) << shift)

    low = jax.lax.fori_loop(0, passes, narrow, jnp.int32(0))
    return jnp.where(count >= flat.size * axes.devices, 0.0, jax.lax.bitcast_convert_type(low, jnp.float32))


def _by_interpolation(flat: Float[Array, " n"], count: Int[Array, ""]) -> Float[Array, ""]:
    """`count_threshold`, in passes whose number depends on the values.

    1. A sorted sample brackets t.
    2. Interpolation on the counts, with a bisection at every third step, narrows the bracket. It takes about 8 passes
       over the values. Bisection of the 31 bits alone would take 31, and a full sort is 40 times slower on a CPU.
    3. The loop stops as soon as the count is exact: t then lies between the `count`-th value and the next smaller one.
       If entries tie, it stops at the largest t with at least `count` entries.
    """
    total = flat.size

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
    """Two thresholds: at least `count` entries very likely reach the first, and fewer than `count` the second.

    They lie 4 standard errors of the rank in the sample to either side.
    """
    sample = jnp.sort(flat[:: max(1, flat.size // _SAMPLE)])
    rank = count.astype(jnp.float32) / flat.size * sample.size
    spread = 4 * jnp.sqrt(jnp.maximum(rank, 1.0)) + 2
    below = (sample.size - 1 - (rank + spread)).astype(jnp.int32)
    above = (sample.size - 1 - (rank - spread)).astype(jnp.int32)
    low = jnp.where(below >= 0, sample[jnp.maximum(below, 0)], 0.0)
    high = jnp.where(above < sample.size, sample[jnp.clip(above, 0, sample.size - 1)], _TOP)
    return low, high
