"""An extraction from end to end: contexts, the model over them, the shuffle, the stores.

The work lies in a hidden folder beside the stores; a rename turns it into them. A run may be killed at any moment. It
goes on when the same command is given again, and ends with the same bytes.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hafs_extract.compiling import compile_blocks
from hafs_extract.config import ExtractConfig, SourceConfig, difference
from hafs_extract.contexts import SPLITS, write_contexts
from hafs_extract.hub.files import Fetch, plan_dataset, plan_model
from hafs_extract.hub.presence import hub_needs
from hafs_extract.journal import (
    Journal,
    SplitProgress,
    begun_config,
    is_complete,
    read_journal,
    store_folders,
    work_root,
    write_journal,
)
from hafs_extract.models import LanguageModel, check_same_model, load_model, pick_dtype
from hafs_extract.passes import Split, open_split, spill_rows, write_stores
from hafs_extract.profiles import Resolved
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
from hafs_jax.store.shuffle import Spill

LOG = logging.getLogger(__name__)

WORK = ".work"
JOURNAL_SECONDS = 2.0  # a kill loses this time, and that of a sync
SPARE_BYTES = 64 << 20  # of disk space, for what is not activations


def extract(
    config: ExtractConfig,
    resolved: Resolved,
    out: Path,
    force: bool = False,
    placed: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Path]]:
    """Makes the stores of `config` under `out` and returns their folders by hook point and split.

    Goes on where an earlier run of the same config was stopped. `force` replaces stores of another config, and
    discards its unfinished work. Where the rows need more disk than the config's `window_gb`, the store is the first
    window, and the others are made as long as a training asks for them (`hafs_jax.store.rolling.windows`). `placed()`
    is called when the stores are there.
    """
    folders, root = store_folders(config, out), work_root(config, out)
    model: LanguageModel | None = None
    stores = {folder.parent for splits in folders.values() for folder in splits.values()}
    with replacing({root, *stores}, "an extraction"):
        config = with_dtype(config, out, force)
        if not force and is_complete(config, out):
            shutil.rmtree(root / WORK, ignore_errors=True)
        else:
            model = _Extraction(config, resolved, root / WORK, force).run(folders)
    placed()
    if (rolling := rolling_at(folders[config.hook_points[0]]["train"])) is not None:
        Windows(config, rolling, model).run()
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

    def __init__(self, config: ExtractConfig, resolved: Resolved, work: Path, force: bool) -> None:
        self.config, self.work = config, work
        journal = read_journal(work)
        if journal and (found := difference(journal.config, to_dict(config))):
            if journal.splits and not force:  # without splits, there is little to lose
                raise UserError(f"{work} holds an unfinished extraction with {found}; pass --force to discard it")
            journal = None
        if journal is None:
            shutil.rmtree(work, ignore_errors=True)
            journal = Journal(to_dict(config), dataclasses.asdict(resolved))
        else:
            LOG.info("going on with the extraction that was interrupted")
        self.journal = dataclasses.replace(journal, attempts=journal.attempts + 1)
        self._note()

    def run(self, folders: dict[str, dict[str, Path]]) -> LanguageModel | None:
        """Makes the stores, as far as they are not made yet, and puts them in their places.

        Returns the language model, where it was needed.
        """
        model = None if self.journal.made else self._make()
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
        return model

    def _made(self, hook_point: str, split: str) -> Path:
        """The folder in which a store is made."""
        return self.work / "stores" / hook_point / split

    def _make(self) -> LanguageModel:
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
            notes = write_contexts(reading, model.tokenize, bos, self.work, model.chat)
            notes += self._cut(open_split("train", self.work / "train", config, model, widths))
            self._note("text", started, notes=tuple(notes))
        for note in self.journal.notes or ():
            LOG.info(note)
        window = text_folder(self.work / ROLLING, 0)
        texts = {name: self.work / name for name in SPLITS} | ({"train": window} if window.exists() else {})
        splits = [open_split(name, texts[name], config, model, widths) for name in SPLITS]
        self._check_space(splits)
        self._compile(splits, model)
        self._write(splits, self._run_model(splits, model), model)
        return model

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

    def _compile(self, splits: list[Split], model: LanguageModel) -> None:
        """Compiles the model's blocks where the config says so, or has "auto" and at least COMPILED_FROM_TOKENS."""
        config, started = self.config, time.monotonic()
        if all(self.journal.progress(split.name).batches == len(split.batches) for split in splits):
            return
        rows = sum(split.rows for split in splits)
        if (windows := self._windows()) is not None:
            rows += sum(windows.rows[1:])
        if compile_blocks(config, model, rows):
            self._note("compile", started)

    def _run_model(self, splits: list[Split], model: LanguageModel) -> list[Spill]:
        """Pass 1 over both splits: the model's rows, in buckets on disk."""
        done = {split.name: self.journal.progress(split.name) for split in splits}
        spills, total = [], sum(split.rows for split in splits)
        with _bar(total, "activations", sum(sum(progress.buckets) for progress in done.values())) as bar:
            for split in splits:
                started = time.monotonic()

                def save(batches: int, counts: list[int], name: str = split.name) -> None:
                    nonlocal started
                    now = time.monotonic()
                    progress = SplitProgress(batches, tuple(counts))
                    self._note("model", started, splits={**self.journal.splits, name: to_dict(progress)})
                    started = now

                progress, folder = done[split.name], self.work / f"{split.name}-rows"
                spill = spill_rows(
                    split,
                    model,
                    self.config,
                    folder,
                    progress.batches,
                    list(progress.buckets),
                    save,
                    JOURNAL_SECONDS,
                    bar,
                )
                spills.append(spill)
        return spills

    def _write(self, splits: list[Split], spills: list[Spill], model: LanguageModel) -> None:
        """Pass 2: makes all stores, which are then whole and only need to be put in their places."""
        started = time.monotonic()
        medians = spills[SPLITS.index("train")].median_norms()
        manifests: dict[Path, Manifest] = {}
        with _bar(sum(split.rows for split in splits), "shuffling") as bar:
            for split, spill in zip(splits, spills, strict=True):
                folders = {hook_point: self._made(hook_point, split.name) for hook_point in self.config.hook_points}
                manifests |= write_stores(split, spill, medians, folders, self.config, model, self.journal.profile, bar)
        self._note("write", started)
        tokens, positions = sum(split.rows for split in splits), sum(split.batches.positions for split in splits)
        seconds = self.journal.seconds
        timing = {
            "seconds": sum(seconds.values()),
            "seconds_by_stage": seconds,
            "attempts": self.journal.attempts,
            "compiled": "compile" in seconds,
            "device": str(model.device),
            "tokens": tokens,
            "tokens_per_second": tokens / max(seconds["model"], 1e-9),
            "padding_share": 1 - sum(len(split.contexts.tokens) for split in splits) / positions,
        }
        commits = self.journal.commits
        for folder, manifest in manifests.items():
            sources = (dataclasses.replace(source, revision=commits.get(source.name)) for source in manifest.sources)
            write_record(folder / TIMING, timing)
            manifests[folder] = dataclasses.replace(manifest, sources=tuple(sources))
            write_manifest(folder, manifests[folder])
        if (windows := self._windows()) is not None:
            first = manifests[self._made(self.config.hook_points[0], "train")]
            kept = {"0": first.rows}
            write_ledger(self.work / ROLLING, Ledger(first.fingerprint, windows.rows, kept))
        self._note(made=True)

    def _windows(self) -> Ledger | None:
        """The windows that the training split was cut into; None where it is one store."""
        folder = self.work / ROLLING
        return read_ledger(folder) if folder.exists() else None

    def _check_space(self, splits: list[Split]) -> None:
        spilled = sum(path.stat().st_size for path in self.work.glob("*-rows/*"))
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
