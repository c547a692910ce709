"""Batches from a rolling store: windows that are made ahead of the training, and removed behind its checkpoints."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hafs_jax.base.errors import UserError
from hafs_jax.base.process.locks import is_held, locked
from hafs_jax.store.reader import Store
from hafs_jax.store.rolling.windows import LOCK, TRAINING_LOCK, Rolling, Wanted, rolling_at
from hafs_jax.store.stream import Stream, StreamBatches
from hafs_jax.training.data import Batches, Part, Rows

LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 10.0  # for an extraction that starts or starts again


@dataclass(frozen=True)
class _Piece:
    """Consecutive steps of one pass over one window."""

    window: int
    number: int  # of the pass
    first: int  # step, counted from the start of the window's part of the pass
    last: int
    stop: int  # the training's step after the last one


class RollingBatches(Batches):
    """The batches of a training over a rolling store: step n is always the same rows in the same order.

    A pass visits the windows one after another, and each as `Batches` visits a store. Rows that do not fill a window's
    last batch are left out. With one window these are the batches of an ordinary store.
    """

    def __init__(self, store: Store, rolling: Rolling, batch_size: int, seed: int, steps: int | None = None) -> None:
        """`steps` are those of the whole training: the windows after them are not asked for."""
        super().__init__(store, batch_size, seed)
        self.rolling, self.steps = rolling, steps
        self._open: deque[_Piece] = deque()  # from that of the last checkpoint on
        self._closed = threading.Event()

    def dispatches(self, start: int, stop: int, size: int) -> Iterator[Rows]:
        with locked(self.rolling.folder / TRAINING_LOCK, "a training", self.rolling.folder):
            yield from super().dispatches(start, stop, size)

    def rows(self, start: int, stop: int) -> Iterator[tuple[Rows, np.ndarray]]:
        for piece in self._pieces(start, stop):
            if not self._open:  # the start: what an earlier training left
                self._keep({piece.window, *self._next(piece)})
            self._open.append(piece)
            store = self._store(piece)
            one = Batches(store, self.batch_size, self.seed + (piece.window << 40))
            first = piece.number * one.steps_per_pass
            yield from one.rows(first + piece.first, first + piece.last)

    def saved(self, step: int) -> None:
        """Says that a checkpoint of `step` is on disk: the windows before it are removed."""
        while len(self._open) > 1 and self._open[0].stop <= step:
            self._open.popleft()
        latest = self._open[-1]
        self._keep({piece.window for piece in self._open} | set(self._next(latest)))

    def finished(self) -> None:
        """Says that the training has ended: no more windows are made, and those that are there are removed."""
        self.rolling.ask(Wanted(finished=True))
        self._keep(set())

    def close(self) -> None:
        """Ends the waiting for a window, in whatever thread."""
        self._closed.set()

    def _pieces(self, start: int, stop: int) -> Iterator[_Piece]:
        """The steps from `start` to `stop`, window by window."""
        before, number = 0, 0  # steps before the window's part of the pass
        while before < stop:
            for window in range(self.rolling.windows):
                steps = self._steps_of(window)
                first, last = max(0, start - before), min(steps, stop - before)
                if first < last:
                    yield _Piece(window, number, first, last, before + last)
                before += steps
            number += 1

    def _steps_of(self, window: int) -> int:
        """The steps of one pass over the window; waits until it was made once."""
        if (rows := self.rolling.kept_rows(window)) is None:
            self._wait(window, [window])
            rows = self.rolling.kept_rows(window)
        assert rows is not None
        return rows // self.batch_size

    def _next(self, piece: _Piece) -> list[int]:
        """The window that is read after the piece's, if the training does not end before."""
        return (
            [] if self.steps is not None and piece.stop >= self.steps else [(piece.window + 1) % self.rolling.windows]
        )

    def _store(self, piece: _Piece) -> Store:
        """The piece's window, once it is made. The next one is asked for."""
        wanted = [piece.window, *self._next(piece)]
        self._wait(piece.window, wanted)
        self.rolling.ask(Wanted(tuple(window for window in wanted if window)))
        return self.stores[0] if piece.window == 0 else Store(self.rolling.place(piece.window))

    def _wait(self, window: int, wanted: list[int]) -> None:
        """Returns when the window is on disk. Raises `UserError` where nobody makes it."""
        if self.rolling.is_made(window):
            return
        self.rolling.ask(Wanted(tuple(one for one in wanted if one)))
        LOG.debug(f"waiting for window {window}")
        seen = time.monotonic()
        while not self.rolling.is_made(window):
            if self._closed.wait(_POLL_SECONDS):
                raise UserError("the training ended while it waited for activations")
            if is_held(self.rolling.folder / LOCK):
                seen = time.monotonic()
            elif time.monotonic() - seen > _PATIENCE_SECONDS:
                raise UserError(
                    f"window {window} of {self.rolling.folder} is not there, and no extraction is at work that would "
                    "make it; give the same `hafs extract` again beside this training, or train with --stream"
                )

    def _keep(self, windows: set[int]) -> None:
        """Removes all windows that are on disk but those."""
        for window in self.rolling.on_disk():
            if window not in windows:
                self.rolling.remove(window)


def batches_of(
    source: Store | Stream,
    batch_size: int,
    seed: int,
    target: Store | None = None,
    steps: int | None = None,
    part: Part | None = None,
) -> Batches | RollingBatches | StreamBatches:
    """The batches of a training of `steps` steps: a store's in an order that the seed gives, a stream's in its own.

    `part` is what this process takes of those of a store on disk.
    """
    if isinstance(source, Stream):
        return StreamBatches(source, batch_size)
    if target is None and (rolling := rolling_at(source.folder)) is not None:
        return RollingBatches(source, rolling, batch_size, seed, steps)
    return Batches(source, batch_size, seed, target, part)
