"""Makes stores of any [..., D] arrays: vision, audio, protein embeddings. Standard library and numpy only.

Such a store has the format of any other, but no tokens. Its manifest says so: the tokenizer is empty (`has_tokens` is
False), `hook_point` is "array", and the model's `origin` is "array:<file>". In place of tokens, the fields of ROW lead
from every stored row back to where it came from:

    source      number of the input file, in the order of the manifest's `sources`
    token       number of the row in that file, leading dimensions flattened
    document    line of documents.jsonl, which holds the row's "group" (without groups: the row's number)
    context     number of the row within its split, in input order; each row is a context of one token
    position    0

Targets, for transcoders, become a second pair of stores with the same rows in the same order.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.files import sha256_of
from hafs_jax.base.options import check, option, to_dict
from hafs_jax.base.places import make_folder, put_in_place
from hafs_jax.base.process.locks import locked
from hafs_jax.store.descriptions import FILES, Descriptions, Grouping
from hafs_jax.store.holding import LOCK, replacing
from hafs_jax.store.manifest import (
    CONTEXT,
    DISK_DTYPES,
    FORMAT_VERSION,
    MANIFEST,
    ROW,
    Manifest,
    ModelInfo,
    NormFilter,
    SourceInfo,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from hafs_jax.store.npy import ArrayRows, Arrays, read_groups
from hafs_jax.store.shards import ShardWriter
from hafs_jax.store.shuffle import Spill, n_buckets, norm_limits, shuffle_keys, spill_record, within_limits

SPLITS = ("train", "heldout")
HOOK_POINT = "array"
WORK = ".import"

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, rows done since the last call, rows in all)."""

_SPARE_BYTES = 64 << 20
_LINE_BYTES = 48  # of documents.jsonl


@dataclass(frozen=True)
class ArrayConfig:
    """What decides the bytes of a store of arrays, apart from the arrays themselves."""

    name: str = option("array", "what the activations are of; the manifest's model name")
    heldout_fraction: float = option(
        0.05, "share of the groups (without groups: of the rows) in the held-out store", above=0, below=1
    )
    seed: int = option(0, "seed of the held-out split and of the shuffle", least=0, most=2**63 - 1)
    dtype: str = option(
        "keep",
        "dtype of the stored activations; keep: float16 where the input is float16, else float32",
        choices=("keep", *DISK_DTYPES),
    )
    norm_multiple: float | None = option(
        3.0, "rows whose norm is above this multiple of the median are dropped; none: no row", above=0
    )
    shard_rows: int = option(65_536, "rows in a shard", least=1, most=2**31 - 1)

    def __post_init__(self) -> None:
        check(self)
        if not self.name:
            raise UserError("name='': expected a name for the activations")


def write_array_store(
    folder: Path | str,
    acts: Arrays,
    *,
    target: Arrays | None = None,
    groups: np.ndarray | Path | str | None = None,
    name: str = "array",
    seed: int = 0,
    heldout_fraction: float = 0.05,
    dtype: str = "keep",
    norm_multiple: float | None = 3.0,
    shard_rows: int = 65_536,
    force: bool = False,
    progress: Progress = lambda what, rows, total: None,
) -> dict[str, Path]:
    """Makes the stores `folder`/store/{train,heldout} of [..., D] activations and returns their folders by split.

    acts      an array, an npy file (read in blocks, so that it may be larger than memory), or several of them
    target    as many rows of any width, for transcoders: makes `folder`/target/{train,heldout} too, which are returned
              as "target_train" and "target_heldout"
    groups    an integer for each row; rows of one group fall into one split
    norm_multiple  rows whose norm is above this multiple of the median norm of the training split are not stored, of
              activations or targets; None: every row is
    force     replaces stores of other rows, which otherwise are a `UserError`
    progress  is called as the work goes on, see `Progress`

    The other arguments are the fields of `ArrayConfig`. Nothing is done where stores of these very rows are there.
    Raises `UserError` for input that cannot be stored.
    """
    config = ArrayConfig(name, heldout_fraction, seed, dtype, norm_multiple, shard_rows)
    job = ArrayImport(Path(folder), config, acts, target, groups)
    job.make(force, progress)
    return job.folders


class ArrayImport:
    """One import: the input, checked, and the stores to make of it."""

    def __init__(
        self,
        folder: Path,
        config: ArrayConfig,
        acts: Arrays,
        target: Arrays | None = None,
        groups: np.ndarray | Path | str | None = None,
    ) -> None:
        """Opens and checks the input; raises `UserError` where it cannot become two stores."""
        self.folder, self.config = folder, config
        self.inputs = {"store": ArrayRows(acts)}
        self.acts = self.inputs["store"]
        self.rows = self.acts.rows
        if target is not None:
            self.inputs["target"] = ArrayRows(target)
            if (found := self.inputs["target"].rows) != self.rows:
                raise UserError(f"targets: expected {self.rows} rows, as many as activations, found {found}")
        if self.rows >= 2**31 or len(self.acts.parts) > 2**16:
            raise UserError(
                f"expected fewer than 2^31 rows in at most 65,536 files, found {self.rows:,} in"
                f" {len(self.acts.parts):,}; make several profiles of them"
            )
        groups_N = None if groups is None else read_groups(groups, self.rows)
        self.grouping = Grouping(self.rows, groups_N, config.seed, config.heldout_fraction)
        if not all(self.grouping.rows_by_split):
            empty = SPLITS[self.grouping.rows_by_split.index(0)]
            raise UserError(
                f"no row of {self.rows} fell into the {empty} split; give more rows or groups, or change"
                f" heldout_fraction={config.heldout_fraction}"
            )
        self.folders = {
            split if place == "store" else f"{place}_{split}": folder / place / split
            for place in self.inputs
            for split in SPLITS
        }

    def make(self, force: bool, progress: Progress) -> bool:
        """Makes the stores and puts them in their places, the training store last. False where they were there already.

        Unless `force`, raises `UserError` where there are stores of other rows or an unfinished extraction. Stores that
        are there may be in use meanwhile.
        """
        root = self.folder / "store"
        work, unfinished = root / WORK, root / ".work"
        if not (force or work.exists() or unfinished.exists()):
            with locked(root / LOCK, "an import", root, shared=True):
                if self._is_complete(progress):
                    return False
        with replacing((self.folder / place for place in self._places()), "an import"):
            if unfinished.exists() and not force:
                raise UserError(
                    f"{root} holds an unfinished extraction; pass {arg('force', True)} to discard it, or "
                    "choose another folder"
                )
            is_complete = not force and self._is_complete(progress)
            shutil.rmtree(work, ignore_errors=True)
            if is_complete:
                return False
            make_folder(work)
            self._make(work, progress)
            shutil.rmtree(unfinished, ignore_errors=True)
            for split in SPLITS:
                if "target" not in self.inputs and (old := self.folder / "target" / split).exists():  # of other rows
                    old.rename(work / f"old-target-{split}")
            for place in reversed(self.inputs):
                for split in reversed(SPLITS):
                    old = work / f"old-{place}-{split}"
                    put_in_place(work / place / split, self.folder / place / split, old)
            shutil.rmtree(work)
        return True

    def _places(self) -> list[str]:
        """The folders of stores that are made or removed."""
        return [*self.inputs, *(["target"] if (self.folder / "target").exists() else [])]

    def _is_complete(self, progress: Progress) -> bool:
        """Whether all stores are there and made of these very arrays; `UserError` where one is made of others."""
        made = [folder for folder in self.folders.values() if (folder / MANIFEST).exists()]
        extra = self.folder / "target" / SPLITS[0]
        if "target" not in self.inputs and (extra / MANIFEST).exists():
            made.append(extra)
        if not made:
            return False
        self._check_same(made, self._made_from({place: None for place in self.inputs}))  # before reading all the input
        digests = {place: hashlib.sha256() for place in self.inputs}
        for _, start, stop in self.acts.blocks():
            for place, rows in self.inputs.items():
                rows.pieces(start, stop, digests[place])
            progress("comparing", stop - start, self.rows)
        self._check_same(made, self._made_from({place: digest.hexdigest() for place, digest in digests.items()}))
        return len(made) == len(self.folders)

    def _make(self, work: Path, progress: Progress) -> None:
        dtypes = {place: self._dtype(rows) for place, rows in self.inputs.items()}
        record = spill_record([(rows.d_model, dtypes[place]) for place, rows in self.inputs.items()])
        self._check_space(work, record)
        with contextlib.ExitStack() as files:
            spills: list[Spill] = []
            descriptions: list[Descriptions] = []
            for split, rows in zip(SPLITS, self.grouping.rows_by_split, strict=True):
                spill = Spill(work / f"{split}-rows", record, n_buckets(rows, record))
                spills.append(files.enter_context(contextlib.closing(spill)))
                grouped = self.grouping.groups_N is not None
                writer = Descriptions(work / "store" / split, rows, len(self.acts.parts), grouped)
                descriptions.append(files.enter_context(contextlib.closing(writer)))
            digests = self._spill(spills, descriptions, list(dtypes.values()), progress)
        medians = spills[0].median_norms()
        limits = norm_limits(self.config.norm_multiple, medians)
        for split, spill, described in zip(SPLITS, spills, descriptions, strict=True):
            folders = {place: work / place / split for place in self.inputs}
            if "target" in folders:
                shutil.copytree(folders["store"], folders["target"])  # what describes the rows
            with contextlib.ExitStack() as threads:
                writers = []
                for place, array in self.inputs.items():
                    into, dtype, parts = folders[place], dtypes[place], len(self.acts.parts)
                    shards = ShardWriter(into, array.d_model, dtype, self.config.shard_rows, parts)
                    writers.append(threads.enter_context(contextlib.closing(shards)))
                given_by_source = np.zeros(len(self.acts.parts), np.int64)
                for records in spill.shuffled():
                    given_by_source += np.bincount(records["row"]["source"], minlength=len(given_by_source))
                    kept = within_limits(records, limits)
                    for kind, shards in enumerate(writers):
                        shards.add(kept[f"acts{kind}"], kept["row"])
                    progress("shuffling", len(records), self.rows)
                for place, shards, median in zip(folders, writers, medians, strict=True):
                    manifest = self._manifest(
                        split, place, shards, median, digests, described, folders[place], given_by_source.tolist()
                    )
                    write_manifest(folders[place], manifest)
            shutil.rmtree(work / f"{split}-rows")

    def _spill(
        self, spills: list[Spill], descriptions: list[Descriptions], dtypes: list[str], progress: Progress
    ) -> dict[str, str]:
        """Pass 1: puts every row into its split's bucket. Returns the checksums of the inputs."""
        digests = {place: hashlib.sha256() for place in self.inputs}
        for source, start, stop in self.acts.blocks():
            kept = [
                rows.convert(start, stop, dtype, digests[place])
                for (place, rows), dtype in zip(self.inputs.items(), dtypes, strict=True)
            ]
            is_heldout_B, group_B = self.grouping.read(start, stop)
            for number, (spill, described) in enumerate(zip(spills, descriptions, strict=True)):
                here = np.flatnonzero(is_heldout_B == bool(number))
                records = np.zeros(len(here), spill.record)
                records["key"] = shuffle_keys(self.config.seed, number, spill.rows, len(here))
                row = records["row"]
                row["token"] = start - self.acts.parts[source].first + here
                row["context"], row["source"] = np.arange(spill.rows, spill.rows + len(here)), source
                described.add(row, group_B[here])
                for kind, (acts, norm_B) in enumerate(kept):
                    records[f"acts{kind}"], records["norm"][:, kind] = acts[here], norm_B[here]
                spill.append(records)
            progress("reading", stop - start, self.rows)
        for spill, described in zip(spills, descriptions, strict=True):
            spill.flush()  # no sync: an import that is killed begins anew
            described.sync()
        return {place: digest.hexdigest() for place, digest in digests.items()}

    def _manifest(
        self,
        split: str,
        place: str,
        shards: ShardWriter,
        median: float,
        digests: dict[str, str],
        described: Descriptions,
        folder: Path,
        given: list[int],
    ) -> Manifest:
        """The manifest of a store. `given` are the rows of the split by source, before the norm filter."""
        statistics, rows, name = shards.finish(), self.inputs[place], self.config.name
        multiple = self.config.norm_multiple
        if statistics is None:
            raise UserError(f"norm_multiple={multiple} drops every row of the {split} split; raise it")
        limit = None if multiple is None else multiple * median
        origin = "array:" + ",".join(Path(part.name).name for part in rows.parts)
        documents, counts = described.documents_by_source.tolist(), shards.rows_by_source.tolist()
        return Manifest(
            format_version=FORMAT_VERSION,
            split=split,
            profile={
                "requested": self.folder.name,
                "resolved": self.folder.name,
                "reason": "imported from arrays",
            },
            model=ModelInfo(name, None, origin, str(rows.parts[0].dtype), 0, rows.d_model),
            tokenizer=TokenizerInfo("", 0, None, False),
            hook_point=HOOK_POINT,
            d_model=rows.d_model,
            dtype=self._dtype(rows),
            context_length=1,
            seed=self.config.seed,
            sources=tuple(
                SourceInfo(Path(part.name).stem, part.name, 1.0, documents[i], given[i], counts[i])
                for i, part in enumerate(self.acts.parts)
            ),
            norm_filter=NormFilter(multiple, median, limit, sum(given) - shards.rows),
            rows=shards.rows,
            shards=tuple(shards.shards),
            files_sha256={file: sha256_of(folder / file) for file in FILES},
            mean=tuple(statistics.mean_D.tolist()),
            mean_squared_norm=statistics.mean_squared_norm,
            variance=statistics.variance,
            config=self._made_from(digests),
        )

    def _made_from(self, digests: dict[str, Any]) -> dict[str, Any]:
        """The manifest's `config`: what a store was made from. A digest of None is not known yet."""
        found = {"kind": "array", **to_dict(self.config), "rows": self.rows, "groups_sha256": self.grouping.sha256}
        for place in ("store", "target"):
            rows = self.inputs.get(place)
            found[f"{place}_d_model"] = rows.d_model if rows else None
            found[f"{place}_sha256"] = digests.get(place)
        return found

    def _check_same(self, folders: list[Path], wanted: dict[str, Any]) -> None:
        known = {key for key in wanted if not (key in ("store_sha256", "target_sha256") and wanted[key] is None)}
        for folder in folders:
            found = read_manifest(folder).config
            for key in [*wanted, *found]:
                if key in known and found.get(key) != wanted.get(key):
                    raise UserError(
                        f"{folder} was made with {key}={found.get(key)!r}, not {wanted.get(key)!r};"
                        f" pass {arg('force', True)} to replace it, or choose another folder"
                    )

    def _dtype(self, rows: ArrayRows) -> str:
        return rows.dtype if self.config.dtype == "keep" else self.config.dtype

    def _check_space(self, work: Path, record: np.dtype) -> None:
        kept = record.itemsize - record["key"].itemsize - record["norm"].itemsize - ROW.itemsize
        described = ROW.itemsize + CONTEXT.itemsize + 4 + _LINE_BYTES
        needed = self.rows * (record.itemsize + kept + len(self.inputs) * (4 + described)) + _SPARE_BYTES
        free = shutil.disk_usage(work).free
        if free < needed:
            raise UserError(
                f"{self.folder} needs {needed / 1e9:.1f} GB of free disk space (half of it only until the rows are"
                f" shuffled), found {free / 1e9:.1f} GB; free some, or choose another folder"
            )
