"""What of an extraction is on disk: the stores, or the journal of an unfinished one. Standard library and numpy only.

A killed run goes on from its journal, which is never ahead of what is synced to disk.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.config import ExtractConfig, difference
from extract.contexts import SPLITS
from extract.format.config import from_dict, option, to_dict
from extract.format.errors import UserError
from extract.format.files import read_json, write_json
from extract.format.store import MANIFEST, read_manifest

JOURNAL = "journal.json"


def store_folders(config: ExtractConfig, out: Path) -> dict[str, Path]:
    """Where each split's store lies: `out`/<profile>/store/<split>."""
    return {split: out / config.profile / "store" / split for split in SPLITS}


def is_complete(config: ExtractConfig, out: Path) -> bool:
    """Whether both stores are there under this very config; `UserError` where they are there under another."""
    folders = store_folders(config, out)
    made = [folder for folder in folders.values() if (folder / MANIFEST).exists()]
    for folder in made:
        if found := difference(read_manifest(folder).config, to_dict(config)):
            raise UserError(f"{folder} was extracted with {found}; pass --force to replace it, or choose another OUT")
    return len(made) == len(folders)


@dataclass(frozen=True)
class SplitProgress:
    """How far the model has come with one split."""

    batches: int = 0
    buckets: tuple[int, ...] = ()  # rows in each bucket; () before the first batch


@dataclass(frozen=True)
class Journal:
    """Where an unfinished extraction stands; rewritten atomically every few seconds."""

    config: dict[str, Any]
    profile: dict[str, Any]
    notes: tuple[str, ...] | None = None  # on the mix of texts; None until the contexts are on disk
    model: dict[str, Any] | None = None
    splits: dict[str, Any] = option({}, "SplitProgress by split")
    seconds: dict[str, Any] = option({}, "seconds by stage, over all attempts")
    attempts: int = 0

    def progress(self, split: str) -> SplitProgress:
        return from_dict(SplitProgress, self.splits.get(split, {}), f"{JOURNAL}: {split}")


def read_journal(folder: Path) -> Journal | None:
    """The journal in `folder`, or None where no extraction was begun."""
    path = folder / JOURNAL
    return from_dict(Journal, read_json(path, "a journal"), str(path)) if path.exists() else None


def write_journal(folder: Path, journal: Journal) -> None:
    write_json(folder / JOURNAL, to_dict(journal))


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
