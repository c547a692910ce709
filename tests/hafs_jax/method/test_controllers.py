"""lambda(e) against a plain re-statement of the method, its robustness, and the L0 controller."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.config import PenaltyConfig, SparsityConfig
from hafs_jax.method.controllers import ErrorGate, init_gate, init_sparsity, update_gate, update_sparsity

CONFIG = PenaltyConfig(kind="hinge", gate=True, ramp=True, lam_max=1.0)
TAU = 0.25


def plain(values: list[float], tau: float, config: PenaltyConfig) -> list[float]:
    """The controller in plain Python, from the method's text."""
    ema = count = lam = 0.0
    out = []
    for f in values:
        ok = math.isfinite(f)
        f = f if ok else 0.0
        reference = ema / (1 - config.ema_decay**count) if count > 0 else f
        f = min(f, 3 * reference if count > 100 else max(1, f))
        if ok:
            ema, count = config.ema_decay * ema + (1 - config.ema_decay) * f, count + 1
            e = ema / (1 - config.ema_decay**count)
            sigmoid = 1 / (1 + math.exp(-(tau - e) / (config.gate_width * tau)))
            target = config.lam_min + (config.lam_max - config.lam_min) * sigmoid
            lam += min(max(target - lam, -0.1 * config.lam_max), 0.02 * config.lam_max)
        else:
            lam *= 0.5
        out.append(lam)
    return out


def run(values: list[float], config: PenaltyConfig = CONFIG, tau: float = TAU) -> tuple[ErrorGate, np.ndarray]:
    def body(gate: ErrorGate, fvu: jax.Array) -> tuple[ErrorGate, jax.Array]:
        gate = update_gate(gate, fvu, config, tau, config.lam_max)
        return gate, gate.lam

    return jax.lax.scan(body, init_gate(config, config.lam_max), jnp.asarray(values, jnp.float32))


def test_equals_the_plain_statement_on_a_rough_sequence() -> None:
    random = np.random.default_rng(0)
    values = list(0.2 + np.exp(-np.arange(500) / 60) * 0.8 + 0.02 * random.normal(size=500))
    values[180], values[300:310], values[400] = float("nan"), [float("inf")] * 10, 60.0
    gate, lams = run(values)
    np.testing.assert_allclose(lams, plain(values, TAU, CONFIG), rtol=2e-4, atol=1e-6)
    assert int(gate.bad) == 11 and bool(gate.reached)


def test_a_spike_barely_changes_lambda_and_bad_batches_let_it_recover() -> None:
    """One 250x spike takes lambda from 0.837 to 0.823 and 0.829; ten NaN take it to 0.0008, and 50 steps back."""
    steady = [0.19] * 600
    before = run(steady)[1][-1]
    spiked = run(steady + [250 * 0.19] + [0.19] * 100)[1]
    assert abs(float(spiked[600:].min() - before)) < 0.02
    ill = run(steady + [float("nan")] * 10 + [0.19] * 60)[1]
    assert float(ill[609]) < 0.001 and float(ill[-1]) > 0.95 * float(before)


def test_a_long_collapse_takes_lambda_to_zero_and_it_comes_back() -> None:
    values = [0.19] * 400 + [1.0] * 100 + [0.19] * 700
    lams = run(values)[1]
    assert float(lams[460]) < 0.01 and float(lams[-1]) > 0.8 * float(lams[399])


def test_lambda_never_changes_faster_than_promised() -> None:
    config = PenaltyConfig(kind="hinge", gate=True, lam_max=3.0, lam_min=0.5)
    lams = np.concatenate([[0.5], run([0.05] * 200 + [5.0] * 100, config)[1]])
    assert np.diff(lams).max() <= 0.02 * 3 + 1e-6 and np.diff(lams).min() >= -0.1 * 3 - 1e-6
    assert lams.min() >= 0.5 - 1e-6 and lams.max() <= 3.0 + 1e-6


def test_without_gate_or_penalty_lambda_is_constant_but_the_error_is_followed() -> None:
    for config, expected in ((PenaltyConfig(kind="hinge", lam_max=2.0), 2.0), (PenaltyConfig(), 0.0)):
        gate, lams = run([0.5] * 20 + [float("nan")], config)
        assert set(np.asarray(lams).tolist()) == {expected}
        assert float(gate.error(config.ema_decay)) == pytest.approx(0.5, rel=1e-5) and int(gate.bad) == 1


def test_error_that_never_reaches_tau_says_so() -> None:
    assert not bool(run([0.9] * 300)[0].reached)


def test_sparsity_control_approaches_the_target_and_freezes() -> None:
    config = SparsityConfig()
    control = init_sparsity(0.04, 40)
    up = update_sparsity(control, jnp.float32(80), config, 40, jnp.array(True))
    assert float(up.coefficient) > 0.04
    down = update_sparsity(control, jnp.float32(10), config, 40, jnp.array(True))
    assert float(down.coefficient) < 0.04
    for frozen in (
        update_sparsity(control, jnp.float32(80), config, 40, jnp.array(False)),
        update_sparsity(control, jnp.float32(jnp.nan), config, 40, jnp.array(True)),
    ):
        assert float(frozen.coefficient) == pytest.approx(0.04)


def test_the_coefficient_rises_slowly_from_any_l0() -> None:
    """While L0 is still falling from its start, a coefficient that followed it would overshoot and kill latents."""
    config, gain = SparsityConfig(), SparsityConfig().match_gain
    control = init_sparsity(1.0, 40)
    for l0, factor in ((40_000.0, 2**gain), (60.0, 1.5**gain), (20.0, 0.5**gain), (0.0, 2 ** (-3 * gain))):
        moved = update_sparsity(control, jnp.float32(l0), config, 40, jnp.array(True))
        assert float(moved.coefficient) == pytest.approx(factor, rel=1e-5)
