"""The chunked hinge against the plain sum over all pairs, in value and gradient; mu0; coherence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.config import PenaltyConfig, SAEConfig
from hafs_jax.method.penalties import (
    Structure,
    assign_parents,
    coherence,
    first_groups,
    frobenius_penalty,
    hinge_penalty,
    noise_floor_margin,
    ortsae_penalty,
    tangent,
    tangent_norms,
)
from tests.support.penalties import D, F, structure_of


def naive(W_dec: jax.Array, alpha: float, mu0: float, T: np.ndarray | None = None) -> jax.Array:
    """The sum over all pairs, F x F."""
    U = W_dec / jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    cosines = U @ U.T
    T = np.ones((F, F)) if T is None else T
    total = 0.0
    for i in range(F):
        for j in range(F):
            if i != j:
                total = total + (1 - alpha * T[i, j]) * jnp.maximum(cosines[i, j] - mu0, 0.0) ** 2
    return total / F


@pytest.fixture
def W_dec() -> jax.Array:
    return 1.7 * jax.random.normal(jax.random.key(1), (F, D))


def test_the_norms_of_a_tangent_need_no_tangent() -> None:
    """Of rows whose norm is only about 1 too, of a row of zeros, and of one that points along its unit row."""
    gradient_FD = jax.random.normal(jax.random.key(2), (F, D))
    unit_FD = jax.random.normal(jax.random.key(3), (F, D))
    unit_FD *= jnp.linspace(0.9, 1.1, F)[:, None] / jnp.linalg.norm(unit_FD, axis=1, keepdims=True)
    unit_FD = unit_FD.at[1].divide(jnp.linalg.norm(unit_FD[1]))
    gradient_FD = gradient_FD.at[0].set(0.0).at[1].set(5.0 * unit_FD[1])
    expected_F = jnp.linalg.norm(tangent(gradient_FD, unit_FD), axis=1)
    np.testing.assert_allclose(tangent_norms(gradient_FD, unit_FD), expected_F, rtol=1e-5, atol=5e-3)
    np.testing.assert_allclose(tangent_norms(gradient_FD, unit_FD)[2:], expected_F[2:], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_one_chunk_equals_the_plain_sum_and_its_gradient(W_dec: jax.Array, alpha: float) -> None:
    config = PenaltyConfig(kind="hinge", chunk_size=64)

    def ours(W: jax.Array) -> jax.Array:
        return hinge_penalty(W, jnp.float32(alpha), structure_of(), 0.1, config, jax.random.key(0))

    np.testing.assert_allclose(ours(W_dec), naive(W_dec, alpha, 0.1), rtol=1e-5)
    theirs = jax.grad(lambda W: naive(W, alpha, 0.1))(W_dec)
    np.testing.assert_allclose(jax.grad(ours)(W_dec), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk_size", [4, 11, 5])  # 4 and 5 leave a last chunk of 2
def test_chunks_are_unbiased_over_partitions_in_value_and_gradient(W_dec: jax.Array, chunk_size: int) -> None:
    config = PenaltyConfig(kind="hinge", chunk_size=chunk_size)
    keys = jax.random.split(jax.random.key(2), 20_000)
    value_and_grad = jax.value_and_grad(
        lambda W, key: hinge_penalty(W, jnp.float32(0.3), structure_of(), 0.1, config, key)
    )
    values, grads = jax.vmap(value_and_grad, (None, 0))(W_dec, keys)
    error = float(values.std()) / np.sqrt(len(keys))
    assert abs(float(values.mean()) - float(naive(W_dec, 0.3, 0.1))) < 4 * error
    theirs = jax.grad(lambda W: naive(W, 0.3, 0.1))(W_dec)
    errors = np.asarray(grads.std(0)) / np.sqrt(len(keys))
    assert (np.abs(np.asarray(grads.mean(0) - theirs)) < 5 * errors + 1e-6).all()


def test_contiguous_sharing_relaxes_only_pairs_of_a_group(W_dec: jax.Array) -> None:
    config = PenaltyConfig(kind="hinge", chunk_size=64, sharing="contiguous", group_size=4)
    ours = hinge_penalty(W_dec, jnp.float32(0.9), structure_of(config), 0.1, config, jax.random.key(5))
    groups = np.arange(F) // 4
    np.testing.assert_allclose(ours, naive(W_dec, 0.9, 0.1, groups[:, None] == groups[None]), rtol=1e-5)


def test_inside_the_margin_there_is_no_force_and_scale_does_not_matter() -> None:
    config = PenaltyConfig(kind="hinge")
    gradient = jax.grad(
        lambda W: hinge_penalty(W, jnp.float32(0.0), structure_of(n_latents=len(W)), 0.05, config, jax.random.key(0))
    )
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
    config = PenaltyConfig(kind="hinge", chunk_size=1000)
    value = hinge_penalty(W, jnp.float32(0.0), structure_of(n_latents=600), mu0, config, jax.random.key(0))
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


def test_coherence_of_some_latents_is_with_all_others(W_dec: jax.Array) -> None:
    U = np.asarray(W_dec / jnp.linalg.norm(W_dec, axis=1, keepdims=True), np.float64)
    nearest_F = (U @ U.T - 2 * np.eye(F)).max(1)
    ours, whole = coherence(W_dec, most=7, chunk=3), coherence(W_dec)
    some = np.arange(7) * F // 7
    np.testing.assert_allclose(ours["coherence_mean"], nearest_F[some].mean(), rtol=1e-5)
    np.testing.assert_allclose(ours["coherence_max"], nearest_F[some].max(), rtol=1e-5)
    np.testing.assert_allclose(ours["frobenius_excess"], whole["frobenius_excess"], rtol=1e-5)
    np.testing.assert_allclose(coherence(W_dec, most=F + 1)["coherence_mean"], whole["coherence_mean"], rtol=1e-5)


def test_levels_are_the_prefixes_bands_and_parents_the_nearest_of_the_first(W_dec: jax.Array) -> None:
    level = PenaltyConfig(kind="hinge", sharing="level", chunk_size=64)
    sae = SAEConfig(n_latents=F, k=3, prefixes=(0.25, 0.5, 1.0))  # 5.5 rounds to 6: bands of 6, 5 and 11
    bands = np.repeat([0, 1, 2], [6, 5, 11])
    np.testing.assert_array_equal(first_groups(level, sae), bands)
    ours = hinge_penalty(W_dec, jnp.float32(0.8), grouped(bands), 0.1, level, KEY)
    np.testing.assert_allclose(ours, naive(W_dec, 0.8, 0.1, bands[:, None] == bands[None]), rtol=1e-5)

    groups = np.asarray(assign_parents(W_dec, 4))
    U = np.asarray(W_dec) / np.linalg.norm(W_dec, axis=1, keepdims=True)
    assert groups[:4].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(groups[4:], (U[4:] @ U[:4].T).argmax(1))
    parent = PenaltyConfig(kind="hinge", sharing="parent", chunk_size=64)
    ours = hinge_penalty(W_dec, jnp.float32(0.8), grouped(groups), 0.1, parent, KEY)
    np.testing.assert_allclose(ours, naive(W_dec, 0.8, 0.1, groups[:, None] == groups[None]), rtol=1e-5)


KEY = jax.random.key(5)


def grouped(groups: np.ndarray) -> Structure:
    return structure_of().replace(groups_F=jnp.asarray(groups, jnp.int32))


def test_cofiring_pairs_share_as_far_as_the_rarer_fires_with_the_other(W_dec: jax.Array) -> None:
    active = np.asarray(structure_of().active_BF, float)
    T = np.zeros((F, F))
    for i in range(F):
        for j in range(F):
            rarer = min(active[:, i].sum(), active[:, j].sum())
            T[i, j] = (active[:, i] * active[:, j]).sum() / rarer if rarer else 0.0
    config = PenaltyConfig(kind="hinge", sharing="cofiring", chunk_size=64)
    ours = hinge_penalty(W_dec, jnp.float32(0.7), structure_of(), 0.1, config, KEY)
    np.testing.assert_allclose(ours, naive(W_dec, 0.7, 0.1, T), rtol=1e-5)


@pytest.mark.parametrize(("yielding", "turned", "fixed"), [("later", 1, 0), ("rarer", 0, 1)])
def test_only_the_latent_that_yields_is_turned(yielding: str, turned: int, fixed: int) -> None:
    """Two latents of cosine 0.6; number 0 fires less (see `structure`) and comes first."""
    W = jnp.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])

    def value(W: jax.Array, who: str) -> jax.Array:
        config = PenaltyConfig(kind="hinge", yielding=who)
        return hinge_penalty(W, jnp.float32(0.0), structure_of(n_latents=2), 0.1, config, KEY)

    both, one = (jax.grad(value)(W, who) for who in ("both", yielding))
    np.testing.assert_allclose(value(W, yielding), value(W, "both"), rtol=1e-6)
    assert float(jnp.abs(one[fixed]).max()) == 0 and float(jnp.abs(one[turned]).max()) > 0.1
    np.testing.assert_allclose(one[turned], both[turned], rtol=1e-5)


def test_equal_rates_turn_both() -> None:
    W = jnp.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])
    even = structure_of(n_latents=2).replace(rate_F=jnp.array([0.2, 0.2]))

    def value(W: jax.Array, who: str) -> jax.Array:
        return hinge_penalty(W, jnp.float32(0.0), even, 0.1, PenaltyConfig(kind="hinge", yielding=who), KEY)

    np.testing.assert_allclose(jax.grad(value)(W, "rarer"), jax.grad(value)(W, "both"), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [64, 11, 8])  # one chunk; two; three of 8, the last filled up
def test_ortsae_against_the_plain_definition(W_dec: jax.Array, chunk_size: int) -> None:
    config = PenaltyConfig(kind="ortsae", chunk_size=chunk_size)
    U = np.asarray(W_dec) / np.linalg.norm(W_dec, axis=1, keepdims=True)
    count = -(-F // min(chunk_size, F))
    m = -(-F // count)
    order = np.asarray(jax.random.permutation(KEY, F))
    total = 0.0
    for start in range(0, F, m):
        cosines = U[order[start : start + m]] @ U[order[start : start + m]].T
        np.fill_diagonal(cosines, -1)
        total += (cosines.max(1) ** 2).sum()
    np.testing.assert_allclose(ortsae_penalty(W_dec, config, KEY), total / F, rtol=1e-5)


def test_frobenius_against_all_pairs(W_dec: jax.Array) -> None:
    U = np.asarray(W_dec) / np.linalg.norm(W_dec, axis=1, keepdims=True)
    np.testing.assert_allclose(frobenius_penalty(W_dec), ((U @ U.T - np.eye(F)) ** 2).sum() / F, rtol=1e-5)
