"""Steps of test size on four virtual devices, for processes that are started with them (`on_four_devices`)."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hafs_jax.config import TrainConfig
from hafs_jax.fast.mesh import BATCHES, make_mesh, state_shardings
from hafs_jax.method.sae import InputScale
from hafs_jax.ops.axes import Axes
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, init_state
from tests.support.steps import D, small

B, F, K, STEPS = 16, 32, 3, 5
MESHES = (Axes(4, 1), Axes(2, 2), Axes(1, 4))
TOLERANCE = 1e-5


def config_of(variant: str, architecture: str, **fields: Any) -> TrainConfig:
    """A config whose latents die after two steps; `fields` replace those of its parts, or its own."""
    parts: dict[str, dict[str, Any]] = {
        "sae": {"n_latents": F, "k": K},
        "penalty": {"chunk_size": 6, "mu0": 0.1, "tau": 10.0 if variant == "adaptive" else None},
        "sparsity": {"dead_after_tokens": 2 * B, "aux_k": 4},
    }
    for name in [name for name in fields if isinstance(fields[name], dict)]:
        parts[name] = {**parts.get(name, {}), **fields.pop(name)}
    own = {"batch_size": B, "tokens": B * STEPS, "steps_per_dispatch": STEPS, **fields}
    return dataclasses.replace(small(variant, architecture, **parts), **own)


def outcome(config: TrainConfig, axes: Axes) -> Any:
    """The weights, moments and counters after five steps, and the steps' metrics."""
    hyper, spread = hyperparameters(config), None
    state = init_state(config, D, jax.random.key(0), hyper)
    acts = jax.random.normal(jax.random.key(7), (STEPS, B, D)) + 0.2
    scale = InputScale(jnp.linspace(-0.5, 0.5, D), jnp.float32(1.3), jnp.float32(D))
    if axes.devices > 1:
        mesh = make_mesh(axes)
        spread = state_shardings(state, mesh)
        state, acts = jax.device_put(state, spread), jax.device_put(acts, jax.NamedSharding(mesh, BATCHES))
        assert state.params["W_dec"].addressable_shards[0].data.shape == (F // axes.devices, D)
    state, metrics = compile_steps(spread)(state, acts, scale, hyper, config)
    return jax.device_get((state.params, state.opt_state, state.steps_since_fired_F, state.rate_F, metrics))


def compare(config: TrainConfig, meshes: tuple[Axes, ...] = MESHES) -> dict[str, float]:
    """The largest difference on each mesh from one device; an error where it is above the tolerance."""
    one, found = outcome(config, Axes()), {}
    for axes in meshes:
        worst = 0.0
        other = jax.tree.leaves(outcome(config, axes))
        for (path, expected), value in zip(jax.tree_util.tree_leaves_with_path(one), other, strict=True):
            np.testing.assert_allclose(
                value, expected, atol=TOLERANCE, rtol=TOLERANCE,
                err_msg=f"{config.sae.architecture} {config.variant} {axes} {jax.tree_util.keystr(path)}",
            )  # fmt: skip
            if np.size(value):
                worst = max(worst, float(np.max(np.abs(np.asarray(value, float) - np.asarray(expected, float)))))
        found[f"{axes.data}x{axes.latent}"] = worst
    return found


def on_devices(script: str, *arguments: str, count: int = 4) -> str:
    """What the script prints on so many virtual devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
