"""Locking a folder for one process, and putting a finished folder in its place. Standard library only."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hafs_jax.base.errors import UserError


@contextlib.contextmanager
def locked(folder: Path, work: str = "extraction", name: str = ".lock", place: Path | None = None) -> Iterator[None]:
    """Makes `folder` and locks it for this process; `UserError` where another process has locked it.

    The lock is the file `name` in the folder. The system frees it when its process ends, however it ends. The error
    says that another `work` is at work in `place`, which is the folder unless another is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another {work} is at work in {place or folder}; wait for it, or choose another folder"
                ) from None
            if not _is_at(path, file.fileno()):
                continue  # its owner removed this file, at the end of its work, after it was opened here
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # before it is unlocked: who has opened it already sees that it is gone
            return


def _is_at(path: Path, number: int) -> bool:
    """Whether the open file `number` is the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


def put_in_place(made: Path, place: Path, old: Path) -> None:
    """Renames the folder `made` to `place`. A folder that is there already becomes `old`, in place of an older one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(parents=True, exist_ok=True)
        place.rename(old)
    made.rename(place)
