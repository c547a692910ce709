"""The optimizer's update equals optax's, is made in place on a CPU, and changes nothing after a bad batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.fast.adam import optimizer, plain_update, update
from hafs_jax.fast.kernels import calls
from hafs_jax.fast.kernels.update import adam_of_rows, takes
from hafs_jax.fast.plan import choose
from hafs_jax.method.penalties import tangent
from hafs_jax.method.sae import init_params, unit_rows
from hafs_jax.ops.products import Params
from hafs_jax.presets import preset

D, F = 8, 24


def config_of(architecture: str = "jumprelu", frozen: str = "nothing", **fields: Any) -> TrainConfig:
    config = preset("baseline", architecture)
    sae = dataclasses.replace(config.sae, n_latents=F, k=4)
    return dataclasses.replace(
        config, sae=sae, frozen=frozen, optimizer=dataclasses.replace(config.optimizer, **fields)
    )


def start(config: TrainConfig) -> tuple[Params, optax.OptState, list[Params]]:
    """Parameters, the optimizer's first state, and three steps' gradients, of which clipping cuts some."""
    params = init_params(config.sae, D, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    grads = [
        {name: size * jax.random.normal(key, value.shape) for name, value in params.items()}
        for key, size in zip(keys, (1e-3, 1.0, 1e-2), strict=True)
    ]
    return params, optimizer(config, D).init(params), grads


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=5e-7)


@pytest.mark.parametrize("frozen", ["nothing", "decoder", "everything"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize(("name", "kernels"), [("adam", "off"), ("adam", "on"), ("adamw", "on"), ("lion", "off")])
def test_an_update_is_that_of_optax(name: str, kernels: str, clip_norm: float | None, frozen: str) -> None:
    config = config_of(frozen=frozen, name=name, clip_norm=clip_norm, beta1=0.8, epsilon=1e-3)
    config = dataclasses.replace(config, kernels=kernels)
    params, state, steps = start(config)
    plain, plain_state, rate = params, state, jnp.float32(0.05)
    for grads in steps:
        params, state = update(
            params, state, grads, optax.global_norm(grads), rate, jnp.bool_(True), config, choose(config)
        )
        plain, plain_state = plain_update(plain, plain_state, grads, rate, config)
        assert_same((params, state), (plain, plain_state))
    first = init_params(config.sae, D, jax.random.key(0))
    assert bool(jnp.any(params["W_enc"] != first["W_enc"])) == (frozen != "everything")
    assert bool(jnp.any(params["W_dec"] != first["W_dec"])) == (frozen == "nothing")
    np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"], axis=1), 1.0, rtol=1e-6)
    assert float(jnp.min(params["threshold"])) >= 0


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_an_update_that_is_not_ok_changes_nothing(name: str) -> None:
    config = config_of(name=name)
    params, state, (grads, *_) = start(config)
    bad = jax.tree.map(lambda value: jnp.full_like(value, jnp.nan), grads)
    found = update(params, state, bad, jnp.float32(jnp.nan), jnp.float32(0.1), jnp.bool_(False), config, choose(config))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves((params, state)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("platform", "kernels"),
    [("cpu", "off"), ("gpu", "off"), ("cpu", "on")],
    ids=["by a branch", "by selection", "by a kernel"],
)
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_members_that_are_ok_change_and_the_others_stay(name: str, platform: str, kernels: str) -> None:
    """One program for two SAEs, of which the second's gradient is not finite; and one for each, compiled."""
    config = dataclasses.replace(config_of(name=name), kernels=kernels)
    params, state, (_, grads, _) = start(config)
    two = jax.tree.map(lambda value: jnp.stack([value, jnp.full_like(value, jnp.nan)]), grads)
    norms, ok = jnp.stack([optax.global_norm(grads), jnp.float32(jnp.nan)]), jnp.array([True, False])

    def updated(grads: Params, norm: jax.Array, ok: jax.Array) -> tuple[Params, optax.OptState]:
        return update(params, state, grads, norm, jnp.float32(0.1), ok, config, choose(config, platform))

    together = jax.jit(jax.vmap(updated))(two, norms, ok)
    expected = plain_update(params, state, grads, jnp.float32(0.1), config), (params, state)
    for member in range(2):
        assert_same(jax.tree.map(lambda leaf, at=member: leaf[at], together), expected[member])
        alone = jax.jit(updated)(jax.tree.map(lambda leaf, at=member: leaf[at], two), norms[member], ok[member])
        assert_same(alone, expected[member])


@pytest.mark.parametrize(("width", "widest"), [(5, 2048), (256, 2048), (256, 128)])
@pytest.mark.parametrize("turns", [False, True])
def test_a_kernel_updates_rows_turns_gradients_and_keeps_what_is_not_ok(
    width: int, widest: int, turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "WIDEST", widest)
    assert takes(width, interpret=True)
    keys = jax.random.split(jax.random.key(2), 4)
    W, gradient, mu, nu = (jax.random.normal(key, (7, width)) for key in keys)
    W, nu = unit_rows(W), nu**2
    W, gradient, mu = W.at[3].set(0.0), gradient.at[3].set(0.0), mu.at[3].set(0.0)  # it stays a row of zeros
    scalars = jnp.array([0.3, 0.1, 5.0, 50.0, 1.0])

    def made(*scalars_S: Any) -> Any:
        return adam_of_rows(W, gradient, mu, nu, jnp.stack(scalars_S), (0.8, 0.98), 1e-3, True, turns)

    g = 0.3 * (tangent(gradient, W) if turns else gradient)
    new_mu, new_nu = 0.8 * mu + 0.2 * g, 0.98 * nu + 0.02 * g**2
    expected = unit_rows(W - 0.1 * 5 * new_mu / (jnp.sqrt(50 * new_nu) + 1e-3)), new_mu, new_nu
    for mine, theirs in zip(made(*scalars), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-6)
    assert not made(*scalars)[0][3].any()
    for mine, theirs in zip(made(jnp.nan, *scalars[1:4], 0.0), (W, mu, nu), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_only_rows_that_fit_a_programs_threads_are_taken_by_the_kernel() -> None:
    assert [D for D in (64, 100, 512, 576, 768, 2048, 2304, 4096, 4608) if takes(D, interpret=False)] == [
        *(512, 768, 2048, 2304, 4096)
    ]


def test_a_gradient_of_zero_changes_nothing() -> None:
    config = config_of()
    params, state, (grads, *_) = start(config)
    nothing = jax.tree.map(jnp.zeros_like, grads)
    norm = optax.global_norm(nothing)
    found, _ = update(params, state, nothing, norm, jnp.float32(0.1), jnp.bool_(True), config, choose(config))
    assert_same(found, params)


def test_on_a_cpu_moments_and_parameters_are_overwritten_in_place() -> None:
    """Temporary memory is one matrix, the decoder before its rows get norm 1: nothing is copied."""
    config = dataclasses.replace(config_of(), sae=dataclasses.replace(config_of().sae, n_latents=4096))
    params = jax.eval_shape(lambda: init_params(config.sae, 64, jax.random.key(0)))
    state = jax.eval_shape(lambda: optimizer(config, 64).init(params))

    def updated(params: Params, state: optax.OptState, grads: Params) -> tuple[Params, optax.OptState]:
        norm = optax.global_norm(grads)
        return update(params, state, grads, norm, jnp.float32(0.1), jnp.isfinite(norm), config, choose(config))

    plan = jax.jit(updated, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 1.5 * 4 * 64 * 4096


def test_an_unknown_optimizer_is_refused() -> None:
    for name in ("adamm", "apply_updates"):
        with pytest.raises(UserError, match="expected an optimizer of optax that takes a learning rate"):
            optimizer(config_of(name=name), D)
