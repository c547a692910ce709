"""Who holds a store: many may read it at once, and whoever replaces it holds it alone. Standard library and numpy only.

The lock is the file `.lock` beside the stores of all splits, which are replaced together.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hafs_jax.base.errors import UserError
from hafs_jax.base.process.locks import locked
from hafs_jax.store.manifest import MANIFEST, read_manifest
from hafs_jax.store.reader import Store

LOCK = ".lock"


@contextmanager
def replacing(folders: Iterable[Path], work: str) -> Iterator[None]:
    """Locks folders of stores, such as OUT/offline/store, for `work` ("an extraction") that makes or replaces these.

    `UserError` where another process reads or replaces one.
    """
    with ExitStack() as locks:
        for folder in sorted(set(folders)):
            locks.enter_context(locked(folder / LOCK, work, folder))
        yield


@contextmanager
def as_it_is(store: Path, work: str) -> Iterator[None]:
    """Holds the store at this folder for `work` ("a check") before it is opened; nothing where none is there.

    `UserError` where another process replaces it.
    """
    with ExitStack() as locks:
        if (store / MANIFEST).exists():
            folder = store.resolve().parent
            locks.enter_context(locked(folder / LOCK, work, folder, shared=True))
        yield


@contextmanager
def reading(stores: Iterable[Store], work: str) -> Iterator[None]:
    """Holds stores that were opened for `work` ("a training"): none of them is replaced meanwhile.

    `UserError` where another process replaces one, or has replaced it since it was opened.
    """
    opened = list(stores)
    with ExitStack() as locks:
        for folder in sorted({store.folder.resolve().parent for store in opened}):
            locks.enter_context(locked(folder / LOCK, work, folder, shared=True))
        for store in opened:
            found = read_manifest(store.folder).fingerprint
            if found != store.manifest.fingerprint:
                raise UserError(
                    f"store {store.folder} was replaced since it was opened (fingerprint "
                    f"{store.manifest.fingerprint}, now {found}); give the same command again"
                )
        yield
