"""Each architecture's function and custom gradients against PyTorch; Matryoshka's prefixes; starts of training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hafs_jax.base.errors import UserError
from hafs_jax.config import SAEConfig
from hafs_jax.method.architectures import ARCHITECTURES, Encoding, OperatingPoint, gate_reconstruction
from hafs_jax.method.budgets import budget_bands, budget_changes, budget_counts
from hafs_jax.method.matryoshka import bands, fixed_ends, prefix_changes, prefix_ends, prefix_errors
from hafs_jax.method.sae import SAE, init_params

B, D, F, K = 12, 5, 11, 3


def config_of(architecture: str, **changes: Any) -> SAEConfig:
    return SAEConfig(architecture=architecture, n_latents=F, k=K, **changes)


def arrays(architecture: str, **changes: Any) -> tuple[SAEConfig, dict, jax.Array]:
    """A config, its parameters, none of them trivial, and pre-activations."""
    config = config_of(architecture, **changes)
    params = init_params(config, D, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params) + 1)
    shifted = {
        name: value + 0.3 * jax.random.uniform(key, value.shape)
        for (name, value), key in zip(params.items(), keys[:-1], strict=True)
    }
    return config, shifted, jax.random.normal(keys[-1], (B, F))


@pytest.mark.parametrize("to_input", [False, True])
def test_jumprelus_gradients_are_the_straight_through_estimates(to_input: bool) -> None:
    """Against sae_lens's own functions, on the latents, on L0, for thresholds and pre-activations."""
    from sae_lens.saes.jumprelu_sae import JumpReLU, Step

    config, params, pre = arrays("jumprelu", bandwidth=0.7, threshold_gradient_to_input=to_input, l0_loss="step")
    weights = jax.random.normal(jax.random.key(3), (B, F))
    theirs_pre = torch.tensor(np.asarray(pre), requires_grad=True)
    theirs_threshold = torch.tensor(np.asarray(params["threshold"]), requires_grad=True)
    architecture = ARCHITECTURES["jumprelu"]

    def latents(params: dict, pre: jax.Array) -> jax.Array:
        return jnp.sum(architecture.activate(pre, params, config, OperatingPoint(K)) * weights)

    def cost(params: dict, pre: jax.Array) -> jax.Array:
        return jnp.sum(architecture.cost(Encoding(pre, jax.nn.relu(pre)), params, config) * weights[:, 0])

    ours = [latents, cost]
    values = torch.tensor(np.asarray(weights))
    theirs = [
        (JumpReLU.apply(theirs_pre, theirs_threshold, 0.7, to_input) * values).sum(),
        (Step.apply(theirs_pre, theirs_threshold, 0.7, to_input).sum(1) * values[:, 0]).sum(),
    ]
    for function, loss in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(function(params, pre), loss.detach(), rtol=1e-5)
        grads, grad_pre = jax.grad(function, argnums=(0, 1))(params, pre)
        expected = torch.autograd.grad(loss, (theirs_threshold, theirs_pre), allow_unused=True)
        np.testing.assert_allclose(grads["threshold"], expected[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(grad_pre, 0.0 if expected[1] is None else expected[1], rtol=1e-4, atol=1e-6)
        assert float(jnp.abs(grads["threshold"]).max()) > 0


@pytest.mark.parametrize(
    ("l0_loss", "expected"), [("step", 4.0), ("target", 3.0 * (4 / 3 - 1) ** 2), ("quadratic", 2 / 3), ("tanh", None)]
)
def test_the_forms_of_the_l0_cost(l0_loss: str, expected: float | None) -> None:
    config, params, _ = arrays("jumprelu", l0_loss=l0_loss)
    params = {**params, "threshold": jnp.full(F, 0.5)}
    pre = jnp.full((2, F), 0.4).at[:, :4].set(0.6)
    latents = ARCHITECTURES["jumprelu"].activate(pre, params, config, OperatingPoint(K))
    cost = ARCHITECTURES["jumprelu"].cost(Encoding(pre, latents), params, config)
    np.testing.assert_allclose(cost, 4 * np.tanh(2.4) if expected is None else expected, rtol=1e-5)


def test_gated_against_its_definition_and_its_gate_learns_with_a_constant_decoder() -> None:
    config, params, _ = arrays("gated")
    acts = jax.random.normal(jax.random.key(4), (B, D))
    encoding, _ = SAE(config, D).apply({"params": params}, acts, OperatingPoint(K))
    p = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in params.items()}
    centred = torch.tensor(np.asarray(acts)) - p["b_dec"]
    gate = centred @ p["W_enc"].T + p["b_enc"]
    magnitude = centred @ (p["W_enc"].T * p["r_mag"].exp()) + p["b_mag"]
    np.testing.assert_allclose(encoding.latents_BF, ((gate > 0) * torch.relu(magnitude)).detach(), rtol=1e-4, atol=1e-5)

    def ours(params: dict) -> jax.Array:
        encoding, _ = SAE(config, D).apply({"params": params}, acts, OperatingPoint(K))
        return gate_reconstruction(encoding, params, config, acts)

    recon = torch.relu(gate) @ p["W_dec"].detach() + p["b_dec"].detach()
    loss = ((torch.tensor(np.asarray(acts)) - recon) ** 2).sum(1).mean()
    loss.backward()
    np.testing.assert_allclose(ours(params), loss.detach(), rtol=1e-5)
    grads = jax.grad(ours)(params)
    for name in ("W_enc", "b_enc", "b_dec"):
        np.testing.assert_allclose(grads[name], p[name].grad, rtol=1e-4, atol=1e-5, err_msg=name)
    assert not grads["W_dec"].any()


def test_prefixes_each_reconstruct_and_the_last_is_the_whole() -> None:
    config, params, _ = arrays("matryoshka", prefixes=(0.2, 0.5, 1.0))  # of 11: 2, 6 (5.5 rounds up), 11
    assert fixed_ends(config) == (2, 6, 11)
    np.testing.assert_array_equal(bands(config), np.repeat([0, 1, 2], [2, 4, 5]))
    latents = jax.nn.relu(jax.random.normal(jax.random.key(5), (B, F)))
    target = jax.random.normal(jax.random.key(6), (B, D))
    errors, residual = prefix_errors(
        prefix_changes(latents, params, config, jax.random.key(0)), target, params["b_dec"]
    )
    for end, error in zip((2, 6, 11), errors, strict=True):
        expected = target - latents[:, :end] @ params["W_dec"][:end] - params["b_dec"][None]
        np.testing.assert_allclose(error, (expected**2).sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(residual, expected, rtol=1e-4, atol=1e-5)


def test_sampled_prefixes_differ_by_key_and_equal_their_definition() -> None:
    config, params, _ = arrays("matryoshka", sampled_prefixes=4)
    latents = jax.nn.relu(jax.random.normal(jax.random.key(5), (B, F)))
    target = jax.random.normal(jax.random.key(6), (B, D))
    seen = set()
    for seed in range(6):
        ends = np.asarray(prefix_ends(config, jax.random.key(seed)))
        errors, _ = prefix_errors(
            prefix_changes(latents, params, config, jax.random.key(seed)), target, params["b_dec"]
        )
        assert len(ends) == 4 and ends[-1] == F and (np.diff(ends) >= 0).all() and ends[0] >= 1
        for end, error in zip(ends, errors, strict=True):
            expected = target - latents[:, :end] @ params["W_dec"][:end] - params["b_dec"][None]
            np.testing.assert_allclose(error, (expected**2).sum(1).mean(), rtol=1e-4)
        seen.add(tuple(ends.tolist()))
    assert len(seen) > 3
    many = np.asarray(
        prefix_ends(dataclasses.replace(config, n_latents=4096, sampled_prefixes=4000), jax.random.key(0))
    )
    assert np.median(many) < 64  # short prefixes are the more frequent: the median of the truncated Pareto is 4


@pytest.mark.parametrize("k", [7, 3])
def test_budgets_each_reconstruct_with_their_largest_latents(k: int) -> None:
    config, params, _ = arrays("hierarchical_topk", k_values=(3.0, 1.0), budgets=(0.2, 0.3, 0.5, 1.0))
    latents = ARCHITECTURES["hierarchical_topk"].activate(
        jax.random.normal(jax.random.key(5), (B, F)) + 0.7, params, config, OperatingPoint(k)
    )
    target = jax.random.normal(jax.random.key(6), (B, D))
    counts = {7: [1, 2, 4, 7], 3: [1, 1, 2, 3]}[k]  # 3.5 and 1.5 are rounded to even
    np.testing.assert_array_equal(budget_counts(config, k), counts)
    errors, _ = jax.jit(lambda k: prefix_errors(budget_changes(latents, params, config, k), target, params["b_dec"]))(k)
    order = np.argsort(-np.asarray(latents), axis=1)
    for count, error in zip(counts, errors, strict=True):
        largest = np.zeros((B, F), np.float32)
        np.put_along_axis(largest, order[:, :count], np.take_along_axis(np.asarray(latents), order[:, :count], 1), 1)
        expected = np.asarray(target) - largest @ np.asarray(params["W_dec"]) - np.asarray(params["b_dec"])
        np.testing.assert_allclose(error, (expected**2).sum(1).mean(), rtol=1e-5)
    bands = np.searchsorted(counts, np.arange(config.largest_k), side="right").clip(max=3)
    np.testing.assert_array_equal(budget_bands(2 * config.largest_k, config, k), [*bands, *bands])


@pytest.mark.parametrize("budgets", [(0.5,), (0.5, 0.25, 1.0), ()])
def test_budgets_rise_to_k(budgets: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"sae\.budgets=.*: expected rising fractions of k, the last of them 1"):
        config_of("hierarchical_topk", budgets=budgets)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_encoder_starts(architecture: str) -> None:
    tied = init_params(config_of(architecture, encoder_scale=0.5), D, jax.random.key(0))
    np.testing.assert_allclose(tied["W_enc"], 0.5 * tied["W_dec"], rtol=1e-6)
    free = init_params(config_of(architecture, encoder="random"), D, jax.random.key(0))
    assert float(jnp.abs(free["W_enc"] - free["W_dec"]).max()) > 0.1
    dense = architecture in ("relu", "gated", "matryoshka_relu")
    np.testing.assert_allclose(jnp.linalg.norm(free["W_enc"], axis=1), 2 * D / F if dense else 1.0, rtol=1e-5)
    across = init_params(config_of(architecture, transcode=True), D, jax.random.key(0), 7)
    assert across["W_enc"].shape == (F, D) and across["W_dec"].shape == (F, 7) and across["b_dec"].shape == (7,)


@pytest.mark.parametrize("expansion", [1, 2, 8])
@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_a_dense_start_does_not_reconstruct_too_much(architecture: str, expansion: int) -> None:
    """Half of the latents fire at first, whatever F: the first reconstruction is about x, not F / (2 D) x."""
    width = 32
    config = SAEConfig(architecture=architecture, n_latents=expansion * width, k=4)
    params = init_params(config, width, jax.random.key(0))
    acts = jax.random.normal(jax.random.key(1), (256, width))
    _, recon = SAE(config, width).apply({"params": params}, acts, OperatingPoint(4))
    along = float(jnp.sum(recon * acts) / jnp.sum(acts**2))
    assert along == pytest.approx(min(1.0, expansion / 2), rel=0.1)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_k_of_the_step_decides_l0(architecture: str) -> None:
    config, params, pre = arrays(architecture, k_values=(2.0, 1.0))
    activate = jax.jit(lambda k: ARCHITECTURES[architecture].activate(jnp.abs(pre), params, config, OperatingPoint(k)))
    for k in (1, 3, 6):
        assert float((activate(jnp.int32(k)) > 0).sum() / B) == k
