"""Checkpoints with Orbax: the whole training state and the input scale, written atomically, two kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from extract.format.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.sae import InputScale
from hafs_jax.state import TrainState, hyperparameters, init_state


class Checkpoints:
    """The checkpoints of one run. Use as a context manager."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The last whole checkpoint's step; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, scale: InputScale) -> None:
        """Writes the checkpoint of the state's step; a second call at the same step does nothing."""
        step = int(state.step)
        if self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(_plain(state, scale)))
            self._manager.wait_until_finished()

    def restore(self, like: TrainState, scale: InputScale) -> tuple[TrainState, InputScale]:
        """The latest checkpoint, with the shapes, dtypes and shardings of `like`."""
        step = self.latest_step()
        if step is None:
            raise UserError(f"expected a checkpoint in {self._manager.directory}, found none; train the run first")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like, scale))
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} does not fit this config or is damaged "
                f"({str(error).splitlines()[0]}); train the run again with --force"
            ) from error
        state = restored["state"]
        return state.replace(key=jax.random.wrap_key_data(state.key)), restored["scale"]


def load_checkpoint(folder: Path, config: TrainConfig, d_model: int) -> tuple[TrainState, InputScale]:
    """The latest checkpoint of a run with `config`, on the default device."""
    state, scale = blank(config, d_model)
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state, scale)


def blank(config: TrainConfig, d_model: int) -> tuple[TrainState, InputScale]:
    """A state and scale of the config's shapes, of arbitrary values."""
    state = init_state(config, d_model, jax.random.key(0), hyperparameters(config))
    zeros = jax.numpy.zeros
    return state, InputScale(zeros(d_model), zeros(()), zeros(()))


def _plain(state: TrainState, scale: InputScale) -> dict[str, Any]:
    return {"state": state.replace(key=jax.random.key_data(state.key)), "scale": scale}
