"""One training step against PyTorch's autograd and Adam; bad batches; vmap; sharding; the golden step."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset
from hafs_jax.sae import InputScale
from hafs_jax.state import TrainState, hyperparameters, init_state
from hafs_jax.step import compile_steps, train_step

B, D, F, K = 12, 5, 11, 3


def small(variant: str = "baseline", architecture: str = "batchtopk", **parts: dict[str, Any]) -> TrainConfig:
    """A config of test size; `parts` replace fields of its parts."""
    config = dataclasses.replace(preset(variant, architecture), tokens=40 * B, batch_size=B, steps_per_dispatch=2)
    changes: dict[str, dict[str, Any]] = {
        "sae": {"n_latents": F, "k": K},
        "penalty": {"chunk_size": 64, "mu0": 0.1, "tau": 0.4 if config.penalty.gate else None},
        "optimizer": {"learning_rate": 0.01},
    }
    for part, values in parts.items():
        changes[part] = {**changes.get(part, {}), **values}
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **values) for part, values in changes.items()}
    )


def fresh(config: TrainConfig, seed: int = 0) -> tuple[TrainState, InputScale]:
    scale = InputScale(jnp.linspace(-0.5, 0.5, D), jnp.float32(1.3), jnp.float32(D))
    return init_state(config, D, jax.random.key(seed), hyperparameters(config)), scale


def batch(seed: int = 0, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(100 + seed), (B, D)) + 0.2


def one_step(config: TrainConfig, state: TrainState, scale: InputScale, acts: jax.Array) -> tuple[TrainState, dict]:
    return jax.jit(train_step, static_argnames="config")(state, acts, scale, hyperparameters(config), config)


def torch_step(config: TrainConfig, state: TrainState, scale: InputScale, acts: np.ndarray) -> dict[str, np.ndarray]:
    """The same step in the plainest PyTorch: whole Gram, autograd through x - b_dec, torch's own Adam."""
    params = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in state.params.items()}
    x = torch.tensor((np.asarray(acts, np.float32) - np.asarray(scale.mean_D)) * float(scale.scale))
    pre = (x - params["b_dec"]) @ params["W_enc"] + params["b_enc"]
    latents = torch.relu(pre)
    if config.sae.architecture == "batchtopk":
        kept = torch.zeros_like(latents).reshape(-1)
        kept[latents.reshape(-1).topk(B * K).indices] = 1
        latents = latents * kept.reshape(B, F)
    if config.sae.architecture == "topk":
        latents = latents * torch.zeros_like(latents).scatter(1, latents.topk(K, dim=1).indices, 1.0)
    fvu = ((x - latents @ params["W_dec"] - params["b_dec"]) ** 2).sum(1).mean() / D
    loss = fvu
    if config.sae.architecture == "relu":
        loss = loss + config.sparsity.l1 * (latents * params["W_dec"].norm(dim=1)).sum(1).mean() / D
    if config.penalty.kind == "hinge":
        U = params["W_dec"] / params["W_dec"].norm(dim=1, keepdim=True)
        hinge = torch.relu(U @ U.T - config.penalty.mu0) ** 2 * (1 - torch.eye(F))
        alpha = 1.0 if config.penalty.ramp else 0.0  # at step 0
        loss = loss + float(state.gate.lam) * (1 - alpha) * hinge.sum() / F
    loss.backward()
    W = params["W_dec"]
    W.grad -= (W.grad * W.detach()).sum(1, keepdim=True) * W.detach()
    rise = round(config.optimizer.warmup * config.steps)
    torch.optim.Adam(list(params.values()), lr=config.optimizer.learning_rate / max(rise, 1)).step()
    with torch.no_grad():
        W /= W.norm(dim=1, keepdim=True)
    return {"loss": loss.detach().numpy(), **{name: value.detach().numpy() for name, value in params.items()}}


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "relu"])
@pytest.mark.parametrize("variant", ["baseline", "strict", "adaptive", "gate_only"])
def test_a_step_equals_torchs(variant: str, architecture: str) -> None:
    config = small(variant, architecture, sparsity={"l1_warmup": 0.0}, optimizer={"clip_norm": None})
    state, scale = fresh(config)
    after, metrics = one_step(config, state, scale, batch())
    theirs = torch_step(config, state, scale, np.asarray(batch()))
    np.testing.assert_allclose(metrics["loss"], theirs["loss"], rtol=1e-5)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        # Adam's first step is the sign of the gradient: entries of zero gradient may differ by rounding alone.
        np.testing.assert_allclose(after.params[name], theirs[name], atol=2e-6, err_msg=name)
    assert int(after.step) == 1


def test_gradients_of_the_folded_bias_equal_autodiff_through_the_input() -> None:
    """x @ W + (b - b_dec @ W) and (x - b_dec) @ W + b have the same gradient for every parameter."""
    from hafs_jax.sae import SAE

    config = small().sae
    params = {**fresh(small())[0].params, "b_dec": jnp.linspace(-1, 1, D)}

    def ours(params: dict) -> jax.Array:
        return jnp.sum(jnp.sin(SAE(config, D).apply({"params": params}, batch(), method="encode").pre_BF))

    def plain(params: dict) -> jax.Array:
        return jnp.sum(jnp.sin((batch() - params["b_dec"][None]) @ params["W_enc"] + params["b_enc"][None]))

    for name, theirs in jax.grad(plain)(params).items():
        np.testing.assert_allclose(jax.grad(ours)(params)[name], theirs, rtol=1e-4, atol=1e-4, err_msg=name)


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


def test_aux_loss_against_a_plain_one() -> None:
    from hafs_jax.sae import SAE
    from hafs_jax.step import aux_loss

    config = small()
    params = fresh(config)[0].params
    random = np.random.default_rng(0)
    pre, residual = random.normal(size=(B, F)).astype(np.float32), random.normal(size=(B, D)).astype(np.float32)
    dead = random.uniform(size=F) < 0.6
    expected = 0.0
    for row in range(B):
        values = np.where(dead, np.maximum(pre[row], 0), 0)
        values[np.argsort(-values)[2:]] = 0
        expected += ((residual[row] - values @ np.asarray(params["W_dec"])) ** 2).sum()
    ours = aux_loss(params, jnp.asarray(pre), jnp.asarray(residual), jnp.asarray(dead), SAE(config.sae, D), 2)
    np.testing.assert_allclose(ours, expected / (residual**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_a_batch_that_is_not_finite_changes_nothing_but_counters_and_lambda(poison: float) -> None:
    config = small("adaptive")
    state, scale = fresh(config)
    for seed in range(4):
        state, _ = one_step(config, state, scale, batch(seed))
    state = state.replace(gate=state.gate.replace(lam=jnp.float32(0.8)))
    after, metrics = one_step(config, state, scale, batch().at[3, 2].set(poison))
    for before, now in zip(
        jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves((after.params, after.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(before, now)
    assert float(after.gate.lam) == pytest.approx(0.4) and float(after.gate.ema) == float(state.gate.ema)
    assert float(after.threshold_ema) == float(state.threshold_ema)
    assert int(metrics["bad_batches"]) == 1 and int(after.step) == int(state.step) + 1
    assert np.isfinite(float(after.sparsity.l0_ema))


def test_counters_saturate_instead_of_wrapping() -> None:
    config = small()
    state, scale = fresh(config)
    state = state.replace(steps_since_fired_F=jnp.full(F, 2**30, jnp.int32))
    state, metrics = one_step(config, state, scale, jnp.zeros((B, D)))
    assert int(state.steps_since_fired_F.max()) == 2**30 and float(metrics["dead_fraction"]) > 0


def test_many_saes_in_one_program_equal_their_solo_runs() -> None:
    """The seam for sweeps: vmap over states and hyperparameters, one batch for all."""
    config = small("adaptive")
    hyper = hyperparameters(config)
    hypers = jax.tree.map(lambda value: jnp.stack([value, value * 0.5, value * 2]), hyper)
    states = [init_state(config, D, jax.random.key(s), jax.tree.map(lambda v, s=s: v[s], hypers)) for s in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    scale = fresh(config)[1]
    step = jax.jit(jax.vmap(lambda s, h: train_step(s, batch(), scale, h, config)))
    together, _ = step(stacked, hypers)
    for index, state in enumerate(states):
        hyper_i = jax.tree.map(lambda v, i=index: v[i], hypers)
        alone, _ = jax.jit(train_step, static_argnames="config")(state, batch(), scale, hyper_i, config)
        for name, value in alone.params.items():
            np.testing.assert_allclose(together.params[name][index], value, atol=1e-5, err_msg=name)


def test_several_steps_per_dispatch_equal_single_steps_and_nothing_recompiles() -> None:
    config = small("adaptive")
    state, scale = fresh(config)
    acts = jnp.stack([batch(0), batch(1)])
    singles = state
    for index in range(2):
        singles, _ = one_step(config, singles, scale, acts[index])
    train_steps = compile_steps()
    together, metrics = train_steps(state, acts, scale, hyperparameters(config), config)
    np.testing.assert_allclose(together.params["W_dec"], singles.params["W_dec"], atol=1e-6)
    assert metrics["loss"].shape == (2,)
    train_steps(together, acts, scale, hyperparameters(config), config)
    assert train_steps._cache_size() == 1


def test_golden_step() -> None:
    """Fixed numbers of two steps. They change only with the loss, the optimizer or the initialisation, on purpose."""
    config = small("strict")
    state, scale = fresh(config)
    _, metrics = compile_steps()(state, jnp.stack([batch(0), batch(1)]), scale, hyperparameters(config), config)
    found = {name: [round(float(v), 4) for v in metrics[name]] for name in ("fvu", "penalty", "l0", "loss")}
    assert found == GOLDEN


GOLDEN = {
    "fvu": [2.9965, 5.5993],
    "penalty": [1.1961, 1.1659],
    "l0": [3.0, 3.0],
    "loss": [6.5849, 9.0969],
}


def test_a_sharded_step_equals_the_step_on_one_device(tmp_path: Path) -> None:
    """Four host devices, batch and dictionary both split, in a process of its own: the device count is fixed."""
    script = tmp_path / "sharded.py"
    script.write_text(
        "import jax, numpy as np, jax.numpy as jnp, dataclasses\n"
        "from test_step import small, fresh, batch\n"
        "from hafs_jax import shardings\n"
        "from hafs_jax.state import hyperparameters\n"
        "from hafs_jax.step import compile_steps\n"
        "config = small('adaptive', sae={'n_latents': 12, 'k': 3})\n"
        "acts = jnp.stack([batch(0), batch(1)])\n"
        "outs = []\n"
        "for split in (False, True):\n"
        "    state, scale = fresh(config)\n"
        "    block, spread = acts, None\n"
        "    if split:\n"
        "        mesh = shardings.make_mesh(2)\n"
        "        spread = shardings.state_shardings(state, mesh)\n"
        "        state = jax.device_put(state, spread)\n"
        "        block = jax.device_put(acts, jax.NamedSharding(mesh, shardings.BATCHES))\n"
        "        assert state.params['W_dec'].addressable_shards[0].data.shape == (6, 5)\n"
        "    state, metrics = compile_steps(spread)(state, block, scale, hyperparameters(config), config)\n"
        "    outs.append(jax.device_get((state.params, metrics)))\n"
        "for one, other in zip(jax.tree.leaves(outs[0]), jax.tree.leaves(outs[1])):\n"
        "    np.testing.assert_allclose(one, other, atol=2e-5)\n"
        "print('equal on', jax.device_count())\n"
    )
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "equal on 4" in done.stdout, done.stderr[-2000:]
