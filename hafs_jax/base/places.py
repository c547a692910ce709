"""How finished folders come to their places, and how a place is held by one process. Standard library only."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from hafs_jax.base.errors import UserError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process alone; `UserError` where another extraction is at work there."""
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
    """Renames the folder `made` to `place`; what was there before becomes `old`, which is emptied first."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(parents=True, exist_ok=True)
        place.rename(old)
    made.rename(place)
