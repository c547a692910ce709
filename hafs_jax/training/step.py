"""The training step: pure, jit-compiled once per config, the state donated.

It descends on loss + lambda O. The penalty O depends on the decoder alone, so its gradient is computed by itself and
added.
"""

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from hafs_jax.config import TrainConfig
from hafs_jax.fast.adam import by_rows, update
from hafs_jax.fast.hinge import penalty_and_gradient
from hafs_jax.fast.objective import loss_and_gradients
from hafs_jax.fast.plan import Plan, choose
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.method.controllers import ErrorGate, SparsityControl, update_gate, update_sparsity
from hafs_jax.method.loss import Forward, Metrics, Weights
from hafs_jax.method.penalties import PENALTIES, Structure, assign_parents, noise_floor_margin, tangent, tangent_norms
from hafs_jax.method.resample import resample
from hafs_jax.method.sae import InputScale
from hafs_jax.method.schedules import (
    alpha_schedule,
    coefficient_schedule,
    k_schedule,
    learning_rate_schedule,
    settled_step,
)
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.members import largest_of_members
from hafs_jax.ops.products import Params
from hafs_jax.training.state import Hyperparameters, TrainState

Batch = Array | tuple[Array, Array]
"""Raw activations of any float dtype, [B, D]; for a transcoder those of its input and of its target, [B, D_out]."""

_NEVER = 2**30  # where steps_since_fired saturates
_RATE_DECAY = 0.99  # of the moving average of each latent's firing rate, per step


def margin(config: TrainConfig, d_out: int) -> float:
    """mu0: the config's, or the one solved from the noise floor in the decoder's `d_out` dimensions; 0 without one."""
    if config.penalty.mu0 is not None:
        return config.penalty.mu0
    if not PENALTIES[config.penalty.kind].has_margin:
        return 0.0
    return noise_floor_margin(config.sae.F, d_out, config.penalty.noise_floor)


def train_step(
    state: TrainState,
    batch: Batch,
    scale: InputScale,
    hyper: Hyperparameters,
    config: TrainConfig,
    axis: str | None = None,
    platform: str | None = None,
    axes: Axes = Axes(),
) -> tuple[TrainState, Metrics]:
    """One optimizer update on a batch of raw activations; and the step's metrics.

    A batch whose loss or gradient is not finite changes nothing but the counters and lambda (halved). `axis` names the
    mapped axis of SAEs that are trained together, where there is one. `platform` is what the step is to run on (none:
    where JAX runs). With `axes` it is the step of one of several devices: `batch` has its rows, the state its latents'
    counters and the parameters and moments of the latents that it owns.
    """
    plan = choose(config, platform, axes)
    step, settings = state.step, config.sparsity
    architecture = ARCHITECTURES[config.sae.architecture]
    acts_BD, target_BD = _scaled(batch, scale)
    variance = scale.variance if scale.target is None else scale.target.variance
    dead_steps = -(-settings.dead_after_tokens // config.batch_size)
    weights = _weights(state, dead_steps, config)
    chunk_key = jax.random.fold_in(state.key, step)
    prefix_key, row_key = jax.random.fold_in(chunk_key, 1), jax.random.fold_in(chunk_key, 2)
    params = axes.shared_params(state.params, config.sae.compute_dtype)
    (loss, forward), grads = loss_and_gradients(
        params, acts_BD, target_BD, weights, variance, prefix_key, config, plan, axis
    )
    grads, B = axes.shared_gradients(grads), len(acts_BD) * axes.data
    rate_F = _RATE_DECAY * state.rate_F + (1 - _RATE_DECAY) * forward.firing_F / B

    # A unit row can only turn. What points along it would be undone by `unit_rows`, but would stay in Adam's moments.
    whole_FD = grads["W_dec"]
    is_plain = config.penalty.kind == "none"
    turns = is_plain and by_rows(config, plan, whole_FD.shape[1])  # the kernel does it, on the way
    grads["W_dec"] = whole_FD if turns else tangent(whole_FD, state.params["W_dec"])
    alpha = jnp.float32(alpha_schedule(config.penalty, config.steps)(step))
    penalised = _with_penalty(grads["W_dec"], state, forward, rate_F, alpha, config, plan, chunk_key, axis)
    grads["W_dec"], held, groups_F, penalty = penalised
    loss += penalty["loss_orthogonality"]
    sizes = grads
    if turns or (is_plain and not plan.on_cpu):  # so that XLA need not write the tangent to memory
        sizes = {**grads, "W_dec": tangent_norms(whole_FD, state.params["W_dec"])}
    gradient_norm = axes.norm(sizes)
    ok = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

    learning_rate = hyper.learning_rate * learning_rate_schedule(config.optimizer, config.steps)(step)
    old = state.params, state.opt_state
    params, opt_state = update(*old, grads, gradient_norm, learning_rate, ok, config, plan, turns)

    l0 = axes.sum_of_latents(jnp.sum(forward.firing_F)) / B
    since_F = jnp.where(ok & (forward.firing_F > 0), 0, jnp.minimum(state.steps_since_fired_F + 1, _NEVER))
    threshold_ema, gate, sparsity = _controls(state, forward, l0, weights.k, ok, hyper, config)
    if config.frozen == "everything" and architecture.cost is not None:
        # No coefficient could move L0: the bias does, by the same law.
        params["b_enc"] -= jnp.log2(sparsity.coefficient / state.sparsity.coefficient)
    if settings.resample_every_steps:
        now = (step + 1) % settings.resample_every_steps == 0
        now &= ok & (step < round(settings.resample_until * config.steps))
        rows = (acts_BD, forward.residual_BD)
        found = resample(params, opt_state, since_F, dead_steps, rows, now, row_key, config, axis, axes)
        params, opt_state, since_F = found

    metrics = {
        "step": step + 1,
        "loss": loss,
        **forward.parts,
        **penalty,
        "fvu_ema": gate.error(config.penalty.ema_decay),
        "l0": l0,
        "k": weights.k,
        "dead_fraction": axes.sum_of_latents(jnp.mean(since_F >= dead_steps)) / axes.latent,
        "alpha": alpha,
        "lambda": state.gate.lam,
        "tau_reached": gate.reached,
        "learning_rate": learning_rate,
        "sparsity_coefficient": weights.coefficient if architecture.cost is not None else jnp.zeros(()),
        "gradient_norm": gradient_norm,
        "bad_batches": gate.bad,
    }
    new_state = TrainState(
        step=step + 1,
        params=params,
        average=_averaged(state, params, config),
        held_penalty=held,
        opt_state=opt_state,
        steps_since_fired_F=since_F,
        rate_F=jnp.where(ok, rate_F, state.rate_F),
        groups_F=groups_F,
        threshold_ema=threshold_ema,
        gate=gate,
        sparsity=sparsity,
        key=state.key,
    )
    return new_state, metrics


def _weights(state: TrainState, dead_steps: int, config: TrainConfig) -> Weights:
    """What the loss takes from schedules and state at this step."""
    coefficient = state.sparsity.coefficient * coefficient_schedule(config.sparsity, config.steps)(state.step)
    is_dead_F = state.steps_since_fired_F >= dead_steps
    return Weights(k=k_schedule(config.sae, config.steps)(state.step), coefficient=coefficient, is_dead_F=is_dead_F)


def _with_penalty(
    grad_FD: Float[Array, "O D"],
    state: TrainState,
    forward: Forward,
    rate_F: Float[Array, " F"],
    alpha: Float[Array, ""],
    config: TrainConfig,
    plan: Plan,
    key: Key[Array, ""],
    axis: str | None,
) -> tuple[Float[Array, "O D"], Params, Int[Array, " F"], Metrics]:
    """`_penalised`, with the groups of latents; unchanged and zeros where there is no penalty."""
    groups_F = state.groups_F
    if config.penalty.kind == "none":
        names = ("penalty", "loss_orthogonality", "penalty_gradient_share")
        return grad_FD, state.held_penalty, groups_F, {name: jnp.zeros(()) for name in names}
    if config.penalty.sharing == "parent":
        groups_F = _regrouped(state, config, plan.axes, axis)
    active_BF = None if forward.encoding is None else forward.encoding.latents_BF > 0
    axes = plan.axes
    structure = Structure(axes.all_latents(groups_F), axes.all_latents(rate_F), active_BF, axes)
    grad_FD, held, metrics = _penalised(grad_FD, state, alpha, structure, config, plan, key, axis)
    return grad_FD, held, groups_F, metrics


def _controls(
    state: TrainState,
    forward: Forward,
    l0: Float[Array, ""],
    k: Array,
    ok: Array,
    hyper: Hyperparameters,
    config: TrainConfig,
) -> tuple[Array, ErrorGate, SparsityControl]:
    """The learned threshold, the error gate and the L0 controller after a step."""
    architecture, threshold_ema, sparsity = ARCHITECTURES[config.sae.architecture], state.threshold_ema, state.sparsity
    if architecture.learns_threshold:
        threshold_ema = _followed(threshold_ema, forward.smallest, ok, config.sparsity.threshold_decay)
    fvu = jnp.where(ok, forward.parts["fvu"], jnp.nan)
    gate = update_gate(state.gate, fvu, config.penalty, hyper.tau, hyper.lam_max)
    if architecture.cost is not None:
        sparsity = _matched(state, jnp.where(ok, l0, jnp.nan), k, config)
    return threshold_ema, gate, sparsity


def _followed(ema: Array, smallest: Float[Array, ""], ok: Array, decay: float) -> Float[Array, ""]:
    """The moving average of the batch's smallest active latent; as it was where nothing is active."""
    return jnp.where(ok & jnp.isfinite(smallest), decay * ema + (1 - decay) * smallest, ema)


def _matched(state: TrainState, l0: Float[Array, ""], k: Array, config: TrainConfig) -> SparsityControl:
    """The L0 controller after a step. It changes between warm-up and the last `freeze_fraction` of training."""
    settings = config.sparsity
    frozen_from = round((1 - settings.freeze_fraction) * config.steps)
    matches = settings.match_l0 or config.frozen == "everything"
    moving = matches & (state.step >= settled_step(settings, config.steps)) & (state.step < frozen_from)
    return update_sparsity(state.sparsity, l0, settings, k, moving)


def _scaled(batch: Batch, scale: InputScale) -> tuple[Array, Array]:
    """The scaled input and target; the same array where the SAE reconstructs its input."""
    if isinstance(batch, tuple):
        assert scale.target is not None
        return scale(batch[0]), scale.target(batch[1])
    acts_BD = scale(batch)
    return acts_BD, acts_BD


def _averaged(state: TrainState, params: Params, config: TrainConfig) -> Params:
    """The moving average of the weights where the config asks for one; its window grows over the first steps."""
    if config.optimizer.average is None:
        return state.average
    decay = jnp.minimum(config.optimizer.average, (1.0 + state.step) / (10.0 + state.step))
    return cast(Params, jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, params))


def _penalised(
    grad_FD: Float[Array, "F D"],
    state: TrainState,
    alpha: Float[Array, ""],
    structure: Structure,
    config: TrainConfig,
    plan: Plan,
    key: Key[Array, ""],
    axis: str | None,
) -> tuple[Float[Array, "F D"], Params, Metrics]:
    """W_dec's gradient with lambda times the penalty's, the penalty to hold, and the metrics.

    Between its updates, every `every_steps` steps, we reuse the penalty's last gradient. Applying one that is
    `every_steps` times larger at each update would inflate Adam's second moments and be clipped.
    """
    W_dec, every = state.params["W_dec"], config.penalty.every_steps
    mu0 = margin(config, grad_FD.shape[1])

    def anew(_: Params) -> Params:
        value, penalty_FD = penalty_and_gradient(W_dec, alpha, structure, mu0, config.penalty, key, plan)
        size, rest = (plan.axes.norm({"W_dec": of_FD}) for of_FD in (penalty_FD, grad_FD))
        size *= state.gate.lam
        return {"W_dec": penalty_FD, "value": value, "share": size / jnp.maximum(size + rest, 1e-30)}

    if every == 1:
        found = anew(state.held_penalty)
    else:
        due = largest_of_members(state.step % every == 0, axis)
        found = cast(Params, jax.lax.cond(due, anew, lambda held: held, state.held_penalty))
    metrics = {
        "penalty": found["value"],
        "loss_orthogonality": state.gate.lam * found["value"],
        "penalty_gradient_share": found["share"],
    }
    return grad_FD + state.gate.lam * found["W_dec"], found if state.held_penalty else {}, metrics


def _regrouped(state: TrainState, config: TrainConfig, axes: Axes, axis: str | None) -> Int[Array, " F"]:
    """Children assigned to parents anew, every `regroup_every_steps` steps."""
    settings = config.penalty
    return jax.lax.cond(
        largest_of_members(state.step % settings.regroup_every_steps == 0, axis),
        lambda: axes.of_owners(assign_parents(state.params["W_dec"], settings.parents, axes)),
        lambda: state.groups_F,
    )
