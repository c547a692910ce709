"""Choosing the largest entries of an array without sorting it. Pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_SAMPLE = 4_096  # entries sorted to bracket the threshold; 4 standard errors of its rank either side
_TOP = np.float32(np.finfo(np.float32).max)


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


def _bits(value: Float[Array, ""]) -> Array:
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
