"""Checkpoints with Orbax: the whole training state and the input scale, written atomically, two kept.

Each holds the SHA-256 of its arrays, as the array `sha256`, which a restore compares. Those of earlier versions hold
none and are restored as they are.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.files import read_json, write_record
from hafs_jax.base.foreign import reason
from hafs_jax.base.process.saving import saving
from hafs_jax.config import TrainConfig
from hafs_jax.method.sae import InputScale
from hafs_jax.ops import hosts
from hafs_jax.ops.parts import whole
from hafs_jax.training.state import TrainState, hyperparameters, init_state

LOG = logging.getLogger(__name__)

FIRST = "first.json"
"""A note beside the first checkpoint of all, as long as it is not on disk whole: {"step"}."""

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


def _is_news(record: logging.LogRecord) -> bool:
    """False for what asyncio says of Orbax's tasks that failed beside the one whose exception was raised."""
    said = record.getMessage()
    return not (said.startswith("Task exception was never retrieved") and "orbax" in said)


class Checkpoints:
    """The checkpoints of one run. Use as a context manager.

    Orbax compresses a whole checkpoint in memory before it writes it. Given a `state` of the shapes that are saved, it
    compresses one array at a time.
    """

    def __init__(self, folder: Path, keep: int = 2, state: Any = None) -> None:
        logging.getLogger("asyncio").addFilter(_is_news)
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
        plain["sha256"] = _checksums(plain)
        with self._first_of_all(step), saving(Path(self._manager.directory), step):
            self._manager.save(step, args=ocp.args.StandardSave(plain))
            self._manager.wait_until_finished()
        self._check_shapes(
            step, plain, f"checkpoint {step} in {self._manager.directory} was written and cannot be read"
        )

    @contextmanager
    def _first_of_all(self, step: int) -> Iterator[None]:
        """Around the writing of a checkpoint: notes the first one, until it is on disk.

        It has its name before all of it is there. Where the power fails in between, a later one has one before it to go
        back to; of this one nothing was lost.
        """
        is_noted = hosts.first() and not self._manager.all_steps()
        if is_noted:
            write_record(self._first, {"step": step})
        yield
        if is_noted:
            self._first.unlink()

    @property
    def _first(self) -> Path:
        return Path(self._manager.directory) / FIRST

    def _is_lost(self, steps: list[int]) -> bool:
        """Whether the only checkpoint is the first one, and was being written when the machine stopped."""
        return self._first.exists() and [read_json(self._first, "a note of a checkpoint").get("step")] == steps

    def resume(self, like: TrainState, scale: InputScale) -> tuple[TrainState, InputScale] | None:
        """The latest checkpoint that is whole, for a training to go on from; None where there is none yet.

        A later one that is damaged is moved out of the way, and a line says so.
        """
        steps = self._manager.all_steps()
        try:
            state, step = self._latest_whole(like, scale) if steps else (None, -1)
        except UserError:
            if not self._is_lost(steps):
                raise
            LOG.warning(f"checkpoint {steps[0]} was not yet on disk when the machine stopped; the training begins anew")
            state, step = None, -1
        if state is not None and hosts.first() and self._first.exists():  # it was killed before it took the note away
            with saving(Path(self._manager.directory), step):
                pass
            self._first.unlink()
        for later in [number for number in self._manager.all_steps() if number > step]:
            folder = Path(self._manager.directory)
            if hosts.first():
                (folder / str(later)).rename(folder.with_name(f"{folder.name}.damaged-{later}"))
        hosts.exchange()
        self._manager.reload()
        return state

    def restore(self, like: TrainState, scale: InputScale, step: int | None = None) -> tuple[TrainState, InputScale]:
        """The checkpoint of `step` (none: the latest that is whole), of this format or an earlier one.

        It has the shapes, dtypes and shardings of `like`. Raises `UserError` where it is missing or damaged.
        """
        if step is None:
            return self._latest_whole(like, scale)[0]
        if step not in self._manager.all_steps():
            found = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise UserError(f"expected checkpoint {step} in {self._manager.directory}, found {found}; {_AGAIN}")
        try:
            return self._restored(step, like, scale)
        except UserError as error:
            raise UserError(f"{error}; {_AGAIN}") from error

    def _latest_whole(self, like: TrainState, scale: InputScale) -> tuple[tuple[TrainState, InputScale], int]:
        """The latest checkpoint that can be restored, and its step; each that cannot is told in a line."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise UserError(f"expected a checkpoint in {self._manager.directory}, found none; train the run first")
        first: UserError | None = None
        for step, before in zip(steps, [*steps[1:], None], strict=True):
            try:
                return self._restored(step, like, scale), step
            except UserError as error:
                first = first or error
                if before is not None:
                    LOG.warning(f"{error}; going back to checkpoint {before}")
        raise UserError(f"{first}; train the run again with {arg('force', True)}") from first

    def _restored(self, step: int, like: TrainState, scale: InputScale) -> tuple[TrainState, InputScale]:
        """The checkpoint of `step`, whose arrays are those that were saved."""
        where = f"checkpoint {step} in {self._manager.directory}"
        unfit = f"{where} does not fit this config or is damaged"
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like, scale))
        wanted = abstract["state"]
        abstract["format"] = np.zeros(1, np.int32)  # of the host: for a shape without a sharding, Orbax reads metadata
        with hosts.together():
            names = {name.partition(".")[0] for name in self._shapes(step, unfit)}
            if is_old := "format" not in names:
                abstract["state"] = jax.tree_util.tree_map_with_path(_of_format_1, wanted)
                del abstract["format"]
            if "sha256" in names:
                abstract["sha256"] = np.zeros((len(jax.tree.leaves(abstract)), 32), np.uint8)
            self._check_shapes(step, abstract, unfit)
            self._check_notes(step, unfit)
            with _damaged(unfit):
                restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        if (expected := restored.pop("sha256", None)) is not None:
            _check_arrays(restored, np.asarray(expected), where)
        fields = dict(restored["state"])
        if is_old:
            fields = jax.tree_util.tree_map_with_path(_from_format_1, fields, wanted)
        elif (number := int(restored["format"][0])) != FORMAT:
            raise UserError(
                f"{where} has format {number}, this version reads 1 to {FORMAT}; install a newer version of hafs-jax"
            )
        if "pull" in fields:
            fields["held_penalty"] = fields.pop("pull")
        return like.replace(**fields | {"key": jax.random.wrap_key_data(fields["key"])}), restored["scale"]

    def _folder(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step) / ocp.checkpoint_manager.DEFAULT_ITEM_NAME

    def _check_notes(self, step: int, unfit: str) -> None:
        """Reads what Orbax reads beside the arrays, while it reads these: a fault would leave reads running."""
        with _damaged(unfit):
            for path in sorted(self._folder(step).glob("array_metadatas/process_*")):
                for entry in json.loads(path.read_text())["array_metadatas"]:
                    note = entry["array_metadata"]
                    if not isinstance(note["param_name"], str) or note.get("ext_metadata") is not None:
                        raise ValueError(f"{path.name} holds {str(note)[:80]}")
                    tuple(note["write_shape"]), tuple(note["chunk_shape"])

    def _shapes(self, step: int, unfit: str) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the checkpoint, by name, from its own metadata.

        Orbax's `item_metadata` has them too, but leaves 0.1 MB that is never freed: `to_json` of TensorStore 0.1.86
        leaks what it returns.
        """
        folder = self._folder(step)
        with _damaged(unfit):
            base = {"driver": "file", "path": f"{folder}/"}
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            keys = [key for key in store.list().result() if key.endswith(_ARRAY)]
            notes = [(key, store.read(key)) for key in keys]
            return {
                key[: -len(_ARRAY)].decode(): tuple(json.loads(note.result().value)["shape"]) for key, note in notes
            }

    def _check_shapes(self, step: int, expected_tree: dict[str, Any], unfit: str) -> None:
        """Compares shapes with the checkpoint's metadata. It takes 3 ms.

        It comes before a restore, since one that fails leaves reads running.
        """
        found = self._shapes(step, unfit)
        expected = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(expected_tree)}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise UserError(f"{unfit} ({name}: expected shape {expected.get(name)}, found {found.get(name)})")


_ARRAY = b"/.zarray"
"""How the key of an array's metadata ends, after its name."""

_AGAIN = (
    "a finished SAE is not replaced by an earlier checkpoint: remove run.json and give the same `hafs train` to go on "
    "from the one before, or train the run again with --force"
)


@contextmanager
def _damaged(unfit: str) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for files that are damaged, which is of any kind, into a `UserError`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # no memory
            raise
        raise UserError(f"{unfit} ({reason(error)})") from error


def _checksums(plain: dict[str, Any]) -> np.ndarray:
    """The SHA-256 of each array's name, dtype, shape and bytes, [arrays, 32], by name."""
    leaves = sorted((_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(plain))
    found = []
    for name, leaf in leaves:
        value = np.ascontiguousarray(whole(leaf))
        digest = hashlib.sha256(f"{name} {value.dtype} {leaf.shape} ".encode())
        digest.update(value.reshape(-1).view(np.uint8).data)
        found.append(np.frombuffer(digest.digest(), np.uint8))
    return np.stack(found)


def _check_arrays(plain: dict[str, Any], expected: np.ndarray, where: str) -> None:
    names = sorted(_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain))
    differ = (_checksums(plain) != expected).any(1)
    if differ.any():
        which = names[int(np.argmax(differ))]
        raise UserError(f"{where} is damaged ({which} is not the array that was saved; its checksum differs)")


def load_checkpoint(
    folder: Path, config: TrainConfig, d_model: int, d_out: int | None = None, step: int | None = None
) -> tuple[TrainState, InputScale]:
    """A checkpoint of a run with `config`, on the default device: that of `step`, or the latest that is whole.

    `d_out`: of a transcoder.
    """
    state, scale = blank(config, d_model, d_out)
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state, scale, step)


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
