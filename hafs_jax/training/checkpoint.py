"""Checkpoints with Orbax: the whole training state and the input scale, written atomically, two kept."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.process.saving import saving
from hafs_jax.config import TrainConfig
from hafs_jax.method.sae import InputScale
from hafs_jax.training.state import TrainState, hyperparameters, init_state

FORMAT = 2  # 1, of versions up to 0.1.0, has no number in the file, and W_enc and its moments are [D, F]
_PATTERN_SIGNS = "*?[\\"


def check_path(folder: Path) -> None:
    """Raises `UserError` where checkpoints in `folder` could not be read: Orbax takes its path for a pattern."""
    path = str(folder.absolute())
    if found := next((sign for sign in _PATTERN_SIGNS if sign in path), None):
        raise UserError(
            f"{path}: expected a path without {' '.join(_PATTERN_SIGNS)}, found {found!r}; a checkpoint there could "
            "not be read back: choose another folder"
        )


class Checkpoints:
    """The checkpoints of one run. Use as a context manager.

    Orbax compresses a whole checkpoint in memory before it writes it. Given a `state` of the shapes that are saved, it
    compresses one array at a time.
    """

    def __init__(self, folder: Path, keep: int = 2, state: Any = None) -> None:
        sizes = [leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state) if _is_plain(leaf)]
        limit = {"save_concurrent_gb": (max(sizes) + 1) / 1e9} if sizes else {}  # to be above the largest array
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
        handler = ocp.StandardCheckpointHandler(**limit)
        self._manager = ocp.CheckpointManager(folder.absolute(), item_handlers=handler, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The last whole checkpoint's step; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, scale: InputScale) -> None:
        """Writes the checkpoint of the state's step; a second call at the same step does nothing.

        Of a stack of states (many SAEs in one program) the steps are equal. The arrays' shapes are read back, so that a
        checkpoint that cannot be read is noticed here. Raises `UserError` then, and where the disk is full.
        """
        step = int(np.ravel(state.step)[0])
        if self._manager.latest_step() == step:
            return
        plain = _plain(state, scale)
        with saving(Path(self._manager.directory), step):
            self._manager.save(step, args=ocp.args.StandardSave(plain))
            self._manager.wait_until_finished()
        self._check_shapes(
            step, plain, f"checkpoint {step} in {self._manager.directory} was written and cannot be read"
        )

    def restore(self, like: TrainState, scale: InputScale) -> tuple[TrainState, InputScale]:
        """The latest checkpoint, of this format or an earlier one, with the shapes, dtypes and shardings of `like`."""
        step = self.latest_step()
        if step is None:
            raise UserError(f"expected a checkpoint in {self._manager.directory}, found none; train the run first")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like, scale))
        wanted = abstract["state"]
        unfit = f"checkpoint {step} in {self._manager.directory} does not fit this config or is damaged"
        if is_old := not self._has_format(step):
            abstract["state"] = jax.tree_util.tree_map_with_path(_of_format_1, wanted)
            del abstract["format"]
        self._check_shapes(step, abstract, unfit, f"; train the run again with {arg('force', True)}")
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{unfit} ({str(error).splitlines()[0]}); train the run again with {arg('force', True)}"
            ) from error
        fields = dict(restored["state"])
        if is_old:
            fields = jax.tree_util.tree_map_with_path(_from_format_1, fields, wanted)
        elif int(restored["format"][0]) != FORMAT:
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} has format {int(restored['format'][0])}, this version "
                f"reads 1 to {FORMAT}; install a newer version of hafs-jax"
            )
        if "pull" in fields:
            fields["held_penalty"] = fields.pop("pull")
        return like.replace(**fields | {"key": jax.random.wrap_key_data(fields["key"])}), restored["scale"]

    def _has_format(self, step: int) -> bool:
        """Whether the checkpoint says of which format it is. One that cannot be looked into is refused later."""
        try:
            saved = self._manager.item_metadata(step)
        except (ValueError, KeyError, FileNotFoundError):
            return True
        return saved is None or saved.tree is None or "format" in saved.tree

    def _check_shapes(self, step: int, expected_tree: dict[str, Any], unfit: str, remedy: str = "") -> None:
        """Compares shapes with the checkpoint's metadata. It takes 3 ms.

        It comes before a restore, since one that fails leaves reads running.
        """
        try:
            saved = self._manager.item_metadata(step)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(f"{unfit} ({str(error).splitlines()[0]}){remedy}") from error
        if saved is None or saved.tree is None:
            raise UserError(f"{unfit} (it has no metadata){remedy}")
        found = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(saved.tree)}
        expected = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected_tree)}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise UserError(
                    f"{unfit} ({name}: expected shape {expected.get(name)}, found {found.get(name)}){remedy}"
                )


def load_checkpoint(
    folder: Path, config: TrainConfig, d_model: int, d_out: int | None = None
) -> tuple[TrainState, InputScale]:
    """The latest checkpoint of a run with `config`, on the default device. `d_out`: of a transcoder."""
    state, scale = blank(config, d_model, d_out)
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state, scale)


def blank(config: TrainConfig, d_model: int, d_out: int | None = None) -> tuple[TrainState, InputScale]:
    """The shapes and dtypes of the config's state and scale, for the default device. Computes nothing."""

    def of_config() -> tuple[TrainState, InputScale]:
        state = init_state(config, d_model, jax.random.key(0), hyperparameters(config), d_out)
        zeros = jax.numpy.zeros
        target = InputScale(zeros(d_out or d_model), zeros(()), zeros(())) if config.sae.transcode else None
        return state, InputScale(zeros(d_model), zeros(()), zeros(()), target)

    here = jax.numpy.zeros(()).sharding
    shapes = jax.eval_shape(of_config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)


def _plain(state: TrainState, scale: InputScale) -> dict[str, Any]:
    """What is written. `held_penalty` is called pull on disk, and left out where it holds no arrays."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    if held := fields.pop("held_penalty"):
        fields["pull"] = held
    return {"state": fields | {"key": _key_data(state.key)}, "scale": scale, "format": np.array([FORMAT], np.int32)}


def _is_plain(leaf: Any) -> bool:
    return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_encoder(path: tuple) -> bool:
    return "W_enc" in _name(path).split(".")


def _of_format_1(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape that a leaf of the state has in a checkpoint of format 1."""
    if not _is_encoder(path):
        return leaf
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec[:-2], spec[-1], spec[-2]))
    shape = (*leaf.shape[:-2], leaf.shape[-1], leaf.shape[-2])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _from_format_1(path: tuple, leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """The leaf of the state that one of a checkpoint of format 1 is now."""
    return jax.device_put(jax.numpy.swapaxes(leaf, -1, -2), wanted.sharding) if _is_encoder(path) else leaf


def _key_data(key: Any) -> Any:
    """The numbers of a PRNG key; of the shape of one (`blank`), their shape."""
    if not isinstance(key, jax.ShapeDtypeStruct):
        return jax.random.key_data(key)
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _name(path: tuple) -> str:
    """The path's keys joined by dots, whether they name attributes, dictionary entries or positions."""
    parts = (getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)
    return ".".join(map(str, parts))
