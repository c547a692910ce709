"""The chunked hinge against the plain sum over all pairs, in value and gradient; mu0; coherence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.config import PenaltyConfig
from hafs_jax.penalty import coherence, hinge_penalty, noise_floor_margin

F, D = 22, 7


def naive(W_dec: jax.Array, alpha: float, mu0: float, groups: np.ndarray | None = None) -> jax.Array:
    """METHOD's sum over all pairs, F x F."""
    U = W_dec / jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    cosines = U @ U.T
    T = np.ones((F, F)) if groups is None else (groups[:, None] == groups[None]).astype(float)
    total = 0.0
    for i in range(F):
        for j in range(F):
            if i != j:
                total = total + (1 - alpha * T[i, j]) * jnp.maximum(cosines[i, j] - mu0, 0.0) ** 2
    return total / F


@pytest.fixture
def W_dec() -> jax.Array:
    return 1.7 * jax.random.normal(jax.random.key(1), (F, D))


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_one_chunk_equals_the_plain_sum_and_its_gradient(W_dec: jax.Array, alpha: float) -> None:
    config = PenaltyConfig(kind="hinge", chunk_size=64)

    def ours(W: jax.Array) -> jax.Array:
        return hinge_penalty(W, jnp.float32(alpha), 0.1, config, jax.random.key(0))

    np.testing.assert_allclose(ours(W_dec), naive(W_dec, alpha, 0.1), rtol=1e-5)
    theirs = jax.grad(lambda W: naive(W, alpha, 0.1))(W_dec)
    np.testing.assert_allclose(jax.grad(ours)(W_dec), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk_size", [4, 11, 5])  # 4 and 5 leave a last chunk of 2
def test_chunks_are_unbiased_over_partitions_in_value_and_gradient(W_dec: jax.Array, chunk_size: int) -> None:
    config = PenaltyConfig(kind="hinge", chunk_size=chunk_size)
    keys = jax.random.split(jax.random.key(2), 20_000)
    value_and_grad = jax.value_and_grad(lambda W, key: hinge_penalty(W, jnp.float32(0.3), 0.1, config, key))
    values, grads = jax.vmap(value_and_grad, (None, 0))(W_dec, keys)
    error = float(values.std()) / np.sqrt(len(keys))
    assert abs(float(values.mean()) - float(naive(W_dec, 0.3, 0.1))) < 4 * error
    theirs = jax.grad(lambda W: naive(W, 0.3, 0.1))(W_dec)
    errors = np.asarray(grads.std(0)) / np.sqrt(len(keys))
    assert (np.abs(np.asarray(grads.mean(0) - theirs)) < 5 * errors + 1e-6).all()


def test_contiguous_sharing_relaxes_only_pairs_of_a_group(W_dec: jax.Array) -> None:
    config = PenaltyConfig(kind="hinge", chunk_size=64, sharing="contiguous", group_size=4)
    ours = hinge_penalty(W_dec, jnp.float32(0.9), 0.1, config, jax.random.key(5))
    np.testing.assert_allclose(ours, naive(W_dec, 0.9, 0.1, np.arange(F) // 4), rtol=1e-5)


def test_inside_the_margin_there_is_no_force_and_scale_does_not_matter() -> None:
    config = PenaltyConfig(kind="hinge")
    gradient = jax.grad(lambda W: hinge_penalty(W, jnp.float32(0.0), 0.05, config, jax.random.key(0)))
    assert not gradient(jnp.eye(5, 9)).any()
    W = jax.random.normal(jax.random.key(3), (F, D))
    along = jnp.sum(gradient(W) * W, axis=1)
    np.testing.assert_allclose(along, 0.0, atol=1e-6)


@pytest.mark.parametrize(("n_latents", "expected"), [(2048, 0.048), (4096, 0.061), (8192, 0.073), (16384, 0.084)])
def test_margin_at_width_512(n_latents: int, expected: float) -> None:
    assert noise_floor_margin(n_latents, 512, 0.25) == pytest.approx(expected, abs=5e-4)


def test_random_rows_have_the_noise_floor_as_their_penalty() -> None:
    mu0 = noise_floor_margin(600, 64, 0.25)
    W = jax.random.normal(jax.random.key(4), (600, 64))
    value = hinge_penalty(W, jnp.float32(0.0), mu0, PenaltyConfig(kind="hinge", chunk_size=1000), jax.random.key(0))
    assert float(value) == pytest.approx(0.25, rel=0.1)
    assert noise_floor_margin(3, 64, 0.25) == 0.0


def test_coherence_against_the_full_gram(W_dec: jax.Array) -> None:
    U = np.asarray(W_dec / jnp.linalg.norm(W_dec, axis=1, keepdims=True), np.float64)
    cosines = U @ U.T - 2 * np.eye(F)
    ours = coherence(W_dec, chunk=5)
    np.testing.assert_allclose(ours["coherence_mean"], cosines.max(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(ours["coherence_max"], cosines.max(), rtol=1e-5)
    off = ((U @ U.T) ** 2).sum() - F
    np.testing.assert_allclose(ours["frobenius_excess"], off / (F * (F - 1) / D), rtol=1e-4)
