"""Syncs extracted rows to disk while the model runs over the next ones. No torch here."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from hafs_jax.base.memory import give_back_memory
from hafs_jax.store.shuffle import Spill


class Saver:
    """Syncs a spill every `seconds`, in a thread: a disk may take as long to sync rows as the model to compute them.

    When all that had been appended before the sync is on disk, `save(batches, rows by bucket)` is called in the same
    thread. There is one sync at a time; the next waits for it. A kill therefore loses the time of one sync, plus the
    longer of `seconds` and that time.
    """

    def __init__(self, spill: Spill, save: Callable[[int, list[int]], None], seconds: float) -> None:
        self._spill, self._save, self._seconds = spill, save, seconds
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        self._began = time.monotonic()
        self._last = 0  # batches that are saved or being saved

    def appended(self, batches: int) -> None:
        """Says that the rows of the first `batches` batches are in the spill. Raises what the last sync raised."""
        if time.monotonic() - self._began >= self._seconds:
            self._begin(batches)

    def finish(self, batches: int) -> None:
        """Syncs the first `batches` batches and returns when they are on disk."""
        if batches > self._last:
            self._begin(batches)
        self._wait()

    def close(self) -> None:
        """Ends the thread after the sync that is under way. If that sync fails, nothing is raised here."""
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
