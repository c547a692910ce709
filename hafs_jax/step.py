"""The loss and the training step: pure, jit-compiled once per config, the state donated.

    L = FVU + sparsity + aux + lambda * O

in units of FVU: the batch's residual over the store's variance. For relu that is the usual |x - x_hat|^2 + l1 |f|_1,
divided by the constant variance.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Key

from hafs_jax.architectures import ARCHITECTURES
from hafs_jax.config import TrainConfig
from hafs_jax.controllers import update_gate, update_sparsity
from hafs_jax.penalty import hinge_penalty, noise_floor_margin
from hafs_jax.sae import SAE, Encoding, InputScale, Params, unit_rows
from hafs_jax.schedules import alpha_schedule, learning_rate_schedule, warmup_schedule
from hafs_jax.state import Hyperparameters, TrainState, optimizer

Metrics = dict[str, Array]

_NEVER = 2**30  # where steps_since_fired saturates


class Weights(struct.PyTreeNode):
    """What the loss at one step is weighted with; constants of differentiation."""

    alpha: Float[Array, ""]
    lam: Float[Array, ""]
    l1: Float[Array, ""]
    is_dead_F: Bool[Array, " F"]


def loss_fn(
    params: Params,
    acts_BD: Float[Array, "B D"],
    weights: Weights,
    variance: Float[Array, ""],
    key: Key[Array, ""],
    config: TrainConfig,
) -> tuple[Float[Array, ""], tuple[Encoding, Metrics]]:
    """The loss of scaled activations, with the encoding and the loss's parts."""
    d_model = acts_BD.shape[1]
    architecture = ARCHITECTURES[config.sae.architecture]
    sae = SAE(config.sae, d_model)
    encoding, recon_BD = cast(tuple[Encoding, Array], sae.apply({"params": params}, acts_BD))
    residual_BD = acts_BD - recon_BD
    fvu = jnp.mean(jnp.sum(residual_BD**2, axis=1)) / variance
    parts = {"fvu": fvu, "loss_reconstruction": fvu}
    parts["loss_sparsity"] = jnp.zeros(())
    if architecture.uses_l1:
        # The decoder's rows have unit norm, so L1 x decoder norm is L1.
        parts["loss_sparsity"] = weights.l1 * jnp.mean(jnp.sum(encoding.latents_BF, axis=1)) / variance
    parts["loss_aux"] = jnp.zeros(())
    if architecture.uses_aux and config.sparsity.aux > 0:
        aux = aux_loss(params, encoding.pre_BF, residual_BD, weights.is_dead_F, sae, config.sparsity.aux_k)
        parts["loss_aux"] = config.sparsity.aux * aux
    parts["penalty"] = parts["loss_orthogonality"] = jnp.zeros(())
    if config.penalty.kind == "hinge":
        parts["penalty"] = hinge_penalty(params["W_dec"], weights.alpha, margin(config, d_model), config.penalty, key)
        parts["loss_orthogonality"] = weights.lam * parts["penalty"]
    names = ("loss_reconstruction", "loss_sparsity", "loss_aux", "loss_orthogonality")
    parts["loss"] = sum((parts[name] for name in names), jnp.zeros(()))
    return parts["loss"], (encoding, parts)


def aux_loss(
    params: Params,
    pre_BF: Float[Array, "B F"],
    residual_BD: Float[Array, "B D"],
    is_dead_F: Bool[Array, " F"],
    sae: SAE,
    aux_k: int,
) -> Float[Array, ""]:
    """|e - e_hat|^2 / |e|^2, e the residual (a constant), e_hat its reconstruction by the top `aux_k` dead latents.

    Gao et al. 2024 (arXiv 2406.04093), appendix A.2. Costs nothing while no latent is dead: then it is 0.
    """
    target_BD = jax.lax.stop_gradient(residual_BD)

    def revive(params: Params, pre_BF: Array) -> Array:
        dead_BF = jnp.where(is_dead_F[None], jax.nn.relu(pre_BF), 0.0)
        if aux_k < dead_BF.shape[1]:
            smallest_B1 = jax.lax.top_k(jax.lax.stop_gradient(dead_BF), aux_k)[0][:, -1:]
            dead_BF = jnp.where(dead_BF >= smallest_B1, dead_BF, 0.0)
        recon_BD = cast(Array, sae.apply({"params": params}, dead_BF, method="decode")) - params["b_dec"][None]
        return jnp.sum((target_BD - recon_BD) ** 2) / jnp.maximum(jnp.sum(target_BD**2), 1e-20)

    return jax.lax.cond(jnp.any(is_dead_F), revive, lambda *_: jnp.zeros(()), params, pre_BF)


def margin(config: TrainConfig, d_model: int) -> float:
    """mu0: the config's, or the one solved from the noise floor."""
    if config.penalty.mu0 is not None:
        return config.penalty.mu0
    return noise_floor_margin(config.sae.F, d_model, config.penalty.noise_floor)


def train_step(
    state: TrainState, acts_BD: Array, scale: InputScale, hyper: Hyperparameters, config: TrainConfig
) -> tuple[TrainState, Metrics]:
    """One optimizer update on raw activations of any float dtype; and the step's metrics.

    A batch whose loss or gradient is not finite changes nothing but the counters and lambda (halved).
    """
    step, settings = state.step, config.sparsity
    architecture = ARCHITECTURES[config.sae.architecture]
    dead_steps = -(-settings.dead_after_tokens // config.batch_size)
    weights = Weights(
        alpha=jnp.float32(alpha_schedule(config.penalty, config.steps)(step)),
        lam=state.gate.lam,
        l1=state.sparsity.coefficient * warmup_schedule(settings.l1_warmup, config.steps)(step),
        is_dead_F=state.steps_since_fired_F >= dead_steps,
    )
    chunk_key = jax.random.fold_in(state.key, step)
    (loss, (encoding, parts)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, scale(acts_BD), weights, scale.variance, chunk_key, config
    )
    # A unit row can only turn: what points along it would be undone by `unit_rows` but stay in Adam's moments.
    W_dec = state.params["W_dec"]
    grads["W_dec"] -= jnp.sum(grads["W_dec"] * W_dec, axis=1, keepdims=True) * W_dec
    gradient_norm = optax.global_norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

    direction, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    learning_rate = hyper.learning_rate * learning_rate_schedule(config.optimizer, config.steps)(step)
    params = jax.tree.map(lambda value, move: value - learning_rate * move, state.params, direction)
    params["W_dec"] = unit_rows(params["W_dec"])
    params, opt_state = _where(ok, (params, opt_state), (state.params, state.opt_state))

    active_BF = encoding.latents_BF > 0
    l0 = jnp.sum(active_BF, dtype=jnp.float32) / acts_BD.shape[0]
    fired_F = jnp.any(active_BF, axis=0)
    since_F = jnp.where(ok & fired_F, 0, jnp.minimum(state.steps_since_fired_F + 1, _NEVER))
    threshold_ema = state.threshold_ema
    if architecture.learns_threshold:
        smallest = jnp.min(jnp.where(active_BF, encoding.latents_BF, jnp.inf))
        moved = settings.threshold_decay * threshold_ema + (1 - settings.threshold_decay) * smallest
        threshold_ema = jnp.where(ok & jnp.isfinite(smallest), moved, threshold_ema)
    gate = update_gate(state.gate, jnp.where(ok, parts["fvu"], jnp.nan), config.penalty, hyper.tau, hyper.lam_max)
    sparsity = state.sparsity
    if architecture.uses_l1:
        frozen_from = round((1 - settings.freeze_fraction) * config.steps)
        moving = settings.match_l0 & (step >= round(settings.l1_warmup * config.steps)) & (step < frozen_from)
        sparsity = update_sparsity(sparsity, jnp.where(ok, l0, jnp.nan), settings, config.sae.k, moving)

    metrics = {
        "step": step + 1,
        **parts,
        "fvu_ema": gate.error(config.penalty.ema_decay),
        "l0": l0,
        "dead_fraction": jnp.mean(since_F >= dead_steps),
        "alpha": weights.alpha,
        "lambda": weights.lam,
        "learning_rate": learning_rate,
        "sparsity_coefficient": weights.l1 if architecture.uses_l1 else jnp.zeros(()),
        "gradient_norm": gradient_norm,
        "bad_batches": gate.bad,
    }
    new_state = TrainState(step + 1, params, opt_state, since_F, threshold_ema, gate, sparsity, state.key)
    return new_state, metrics


def compile_steps(state_shardings: Any = None) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled program: (state, acts_SBD, scale, hyper, config) -> (state, metrics of [S]), S steps in one call.

    The state is donated. Its shardings are pinned to `state_shardings`, so that the state that comes out fits the
    program that it goes back into, and nothing compiles twice.
    """

    def train_steps(
        state: TrainState, acts_SBD: Array, scale: InputScale, hyper: Hyperparameters, config: TrainConfig
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, acts_BD: Array) -> tuple[TrainState, Metrics]:
            return train_step(state, acts_BD, scale, hyper, config)

        return jax.lax.scan(body, state, acts_SBD)

    out: dict[str, Any] = {} if state_shardings is None else {"out_shardings": (state_shardings, None)}
    return jax.jit(train_steps, static_argnames="config", donate_argnames="state", **out)


def _where(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
