"""The one pytree that holds everything that changes during training.

Scalars are written `...`: under `vmap` over many SAEs every leaf has one leading axis more.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from hafs_jax.config import TrainConfig
from hafs_jax.fast.adam import optimizer
from hafs_jax.method.controllers import ErrorGate, SparsityControl, init_gate, init_sparsity
from hafs_jax.method.penalties import first_groups
from hafs_jax.method.sae import init_params, unit_rows
from hafs_jax.ops.products import Params


class Hyperparameters(struct.PyTreeNode):
    """The numbers that may differ between SAEs trained in one program; all else is static config."""

    learning_rate: Float[Array, "..."]
    coefficient: Float[Array, "..."]
    lam_max: Float[Array, "..."]
    tau: Float[Array, "..."]  # 1 where there is no gate


class TrainState(struct.PyTreeNode):
    """Parameters, optimizer, controllers, counters and the PRNG key. `step` is also the position in the data."""

    step: Int[Array, "..."]
    params: Params
    average: Params  # the weights' moving average; empty where the config asks for none
    held_penalty: Params  # the penalty's last gradient and value, for steps without a new one; empty where each has one
    opt_state: optax.OptState
    steps_since_fired_F: Int[Array, "... F"]  # steps, not rows, and saturating: never wraps
    rate_F: Float[Array, "... F"]  # moving average of the share of rows in which each latent fires
    groups_F: Int[Array, "... F"]  # who may share direction with whom: see `penalty.sharing_weights`
    threshold_ema: Float[Array, "..."]  # of the smallest active latent in a batch, uncorrected
    gate: ErrorGate
    sparsity: SparsityControl
    key: Key[Array, "..."]

    def threshold(self, decay: float) -> Float[Array, ""]:
        """The inference threshold, in scaled units: the bias-corrected moving average; 0 before any step."""
        count = jnp.maximum(self.gate.count, 1).astype(jnp.float32)
        return self.threshold_ema / (1.0 - jnp.float32(decay) ** count)

    def weights(self) -> Params:
        """The SAE that this state stands for: the averaged weights, with unit decoder rows, or the parameters."""
        if not self.average:
            return self.params
        return {**self.average, "W_dec": unit_rows(self.average["W_dec"])}


def shared_config(config: TrainConfig) -> TrainConfig:
    """The config without names and the numbers of `Hyperparameters`: what a program depends on.

    Two configs with the same shared config train in one program.
    """
    penalty = dataclasses.replace(config.penalty, lam_max=max(1.0, config.penalty.lam_min), tau=None)
    return dataclasses.replace(
        config,
        variant="",
        seed=0,
        tag="",
        tensorboard=False,
        wandb=None,
        arm="",
        mesh="",
        penalty=penalty,
        sparsity=dataclasses.replace(config.sparsity, coefficient=1.0),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0),
    )


def hyperparameters(config: TrainConfig) -> Hyperparameters:
    """The config's own numbers."""
    tau = 1.0 if config.penalty.tau is None else config.penalty.tau
    numbers = (config.optimizer.learning_rate, config.sparsity.coefficient, config.penalty.lam_max, tau)
    return Hyperparameters(*map(jnp.float32, numbers))


def seed_key(seed: int) -> Key[Array, ""]:
    """The key of a seed of up to 63 bits. That of a smaller one than 2^32 is `jax.random.key(seed)`.

    JAX itself reads the lowest 32 bits of a seed where it computes in 32 bits.
    """
    key, rest = jax.random.key(seed % 2**32), seed >> 32
    return jax.random.fold_in(key, rest) if rest else key


def init_state(
    config: TrainConfig, d_model: int, key: Key[Array, ""], hyper: Hyperparameters, d_out: int | None = None
) -> TrainState:
    """A new state. `key` seeds the weights and the penalty's chunks. `d_out` is the width of a transcoder's target."""
    init_key, chunk_key = jax.random.split(key)
    return state_of(config, init_params(config.sae, d_model, init_key, d_out), chunk_key, hyper)


def no_penalty(params: Params) -> Params:
    """The penalty's tangent gradient at W_dec, its value, and its share of the whole gradient, before any is known."""
    return {"W_dec": jnp.zeros_like(params["W_dec"]), "value": jnp.zeros(()), "share": jnp.zeros(())}


def state_of(config: TrainConfig, params: Params, key: Key[Array, ""], hyper: Hyperparameters) -> TrainState:
    """The state at the start of training from `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        average={} if config.optimizer.average is None else jax.tree.map(jnp.copy, params),
        held_penalty={} if config.penalty.kind == "none" or config.penalty.every_steps == 1 else no_penalty(params),
        opt_state=optimizer(config, params["W_dec"].shape[-1]).init(params),
        steps_since_fired_F=jnp.zeros(config.sae.F, jnp.int32),
        rate_F=jnp.zeros(config.sae.F),
        groups_F=first_groups(config.penalty, config.sae),
        threshold_ema=jnp.zeros(()),
        gate=init_gate(config.penalty, hyper.lam_max),
        sparsity=init_sparsity(hyper.coefficient, config.sae.k),
        key=key,
    )
