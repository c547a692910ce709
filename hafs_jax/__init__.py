"""Training sparse autoencoders on stores of activations in JAX, with hierarchical adaptive feature sharing (HAFS).

    from hafs_jax import load, preset, train
    run = train(preset("baseline", "matryoshka"), acts)  # an array, a file, a store, or an iterator of batches
    sae = load(run.folder)
    latents = sae.encode(acts)

The names below are imported when they are first used: `import hafs_jax` brings no JAX. The library logs to the logger
"hafs_jax" and prints nothing: `logging.basicConfig(level=logging.INFO)` shows its notes. Python shows its warnings.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hafs_jax.api import TrainedSAE as TrainedSAE
    from hafs_jax.api import load as load
    from hafs_jax.base.errors import UserError as UserError
    from hafs_jax.config import TrainConfig as TrainConfig
    from hafs_jax.fast.forms import Form as Form
    from hafs_jax.method.architectures import Architecture as Architecture
    from hafs_jax.method.penalties import Penalty as Penalty
    from hafs_jax.presets import ARCHITECTURES as ARCHITECTURES
    from hafs_jax.presets import VARIANTS as VARIANTS
    from hafs_jax.presets import preset as preset
    from hafs_jax.presets import with_fields as with_fields
    from hafs_jax.registry import register_architecture as register_architecture
    from hafs_jax.registry import register_penalty as register_penalty
    from hafs_jax.registry import register_variant as register_variant
    from hafs_jax.runs import Run as Run
    from hafs_jax.runs import RunSummary as RunSummary
    from hafs_jax.saelens import export_saelens as export_saelens
    from hafs_jax.store.arrays import write_array_store as write_array_store
    from hafs_jax.store.reader import Store as Store
    from hafs_jax.training.loop import Terminated as Terminated
    from hafs_jax.training.loop import TrainingStopped as TrainingStopped
    from hafs_jax.training.sweeps import sweep as sweep
    from hafs_jax.training.train import open_stores as open_stores
    from hafs_jax.training.train import train as train

__version__ = "0.1.0"

_MODULES = {
    "ARCHITECTURES": "presets",
    "Architecture": "method.architectures",
    "Form": "fast.forms",
    "Penalty": "method.penalties",
    "Run": "runs",
    "RunSummary": "runs",
    "Store": "store.reader",
    "Terminated": "training.loop",
    "TrainConfig": "config",
    "TrainedSAE": "api",
    "TrainingStopped": "training.loop",
    "UserError": "base.errors",
    "VARIANTS": "presets",
    "export_saelens": "saelens",
    "load": "api",
    "open_stores": "training.train",
    "preset": "presets",
    "register_architecture": "registry",
    "register_penalty": "registry",
    "register_variant": "registry",
    "sweep": "training.sweeps",
    "train": "training.train",
    "with_fields": "presets",
    "write_array_store": "store.arrays",
}
"""The module of each public name, the same as those of the imports above, which type checkers read."""

__all__ = sorted([*_MODULES, "__version__"])


if not TYPE_CHECKING:  # else a misspelt name would have a type too

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'hafs_jax' has no attribute {name!r}")
        return getattr(importlib.import_module(f"hafs_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
