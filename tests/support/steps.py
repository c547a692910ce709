"""A training step of test size: its config, a fresh state, a batch, and one compiled step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hafs_jax.config import TrainConfig
from hafs_jax.method.sae import InputScale
from hafs_jax.presets import preset
from hafs_jax.training.state import TrainState, hyperparameters, init_state
from hafs_jax.training.step import train_step

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
