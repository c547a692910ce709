"""What brings dead latents back: the auxiliary and the pre-activation loss, and resampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.fast import plan
from hafs_jax.fast.objective import _capacities, add_auxiliary
from hafs_jax.method.architectures import OperatingPoint
from hafs_jax.method.revival import pre_activation_loss
from hafs_jax.method.sae import SAE, init_params
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, init_state
from tests.support.steps import B, D, F, K, batch, fresh, one_step, small


def test_dead_latents_are_revived_by_their_own_gradient() -> None:
    config = small(sparsity={"dead_after_tokens": 1, "aux": 1.0, "aux_k": 2})
    state, scale = fresh(config)
    dead = jnp.zeros(F, bool).at[jnp.array([2, 5, 7])].set(True)
    state = state.replace(steps_since_fired_F=jnp.where(dead, 5, 0))
    _, metrics = one_step(config, state, scale, batch())
    assert float(metrics["loss_aux"]) > 0
    off = state.replace(steps_since_fired_F=jnp.zeros(F, jnp.int32))
    _, without = one_step(config, off, scale, batch())
    assert float(without["loss_aux"]) == 0 and float(without["fvu"]) == float(metrics["fvu"])


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("aux_k", [2, 64])
@pytest.mark.parametrize(
    ("dead", "platform"), [(1, "cpu"), (20, "cpu"), (100, "cpu"), (300, "cpu"), (10, "gpu"), (11, "gpu"), (300, "gpu")]
)
def test_the_aux_loss_and_its_gradient_are_the_plain_ones(
    dead: int, platform: str, aux_k: int, transcode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each capacity for dead latents, with fewer and with more of them than `aux_k`."""
    n_latents = 600
    assert _capacities(n_latents, plan.choose(small(), "cpu")) == [32, 128, 600]
    assert _capacities(n_latents, plan.choose(small(), "gpu")) == [10, 75, 600]
    config = small(sae={"n_latents": n_latents, "transcode": transcode}, sparsity={"aux_k": aux_k, "aux": 1.0})
    params = init_params(config.sae, D, jax.random.key(0))
    random = np.random.default_rng(0)
    params |= {name: jnp.asarray(random.normal(size=params[name].shape), jnp.float32) for name in ("b_enc", "b_dec")}
    acts, residual = random.normal(size=(B, D)).astype(np.float32), random.normal(size=(B, D)).astype(np.float32)
    is_dead = np.isin(np.arange(n_latents), random.choice(n_latents, dead, replace=False))

    def plain(params: dict) -> jax.Array:
        pre = (acts if transcode else acts - params["b_dec"][None]) @ params["W_enc"].T + params["b_enc"][None]
        values = jnp.where(is_dead[None], jax.nn.relu(pre), 0.0)
        kth = jax.lax.stop_gradient(jnp.sort(values, axis=1)[:, -aux_k])
        values = jnp.where(values >= kth[:, None], values, 0.0)
        return jnp.sum((residual - values @ params["W_dec"]) ** 2) / jnp.sum(residual**2)

    expected, expected_grads = jax.value_and_grad(plain)(params)
    rows = (jnp.asarray(acts), jnp.asarray(residual), jnp.asarray(is_dead))
    for blocks in (1, 3):
        monkeypatch.setitem(plan._BLOCK_BYTES, platform, 4 * n_latents * B // blocks)
        chosen = plan.choose(config, platform)
        ours, grads = add_auxiliary(jax.tree.map(jnp.ones_like, params), params, *rows, config, chosen)
        assert float(ours) == pytest.approx(float(expected), rel=1e-5)
        for name, grad in expected_grads.items():
            assert float(jnp.abs(grad).max()) > 1e-3 or (transcode and name == "b_dec")
            np.testing.assert_allclose(grads[name] - 1, grad, rtol=1e-4, atol=1e-5, err_msg=name)


def test_members_without_dead_latents_are_left_alone_by_those_with_some() -> None:
    config = small(
        "adaptive", sparsity={"dead_after_tokens": 50 * B, "aux": 1.0, "aux_k": 2}, penalty={"every_steps": 2}
    )
    hyper = hyperparameters(config)
    hypers = jax.tree.map(lambda value: jnp.stack([value] * 3), hyper)
    states = [init_state(config, D, jax.random.key(seed), hyper) for seed in range(3)]
    for member, dead in ((1, 1), (2, F - 2)):
        since_F = jnp.where(jnp.arange(F) < dead, 100, 0)
        states[member] = states[member].replace(steps_since_fired_F=since_F)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    scale, acts = fresh(config)[1], jnp.stack([batch(0)])
    together, metrics = compile_steps(members="vmap")(stacked, acts, scale, hypers, config)
    solo = compile_steps()
    assert float(metrics["loss_aux"][0, 0]) == 0 and (metrics["loss_aux"][0, 1:] > 0).all()
    for index, state in enumerate(states):
        alone, own = solo(state, acts, scale, hyper, config)
        for name in ("loss_aux", "penalty", "penalty_gradient_share"):
            np.testing.assert_allclose(metrics[name][:, index], own[name], rtol=1e-4, err_msg=name)
        for name, value in alone.params.items():
            np.testing.assert_allclose(together.params[name][index], value, atol=1e-5, err_msg=name)


def test_the_pre_activation_loss_brings_dead_latents_towards_their_threshold() -> None:
    pre = np.random.default_rng(0).normal(size=(B, F)).astype(np.float32)
    dead, threshold = np.arange(F) % 3 == 0, np.linspace(0, 1, F, dtype=np.float32)
    params = {"b_enc": jnp.zeros(F), "threshold": jnp.asarray(threshold)}
    ours = pre_activation_loss(params, jnp.asarray(pre), jnp.asarray(dead))
    np.testing.assert_allclose(ours, (np.maximum(threshold - pre, 0) * dead).sum(1).mean(), rtol=1e-5)
    without = pre_activation_loss({"b_enc": jnp.zeros(F)}, jnp.asarray(pre), jnp.asarray(dead))
    np.testing.assert_allclose(without, (np.maximum(-pre, 0) * dead).sum(1).mean(), rtol=1e-5)
    gradient = jax.grad(lambda params: pre_activation_loss(params, jnp.asarray(pre), jnp.asarray(dead)))(params)
    assert not gradient["threshold"].any()


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_dead_latents_are_reset_to_what_is_reconstructed_worst(architecture: str) -> None:
    """Only the dead change; their vectors are residuals of rows, their moments 0; nothing happens in other steps."""
    settings = {"dead_after_tokens": B, "resample_every_steps": 2, "resample_until": 1.0}
    config = small("baseline", architecture, sparsity=settings)
    state, scale = fresh(config)
    dead = np.isin(np.arange(F), [1, 4])
    params = {**state.params, "b_enc": jnp.where(dead, -100.0, state.params["b_enc"])}
    state = state.replace(params=params, steps_since_fired_F=jnp.where(dead, 5, 0).astype(jnp.int32))
    first, _ = one_step(config, state, scale, batch(0))
    assert (np.asarray(first.params["b_enc"])[dead] < -90).all()
    quiet = small("baseline", architecture, sparsity={**settings, "resample_every_steps": 0})
    second, _ = one_step(config, first, scale, batch(1))
    plain, _ = one_step(quiet, first, scale, batch(1))
    alive = ~(np.asarray(plain.steps_since_fired_F) >= 1)
    for name in ("W_enc", "W_dec", "b_enc"):
        ours, theirs = (np.asarray(s.params[name]) for s in (second, plain))
        np.testing.assert_array_equal(ours[alive], theirs[alive])
        assert not np.allclose(ours[dead], theirs[dead])
    x = np.asarray(scale(batch(1)))
    _, recon = SAE(config.sae, D).apply({"params": first.params}, jnp.asarray(x), OperatingPoint(K))
    residual = (x - np.asarray(recon)) / np.linalg.norm(x - np.asarray(recon), axis=1, keepdims=True)
    best = (np.asarray(second.params["W_dec"])[dead] @ residual.T).max(1)
    np.testing.assert_allclose(best, 1.0, rtol=1e-4)
    moments = [leaf for leaf in jax.tree.leaves(second.opt_state) if leaf.shape == (F, D)]
    assert len(moments) == 4 and all(not leaf[dead].any() and leaf[alive].any() for leaf in moments)
    assert (np.asarray(second.steps_since_fired_F)[dead] == 0).all()
