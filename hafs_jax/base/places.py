"""Folders that last: put in their places whole, on disk before anything relies on it, without leftovers.

A rename is on disk once the folder that holds the name was synced (fsync). Standard library only.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from hafs_jax.base.errors import UserError

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}


_MOST_NEW = 100
"""A deeper path is a mistake. Python can neither make nor remove it."""


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it; the new names are on disk when it returns.

    Raises `UserError` where that is over 100 new folders.
    """
    missing = []
    above = folder
    while not above.exists() and above != above.parent:
        missing.append(above)
        above = above.parent
    if (new := len(missing)) > _MOST_NEW:
        raise UserError(f"{str(folder)[:80]}...: expected at most {_MOST_NEW} new folders in a path, found {new}")
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Puts the names in the folder on disk; nothing where the file system has no such thing."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            error.filename = str(folder)
            raise
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Puts a folder with all that is in it on disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place) / name
            if not path.is_symlink():
                with open(path, "rb") as file:
                    try:
                        os.fsync(file.fileno())
                    except OSError as error:
                        error.filename = str(path)
                        raise
        sync_folder(Path(place))


def put_in_place(made: Path, place: Path, old: Path) -> None:
    """Renames the folder `made` to `place`. A folder that is there already becomes `old`, in place of an older one.

    What is in it is on disk before, and its name after.
    """
    sync_tree(made)
    make_folder(place.parent)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        make_folder(old.parent)
        place.rename(old)
        sync_folder(old.parent)
    made.rename(place)
    sync_folder(place.parent)


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder `parent`/<prefix>..., which is removed at the end, with those that killed processes have left."""
    make_folder(parent)
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked_folder(left):
            shutil.rmtree(left)
    folder = parent / f"{prefix}{secrets.token_hex(6)}"
    folder.mkdir(mode=0o700)
    try:
        with contextlib.ExitStack() as lock:
            with contextlib.suppress(OSError):  # a file system without: what is left there stays
                lock.enter_context(_locked_folder(folder))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Locks a folder itself; `BlockingIOError` where another process has."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)
