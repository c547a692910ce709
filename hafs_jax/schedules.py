"""What varies with the training step alone, as optax schedules: alpha(t), the learning rate, the L1 warm-up."""

from collections.abc import Callable

import optax
from jaxtyping import Array, Float

from hafs_jax.config import OptimizerConfig, PenaltyConfig

Schedule = Callable[[Array | int], Float[Array, ""]]
"""step -> value, defined for traced steps."""


def piecewise_linear(fractions: tuple[float, ...], values: tuple[float, ...], steps: int) -> Schedule:
    """The linear interpolation of `values` at `fractions` of `steps`, constant past the last knot.

    Knots are rounded to whole steps; where two fall on one step, the later value holds from there on.
    """
    knots = [round(fraction * steps) for fraction in fractions]
    segments = [
        optax.linear_schedule(values[i], values[i + 1], max(knots[i + 1] - knots[i], 1)) for i in range(len(knots) - 1)
    ]
    return optax.join_schedules([*segments, optax.constant_schedule(values[-1])], knots[1:])


def alpha_schedule(config: PenaltyConfig, steps: int) -> Schedule:
    """alpha(t), the tolerance of shared direction: 1 is no pressure, 0 full pressure; 0 throughout without `ramp`."""
    if not config.ramp:
        return optax.constant_schedule(0.0)
    return piecewise_linear(config.alpha_fractions, config.alpha_values, steps)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """The learning rate relative to its peak: linear from 0 to 1, constant, linear to 0.

    The first step is already a share of the rise and the last still one of the fall: no step is an update of size 0.
    """
    rise, fall = round(config.warmup * steps), round(config.decay * steps)
    warmup = optax.linear_schedule(0.0, 1.0, max(rise, 1))
    decay = optax.linear_schedule(1.0, 0.0, max(fall, 1), transition_begin=steps - fall)
    return lambda step: warmup(step + 1) * (decay(step) if fall else 1.0)


def warmup_schedule(fraction: float, steps: int) -> Schedule:
    """Linear from 0 to 1 over the first `fraction` of `steps`, then 1."""
    if fraction == 0:
        return optax.constant_schedule(1.0)
    return piecewise_linear((0.0, fraction, 1.0), (0.0, 1.0, 1.0), steps)
