"""One training step against PyTorch's autograd and Adam; bad batches; many SAEs; sharding; the golden step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLU, Step

from hafs_jax.config import TrainConfig
from hafs_jax.fast.forms import capacity
from hafs_jax.method.architectures import OperatingPoint
from hafs_jax.method.sae import InputScale
from hafs_jax.presets import ARCHITECTURES
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import TrainState, hyperparameters, init_state
from hafs_jax.training.step import train_step
from tests.support.steps import B, D, F, K, batch, fresh, one_step, small


def torch_step(config: TrainConfig, state: TrainState, scale: InputScale, acts: np.ndarray) -> dict[str, np.ndarray]:
    """The same step in the plainest PyTorch: whole Gram, autograd through x - b_dec, torch's own Adam."""
    params = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in state.params.items()}
    x = torch.tensor((np.asarray(acts, np.float32) - np.asarray(scale.mean_D)) * float(scale.scale))
    pre = (x - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    latents = torch.relu(pre)
    if config.sae.architecture in ("batchtopk", "matryoshka"):
        kept = torch.zeros_like(latents).reshape(-1)
        kept[latents.reshape(-1).topk(B * K).indices] = 1
        latents = latents * kept.reshape(B, F)
    if config.sae.architecture.endswith("topk") and config.sae.architecture != "batchtopk":
        latents = latents * torch.zeros_like(latents).scatter(1, latents.topk(K, dim=1).indices, 1.0)
    if config.sae.architecture == "gated":
        centred = x - params["b_dec"]
        latents = (pre > 0) * torch.relu(centred @ (params["W_enc"].T * params["r_mag"].exp()) + params["b_mag"])
    if config.sae.architecture == "jumprelu":
        latents = JumpReLU.apply(pre, params["threshold"], config.sae.bandwidth, False)

    def error(latents: torch.Tensor) -> torch.Tensor:
        return ((x - latents @ params["W_dec"] - params["b_dec"]) ** 2).sum(1).mean() / D

    def l1(latents: torch.Tensor) -> torch.Tensor:
        return config.sparsity.coefficient * (latents * params["W_dec"].norm(dim=1)).sum(1).mean() / D

    loss = error(latents)
    if config.sae.architecture.startswith("matryoshka"):
        prefixes = [max(1, round(fraction * F)) for fraction in config.sae.prefixes]
        masks = [(torch.arange(F) < end).float() for end in prefixes]
        loss = torch.stack([error(latents * mask) for mask in masks]).mean()
    if config.sae.architecture == "hierarchical_topk":
        largest = [latents.topk(max(1, round(fraction * K)), dim=1) for fraction in config.sae.budgets]
        loss = torch.stack([error(torch.zeros_like(latents).scatter(1, *top[::-1])) for top in largest]).mean()
    if config.sae.architecture == "matryoshka_relu":  # the mean of nested SAEs, each with its own L1
        loss = loss + torch.stack([l1(latents * mask) for mask in masks]).mean()
    if config.sae.architecture == "relu":
        loss = loss + l1(latents)
    if config.sae.architecture == "jumprelu":
        active = Step.apply(pre, params["threshold"], config.sae.bandwidth, False).sum(1).mean()
        loss = loss + config.sparsity.coefficient * K * (active / K - 1) ** 2 / D
    if config.sae.architecture == "gated":
        gate = torch.relu(pre)
        loss = loss + config.sparsity.coefficient * (gate * params["W_dec"].norm(dim=1)).sum(1).mean() / D
        loss = loss + ((x - gate @ params["W_dec"].detach() - params["b_dec"].detach()) ** 2).sum(1).mean() / D
    if config.penalty.kind == "hinge":
        U = params["W_dec"] / params["W_dec"].norm(dim=1, keepdim=True)
        hinge = torch.relu(U @ U.T - config.penalty.mu0) ** 2 * (1 - torch.eye(F))
        alpha = 1.0 if config.penalty.ramp else 0.0  # at step 0
        loss = loss + float(state.gate.lam) * (1 - alpha) * hinge.sum() / F
    if config.penalty.kind in ("ortsae", "frob"):
        U = params["W_dec"] / params["W_dec"].norm(dim=1, keepdim=True)
        cosines = U @ U.T - 2 * torch.eye(F)
        squares = cosines.max(1).values ** 2 if config.penalty.kind == "ortsae" else (U @ U.T) ** 2
        loss = loss + config.penalty.lam_max * (squares.sum() / F - float(config.penalty.kind == "frob"))
    loss.backward()
    W = params["W_dec"]
    W.grad -= (W.grad * W.detach()).sum(1, keepdim=True) * W.detach()
    rise = round(config.optimizer.warmup * config.steps)
    torch.optim.Adam(list(params.values()), lr=config.optimizer.learning_rate / max(rise, 1)).step()
    with torch.no_grad():
        W /= W.norm(dim=1, keepdim=True)
    return {"loss": loss.detach().numpy(), **{name: value.detach().numpy() for name, value in params.items()}}


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("variant", ["baseline", "strict", "adaptive", "gate_only", "ortsae", "frob"])
def test_a_step_equals_torchs(variant: str, architecture: str) -> None:
    fixed = {"coefficient_values": (1.0, 1.0, 1.0)}
    config = small(variant, architecture, sparsity=fixed, optimizer={"clip_norm": None})
    state, scale = fresh(config)
    after, metrics = one_step(config, state, scale, batch())
    theirs = torch_step(config, state, scale, np.asarray(batch()))
    np.testing.assert_allclose(metrics["loss"], theirs["loss"], rtol=1e-5)
    for name in state.params:
        # Adam's first step is the sign of the gradient: entries of zero gradient may differ by rounding alone.
        np.testing.assert_allclose(after.params[name], theirs[name], atol=2e-6, err_msg=name)
    assert int(after.step) == 1


def test_gradients_of_the_encoder_equal_autodiff_through_its_input() -> None:
    """Of every parameter, and of the activations themselves."""
    from hafs_jax.method.sae import SAE

    config = small().sae
    params = {**fresh(small())[0].params, "b_dec": jnp.linspace(-1, 1, D)}

    def ours(params: dict) -> jax.Array:
        encoding = SAE(config, D).apply({"params": params}, params["acts"], OperatingPoint(K), method="encode")
        return jnp.sum(jnp.sin(encoding.pre_BF))

    def plain(params: dict) -> jax.Array:
        centred_BD = params["acts"] - params["b_dec"][None]
        return jnp.sum(jnp.sin(centred_BD @ params["W_enc"].T + params["b_enc"][None]))

    params["acts"] = batch().astype(jnp.float32)
    found = jax.grad(ours)(params)
    for name, theirs in jax.grad(plain)(params).items():
        np.testing.assert_allclose(found[name], theirs, rtol=1e-4, atol=1e-4, err_msg=name)


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


@pytest.mark.parametrize("variant", ["baseline", "adaptive"])
def test_a_step_for_a_gpu_clips_by_the_norm_of_what_it_applies(variant: str) -> None:
    """It takes the norm without the gradient's tangent in memory: a step as for a CPU has it from the tangent."""
    config = small(variant, "topk", optimizer={"clip_norm": 0.01})
    (state, scale), run = fresh(config), jax.jit(train_step, static_argnames=("config", "platform"))
    (gpu, found), (cpu, expected) = (
        run(state, batch(), scale, hyperparameters(config), config, platform=platform) for platform in ("gpu", "cpu")
    )
    assert float(expected["gradient_norm"]) > 0.01 / D  # it is clipped
    assert float(found["gradient_norm"]) == pytest.approx(float(expected["gradient_norm"]), rel=1e-5)
    for one, other in zip(jax.tree.leaves(gpu.opt_state), jax.tree.leaves(cpu.opt_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_counters_saturate_instead_of_wrapping() -> None:
    config = small()
    state, scale = fresh(config)
    state = state.replace(steps_since_fired_F=jnp.full(F, 2**30, jnp.int32))
    state, metrics = one_step(config, state, scale, jnp.zeros((B, D)))
    assert int(state.steps_since_fired_F.max()) == 2**30 and float(metrics["dead_fraction"]) > 0


@pytest.mark.parametrize("how", ["vmap", "map"])
@pytest.mark.parametrize(
    ("architecture", "products"), [*((name, "dense") for name in ARCHITECTURES), ("topk", "sparse"), ("relu", "sparse")]
)
def test_many_saes_in_one_program_equal_their_solo_runs(architecture: str, products: str, how: str) -> None:
    """Two steps of three SAEs with other weights and hyperparameters on the same batches."""
    pre_activation = 0.1 if products == "dense" else 0.0
    sparsity = {"dead_after_tokens": 1, "pre_activation": pre_activation}
    config = dataclasses.replace(small("adaptive", architecture, sparsity=sparsity), products=products)
    hyper = hyperparameters(config)
    hypers = jax.tree.map(lambda value: jnp.stack([value, value * 0.5, value * 2]), hyper)
    apart = [jax.tree.map(lambda value, i=i: value[i], hypers) for i in range(3)]
    states = [init_state(config, D, jax.random.key(seed), apart[seed]) for seed in range(3)]
    if (architecture, products) == ("relu", "sparse"):
        for state, shift in zip(states, (9.0, 3.0, 0.0), strict=True):
            state.params["b_enc"] -= shift
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    scale, acts = fresh(config)[1], jnp.stack([batch(0), batch(1)])
    both = (stacked, hypers) if how == "vmap" else (tuple(states), tuple(apart))
    both = jax.tree.map(jnp.copy, both)  # they are donated
    together, metrics = compile_steps(members=how)(both[0], acts, scale, both[1], config)
    if how == "map":
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *together)
    assert metrics["loss"].shape == (2, 3)
    if (architecture, products) == ("relu", "sparse"):  # two have a slot for each active latent, the last has not
        assert (metrics["l0"][:, :2] < capacity(config.sae)).all() and (
            metrics["l0"][:, 2] > capacity(config.sae)
        ).all()
        assert (metrics["l0"][1, :2] > 0).any()
    solo = compile_steps()
    for index, state in enumerate(states):
        alone, own = solo(state, acts, scale, apart[index], config)
        np.testing.assert_allclose(metrics["loss"][:, index], own["loss"], rtol=1e-4)
        for name, value in alone.params.items():
            np.testing.assert_allclose(together.params[name][index], value, atol=1e-5, err_msg=name)


def test_what_is_frozen_does_not_move() -> None:
    for architecture in ARCHITECTURES:
        state, scale = fresh(small("frozen_decoder", architecture))
        after, _ = one_step(small("frozen_decoder", architecture), state, scale, batch())
        np.testing.assert_array_equal(after.params["W_dec"], state.params["W_dec"])
        assert float(jnp.abs(after.params["W_enc"] - state.params["W_enc"]).max()) > 0
        config = small("random_init", architecture, sparsity={"coefficient_values": (1.0, 1.0, 1.0)})
        state, scale = fresh(config)
        after, metrics = one_step(config, state, scale, batch())
        for name in set(state.params) - {"b_enc"}:
            np.testing.assert_array_equal(after.params[name], state.params[name], err_msg=name)
        moved = np.asarray(after.params["b_enc"] - state.params["b_enc"])
        follows = architecture in ("relu", "jumprelu", "gated", "matryoshka_relu")
        assert np.ptp(moved) < 1e-6 and (moved[0] < 0) == (follows and float(metrics["l0"]) > K)


def test_the_average_of_the_weights_is_what_a_state_stands_for() -> None:
    config = small(optimizer={"average": 0.9})
    state, scale = fresh(config)
    values = [state.params["b_enc"]]
    for step in range(3):
        state, _ = one_step(config, state, scale, batch(step))
        decay = min(0.9, (1 + step) / (10 + step))
        values.append(decay * values[-1] + (1 - decay) * state.params["b_enc"])
    np.testing.assert_allclose(state.weights()["b_enc"], values[-1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jnp.linalg.norm(state.weights()["W_dec"], axis=1), 1.0, rtol=1e-5)
    assert fresh(small())[0].weights() is not None and fresh(small())[0].average == {}


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "rmsprop", "nadam", "adafactor"])
def test_any_optax_optimizer_by_name_takes_our_learning_rate(name: str) -> None:
    config = small(optimizer={"name": name, "clip_norm": None, "learning_rate": 0.01})
    state, scale = fresh(config)
    half = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.005))
    full_step, half_step = (one_step(c, state, scale, batch())[0].params["b_enc"] for c in (config, half))
    assert float(jnp.abs(full_step).max()) > 0
    np.testing.assert_allclose(full_step, 2 * half_step, rtol=1e-4)


def test_a_penalty_of_every_few_steps_is_held_in_between() -> None:
    config = small("strict", penalty={"every_steps": 3, "chunk_size": 4})
    state, scale = fresh(config)
    plain = small("strict", penalty={"chunk_size": 4})
    first, metrics = one_step(config, state, scale, batch())
    alone, own = one_step(plain, fresh(plain)[0], scale, batch())
    for name in ("loss_orthogonality", "penalty_gradient_share", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], own[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(first.params["W_dec"], alone.params["W_dec"], atol=1e-6)
    assert not alone.held_penalty and float(jnp.abs(first.held_penalty["W_dec"]).max()) > 0

    second, metrics = one_step(config, first, scale, batch(1))
    np.testing.assert_array_equal(second.held_penalty["W_dec"], first.held_penalty["W_dec"])
    np.testing.assert_allclose(metrics["penalty"], own["penalty"], rtol=1e-6)
    without, _ = one_step(small(), first.replace(held_penalty={}), scale, batch(1))
    assert float(jnp.abs(second.params["W_dec"] - without.params["W_dec"]).max()) > 1e-4

    due, _ = one_step(config, second.replace(step=jnp.int32(3)), scale, batch(1))
    assert float(jnp.abs(due.held_penalty["W_dec"] - first.held_penalty["W_dec"]).max()) > 0


def test_children_are_assigned_to_parents_every_few_steps() -> None:
    from hafs_jax.method.penalties import assign_parents

    config = small("ramp_only", penalty={"sharing": "parent", "parents": 3, "regroup_every_steps": 2})
    state, scale = fresh(config)
    assert not state.groups_F.any()
    first, _ = one_step(config, state, scale, batch(0))
    np.testing.assert_array_equal(first.groups_F, assign_parents(state.params["W_dec"], 3))
    second, _ = one_step(config, first, scale, batch(1))
    np.testing.assert_array_equal(second.groups_F, first.groups_F)
    turned = second.replace(params={**second.params, "W_dec": jnp.roll(second.params["W_dec"], 1, axis=0)})
    third, _ = one_step(config, turned, scale, batch(2))
    np.testing.assert_array_equal(third.groups_F, assign_parents(turned.params["W_dec"], 3))


def test_several_steps_per_dispatch_equal_single_steps_and_nothing_recompiles() -> None:
    config = small("adaptive")
    state, scale = fresh(config)
    acts = jnp.stack([batch(0), batch(1)])
    singles = state
    for index in range(2):
        singles, _ = one_step(config, singles, scale, acts[index])
    train_steps = compile_steps()
    before = train_steps._cache_size()  # trainings of a kind share the program
    together, metrics = train_steps(state, acts, scale, hyperparameters(config), config)
    np.testing.assert_allclose(together.params["W_dec"], singles.params["W_dec"], atol=1e-6)
    assert metrics["loss"].shape == (2,)
    train_steps(together, acts, scale, hyperparameters(config), config)
    assert train_steps._cache_size() == before + 1


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
