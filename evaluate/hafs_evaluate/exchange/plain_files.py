"""Files of a folder that others made, copied without leaving it. Standard library only.

A link in such a folder may lead to any file of this machine. Copied, and uploaded, its content would be public.
"""

import os
import shutil
from functools import partial
from pathlib import Path

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_atomic


def plain_file(folder: Path, name: str) -> Path:
    """`folder/name`; `UserError` where it is there and is no plain file, or a link that leads out of the folder.

    A link may lead to the same model repository's blobs, as the hub's cache has it: <repository>/blobs/<hash>.
    """
    path = folder / name
    if not os.path.lexists(path):
        return path
    target, inside = path.resolve(), folder.resolve()
    if not (target.is_relative_to(inside) or target.parent == _blobs(inside)):
        raise UserError(f"{path}: expected a file of this folder, found a link out of it; copy the file there")
    if not target.is_file():
        raise UserError(f"{path}: expected a plain file, found none")
    return path


def copy_file(folder: Path, name: str, target: Path) -> None:
    """Copies `folder/name`, a `plain_file`, to `target/name`, atomically."""
    with open(plain_file(folder, name), "rb") as original:
        write_atomic(target / name, partial(shutil.copyfileobj, original))


def _blobs(folder: Path) -> Path | None:
    """The blobs of the hub's cache that `folder` is a part of: <repository>/snapshots/<commit>/... beside blobs/."""
    snapshots = next((above for above in folder.parents if above.name == "snapshots"), None)
    return None if snapshots is None else snapshots.parent / "blobs"
