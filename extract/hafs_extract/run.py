"""An extraction from end to end: contexts, the model over them, the shuffle, the stores.

The work lies in a hidden folder beside the stores; a rename turns it into them. A run may be killed at any moment. It
goes on when the same command is given again, and ends with the same bytes.
"""

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hafs_extract.config import ExtractConfig, SourceConfig, difference
from hafs_extract.contexts import SPLITS, write_contexts
from hafs_extract.hub.files import Fetch, plan_dataset, plan_model
from hafs_extract.hub.presence import hub_needs
from hafs_extract.journal import (
    WORK,
    Journal,
    begun_config,
    changed_text,
    is_complete,
    read_journal,
    store_folders,
    work_root,
    write_journal,
)
from hafs_extract.models import check_same_model, load_model, pick_dtype
from hafs_extract.parts.engine import Engine
from hafs_extract.parts.files import Entry, Parts
from hafs_extract.parts.jobs import Job, Setup
from hafs_extract.parts.makers import Maker, open_maker
from hafs_extract.parts.plan import Part
from hafs_extract.passes import Origin, Split, open_split, origin_of, write_stores
from hafs_extract.profiles import Resolved
from hafs_extract.text.files import text_fingerprint
from hafs_extract.windows import Windows, cut_text
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_record
from hafs_jax.base.log import bar_options
from hafs_jax.base.options import from_dict, to_dict
from hafs_jax.base.places import put_in_place
from hafs_jax.store.holding import replacing
from hafs_jax.store.manifest import TIMING, Manifest, ModelInfo, write_manifest
from hafs_jax.store.rolling.windows import FOLDER as ROLLING
from hafs_jax.store.rolling.windows import Ledger, read_ledger, rolling_at, text_folder, window_rows, write_ledger

LOG = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20  # of disk space, for what is not activations


def extract(
    config: ExtractConfig,
    resolved: Resolved,
    out: Path,
    force: bool = False,
    placed: Callable[[], None] = lambda: None,
    engine: Engine | None = None,
) -> dict[str, dict[str, Path]]:
    """Makes the stores of `config` under `out` and returns their folders by hook point and split.

    Goes on where an earlier run of the same config was stopped. `force` replaces stores of another config, and
    discards its unfinished work. Where the rows need more disk than the config's `window_gb`, the store is the first
    window, and the others are made as long as a training asks for them (`hafs_jax.store.rolling.windows`). `placed()`
    is called when the stores are there. `engine` [this process] says what runs the model.
    """
    folders, root = store_folders(config, out), work_root(config, out)
    stores = {folder.parent for splits in folders.values() for folder in splits.values()}
    with contextlib.ExitStack() as opened:
        maker: Maker | None = None
        with replacing({root, *stores}, "an extraction"):
            config = with_dtype(config, out, force)
            if not force and is_complete(config, out):
                shutil.rmtree(root / WORK, ignore_errors=True)
            else:
                extraction = _Extraction(config, resolved, root / WORK, force, engine or Engine(), opened)
                maker = extraction.run(folders)
        placed()
        if (rolling := rolling_at(folders[config.hook_points[0]]["train"])) is not None:
            with contextlib.closing(Windows(config, rolling, engine or Engine(), maker)) as windows:
                windows.run()
    return folders


def with_dtype(config: ExtractConfig, out: Path, force: bool) -> ExtractConfig:
    """The config with `model_dtype` resolved, which decides the bytes: stores and journals hold it resolved.

    What was begun goes on with the dtype that it began with, also on another machine, unless `force` replaces it.
    """
    if config.model_dtype != "auto":
        return config
    begun = None if force else begun_config(config, out, WORK)
    dtype = begun["model_dtype"] if begun else pick_dtype(config.device)
    LOG.info(f"the model computes in {dtype}")
    return dataclasses.replace(config, model_dtype=dtype)


class _Extraction:
    """One attempt at an extraction. At any moment, `self.journal` is the journal on disk."""

    def __init__(
        self,
        config: ExtractConfig,
        resolved: Resolved,
        work: Path,
        force: bool,
        engine: Engine,
        opened: contextlib.ExitStack,
    ) -> None:
        """`opened` closes what makes the parts."""
        self.config, self.work, self.engine, self._opened = config, work.absolute(), engine, opened
        journal = read_journal(work)
        if journal and (found := difference(journal.config, to_dict(config))):
            if journal.has_parts and not force:  # without parts, there is little to lose
                raise UserError(f"{work} holds an unfinished extraction with {found}; pass --force to discard it")
            journal = None
        if journal and (changed := changed_text(journal.texts, config)):
            if journal.has_parts and not force:
                raise UserError(f"{work} holds an unfinished extraction: {changed}; put it back, or pass --force")
            journal = None
        if journal is None:
            shutil.rmtree(work, ignore_errors=True)
            journal = Journal(to_dict(config), dataclasses.asdict(resolved))
        else:
            LOG.info("going on with the extraction that was interrupted")
        self.journal = dataclasses.replace(journal, attempts=journal.attempts + 1)
        self._progress: tqdm | None = None  # of pass 1, while it goes on
        self._note()

    def run(self, folders: dict[str, dict[str, Path]]) -> Maker | None:
        """Makes the stores, as far as they are not made yet, and puts them in their places.

        Returns the maker of parts, where it was needed.
        """
        maker = None if self.journal.made else self._make()
        windows, place = self.work / ROLLING, self.work.parent / ROLLING
        if windows.exists():
            put_in_place(windows, place, self.work / "old" / ROLLING)
        for split in reversed(SPLITS):  # train last: where it is in place, all are
            for hook_point, places in folders.items():
                made = self._made(hook_point, split)
                if made.exists():
                    put_in_place(made, places[split], self.work / "old" / hook_point / split)
        if place.exists() and rolling_at(folders[self.config.hook_points[0]]["train"]) is None:
            shutil.rmtree(place)  # of the stores before
        shutil.rmtree(self.work)
        return maker

    def _made(self, hook_point: str, split: str) -> Path:
        """The folder in which a store is made."""
        return self.work / "stores" / hook_point / split

    def _make(self) -> Maker:
        config = self.config
        maker = self._opened.enter_context(contextlib.closing(open_maker(self.engine, config.device)))
        try:
            splits, origin = self._prepare(maker)
            self._write(splits, self._run_model(splits, maker), origin, maker)
        except BaseException:
            maker.close()  # while the folder is still locked
            raise
        return maker

    def _prepare(self, maker: Maker) -> tuple[list[Split], Origin]:
        """Loads and checks the model, reads the texts and tells the maker what to do."""
        config, started = self.config, time.monotonic()
        begun = from_dict(ModelInfo, self.journal.model, "journal") if self.journal.model else None
        revision = begun.revision if begun and begun.origin == "hub" else config.revision  # the same commit as before
        sources, revision = self._fetch(revision)
        model = load_model(config.model, config.model_dtype, revision, config.device)
        widths = [model.check_hook_point(hook_point) for hook_point in config.hook_points]
        longest = model.max_context_length
        if longest is not None and config.context_length > longest:
            raise UserError(f"context_length={config.context_length}: {config.model} has {longest} positions")
        if begun is not None:
            check_same_model(model.info, begun, "the interrupted extraction used", f"delete {self.work} to begin anew")
        model.check_causal(config.hook_points, config.context_length)
        info = to_dict(model.info)
        self._note("load", started, model=info)
        if self.journal.notes is None:
            started = time.monotonic()
            bos = model.bos_token_id if model.prepend_bos else None
            reading = dataclasses.replace(config, sources=sources)
            read = {source.name: found for source in sources if (found := text_fingerprint(source))}
            notes = write_contexts(reading, model.tokenize, bos, self.work, model.chat)
            notes += self._cut(open_split("train", self.work / "train", config, model.prepend_bos, widths))
            self._note("text", started, notes=tuple(notes), texts=read)
        for note in self.journal.notes or ():
            LOG.info(note)
        window = text_folder(self.work / ROLLING, 0)
        texts = {name: self.work / name for name in SPLITS} | ({"train": window} if window.exists() else {})
        splits = [open_split(name, texts[name], config, model.prepend_bos, widths) for name in SPLITS]
        self._check_space(splits)
        rows = sum(split.rows for split in splits)
        if (windows := self._windows()) is not None:
            rows += sum(windows.rows[1:])
        shared = str(self.work)
        maker.prepare(Setup(config, tuple(widths), model.info, model.prepend_bos, rows, shared), model)
        return splits, origin_of(model)

    def _cut(self, train: Split) -> list[str]:
        """Cuts the training split into windows where it does not fit `window_gb`; returns a line for the user."""
        folder, gigabytes = self.work / ROLLING, self.config.window_gb
        shutil.rmtree(folder, ignore_errors=True)
        sizes = window_rows(gigabytes, train.rows, train.record.itemsize)
        if len(sizes) == 1 or len(rows := cut_text(train, folder, sizes)) == 1:
            shutil.rmtree(folder, ignore_errors=True)
            return []
        write_ledger(folder, Ledger("", tuple(rows)))
        return [f"{train.rows:,} training rows in {len(rows)} windows, to fit {gigabytes:g} GB"]

    def _fetch(self, revision: str | None) -> tuple[tuple[SourceConfig, ...], str | None]:
        """Fetches all that comes from the hub. Returns the sources and the model's revision, pinned to commits.

        First the hub is asked about everything, so that a dataset that it has not, or that is gated, is noticed before
        the model's weights are fetched; these come last. Where the texts have been read already, only the model is.
        """
        model, datasets = hub_needs(self.config)
        begun, sources = self.journal.commits, []
        texts: list[Fetch] = []
        weights = [plan_model(model, revision)] if model else []
        for source in self.config.sources:
            if self.journal.notes is None and source in datasets:
                text = plan_dataset(dataclasses.replace(source, revision=begun.get(source.name, source.revision)))
                if begun.get(source.name, text.commit) != text.commit:
                    raise UserError(
                        f"source {source.name}: the interrupted extraction read commit {begun[source.name][:12]} of"
                        f" {source.path}, found {str(text.commit)[:12]}; delete {self.work} to begin anew"
                    )
                texts.append(text)
                source = dataclasses.replace(source, revision=text.commit)
            sources.append(source)
        for fetch in [*weights, *texts]:
            fetch.check_access()
        if self.journal.notes is None:
            self._note(commits={source.name: source.revision for source in sources if source.revision})
        for fetch in [*texts, *weights]:
            fetch.run()
        return tuple(sources), weights[0].commit if weights else revision

    def _run_model(self, splits: list[Split], maker: Maker) -> list[Parts]:
        """Pass 1 over both splits: the parts that are not on disk yet."""
        found = [self._parts(split, maker) for split in splits]
        missing = sum(len(parts.missing) for parts in found)
        if missing:
            started = time.monotonic()
            maker.start(missing)
            self._note_maker(maker, started)
        rows = sum(split.rows for split in splits)
        with _bar(rows, "activations", sum(parts.rows_made for parts in found)) as self._progress:
            for parts in found:
                parts.finish()
        self._progress = None
        maker.rest()
        return found

    def _parts(self, split: Split, maker: Maker) -> Parts:
        folder = self.work / f"{split.name}-parts"

        def make(wanted: list[Part]) -> None:
            started = time.monotonic()

            def made(job: Job, entry: Entry) -> None:
                nonlocal started
                parts.note(entry)
                self._note("model", started, has_parts=True)
                started = time.monotonic()
                if self._progress is not None:
                    self._progress.update(entry.part.rows)

            if self._progress is None:
                LOG.warning(f"{len(wanted)} parts of the {split.name} split are damaged; they are made again")
            maker.make([Job(split.name, str(split.folder), str(folder), part) for part in wanted], made)

        parts = Parts(folder, split.plan(), split.record, split.buckets, make)
        return parts

    def _note_maker(self, maker: Maker, started: float) -> None:
        """Notes who makes the parts, and how long it took to get ready."""
        by = maker.made_by or {}
        if self.journal.has_parts and (found := difference(self.journal.made_by, by)):
            LOG.info(f"earlier parts were made with {found}: the last bits of their rows may differ from the others'")
        self._note("compile" if by.get("compiled") else "load", started, made_by=by)

    def _write(self, splits: list[Split], found: list[Parts], origin: Origin, maker: Maker) -> None:
        """Pass 2: makes all stores, which are then whole and only need to be put in their places."""
        started = time.monotonic()
        medians = found[SPLITS.index("train")].median_norms()
        manifests: dict[Path, Manifest] = {}
        profile = self.journal.profile
        with _bar(sum(split.rows for split in splits), "shuffling") as bar:
            for split, parts in zip(splits, found, strict=True):
                folders = {hook_point: self._made(hook_point, split.name) for hook_point in self.config.hook_points}
                manifests |= write_stores(split, parts, medians, folders, self.config, origin, profile, bar)
        self._note("write", started)
        timing = self._timing(splits, maker)
        commits, texts = self.journal.commits, self.journal.texts
        for folder, manifest in manifests.items():
            sources = (
                dataclasses.replace(source, revision=commits.get(source.name), fingerprint=texts.get(source.name))
                for source in manifest.sources
            )
            write_record(folder / TIMING, timing)
            manifests[folder] = dataclasses.replace(manifest, sources=tuple(sources))
            write_manifest(folder, manifests[folder])
        if (windows := self._windows()) is not None:
            first = manifests[self._made(self.config.hook_points[0], "train")]
            kept = {"0": first.rows}
            write_ledger(self.work / ROLLING, Ledger(first.fingerprint, windows.rows, kept))
        self._note(made=True)

    def _timing(self, splits: list[Split], maker: Maker) -> dict[str, Any]:
        tokens, positions = sum(split.rows for split in splits), sum(split.batches.positions for split in splits)
        seconds = self.journal.seconds
        return {
            "seconds": sum(seconds.values()),
            "seconds_by_stage": seconds,
            "attempts": self.journal.attempts,
            "compiled": "compile" in seconds,
            "device": self.journal.made_by.get("device"),
            "made_by": self.journal.made_by,
            "workers": maker.workers,
            "tokens": tokens,
            "tokens_per_second": tokens / max(seconds["model"], 1e-9),
            "padding_share": 1 - sum(len(split.contexts.tokens) for split in splits) / positions,
        }

    def _windows(self) -> Ledger | None:
        """The windows that the training split was cut into; None where it is one store."""
        folder = self.work / ROLLING
        return read_ledger(folder) if folder.exists() else None

    def _check_space(self, splits: list[Split]) -> None:
        spilled = sum(path.stat().st_size for path in self.work.glob("*-parts/*"))
        needed = sum(split.bytes_needed for split in splits) + SPARE_BYTES - spilled
        if self._windows() is not None and self.config.window_gb is not None:
            needed += int(self.config.window_gb * 1e9)
        free = shutil.disk_usage(self.work).free
        if free < needed:
            raise UserError(
                f"{self.work.parent} needs {needed / 1e9:.1f} GB of free disk space (half of it only until the rows are"
                f" shuffled), found {free / 1e9:.1f} GB; free some, choose another OUT, or lower --max-rows"
            )

    def _note(self, stage: str | None = None, started: float = 0.0, **changes: Any) -> None:
        """Writes the journal with `changes`, and with the seconds since `started` added to those of `stage`."""
        spent = dict(self.journal.seconds)
        if stage:
            spent[stage] = spent.get(stage, 0.0) + time.monotonic() - started
        self.journal = dataclasses.replace(self.journal, seconds=spent, **changes)
        write_journal(self.work, self.journal)


def _bar(total: int, what: str, initial: int = 0) -> tqdm:
    return tqdm(total=total, initial=initial, desc=what, unit="tok", unit_scale=True, **bar_options(LOG))
