"""Our loss and gradients against the peers' own training classes, from the same weights on the same batch.

The peers are sae_lens 6.54 (training SAEs), dictionary_learning 0.1.0 (trainers) and sparsify 1.3 (sparse coder). Our
loss times the store's variance V is in their units. Gradients are those before our projection onto the tangent of the
decoder's unit rows; both sides' rows have unit norm. Where definitions differ, a test adds the difference to one side,
exactly, and compares all the rest:

| what | ours | sae_lens | dictionary_learning |
|---|---|---|---|
| unit of the loss | FVU: over V | squared error | squared error |
| decoder's norm | rows held at 1 | free; costs count it: W_dec's gradient has a radial part | rows held at 1 |
| norm in latents of topk and its kin | 1 | times it, then over it: cancels in every gradient | 1 |
| input of the encoder | x - b_dec | x - b_dec or x (apply_b_dec_to_input) | x - b_dec; jumprelu: x |
| aux loss, e' = e - e_hat | sum e'^2 / sum e^2 | mean e'^2 | sum e'^2 / sum (e - mean e)^2 |
| its k | aux_k | D/2, at most the dead | D/2, at most the dead |
| few dead | no change | times dead / (D/2) | no change |
| its latents | relu(pre) | pre, negative ones too | relu(pre) |
| dead | before this batch | before this batch | after this batch: what fires now is not dead |
| matryoshka | mean over prefixes | sum over prefixes | mean of weight x error, the weights 1/G unless given |
| its aux loss | of the whole's residual | the same; or level by level | of the whole's residual |
| gated's gate reconstruction | decoder and b_dec constant | they learn from it too | constant |
| jumprelu's L0 cost | c n; 2c (n - k)^2 / k; c tanh(4 f); c k (mean n/k - 1)^2 | the first 3 | c (mean n/k - 1)^2 |
| kernel of its gradient | around pre | around pre | around f: none below a threshold of width/2 or more |
| pre-activation loss | threshold constant | threshold learns from it too | none |
| inference threshold | average (.99), bias-corrected | average (.99) | average (.999) from step 1000; topk's too |
| first moment of Adam | .9 | .9 | .9; gated, jumprelu 0 |
| clipping of the gradient's norm | 1, of the loss over V | 1 | 1; relu, gated none |

sparsify has topk alone: FVU over the batch's own variance; its aux loss is sae_lens's over the same variance, but
reaches the decoder alone. matryoshka_relu has no peer.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from benchmarks import peers
from hafs_jax.config import TrainConfig
from hafs_jax.fast.objective import loss_and_gradients
from hafs_jax.fast.plan import choose
from hafs_jax.method.loss import Forward, Weights
from hafs_jax.method.sae import InputScale, init_params
from hafs_jax.presets import preset, with_fields
from hafs_jax.store.arrays import write_array_store
from hafs_jax.training.state import hyperparameters, state_of
from hafs_jax.training.step import train_step

B, D, F, K, V = 12, 5, 11, 3, 3.7
AUX, AUX_K = 0.3, D // 2
ENDS = (3, 6, F)  # of Matryoshka's prefixes
COEFFICIENT = 0.7
Arrays = dict[str, np.ndarray]
ROWS = np.asarray(jax.random.normal(jax.random.key(7), (B, D)) * 1.5 + 0.2)


def config_of(architecture: str, sparsity: Any = None, **sae: Any) -> TrainConfig:
    """A config of test size; no aux loss unless `sparsity` asks for it."""
    sizes = {"n_latents": F, "k": K, "prefixes": tuple(end / F for end in ENDS), **sae}
    parts = {"sae": sizes, "sparsity": {"aux": 0.0, "aux_k": AUX_K, **(sparsity or {})}}
    return with_fields(dataclasses.replace(preset("baseline", architecture), tokens=40 * B, batch_size=B), parts)


def weights_of(config: TrainConfig, dead: tuple[int, ...] = (), level: float = 0.05) -> Arrays:
    """Parameters none of which is trivial, W_enc untied. Latents `dead` are small, around `level`, others large."""
    shapes = {name: value.shape for name, value in init_params(config.sae, D, jax.random.key(0)).items()}
    random = np.random.default_rng(3)
    weights = {name: random.normal(0.0, 0.3, shape) for name, shape in shapes.items()}
    weights["W_dec"] /= np.linalg.norm(weights["W_dec"], axis=1, keepdims=True)
    weights["W_enc"] = random.normal(0.0, 0.6, (D, F)).T
    if "threshold" in weights:
        weights["threshold"] = random.uniform(0.1, 0.6, F)
    if dead:
        weights["b_enc"] += 2.0
        weights["W_enc"][list(dead)] *= 0.02
        weights["b_enc"][list(dead)] = level + (weights["W_enc"] @ weights["b_dec"])[list(dead)]
    return {name: np.asarray(value, np.float32) for name, value in weights.items()}


def mask(dead: tuple[int, ...]) -> np.ndarray:
    return np.isin(np.arange(F), dead)


def ours(
    config: TrainConfig, weights: Arrays, is_dead: np.ndarray, coefficient: float = 0.0
) -> tuple[float, Arrays, Forward]:
    """V x `loss_and_gradients`, V x its gradients, and what the forward pass left."""
    params, acts = {name: jnp.asarray(value) for name, value in weights.items()}, jnp.asarray(ROWS)
    at = Weights(jnp.int32(config.sae.k), jnp.float32(coefficient), jnp.asarray(is_dead))
    given = (params, acts, acts, at, jnp.float32(V), jax.random.key(0), config, choose(config))
    (loss, forward), grads = loss_and_gradients(*given)
    return V * float(loss), {name: V * np.asarray(value) for name, value in grads.items()}, forward


def of_sae_lens(sae: Any, architecture: str, is_dead: np.ndarray, **coefficients: float) -> tuple[float, Arrays]:
    """Their loss and its gradients."""
    step = TrainStepInput(torch.tensor(ROWS), coefficients, torch.tensor(is_dead), 0, False)
    loss = sae.training_forward_pass(step).loss
    loss.backward()
    return float(loss.detach()), peers.gradients(sae, "sae_lens", architecture)


def of_dictionary_learning(trainer: Any, architecture: str) -> tuple[float, Arrays]:
    """Their loss and its gradients."""
    loss = trainer.loss(torch.tensor(ROWS), step=0)
    loss.backward()
    return float(loss.detach()), peers.gradients(trainer.ae, "dictionary_learning", architecture)


def assert_same(mine: tuple[float, Arrays], theirs: tuple[float, Arrays], extra: Arrays | None = None) -> None:
    """Equal losses; equal gradients but for `extra`, which theirs have on top."""
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-4)
    assert set(mine[1]) == set(theirs[1]) and set(extra or {}) <= set(mine[1])
    for name, value in mine[1].items():
        more = (extra or {}).get(name)
        assert np.abs(value).max() > 1e-3, f"no gradient of {name} to compare"
        assert more is None or np.abs(more).max() > 1e-3, f"no difference of {name} to add"
        expected = value if more is None else value + more
        np.testing.assert_allclose(
            theirs[1][name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=name
        )


def through(move: Callable[[dict], dict], weights: Arrays, theirs: tuple[float, Arrays]) -> tuple[float, Arrays]:
    """Their loss with gradients for `weights`, where theirs were for `move(weights)`: the chain rule."""
    _, pull = jax.vjp(move, {name: jnp.asarray(value) for name, value in weights.items()})
    (grads,) = pull({name: jnp.asarray(value) for name, value in theirs[1].items()})
    return theirs[0], {name: np.asarray(value) for name, value in grads.items()}


def uncentred(weights: dict) -> dict:
    """The weights of the same function for an encoder that does not subtract b_dec."""
    shift_F = weights["W_enc"] @ weights["b_dec"]
    moved = {**weights, "b_enc": weights["b_enc"] - shift_F}
    return (
        moved if "b_mag" not in weights else moved | {"b_mag": weights["b_mag"] - shift_F * jnp.exp(weights["r_mag"])}
    )


def in_numpy(weights: dict) -> Arrays:
    return {name: np.asarray(value) for name, value in weights.items()}


def radial(weight_BF: np.ndarray, weights: Arrays) -> np.ndarray:
    """The gradient of mean over rows of sum_i weight_i |u_i|, at unit rows u."""
    return weight_BF.mean(0)[:, None] * weights["W_dec"]


def aux_scale(forward: Forward) -> float:
    """V x AUX over the mean squared residual: our aux loss as a weight of the mean squared one."""
    return V * AUX / float((np.asarray(forward.residual_BD) ** 2).sum(1).mean())


# sae_lens


@pytest.mark.parametrize("centred", [True, False])
def test_relu_is_sae_lenss_standard(centred: bool) -> None:
    config = config_of("relu")
    weights = weights_of(config)
    loss, grads, forward = ours(config, weights, mask(()), COEFFICIENT)
    held = weights if centred else in_numpy(uncentred(weights))
    sae = peers.training_sae("relu", held, apply_b_dec_to_input=centred)
    theirs = of_sae_lens(sae, "relu", mask(()), l1=COEFFICIENT)
    if not centred:
        theirs = through(uncentred, weights, theirs)
    extra = {"W_dec": COEFFICIENT * radial(np.asarray(forward.encoding.latents_BF), weights)}
    assert_same((loss, grads), theirs, extra)


@pytest.mark.parametrize("centred", [True, False])
def test_gated_is_sae_lenss_but_for_the_decoder_in_the_gates_reconstruction(centred: bool) -> None:
    config = config_of("gated")
    weights = weights_of(config)
    loss, grads, forward = ours(config, weights, mask(()), COEFFICIENT)
    held = weights if centred else in_numpy(uncentred(weights))
    sae = peers.training_sae("gated", held, apply_b_dec_to_input=centred)
    theirs = of_sae_lens(sae, "gated", mask(()), l1=COEFFICIENT)
    if not centred:
        theirs = through(uncentred, weights, theirs)
    gate_BF = np.maximum(forward.encoding.pre_BF, 0)
    error_BD = gate_BF @ weights["W_dec"] + weights["b_dec"] - ROWS
    pull_FD = 2 / B * gate_BF.T @ error_BD
    extra = {"W_dec": COEFFICIENT * radial(gate_BF, weights) + pull_FD, "b_dec": 2 * error_BD.mean(0)}
    assert_same((loss, grads), theirs, extra)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("to_input", [True, False])
@pytest.mark.parametrize("l0_loss", ["step", "quadratic", "tanh"])
def test_jumprelu_is_sae_lenss_with_the_pre_activation_loss_of_the_dead(
    l0_loss: str, to_input: bool, centred: bool
) -> None:
    short, dead = 0.4, (1, 4, 7)
    config = config_of(
        "jumprelu", {"pre_activation": short}, l0_loss=l0_loss, threshold_gradient_to_input=to_input, bandwidth=0.7
    )
    weights = weights_of(config)
    loss, grads, forward = ours(config, weights, mask(dead), COEFFICIENT)
    settings = {"jumprelu_sparsity_loss_mode": l0_loss, "jumprelu_ste_to_input": to_input, "jumprelu_bandwidth": 0.7}
    held = weights if centred else in_numpy(uncentred(weights))
    sae = peers.training_sae(
        "jumprelu", held, target_l0=K, pre_act_loss_coefficient=short, apply_b_dec_to_input=centred, **settings
    )
    theirs = of_sae_lens(sae, "jumprelu", mask(dead), l0=COEFFICIENT)
    if not centred:
        theirs = through(uncentred, weights, theirs)
    pre_BF, latents_BF = np.asarray(forward.encoding.pre_BF), np.asarray(forward.encoding.latents_BF)
    missing_BF = np.maximum(weights["threshold"] - pre_BF, 0) * mask(dead)
    radial_BF = short * missing_BF
    if l0_loss == "tanh":
        radial_BF = radial_BF + COEFFICIENT * 4 * latents_BF * (1 - np.tanh(4 * latents_BF) ** 2)
    extra = {"W_dec": radial(radial_BF, weights), "threshold": short * (missing_BF > 0).mean(0)}
    assert_same((loss, grads), theirs, extra)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_topk_and_its_kin_are_sae_lenss(architecture: str, rescale: bool, centred: bool) -> None:
    config = config_of(architecture)
    weights = weights_of(config)
    loss, grads, forward = ours(config, weights, mask(()))
    held = weights if centred else in_numpy(uncentred(weights))
    settings = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": centred}
    sae = peers.training_sae(architecture, held, k=K, **settings, **nested(architecture))
    theirs = of_sae_lens(sae, architecture, mask(()))
    if not centred:
        theirs = through(uncentred, weights, theirs)
    assert_same(times(prefixes(architecture), (loss, grads)), theirs)
    assert (np.asarray(forward.encoding.latents_BF) > 0).sum() == B * K


@pytest.mark.parametrize("level", [0.2, 0.0])
@pytest.mark.parametrize("dead", [(4,), (1, 4, 7, 9)])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_the_aux_loss_is_sae_lenss(architecture: str, dead: tuple[int, ...], level: float) -> None:
    """At level 0.2 the dead are positive: sae_lens's own code. At 0 some are negative, and it gets relu(pre)."""
    config = config_of(architecture, {"aux": AUX})
    weights = weights_of(config, dead, level)
    loss, grads, forward = ours(config, weights, mask(dead))
    few = min(len(dead) / (D // 2), 1.0)
    coefficient = prefixes(architecture) * aux_scale(forward) / few
    sae = peers.training_sae(architecture, weights, k=K, aux_loss_coefficient=coefficient, **nested(architecture))
    pre_BK = np.asarray(forward.encoding.pre_BF)[:, list(dead)]
    assert (pre_BK > 0).all() == (level > 0) and (pre_BK > 0).any()
    if level == 0:
        plain = sae.calculate_topk_aux_loss
        sae.calculate_topk_aux_loss = lambda hidden_pre, **rest: plain(hidden_pre=hidden_pre.relu(), **rest)
    theirs = of_sae_lens(sae, architecture, mask(dead))
    assert_same(times(prefixes(architecture), (loss, grads)), theirs)
    assert float(forward.parts["loss_aux"]) > 0.1 * AUX


def test_sae_lenss_aux_loss_of_levels_is_ours_where_the_dead_are_in_the_last() -> None:
    config, dead = config_of("matryoshka", {"aux": AUX}), (7, 8, 10)
    weights = weights_of(config, dead, 0.2)
    loss, grads, forward = ours(config, weights, mask(dead))
    coefficient = len(ENDS) * aux_scale(forward)
    sae = peers.training_sae(
        "matryoshka",
        weights,
        k=K,
        aux_loss_coefficient=coefficient,
        use_matryoshka_aux_loss=True,
        **nested("matryoshka"),
    )
    assert_same(times(len(ENDS), (loss, grads)), of_sae_lens(sae, "matryoshka", mask(dead)))


def test_the_inference_threshold_moves_as_sae_lenss_does() -> None:
    config = config_of("batchtopk")
    weights = weights_of(config)
    sae = peers.training_sae("batchtopk", weights, k=K, topk_threshold_lr=1 - config.sparsity.threshold_decay)
    of_sae_lens(sae, "batchtopk", mask(()))
    hyper = hyperparameters(config)
    state = state_of(config, {name: jnp.asarray(value) for name, value in weights.items()}, jax.random.key(0), hyper)
    unscaled = InputScale(jnp.zeros(D), jnp.float32(1.0), jnp.float32(V))
    step = jax.jit(train_step, static_argnames="config")
    after, _ = step(state, jnp.asarray(ROWS), unscaled, hyper, config)
    np.testing.assert_allclose(after.threshold_ema, float(sae.topk_threshold), rtol=1e-5)
    assert float(after.threshold_ema) > 0


def nested(architecture: str) -> dict[str, Any]:
    return {"matryoshka_widths": list(ENDS)} if architecture == "matryoshka" else {}


def prefixes(architecture: str) -> int:
    """The number of terms that sae_lens adds up and we average."""
    return len(ENDS) if architecture == "matryoshka" else 1


def times(factor: float, pair: tuple[float, Arrays]) -> tuple[float, Arrays]:
    return factor * pair[0], {name: factor * value for name, value in pair[1].items()}


# dictionary_learning


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_relu_and_gated_are_dictionary_learnings(architecture: str) -> None:
    config = config_of(architecture)
    weights = weights_of(config)
    loss, grads, _ = ours(config, weights, mask(()), COEFFICIENT)
    trainer = peers.trainer(architecture, weights, l1_penalty=COEFFICIENT, sparsity_warmup_steps=None)
    assert_same((loss, grads), of_dictionary_learning(trainer, architecture))


@pytest.mark.parametrize("level", [0.2, 0.0])
@pytest.mark.parametrize("dead", [(), (4,), (1, 4, 7, 9)])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_topk_and_its_kin_are_dictionary_learnings_with_their_aux_loss(
    architecture: str, dead: tuple[int, ...], level: float
) -> None:
    """Latent 0 was dead until this batch, in which it fires: they do not count it."""
    config = config_of(architecture, {"aux": AUX})
    weights = weights_of(config, dead, level) if dead else weights_of(config)
    loss, grads, forward = ours(config, weights, mask(dead))
    residual_BD = np.asarray(forward.residual_BD)
    spread = float(((residual_BD - residual_BD.mean(0)) ** 2).sum(1).mean())
    trainer = peers.trainer(
        architecture, weights, k=K, auxk_alpha=aux_scale(forward) * spread, **groups(architecture, weight=1.0)
    )
    if dead:
        trainer.num_tokens_since_fired[[0, *dead]] = trainer.dead_feature_threshold
    theirs = of_dictionary_learning(trainer, architecture)
    found = (trainer.num_tokens_since_fired >= trainer.dead_feature_threshold).numpy()
    np.testing.assert_array_equal(found, mask(dead))
    assert_same((loss, grads), theirs)


def test_dictionary_learnings_matryoshka_weights_its_mean_once_more() -> None:
    config = config_of("matryoshka")
    weights = weights_of(config)
    loss, grads, _ = ours(config, weights, mask(()))
    trainer = peers.trainer("matryoshka", weights, k=K, **groups("matryoshka", weight=None))
    assert_same(times(1 / len(ENDS), (loss, grads)), of_dictionary_learning(trainer, "matryoshka"))


def test_jumprelu_with_a_target_is_dictionary_learnings_but_for_the_kernel() -> None:
    """Their penalty is k times our coefficient; their kernel lies around f, ours around pre."""
    penalty, bandwidth = 2.5, 0.6
    config = config_of("jumprelu", bandwidth=bandwidth, l0_loss="target")
    weights = weights_of(config)
    loss, grads, forward = ours(config, weights, mask(()), penalty / K)
    pre_BF, latents_BF = np.asarray(forward.encoding.pre_BF), np.asarray(forward.encoding.latents_BF)
    pull = 2 * penalty * (float((latents_BF > 0).sum(1).mean()) / K - 1) / K
    trainer = peers.trainer(
        "jumprelu",
        in_numpy(uncentred(weights)),
        bandwidth=bandwidth,
        sparsity_penalty=penalty,
        target_l0=K,
        sparsity_warmup_steps=None,
    )
    theirs = through(uncentred, weights, of_dictionary_learning(trainer, "jumprelu"))

    def kernel(at_BF: np.ndarray) -> np.ndarray:
        return -pull / bandwidth * (np.abs(at_BF - weights["threshold"]) < bandwidth / 2).mean(0)

    assert_same((loss, grads), theirs, {"threshold": kernel(latents_BF) - kernel(pre_BF)})


def groups(architecture: str, weight: float | None) -> dict[str, Any]:
    if architecture != "matryoshka":
        return {}
    fractions = [0.28, 0.28, 0.44]  # of 11, rounded down, and the rest: groups of 3, 3 and 5
    return {"group_fractions": fractions, "group_weights": None if weight is None else [weight] * len(ENDS)}


# sparsify


@pytest.mark.parametrize("dead", [(), (1, 4, 7, 9)])
def test_topk_is_sparsifys_but_for_the_encoder_in_the_aux_loss(dead: tuple[int, ...]) -> None:
    """Its encoder's backward pass leaves out what the aux loss asks of the pre-activations."""
    config = config_of("topk", {"aux": AUX})
    weights = weights_of(config, dead, 0.2) if dead else weights_of(config)
    loss, grads, forward = ours(config, weights, mask(dead))
    without = ours(config_of("topk"), weights, mask(dead))[1]
    coder = peers.sparse_coder(weights, K)
    out = coder(torch.tensor(ROWS), dead_mask=torch.tensor(mask(dead)))
    spread = float(((ROWS - ROWS.mean(0)) ** 2).sum(1).mean())
    total = spread * (out.fvu + aux_scale(forward) * out.auxk_loss)
    total.backward()
    theirs = (float(total.detach()), peers.gradients(coder, "sparsify", "topk"))
    reached = {name: grads[name] if name == "W_dec" else without[name] for name in grads}
    assert_same((loss, reached), theirs)
    for name, value in grads.items():
        assert np.allclose(value, without[name]) == (not dead), name


@pytest.mark.parametrize("architecture", ["relu", "gated", "topk", "batchtopk", "matryoshka"])
def test_training_steps_equal_dictionary_learnings(architecture: str) -> None:
    """Three updates, each on other rows: projection, clipping, Adam and unit rows included."""
    rate, clipped = 0.01, architecture not in ("relu", "gated")
    config = config_of(architecture)
    settings: dict[str, Any] = {
        "learning_rate": rate,
        "warmup": 0.0,
        "decay": 0.0,
        "beta1": 0.9 if architecture != "gated" else 0.0,
    }
    sparsity = {"coefficient": COEFFICIENT, "coefficient_values": (1.0, 1.0, 1.0), "match_l0": False}
    config = with_fields(
        config, {"optimizer": {**settings, "clip_norm": D / V if clipped else None}, "sparsity": sparsity}
    )
    weights = weights_of(config)
    special: dict[str, Any] = {"k": K} if clipped else {"l1_penalty": COEFFICIENT, "sparsity_warmup_steps": None}
    trainer = peers.trainer(architecture, weights, lr=rate, **special, **groups(architecture, weight=1.0))
    hyper = hyperparameters(config)
    state = state_of(config, {name: jnp.asarray(value) for name, value in weights.items()}, jax.random.key(0), hyper)
    unscaled = InputScale(jnp.zeros(D), jnp.float32(1.0), jnp.float32(V))
    step = jax.jit(train_step, static_argnames="config")
    for number in range(3):
        rows = np.roll(ROWS, number, axis=1)
        trainer.update(number + 1, torch.tensor(rows))  # update 0 would move b_dec to the geometric median
        state, metrics = step(state, jnp.asarray(rows), unscaled, hyper, config)
        assert not clipped or float(metrics["gradient_norm"]) > 1 / V
    for name, value in peers.values(trainer.ae, "dictionary_learning", architecture).items():
        moved = np.abs(value - weights[name]).max()
        assert moved > 1.5 * rate, name
        np.testing.assert_allclose(state.params[name], value, atol=1e-4 * moved, err_msg=name)


def test_whole_trainings_of_the_benchmark_agree_with_dictionary_learnings(tmp_path: Path) -> None:
    """With equal losses both sides are equal: rows, order, schedules, coefficient and measurement are the same."""
    from benchmarks import parity

    rows = parity.planted(rows=2000, d_model=8, features=16, active=3.0)
    stores = write_array_store(tmp_path / "planted", rows, heldout_fraction=0.2)
    sizes = ["--steps", "40", "--batch-size", "32", "--n-latents", "16", "--k", "3", "--clip-norm", "1e9"]
    options = parity.parse(["--architectures", "relu", "--seeds", "1", "--coefficient", "relu=0.7", *sizes])
    found = {row["peer"]: row["runs"][0] for row in parity.compare(options, stores["train"], tmp_path / "runs")}
    ours, theirs = found["dictionary_learning"]
    np.testing.assert_allclose(dataclasses.astuple(ours), dataclasses.astuple(theirs), rtol=1e-4)
    assert 0 < ours.fvu < 0.9 and 1 < ours.l0 < 16
    assert found["sae_lens"][0] == ours and 0 < found["sae_lens"][1].fvu < 0.9
