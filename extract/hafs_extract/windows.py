"""Windows of a rolling store (`hafs_jax.store.rolling.windows`): their text, and their rows, one after another."""

import contextlib
import dataclasses
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from hafs_extract.compiling import compile_blocks
from hafs_extract.config import ExtractConfig
from hafs_extract.journal import SplitProgress
from hafs_extract.models import LanguageModel, check_same_model, load_model
from hafs_extract.passes import Split, open_split, spill_rows, write_stores
from hafs_jax.base.files import read_json, write_atomic, write_json, write_npy
from hafs_jax.base.log import bar_options
from hafs_jax.base.options import from_dict, option, to_dict
from hafs_jax.base.process.locks import locked
from hafs_jax.store.manifest import read_manifest, write_manifest
from hafs_jax.store.reader import Contexts
from hafs_jax.store.rolling.windows import LOCK, Rolling, Wanted, text_folder

LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.2
_MAKING, _JOURNAL = ".making", "journal.json"


def cut_text(split: Split, folder: Path, sizes: Sequence[int]) -> list[int]:
    """Cuts a split's text into windows of about `sizes` rows, at the ends of documents; returns their rows.

    There are fewer windows where there are fewer documents. Their text lies in `folder` as `text_folder` says.
    """
    table = split.contexts.table
    rows_N = table["length"].astype(np.int64) - split.first_position
    is_last_N = np.append(np.diff(table["document"]) > 0, True)  # the last context of its document
    ends_N = np.flatnonzero(is_last_N) + 1
    reached_N = np.cumsum(rows_N)[ends_N - 1]
    at = np.searchsorted(reached_N, np.cumsum(sizes)[:-1])
    bounds = np.unique([0, *ends_N[np.minimum(at, len(ends_N) - 1)].tolist(), len(table)]).tolist()
    lines = _lines(split.folder / "documents.jsonl")
    for window, (first, stop) in enumerate(itertools.pairwise(bounds)):
        _write_text(split.contexts, first, stop, lines, text_folder(folder, window))
    return [int(rows_N[first:stop].sum()) for first, stop in itertools.pairwise(bounds)]


def _write_text(contexts: Contexts, first: int, stop: int, lines: Iterator[dict], folder: Path) -> None:
    """Writes contexts `first` to `stop`, and the next documents of `lines`, as the text of a store of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    table = np.array(contexts.table[first:stop])
    start, end = int(table["start"][0]), int(table["start"][-1]) + int(table["length"][-1])
    document, documents = int(table["document"][0]), int(table["document"][-1] - table["document"][0]) + 1
    table["start"] -= start
    table["document"] -= document
    write_npy(folder / "contexts.npy", table)
    write_npy(folder / "tokens.npy", contexts.tokens[start:end])

    def write(file: IO[bytes]) -> None:
        for record in itertools.islice(lines, documents):
            file.write((json.dumps({**record, "document": record["document"] - document}) + "\n").encode())

    write_atomic(folder / "documents.jsonl", write)


def _lines(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


@dataclasses.dataclass(frozen=True)
class _Progress:
    """How far the window that is being made has come."""

    window: int
    spilled: dict = option({}, "SplitProgress")


class Windows:
    """Makes the windows that a training asks for, until it has ended."""

    def __init__(self, config: ExtractConfig, rolling: Rolling, model: LanguageModel | None = None) -> None:
        """`model` is the language model where it is loaded (and, if it is to be, compiled) already."""
        self.config, self.rolling, self._model = config, rolling, model
        self.first = read_manifest(rolling.train)
        self.making = rolling.folder / _MAKING

    def run(self) -> None:
        """Makes what is asked for; waits while nothing is; returns once the training says that it has ended."""
        with locked(self.rolling.folder / LOCK, "an extraction of windows", self.rolling.folder, wait=True):
            if self.rolling.wanted().finished:  # of an earlier training
                self.rolling.ask(Wanted())
            said = None
            while not (wanted := self.rolling.wanted()).finished:
                missing = [window for window in wanted.windows if not self.rolling.is_made(window)]
                if missing:
                    self.make(missing[0])
                elif said != wanted:
                    LOG.info(f"windows {', '.join(map(str, wanted.windows))} are there; waiting for a training")
                    said = wanted
                else:
                    time.sleep(POLL_SECONDS)
            LOG.info("the training has ended: no more windows are needed")

    def make(self, window: int) -> None:
        """Makes a window's store, or goes on where that was interrupted, and puts it in its place."""
        rolling, config, model = self.rolling, self.config, self.model()
        split = open_split("train", rolling.text(window), config, model, [self.first.d_model])
        done, journal = self._begun(window)
        first_row = sum(rolling.ledger.rows[:window])

        def save(batches: int, counts: list[int]) -> None:
            progress = SplitProgress(batches, tuple(counts))
            write_json(journal, to_dict(_Progress(window, to_dict(progress))))

        said = f"window {window} of {rolling.windows - 1}"
        with tqdm(total=2 * split.rows, desc=said, unit="tok", unit_scale=True, delay=1, **bar_options(LOG)) as bar:
            bar.update(sum(done.buckets))
            spill = spill_rows(
                split, model, config, self.making / "rows", done.batches, list(done.buckets), save, 2.0, bar, first_row
            )
            folders = {config.hook_points[0]: self.making / "store"}
            medians = [self.first.norm_filter.median_norm]  # of the first window, so that each window can be made alone
            (manifest,) = write_stores(split, spill, medians, folders, config, model, self.first.profile, bar).values()
        commits = {source.name: source.revision for source in self.first.sources}
        sources = tuple(dataclasses.replace(source, revision=commits.get(source.name)) for source in manifest.sources)
        write_manifest(self.making / "store", dataclasses.replace(manifest, sources=sources))
        rolling.put(window, self.making / "store", manifest.rows)
        shutil.rmtree(self.making)

    def model(self) -> LanguageModel:
        """The language model of the first window, loaded when it is first needed."""
        if self._model is None:
            config, begun = self.config, self.first.model
            revision = begun.revision if begun.origin == "hub" else config.revision
            self._model = load_model(config.model, config.model_dtype, revision, config.device)
            advice = "give it that model again, or extract anew with --force"
            check_same_model(self._model.info, begun, f"{self.rolling.train} was extracted with", advice)
            heldout = read_manifest(self.rolling.train.parent / "heldout")
            rows = self.rolling.rows + heldout.rows + heldout.norm_filter.dropped_rows
            compile_blocks(config, self._model, rows)  # as the first window's extraction chose
        return self._model

    def _begun(self, window: int) -> tuple[SplitProgress, Path]:
        """What of the window was made before an interruption, and where that is noted."""
        journal = self.making / _JOURNAL
        if journal.exists():
            begun = from_dict(_Progress, read_json(journal, "a journal"), str(journal))
            if begun.window == window:
                return from_dict(SplitProgress, begun.spilled, str(journal)), journal
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.making)
        return SplitProgress(), journal
