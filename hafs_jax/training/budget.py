"""Estimates how much memory a training needs, before it starts, and refuses one that does not fit."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hafs_jax.base.errors import UserError, arg
from hafs_jax.config import TrainConfig
from hafs_jax.fast.forms import form_of
from hafs_jax.fast.mesh import all_devices, parse
from hafs_jax.fast.objective import blocks_of_rows
from hafs_jax.fast.plan import choose, target
from hafs_jax.fast.room import available_bytes, remedies, size
from hafs_jax.ops.products import blocks_of
from hafs_jax.store.manifest import DISK_DTYPES
from hafs_jax.training.loop import Stores
from hafs_jax.training.state import hyperparameters, init_state

# What a compiled step holds at once on a CPU beside its state, as XLA's own analysis of temporary memory has it:
# - the gradients and one array as large as either matrix, with a penalty two;
# - copies, where the optimizer does not update in place;
# - these many float32 arrays [B, F] (of a block of rows, where the architecture can be taken so), or those of the dead
#   latents' auxiliary loss for a block.
_GRADIENTS, _PENALTY, _COPIES = 1.5, 0.5, 1.5  # times the parameters
_DENSE_ARRAYS, _SPARSE_ARRAYS = {"gated": 5, "jumprelu": 5, "matryoshka_relu": 5, "hierarchical_topk": 6}, 1
_OTHERS = 3  # of _DENSE_ARRAYS
_AUX_ARRAYS = 3
_DISPATCHES = 5  # being filled, two waiting, two in use


@dataclass(frozen=True)
class Budget:
    """Bytes on one device."""

    parameters: int
    optimizer: int  # moments, averages, counters
    step: int  # gradients and activations
    batches: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.step + self.batches

    def __str__(self) -> str:
        return (
            f"{size(self.total)}: parameters {size(self.parameters)}, optimizer {size(self.optimizer)}, "
            f"a step's gradients and activations {size(self.step)}, batches {size(self.batches)}"
        )


def budget(config: TrainConfig, stores: Stores, members: int = 1, together: str | None = None) -> Budget:
    """The estimated bytes on one device for a resolved config, with `members` SAEs in one program.

    Their steps run at once where `together` is "vmap", else one after the other (see `programs.compile_steps`).
    """
    dispatched = [store for store in (stores.train, stores.target) if store is not None]
    row_bytes = sum(store.manifest.d_model * DISK_DTYPES[store.manifest.dtype].itemsize for store in dispatched)
    return estimate(config, stores.train.manifest.d_model, stores.d_out, row_bytes, members, together)


def estimate(
    config: TrainConfig,
    d_model: int,
    d_out: int | None,
    row_bytes: int,
    members: int = 1,
    together: str | None = None,
    devices: int | None = None,
    platform: str | None = None,
) -> Budget:
    """`budget` without stores: `row_bytes` is the size of a row on disk, with that of a transcoder's target.

    `devices` and `platform` are those of a training elsewhere (None: of this machine).
    """
    B, hyper = config.batch_size, hyperparameters(config)
    state = jax.eval_shape(lambda: init_state(config, d_model, jax.random.key(0), hyper, d_out))
    parameters = _bytes(state.params)
    at_once = members if together == "vmap" else 1
    axes = parse(config.mesh, len(all_devices()) if devices is None else devices)
    whole = 4 * B * config.sae.F // axes.devices
    arrays = _DENSE_ARRAYS.get(config.sae.architecture, _OTHERS)
    plan = choose(config, platform, axes)
    if plan.products == "sparse" and not form_of(config.sae).any_number:
        arrays = _SPARSE_ARRAYS
    activations = arrays * whole // blocks_of_rows(config, B // axes.data, plan)
    if config.sparsity.aux > 0:
        activations = max(
            activations, _AUX_ARRAYS * whole // blocks_of(B // axes.data, config.sae.F // axes.latent, plan.block_bytes)
        )
    copies = _COPIES if together == "vmap" or config.optimizer.name != "adam" else 0.0
    gathered = axes.data > 1  # the parameters of all latents along `data`
    gradients = round((_GRADIENTS + gathered + _PENALTY * (config.penalty.kind != "none") + copies) * parameters)
    batches = _DISPATCHES * config.steps_per_dispatch * B * row_bytes
    return Budget(
        parameters=members * parameters // axes.devices,
        optimizer=members * (_bytes(state) - parameters) // axes.devices,
        step=at_once * (gradients // axes.latent + activations),
        batches=batches // axes.data,
    )


def check_memory(config: TrainConfig, stores: Stores, members: int = 1, together: str | None = None) -> None:
    """Raises `UserError` where the estimate is larger than the free memory, if that is known."""
    needed, free = budget(config, stores, members, together), available_bytes()
    sharing = jax.local_device_count() if target() == "cpu" else 1  # devices in the same memory
    if free is not None and sharing * needed.total > free:
        raise UserError(
            f"{config.sae.architecture} F={config.sae.F} with {arg('batch_size', config.batch_size)} needs about "
            f"{needed}; found {size(free)} free on {jax.local_devices()[0]}; {remedies(members)}"
        )


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
