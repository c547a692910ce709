"""Held-out FVU and L0 during training, the best checkpoint, and when to stop early."""

import functools
import shutil
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from hafs_jax.base.errors import UserError, arg
from hafs_jax.config import TrainConfig
from hafs_jax.fast.mesh import EVERYWHERE, axes_of, split, state_shardings
from hafs_jax.method.architectures import OperatingPoint
from hafs_jax.method.sae import InputScale, encode
from hafs_jax.ops import hosts
from hafs_jax.ops.products import Params, matmul
from hafs_jax.runs import Run
from hafs_jax.training.checkpoint import Checkpoints
from hafs_jax.training.state import TrainState, shared_config
from hafs_jax.training.step import Batch

_ROWS_AT_ONCE = 2048


def heldout_rows(config: TrainConfig, stores: Any, rows: int | None = None) -> tuple[np.ndarray, ...]:
    """The held-out rows that the config measures on, or the first `rows`; `UserError` where there are none."""
    found: tuple[np.ndarray, ...] | None = stores.heldout(config.heldout_rows if rows is None else rows)
    if found is None:
        raise UserError(
            f"{arg('evaluate_every_steps', config.evaluate_every_steps)}: expected a held-out store beside "
            f"{stores.train.folder}, found none; extract one, or leave {arg('evaluate_every_steps')} out"
        )
    return found


class Heldout:
    """One run's held-out measurements. `best` is {"step", "heldout_fvu"} of the best one, None before the first."""

    def __init__(self, config: TrainConfig, run: Run, stores: Any, step: int) -> None:
        """Reads earlier measurements, up to `step`, from the run's metrics. Raises `UserError` where held-out rows are
        asked for and there are none."""
        self._run, self._patience = run, config.patience
        self._rows: tuple[np.ndarray, ...] | None = None
        self._since_best = 0
        self.best: dict[str, Any] | None = None
        if not config.evaluate_every_steps:
            return
        self._rows = heldout_rows(config, stores)
        for record in run.metrics():
            if record["step"] <= step and "heldout_fvu" in record:
                self._note(record["step"], record["heldout_fvu"])

    @property
    def hopeless(self) -> bool:
        """Whether `patience` measurements in a row were no better than the best."""
        return self._patience is not None and self._since_best >= self._patience

    def measure(self, state: TrainState, scale: InputScale, config: TrainConfig, mesh: Mesh) -> dict[str, float]:
        """{"heldout_fvu", "heldout_l0"} of the SAE at inference; the best is checkpointed in the run's `best`."""
        assert self._rows is not None
        squares = active = 0.0
        variance = scale.variance if scale.target is None else scale.target.variance
        for start in range(0, len(self._rows[0]), _ROWS_AT_ONCE):
            parts = tuple(jnp.asarray(rows[start : start + _ROWS_AT_ONCE]) for rows in self._rows)
            more = _sums(state, parts if len(parts) > 1 else parts[0], scale, shared_config(config), mesh)
            squares, active = squares + float(more[0]), active + float(more[1])
        rows = len(self._rows[0])
        fvu = squares / rows / float(variance)
        if self._note(step := int(state.step), fvu):
            if hosts.first():
                _drop_from(self._run.best, step)
            hosts.exchange()
            with Checkpoints(self._run.best, keep=1, state=state) as checkpoints:
                checkpoints.save(state, scale)
        return {"heldout_fvu": fvu, "heldout_l0": active / rows}

    def _note(self, step: int, fvu: float) -> bool:
        """Counts a measurement, and returns whether it is the best so far."""
        is_best = self.best is None or fvu < self.best["heldout_fvu"]
        self._since_best = 0 if is_best else self._since_best + 1
        if is_best:
            self.best = {"step": step, "heldout_fvu": fvu}
        return is_best


def _drop_from(folder: Path, step: int) -> None:
    """Removes checkpoints of this step and later ones, which an attempt that was killed left.

    Orbax would keep later ones instead. One of this step may not be on disk as a whole.
    """
    for path in folder.glob("[0-9]*"):
        if path.name.isdigit() and int(path.name) >= step:
            shutil.rmtree(path)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _sums(
    state: TrainState, batch: Batch, scale: InputScale, config: TrainConfig, mesh: Mesh
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed squared residual and number of active latents of a batch, at inference.

    On several devices each has all rows.
    """
    axes, sae = axes_of(mesh), config.sae

    def of_device(weights: Params, threshold: Array, batch: Batch, scale: InputScale) -> tuple[Array, Array]:
        acts_BD = scale(batch[0] if isinstance(batch, tuple) else batch)
        target_BD = scale.target(batch[1]) if isinstance(batch, tuple) and scale.target is not None else acts_BD
        params = axes.shared_params(weights, sae.compute_dtype)
        latents_BF = encode(params, acts_BD, sae, OperatingPoint(sae.k, threshold, axes)).latents_BF
        change_BD = axes.over_latents(matmul(latents_BF, params["W_dec"], sae.compute_dtype))
        active = axes.sum_of_latents(jnp.sum(latents_BF > 0, dtype=jnp.float32))
        return jnp.sum((target_BD - (change_BD + params["b_dec"][None])) ** 2), active

    weights = state.weights()
    own = jax.tree.map(lambda of: of.spec, state_shardings({"params": weights}, mesh)["params"])
    whole = split(of_device, mesh, (own, EVERYWHERE, EVERYWHERE, EVERYWHERE), EVERYWHERE)
    threshold = state.threshold(config.sparsity.threshold_decay)
    return cast(tuple[Array, Array], whole(weights, threshold, batch, scale))
