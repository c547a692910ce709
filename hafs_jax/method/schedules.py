"""Optax schedules of the training step: alpha(t), k, the sparsity coefficient and the learning rate."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hafs_jax.config import OptimizerConfig, PenaltyConfig, SAEConfig, SparsityConfig

Schedule = Callable[[Array | int], Float[Array, ""] | Int[Array, ""]]
"""step -> value; the step may be traced."""


def piecewise_linear(fractions: tuple[float, ...], values: tuple[float, ...], steps: int) -> Schedule:
    """The linear interpolation of `values` at `fractions` of `steps`, constant after the last knot.

    Knots are rounded to integer steps. If two fall on the same step, the later value holds from there on.
    """
    knots = [round(fraction * steps) for fraction in fractions]
    segments = [
        optax.linear_schedule(values[i], values[i + 1], max(knots[i + 1] - knots[i], 1)) for i in range(len(knots) - 1)
    ]
    return optax.join_schedules([*segments, optax.constant_schedule(values[-1])], knots[1:])


def alpha_schedule(config: PenaltyConfig, steps: int) -> Schedule:
    """alpha(t), the tolerance of shared direction: 1 is no pressure, 0 is full pressure; always 0 without `ramp`."""
    if not config.ramp:
        return optax.constant_schedule(0.0)
    return piecewise_linear(config.alpha_fractions, config.alpha_values, steps)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """The learning rate over its peak: linear from 0 to 1, then constant, then linear or half a cosine to 0.

    The first and the last step have rates above 0, so no step is an update of size 0.
    """
    rise, fall = round(config.warmup * steps), round(config.decay * steps)
    warmup = optax.linear_schedule(0.0, 1.0, max(rise, 1))
    if config.decay_shape == "cosine":
        cosine = optax.cosine_decay_schedule(1.0, max(fall, 1))
        decay: Schedule = lambda step: cosine(jnp.maximum(step - (steps - fall), 0))  # noqa: E731
    else:
        decay = optax.linear_schedule(1.0, 0.0, max(fall, 1), transition_begin=steps - fall)
    return lambda step: warmup(step + 1) * (decay(step) if fall else 1.0)


def coefficient_schedule(config: SparsityConfig, steps: int) -> Schedule:
    """The factor on the sparsity coefficient at each step."""
    return piecewise_linear(config.coefficient_fractions, config.coefficient_values, steps)


def settled_step(config: SparsityConfig, steps: int) -> int:
    """The first step from which the coefficient's schedule is constant. The L0 controller starts there."""
    values, fractions = config.coefficient_values, config.coefficient_fractions
    last = max((i for i in range(1, len(values)) if values[i] != values[i - 1]), default=0)
    return round(fractions[last] * steps)


def k_schedule(config: SAEConfig, steps: int) -> Schedule:
    """k at each step, an integer of at least 1: piecewise linear in the fraction of training."""
    multiple = piecewise_linear(config.k_fractions, config.k_values, steps)
    return lambda step: jnp.clip(jnp.round(config.k * multiple(step)), 1, config.largest_k).astype(jnp.int32)
