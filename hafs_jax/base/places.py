"""Locking a folder for one process, and putting a finished folder in its place. Standard library only."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from hafs_jax.base.errors import UserError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and locks it for this process; `UserError` where another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another extraction is at work in {folder}; wait for it, or choose another OUT") from None
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


def put_in_place(made: Path, place: Path, old: Path) -> None:
    """Renames the folder `made` to `place`. A folder that is there already becomes `old`, in place of an older one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(parents=True, exist_ok=True)
        place.rename(old)
    made.rename(place)
