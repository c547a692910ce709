"""What a user gives as data in Python: a store, files, arrays or an iterator, told apart and made ready. numpy only."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hafs_jax.base.errors import UserError
from hafs_jax.base.tensors import host_array
from hafs_jax.store.arrays import ArrayConfig, ArrayImport
from hafs_jax.store.manifest import MANIFEST
from hafs_jax.store.npy import ArrayRows
from hafs_jax.store.reader import Store
from hafs_jax.store.stream import Stream

SUFFIXES = (".npy", ".safetensors")


def store_folder(data: Any) -> Path | None:
    """The folder of the training store that `data` is or names; None where it is something else.

    A folder that holds store/train or train stands for that.
    """
    if isinstance(data, Store):
        return data.folder
    if not isinstance(data, (str, Path)) or Path(data).suffix in SUFFIXES:
        return None
    places = (Path(data), Path(data) / "store" / "train", Path(data) / "train")
    return next((place for place in places if (place / MANIFEST).exists()), places[0])


def is_array(data: Any) -> bool:
    """Whether `data` is an array, a file of one, or a list of these: something to make a store of."""
    if isinstance(data, (str, Path)):
        return Path(data).suffix in SUFFIXES
    if isinstance(data, (list, tuple)):
        return bool(data) and all(is_array(part) or isinstance(part, (list, tuple, int, float)) for part in data)
    return hasattr(data, "__array__") or callable(getattr(data, "detach", None))


def array_store(data: Any, target: Any, within: Path) -> tuple[Path, Path | None]:
    """The stores of an array and of its target, in `within`/data-<hash>; made where they are not there.

    The hash is of the values, so that the same array finds the same store.
    """
    acts, targets = _loaded(data, "activations"), None if target is None else _loaded(target, "targets")
    digest = hashlib.sha256()
    for given in (acts, targets):
        if given is not None:
            rows = ArrayRows(given)
            for _, start, stop in rows.blocks():
                rows.pieces(start, stop, digest)
            digest.update(f"{rows.d_model} {rows.dtype}".encode())
    folder = within / f"data-{digest.hexdigest()[:12]}"
    places = folder / "store" / "train", None if target is None else folder / "target" / "train"
    if not all((place / MANIFEST).exists() for place in places if place is not None):
        job = ArrayImport(folder, ArrayConfig(), acts, targets)
        job.make(False, lambda what, rows, total: None)
    return places


def stream(data: Any, head_rows: int) -> Stream:
    """A stream of what `data` iterates over; `UserError` where it does not, or is text."""
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, dict)):
        raise UserError(
            f"expected data: a store's folder, an array [rows, D], a {' or '.join(SUFFIXES)} file, or an iterator of "
            f"batches; found a {type(data).__name__}"
        )
    return Stream(data, head_rows)


def _loaded(data: Any, what: str) -> Any:
    """Files as they are, which are read in blocks; arrays of other libraries as numpy's, in float16 or float32."""
    if isinstance(data, (str, Path)):
        return data
    if isinstance(data, (list, tuple)) and any(
        isinstance(part, (str, Path)) or hasattr(part, "shape") for part in data
    ):
        return [_loaded(part, what) for part in data]
    if isinstance(data, np.ndarray) and data.dtype.kind == "f":
        return data
    if getattr(data, "dtype", None) is not None and str(data.dtype) in ("float16", "torch.float16"):
        return host_array(data, f"{what} [rows, D]").astype(np.float16)
    return host_array(data, f"{what} [rows, D]")
