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

from hafs_extract.config import ExtractConfig
from hafs_extract.models import check_same_model, load_model
from hafs_extract.parts.engine import Engine
from hafs_extract.parts.files import Entry, Parts
from hafs_extract.parts.jobs import Job, Setup
from hafs_extract.parts.makers import Maker, open_maker
from hafs_extract.parts.plan import Part
from hafs_extract.passes import Origin, Split, open_split, write_stores
from hafs_jax.base.files import read_json, write_atomic, write_npy, write_record
from hafs_jax.base.log import bar_options
from hafs_jax.base.places import make_folder
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
    make_folder(folder)
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


class Windows:
    """Makes the windows that a training asks for, until it has ended."""

    def __init__(
        self, config: ExtractConfig, rolling: Rolling, engine: Engine | None = None, maker: Maker | None = None
    ) -> None:
        """`maker` makes parts where it was prepared for this extraction already; else `engine` [this process] says."""
        self.config, self.rolling, self._engine = config, rolling, engine or Engine()
        self._maker, self._opened = maker, contextlib.ExitStack()
        if maker is not None:
            maker.move(rolling.folder.absolute())
        self.first = read_manifest(rolling.train)
        self.making = (rolling.folder / _MAKING).absolute()

    def close(self) -> None:
        """Ends the maker that was opened here."""
        self._opened.close()

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
        rolling, config, first, maker = self.rolling, self.config, self.first, self.maker()
        self._begin(window)
        has_bos = first.tokenizer.prepend_bos
        split = open_split("train", rolling.text(window).absolute(), config, has_bos, [first.d_model])
        said = f"window {window} of {rolling.windows - 1}"
        with tqdm(total=2 * split.rows, desc=said, unit="tok", unit_scale=True, delay=1, **bar_options(LOG)) as bar:

            def make(wanted: list[Part]) -> None:
                def made(job: Job, entry: Entry) -> None:
                    parts.note(entry)
                    bar.update(entry.part.rows)

                maker.make([Job("train", str(split.folder), str(folder), part) for part in wanted], made)

            folder, plan = self.making / "parts", split.plan(sum(rolling.ledger.rows[:window]))
            parts = Parts(folder, plan, split.record, split.buckets, make)
            bar.update(parts.rows_made)
            parts.finish()
            folders = {config.hook_points[0]: self.making / "store"}
            medians = [first.norm_filter.median_norm]  # of the first window, so that each window can be made alone
            origin = Origin(first.model, first.tokenizer)
            (manifest,) = write_stores(split, parts, medians, folders, config, origin, first.profile, bar).values()
        pairs = zip(manifest.sources, first.sources, strict=True)
        sources = tuple(
            dataclasses.replace(source, revision=one.revision, fingerprint=one.fingerprint) for source, one in pairs
        )
        write_manifest(self.making / "store", dataclasses.replace(manifest, sources=sources))
        rolling.put(window, self.making / "store", manifest.rows)
        shutil.rmtree(self.making)

    def maker(self) -> Maker:
        """What makes the parts: that of the first window, or one that is opened when it is first needed."""
        if self._maker is None:
            config, first = self.config, self.first
            maker = self._opened.enter_context(contextlib.closing(open_maker(self._engine, config.device)))
            revision = first.model.revision if first.model.origin == "hub" else config.revision
            model = load_model(config.model, config.model_dtype, revision, config.device)
            advice = "give it that model again, or extract anew with --force"
            check_same_model(model.info, first.model, f"{self.rolling.train} was extracted with", advice)
            heldout = read_manifest(self.rolling.train.parent / "heldout")
            rows = self.rolling.rows + heldout.rows + heldout.norm_filter.dropped_rows  # as its extraction counted
            shared, widths = str(self.rolling.folder.absolute()), (first.d_model,)
            maker.prepare(Setup(config, widths, model.info, model.prepend_bos, rows, shared), model)
            self._maker = maker
        return self._maker

    def _begin(self, window: int) -> None:
        """Removes what is left of another window that was begun."""
        journal = self.making / _JOURNAL
        if journal.exists() and read_json(journal, "a journal").get("window") == window:
            return
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.making)
        write_record(journal, {"window": window})
