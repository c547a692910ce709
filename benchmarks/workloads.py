"""Workloads of the suites: configs, rows, weights, our training steps, the products they need. No other library."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hafs_jax.config import TrainConfig
from hafs_jax.fast.plan import resolve_products, this_machine
from hafs_jax.method.sae import InputScale, init_params
from hafs_jax.presets import preset, with_fields
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, shared_config, state_of

D, B, K = 576, 2_048, 32
DISPATCH = 4  # our steps per call; the training loop makes several in one call too
L1 = 1.0

Weights = dict[str, np.ndarray]
"""Our parameter names -> float32 arrays."""


def config_of(architecture: str, n_latents: int, variant: str = "baseline", **fields: Any) -> TrainConfig:
    """The library's defaults, except that relu has a fixed coefficient, as the other libraries have."""
    fixed = {"coefficient": L1, "match_l0": False} if architecture == "relu" else {}
    config = with_fields(
        preset(variant, architecture),
        {
            "sae": {"n_latents": n_latents, "k": K, "encoder_scale": 1.0},
            "sparsity": fixed,
            "batch_size": B,
            "tokens": 100_000 * B,
            **fields,
        },
    )
    return with_fields(config, {"penalty": {"tau": 0.1, "mu0": 0.1}}) if config.penalty.gate else config


def resolved(config: TrainConfig) -> TrainConfig:
    """The config with `products` resolved for this machine, as a training does before it compiles."""
    return dataclasses.replace(config, products=resolve_products(config, this_machine()))


def random_weights(config: TrainConfig, rows_BD: np.ndarray, l0: int | None = None) -> Weights:
    """Random weights. With `l0`, biases leave so many positive pre-activations per row on average."""
    weights = {name: np.array(value) for name, value in init_params(config.sae, D, jax.random.key(0)).items()}
    if l0 is not None:
        pre = np.sort((rows_BD @ weights["W_enc"].T).reshape(-1))
        weights["b_enc"] -= pre[-l0 * len(rows_BD)]
    return weights


def planted_rows(rows: int, seed: int, d_model: int = D, features: int = 2_000) -> np.ndarray:
    """Sparse sums of random directions, [rows, d_model] in float32, with mean 0 and mean squared norm d_model."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((features, d_model), dtype=np.float32)
    active = random.random((rows, features), dtype=np.float32) < 20 / features
    rows_BD = (active * random.random((rows, features), dtype=np.float32)) @ directions
    rows_BD -= rows_BD.mean(0)
    return rows_BD * np.float32(np.sqrt(d_model / np.mean(np.sum(rows_BD**2, axis=1))))


def our_steps(
    config: TrainConfig, rows_BD: np.ndarray, steps: int = DISPATCH, weights: Weights | None = None
) -> Callable[[], Any]:
    """A case of `steps` training steps in one call, from `weights` or from new random ones."""
    config = resolved(config)
    hyper, d_model = hyperparameters(config), rows_BD.shape[1]
    fresh = init_params(config.sae, d_model, jax.random.key(0))
    params = fresh if weights is None else {name: jnp.asarray(value) for name, value in weights.items()}
    state = [state_of(config, params, jax.random.key(1), hyper)]
    scale = InputScale(jnp.zeros(d_model), jnp.float32(1.0), jnp.float32(d_model))
    batches, train_steps, static = jnp.asarray(np.stack([rows_BD] * steps)), compile_steps(), shared_config(config)

    def run() -> None:
        state[0], metrics = train_steps(state[0], batches, scale, hyper, static)
        jax.block_until_ready(metrics)

    return run


def five_products(rows_BD: np.ndarray, weights: Weights, dtype: str = "float32") -> Callable[[], Any]:
    """A case of the five matrix products that every dense step needs, of arrays that are already in `dtype`."""
    acts_BD, W_enc, W_dec = (jnp.asarray(array, dtype) for array in (rows_BD, weights["W_enc"], weights["W_dec"]))
    random_BF = jax.random.normal(jax.random.key(0), (len(acts_BD), len(W_dec)))
    latents_BF = jax.nn.relu(random_BF).astype(dtype)  # half zeros, like ReLU's: some devices draw less power for zeros
    sums = {"preferred_element_type": jnp.float32}
    products = (
        (jax.jit(lambda x, w: jnp.matmul(x, w.T, **sums)), acts_BD, W_enc),
        (jax.jit(lambda f, w: jnp.matmul(f, w, **sums)), latents_BF, W_dec),
        (jax.jit(lambda r, w: jnp.matmul(r, w.T, **sums)), acts_BD, W_dec),
        (jax.jit(lambda f, r: jnp.matmul(f.T, r, **sums)), latents_BF, acts_BD),
        (jax.jit(lambda x, g: jnp.matmul(g.T, x, **sums)), acts_BD, latents_BF),
    )

    def run() -> None:
        for product, left, right in products:
            jax.block_until_ready(product(left, right))

    return run
