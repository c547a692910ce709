"""alpha's knots, the learning rate's shape."""

import pytest

from hafs_jax.config import OptimizerConfig, PenaltyConfig, SAEConfig, SparsityConfig
from hafs_jax.method.schedules import (
    alpha_schedule,
    coefficient_schedule,
    k_schedule,
    learning_rate_schedule,
    settled_step,
)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0, 1.0), (0.025, 0.95), (0.05, 0.9), (0.2, 0.9), (0.4, 0.9), (0.6, 0.45), (0.8, 0.0), (0.9, 0.0), (1.0, 0.0)],
)
def test_alpha_at_its_knots_and_between(fraction: float, expected: float) -> None:
    alpha = alpha_schedule(PenaltyConfig(kind="hinge", ramp=True), 2000)
    assert float(alpha(round(fraction * 2000))) == pytest.approx(expected, abs=1e-6)


def test_alpha_without_the_ramp_is_zero_and_knots_can_be_set() -> None:
    assert float(alpha_schedule(PenaltyConfig(kind="hinge"), 100)(10)) == 0.0
    config = PenaltyConfig(ramp=True, alpha_fractions=(0.0, 0.5, 1.0), alpha_values=(0.2, 0.6, 0.6))
    assert float(alpha_schedule(config, 10)(5)) == pytest.approx(0.6)
    assert float(alpha_schedule(config, 10)(2)) == pytest.approx(0.36)


def test_learning_rate_rises_holds_and_falls_without_a_zero_step() -> None:
    rate = learning_rate_schedule(OptimizerConfig(warmup=0.1, decay=0.2), 100)
    values = [float(rate(step)) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == values[79] == values[80] == 1.0
    assert values[99] == pytest.approx(0.05) and min(values) > 0
    flat = learning_rate_schedule(OptimizerConfig(warmup=0.0, decay=0.0), 10)
    assert {float(flat(step)) for step in range(10)} == {1.0}


def test_cosine_decay_starts_and_ends_where_the_linear_does() -> None:
    rate = learning_rate_schedule(OptimizerConfig(warmup=0.1, decay=0.2, decay_shape="cosine"), 100)
    values = [float(rate(step)) for step in range(100)]
    assert values[79] == values[80] == 1.0 and values[90] == pytest.approx(0.5)
    assert 0 < values[99] < 0.01 and values[85] > 0.85


def test_the_coefficient_rises_and_its_controller_starts_when_it_has() -> None:
    config = SparsityConfig(coefficient_fractions=(0.0, 0.5, 1.0))
    assert [float(coefficient_schedule(config, 8)(step)) for step in (0, 1, 4, 7)] == [0.0, 0.25, 1.0, 1.0]
    assert settled_step(config, 8) == 4
    flat = SparsityConfig(coefficient_fractions=(0.0, 1.0), coefficient_values=(1.0, 1.0))
    assert float(coefficient_schedule(flat, 8)(0)) == 1.0 and settled_step(flat, 8) == 0


def test_k_anneals_in_whole_numbers() -> None:
    config = SAEConfig(n_latents=50, k=5, k_fractions=(0.0, 0.5, 1.0), k_values=(4.0, 1.0, 1.0))
    k = k_schedule(config, 20)
    assert [int(k(step)) for step in (0, 2, 5, 10, 19)] == [20, 17, 12, 5, 5] and config.largest_k == 20
    assert int(k_schedule(SAEConfig(n_latents=50, k=5), 20)(3)) == 5
