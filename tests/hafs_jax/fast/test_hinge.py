"""The penalties' values and gradients as training takes them, against autodiff of the plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.config import PenaltyConfig
from hafs_jax.fast.hinge import hinge_and_gradient, penalty_and_gradient
from hafs_jax.fast.plan import Plan
from hafs_jax.method.penalties import PENALTIES, hinge_penalty
from hafs_jax.method.sae import unit_rows
from tests.support.penalties import D, F, structure_of

KEY = jax.random.key(0)
CPU = Plan("cpu", "dense", 1 << 25)


@pytest.fixture
def W_dec() -> jax.Array:
    return 1.7 * jax.random.normal(jax.random.key(1), (F, D))


@pytest.mark.parametrize("kind", PENALTIES)
def test_every_penalty_gives_its_value_and_a_gradient_that_turns_the_rows(W_dec: jax.Array, kind: str) -> None:
    config, units = PenaltyConfig(kind=kind, chunk_size=5), unit_rows(W_dec)
    given = (units, jnp.float32(0.6), structure_of(config), 0.1, config, KEY)
    value, gradient = jax.value_and_grad(PENALTIES[kind].value)(*given)
    found, turning = penalty_and_gradient(*given, CPU)
    assert float(found) == pytest.approx(float(value), rel=1e-5) and float(value) > 0
    along = jnp.sum(gradient * units, axis=1, keepdims=True) * units
    assert float(jnp.max(jnp.abs(turning))) > 1e-3
    np.testing.assert_allclose(turning, gradient - along, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1000, 11, 5])  # 5 leaves a last chunk of 2
@pytest.mark.parametrize("yielding", ["both", "later", "rarer"])
@pytest.mark.parametrize("sharing", ["global", "contiguous", "cofiring"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_gradient_is_what_of_autodiffs_turns_the_rows(
    W_dec: jax.Array, platform: str, sharing: str, yielding: str, chunk_size: int
) -> None:
    config = PenaltyConfig(kind="hinge", sharing=sharing, yielding=yielding, chunk_size=chunk_size, group_size=3)
    units = unit_rows(W_dec)
    given = (units, jnp.float32(0.6), structure_of(config), 0.1, config, KEY)
    value, gradient = jax.value_and_grad(hinge_penalty)(*given)
    turning = gradient - jnp.sum(gradient * units, axis=1, keepdims=True) * units
    found, ours = hinge_and_gradient(*given, Plan(platform, "dense", 1 << 25))
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    assert float(jnp.max(jnp.abs(turning))) > 0.01
    np.testing.assert_allclose(ours, turning, rtol=1e-4, atol=1e-6)


def test_the_gradients_spread_over_partitions_is_what_the_docstring_says() -> None:
    n_latents, chunk_size, mu0 = 24, 6, 0.05
    units = unit_rows(jax.random.normal(jax.random.key(4), (n_latents, D)))
    given = (jnp.float32(0.0), structure_of(n_latents=n_latents), mu0)
    by_size = {m: PenaltyConfig(kind="hinge", chunk_size=m) for m in (chunk_size, n_latents)}
    _, exact = hinge_and_gradient(units, *given, by_size[n_latents], KEY, CPU)
    keys = jax.random.split(jax.random.key(8), 4000)
    _, each = jax.vmap(lambda key: hinge_and_gradient(units, *given, by_size[chunk_size], key, CPU))(keys)
    found = np.mean(np.sum((np.asarray(each) - np.asarray(exact)) ** 2, axis=2), axis=0)

    U = np.asarray(units, np.float64)
    cosines = U @ U.T
    terms = 4 / n_latents * np.maximum(cosines - mu0, 0)[:, :, None] * (U[None] - cosines[:, :, None] * U[:, None])
    others = np.stack([np.delete(terms[i], i, axis=0) for i in range(n_latents)])
    N, n = n_latents - 1, chunk_size - 1
    expected = N * (N - n) / n * np.sum(np.var(others, axis=1, ddof=1), axis=1)
    np.testing.assert_allclose(found, expected, rtol=0.15)
    np.testing.assert_allclose(np.sum(found), np.sum(expected), rtol=0.03)
