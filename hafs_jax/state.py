"""The one pytree that holds everything that changes during training.

Scalars are written `...`: under `vmap` over many SAEs every leaf has one leading axis more.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from hafs_jax.config import TrainConfig
from hafs_jax.controllers import ErrorGate, SparsityControl, init_gate, init_sparsity
from hafs_jax.sae import Params, init_params


class Hyperparameters(struct.PyTreeNode):
    """The numbers that may differ between SAEs trained in one program; all else is static config."""

    learning_rate: Float[Array, "..."]
    l1: Float[Array, "..."]
    lam_max: Float[Array, "..."]
    tau: Float[Array, "..."]  # 1 where there is no gate


class TrainState(struct.PyTreeNode):
    """Parameters, optimizer, controllers, counters and the PRNG key. `step` is also the position in the data."""

    step: Int[Array, "..."]
    params: Params
    opt_state: optax.OptState
    steps_since_fired_F: Int[Array, "... F"]  # steps, not rows, and saturating: never wraps
    threshold_ema: Float[Array, "..."]  # of the smallest active latent in a batch, uncorrected
    gate: ErrorGate
    sparsity: SparsityControl
    key: Key[Array, "..."]

    def threshold(self, decay: float) -> Float[Array, ""]:
        """The inference threshold, in scaled units: the bias-corrected moving average; 0 before any step."""
        count = jnp.maximum(self.gate.count, 1).astype(jnp.float32)
        return self.threshold_ema / (1.0 - jnp.float32(decay) ** count)


def hyperparameters(config: TrainConfig) -> Hyperparameters:
    """The config's own numbers."""
    tau = 1.0 if config.penalty.tau is None else config.penalty.tau
    return Hyperparameters(
        *map(jnp.float32, (config.optimizer.learning_rate, config.sparsity.l1, config.penalty.lam_max, tau))
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Gradient clipping and Adam's direction; the step multiplies by the learning rate."""
    settings = config.optimizer
    adam = optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)
    return adam if settings.clip_norm is None else optax.chain(optax.clip_by_global_norm(settings.clip_norm), adam)


def init_state(config: TrainConfig, d_model: int, key: Key[Array, ""], hyper: Hyperparameters) -> TrainState:
    """A fresh state; `key` seeds the weights and, split off, the penalty's chunks."""
    init_key, chunk_key = jax.random.split(key)
    params = init_params(config.sae, d_model, init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer(config).init(params),
        steps_since_fired_F=jnp.zeros(config.sae.F, jnp.int32),
        threshold_ema=jnp.zeros(()),
        gate=init_gate(config.penalty, hyper.lam_max),
        sparsity=init_sparsity(hyper.l1, config.sae.k),
        key=chunk_key,
    )
