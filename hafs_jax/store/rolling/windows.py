"""A store that is larger than its disk: its rows are made ahead of a training, in windows, and removed behind it.

The text of the split `train` is cut into windows at the ends of documents. Each window is a store of its own, shuffled
as a whole, and a function of the text, the config and its number alone, so that it can be made again.

store/train              window 0, which stays: its manifest has the mean and the scale of the training
store/rolling/
  rolling.json           the rows of each window before the norm filter, and of those that were made also after it
  text/00001/, ...       contexts, tokens and documents of the other windows
  window-00001/, ...     the windows that are on disk
  wanted.json            what the training asks for: written by it alone
  .making/               the window that is being made

Standard library and numpy only.
"""

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_json
from hafs_jax.base.options import from_dict, option, to_dict
from hafs_jax.base.places import put_in_place
from hafs_jax.store.manifest import MANIFEST, read_manifest

FOLDER = "rolling"
LOCK = ".extraction.lock"  # held while windows are made
TRAINING_LOCK = ".training.lock"  # held while a training reads and removes them
SHARE = 5.2
"""The window budget over a window's rows: the first window, one before the last checkpoint, the one that is read, and
the next one, which takes the space of its buckets too."""

_FILE, _WANTED = "rolling.json", "wanted.json"


@dataclass(frozen=True)
class Ledger:
    """rolling.json: the windows of a rolling store."""

    fingerprint: str  # of window 0
    rows: tuple[int, ...]  # of each window before the norm filter
    kept: dict[str, Any] = option({}, "rows after the norm filter, by the number of a window that was made")


@dataclass(frozen=True)
class Wanted:
    """wanted.json: the windows that the training reads and will read next, in this order."""

    windows: tuple[int, ...] = (1,)
    finished: bool = False  # whether the training has ended, and needs no more


class Rolling:
    """The windows of the store `train`."""

    def __init__(self, train: Path) -> None:
        """Raises `UserError` where there are none (see `rolling_at`)."""
        self.train, self.folder = train, train.parent / FOLDER
        self.ledger = read_ledger(self.folder)

    @property
    def windows(self) -> int:
        return len(self.ledger.rows)

    @property
    def rows(self) -> int:
        """Rows of all windows before the norm filter."""
        return sum(self.ledger.rows)

    def place(self, window: int) -> Path:
        """The folder of a window's store."""
        return self.train if window == 0 else self.folder / f"window-{window:05d}"

    def text(self, window: int) -> Path:
        """The folder of a window's text."""
        return text_folder(self.folder, window)

    def is_made(self, window: int) -> bool:
        """Whether the window's store is on disk, and whole."""
        return (self.place(window) / MANIFEST).exists()

    def on_disk(self) -> list[int]:
        """The windows but the first whose stores are on disk."""
        return [window for window in range(1, self.windows) if self.is_made(window)]

    def kept_rows(self, window: int) -> int | None:
        """The window's rows after the norm filter; None where it was never made."""
        if str(window) not in self.ledger.kept:
            self.ledger = read_ledger(self.folder)
        return self.ledger.kept.get(str(window))

    def put(self, window: int, made: Path, rows: int) -> None:
        """Puts a window that was made, of so many rows, in its place. Only for who has locked `LOCK`."""
        ledger = read_ledger(self.folder)
        write_ledger(self.folder, Ledger(ledger.fingerprint, ledger.rows, {**ledger.kept, str(window): rows}))
        put_in_place(made, self.place(window), self._old(window))

    def remove(self, window: int) -> None:
        """Removes a window's store, never the first. It loses its name first."""
        if window and (place := self.place(window)).exists():
            old = self._old(window)
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
            shutil.rmtree(old)

    def _old(self, window: int) -> Path:
        """Where a window is while it is removed."""
        return self.folder / f".old-{window:05d}"

    def wanted(self) -> Wanted:
        """What the training asks for; without one, the window after the first."""
        path = self.folder / _WANTED
        return from_dict(Wanted, read_json(path, "a training's wishes"), str(path)) if path.exists() else Wanted()

    def ask(self, wanted: Wanted) -> None:
        """Says what the training asks for. Only for who has locked `TRAINING_LOCK`."""
        write_json(self.folder / _WANTED, to_dict(wanted))


def rolling_at(train: Path) -> Rolling | None:
    """The windows of the store at `train`; None where it is an ordinary store, which holds all its rows."""
    folder = train.parent / FOLDER
    if train.name != "train" or not (folder / _FILE).exists():
        return None
    return Rolling(train) if read_ledger(folder).fingerprint == read_manifest(train).fingerprint else None


def read_ledger(folder: Path) -> Ledger:
    """rolling.json in a folder `rolling`; `UserError` where it is damaged."""
    path = folder / _FILE
    ledger = from_dict(Ledger, read_json(path, "the windows of a rolling store"), str(path))
    if len(ledger.rows) < 2 or min(ledger.rows) < 1:
        raise UserError(f"{path}: expected two windows or more, each of some rows, found {list(ledger.rows)}")
    return ledger


def write_ledger(folder: Path, ledger: Ledger) -> None:
    write_json(folder / _FILE, to_dict(ledger))


def text_folder(folder: Path, window: int) -> Path:
    """The folder of a window's text in a folder `rolling`."""
    return folder / "text" / f"{window:05d}"


def window_rows(window_gb: float | None, rows: int, row_bytes: int) -> list[int]:
    """About the rows of each window for `rows` rows of `row_bytes` bytes on disk: one window where they fit the budget.

    Raises `UserError` where the budget holds less than one row in a window.
    """
    if window_gb is None or rows * row_bytes <= window_gb * 1e9:
        return [rows]
    most = int(window_gb * 1e9 / SHARE / row_bytes)
    if most < 1:
        raise UserError(f"window_gb={window_gb:g}: expected room for a row of {row_bytes:,} bytes, {SHARE} times")
    count = -(-rows // most)
    ends = [rows * number // count for number in range(count + 1)]
    return [stop - start for start, stop in itertools.pairwise(ends)]
