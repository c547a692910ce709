"""Putting a pass's rows on disk while the model runs over the next ones. No torch here."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from hafs_jax.base.memory import give_back_memory
from hafs_jax.store.shuffle import Spill


class Saver:
    """Syncs a spill every `seconds`, in a thread, as a disk may take as long for it as the model for its rows.

    `save(batches, rows by bucket)` is called in that thread, once what had been appended when the sync began is on
    disk. One that is still under way when the next is due is waited for, so that a kill costs what a sync takes, and
    the longer of that and `seconds`.
    """

    def __init__(self, spill: Spill, save: Callable[[int, list[int]], None], seconds: float) -> None:
        self._spill, self._save, self._seconds = spill, save, seconds
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        self._began = time.monotonic()
        self._last = 0  # batches that are saved, or being saved

    def appended(self, batches: int) -> None:
        """Tells that the rows of the first `batches` batches are in the spill; raises what the last sync raised."""
        if time.monotonic() - self._began >= self._seconds:
            self._begin(batches)

    def finish(self, batches: int) -> None:
        """Returns when all of it is on disk."""
        if batches > self._last:
            self._begin(batches)
        self._wait()

    def close(self) -> None:
        """Ends the thread after the sync that is under way; a failure of that is not told."""
        self._thread.shutdown()

    def _begin(self, batches: int) -> None:
        self._wait()
        self._saving = self._thread.submit(self._sync, batches, list(self._spill.counts))
        self._began, self._last = time.monotonic(), batches
        give_back_memory()

    def _sync(self, batches: int, counts: list[int]) -> None:
        self._spill.sync()
        self._save(batches, counts)

    def _wait(self) -> None:
        if self._saving is not None:
            self._saving.result()
