"""Room two: training sparse autoencoders on activation stores in JAX, and HAFS (never torch).

    from hafs_jax import load, preset, train
    run = train(preset("baseline", "matryoshka"), store_folder, runs_folder)
    sae = load(run.folder)
    latents = sae.encode(acts)

The names below are imported when they are first used: reading a config or printing help needs no JAX.
"""

import importlib
from typing import Any

_PUBLIC = {
    "ARCHITECTURES": "hafs_jax.presets",
    "Run": "hafs_jax.runs",
    "TrainConfig": "hafs_jax.config",
    "TrainedSAE": "hafs_jax.api",
    "VARIANTS": "hafs_jax.presets",
    "load": "hafs_jax.api",
    "preset": "hafs_jax.presets",
    "sweep": "hafs_jax.training.sweeps",
    "train": "hafs_jax.training.train",
    "with_fields": "hafs_jax.presets",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hafs_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
