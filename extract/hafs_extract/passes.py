"""The two passes over one split: the model's rows into parts, then the shuffle's buckets of all parts into stores.

There is one store for each hook point. Their rows go through the shuffle together, so that the stores stay aligned.
"""

import contextlib
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from hafs_extract.config import ExtractConfig
from hafs_extract.contexts import SPLITS, Batches, plan_batches
from hafs_extract.models import LanguageModel
from hafs_extract.parts.files import Parts
from hafs_extract.parts.plan import Part, plan_parts
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of, write_atomic
from hafs_jax.base.foreign import open_npy
from hafs_jax.base.options import to_dict
from hafs_jax.base.places import make_folder
from hafs_jax.store.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    ROW,
    Manifest,
    ModelInfo,
    NormFilter,
    SourceInfo,
    TokenizerInfo,
    from_float32,
    to_float32,
)
from hafs_jax.store.reader import Contexts
from hafs_jax.store.shards import ShardWriter
from hafs_jax.store.shuffle import n_buckets, norm_limits, norms, shuffle_keys, spill_record, within_limits

TEXT_FILES = ("contexts.npy", "tokens.npy", "documents.jsonl")


@dataclass(frozen=True)
class Origin:
    """What a store's rows come from, as its manifest says it."""

    model: ModelInfo
    tokenizer: TokenizerInfo


def origin_of(model: LanguageModel) -> Origin:
    tokenizer = TokenizerInfo(model.info.name, len(model.tokenizer), model.bos_token_id, model.prepend_bos)
    return Origin(model.info, tokenizer)


@dataclass(frozen=True)
class Split:
    """One split: its text on disk, its batches for the model, and the record of its rows in the shuffle."""

    name: str
    folder: Path
    contexts: Contexts
    batches: Batches
    first_position: int  # the first position that is stored: 1 where BOS is at 0, else 0
    record: np.dtype  # of `shuffle.spill_record`, with a kind of activations for each hook point

    @cached_property
    def rows(self) -> int:
        lengths = self.contexts.table["length"].astype(np.int64)
        return int((lengths - self.first_position).sum())

    @property
    def buckets(self) -> int:
        """The shuffle's buckets."""
        return n_buckets(self.rows, self.record)

    def plan(self, first_row: int = 0) -> list[Part]:
        """The parts of the split. `first_row` is the number of its first row, where it is a window of a longer one."""
        lengths = self.contexts.table["length"].astype(np.int64)[self.batches.order] - self.first_position
        return plan_parts(np.add.reduceat(lengths, self.batches.starts[:-1]), self.record.itemsize, first_row)

    @property
    def bytes_needed(self) -> int:
        """Disk space for buckets, norms and, before the norm filter, the stores: shards, rows files and texts."""
        kinds = self.record["norm"].shape[0]
        stored = sum(self.record[f"acts{kind}"].itemsize + ROW.itemsize for kind in range(kinds))
        text = sum((self.folder / file).stat().st_size for file in TEXT_FILES)
        return self.rows * (self.record.itemsize + 4 * kinds + stored) + kinds * text


def open_split(name: str, folder: Path, config: ExtractConfig, has_bos: bool, widths: Sequence[int]) -> Split:
    """The split whose contexts lie in `folder`; `has_bos`: each begins with BOS.

    `widths` are those of the hook points' activations.
    """
    contexts = Contexts(open_npy(folder / "contexts.npy"), open_npy(folder / "tokens.npy"))
    batches = plan_batches(contexts.table["length"], config.batch_tokens)
    record = spill_record([(width, config.dtype) for width in widths])
    return Split(name, folder, contexts, batches, int(has_bos), record)


def part_records(
    split: Split, model: LanguageModel, config: ExtractConfig, part: Part, storing: ThreadPoolExecutor
) -> np.ndarray:
    """Pass 1 over a part of the split: the records of its rows, [rows] of the split's record.

    Where the model has a device of its own, the rows of a batch are taken from it in `storing`, a single thread.
    """
    records = np.zeros(part.rows, split.record)
    stream, filled = SPLITS.index(split.name), 0

    def store(batch: _Batch) -> None:
        nonlocal filled
        filled += _store(split, config, batch, records[filled:])

    stored: Future[None] | None = None
    for index in range(part.first_batch, part.stop_batch):
        batch = _run(split, model, config, split.batches[index])
        if not _overlaps(model):
            store(batch)
            continue
        if stored is not None:
            stored.result()
        stored = storing.submit(store, batch)  # while the model runs over the next one
    if stored is not None:
        stored.result()
    records["key"] = shuffle_keys(config.seed, stream, part.first_row, part.rows)
    return records


def _overlaps(model: LanguageModel) -> bool:
    """Whether rows are stored while the model runs. On a CPU they would compete for its cores, which is slower."""
    return model.device.type != "cpu"


@dataclass(frozen=True)
class _Batch:
    """Contexts that went through the model: their numbers, padded tokens, and activations on the model's device."""

    numbers: np.ndarray
    tokens_BL: np.ndarray
    acts: dict[str, torch.Tensor]  # [B, L, D] by hook point


def _run(split: Split, model: LanguageModel, config: ExtractConfig, numbers: np.ndarray) -> _Batch:
    """Runs the contexts `numbers` through the model."""
    tokens_BL = np.zeros((len(numbers), int(split.contexts.table["length"][numbers].max())), np.int64)
    for row, number in enumerate(numbers):
        tokens = split.contexts[number]
        tokens_BL[row, : len(tokens)] = tokens
    return _Batch(numbers, tokens_BL, model.activations_at(torch.from_numpy(tokens_BL), config.hook_points))


def _store(split: Split, config: ExtractConfig, batch: _Batch, into: np.ndarray) -> int:
    """Fills in the first records of `into`: a batch's rows, in order, without BOS and padding. Returns their number.

    Their keys are left out.
    """
    table, tokens_BL = split.contexts.table[batch.numbers], batch.tokens_BL
    position_L = np.arange(tokens_BL.shape[1])
    kept_BL = (position_L >= split.first_position) & (position_L < table["length"][:, None])
    context_N, position_N = np.nonzero(kept_BL)
    records = into[: len(context_N)]
    row_N = records["row"]
    row_N["token"], row_N["position"] = tokens_BL[kept_BL], position_N
    row_N["context"] = batch.numbers[context_N]
    row_N["document"], row_N["source"] = table["document"][context_N], table["source"][context_N]
    for kind, (hook_point, acts_BLD) in enumerate(batch.acts.items()):
        acts_ND = acts_BLD[torch.from_numpy(kept_BL).to(acts_BLD.device)]
        kept_ND = _convert_rows(acts_ND, config.dtype)
        records["norm"][:, kind] = norm_N = norms(kept_ND, config.dtype)
        if not (is_finite_N := np.isfinite(norm_N)).all():
            raise _not_finite(hook_point, acts_ND.float().cpu().numpy(), ~is_finite_N, row_N, split, config)
        records[f"acts{kind}"] = kept_ND
    return len(records)


def _convert_rows(acts_ND: torch.Tensor, dtype: str) -> np.ndarray:
    """Activations converted to DISK_DTYPES[dtype], [N, D]. torch rounds them on their device, faster than numpy."""
    kept_ND = acts_ND.to(getattr(torch, dtype)).cpu()
    return kept_ND.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else kept_ND.numpy()


def _not_finite(
    hook_point: str,
    acts_ND: Float[np.ndarray, "N D"],
    bad: np.ndarray,
    row_N: np.ndarray,
    split: Split,
    config: ExtractConfig,
) -> UserError:
    """The error that names the first of the rows marked by `bad` [N] bool."""
    kept_ND = to_float32(from_float32(acts_ND, config.dtype), config.dtype)
    first = int(np.argmax(bad))
    row, column = row_N[first], int(np.argmax(~np.isfinite(kept_ND[first])))
    value = float(acts_ND[first, column])
    why = f"does not fit into {config.dtype}; say --dtype bfloat16" if np.isfinite(value) else "is not finite"
    return UserError(
        f"{hook_point} of document {row['document']} of the {split.name} split"
        f" (source {config.sources[row['source']].name}), position {row['position']} of context {row['context']}:"
        f" value {value:g} in dimension {column} {why} ({int(bad.sum())} such rows in this batch)"
    )


def write_stores(
    split: Split,
    parts: Parts,
    median_norms: Sequence[float],
    folders: dict[str, Path],
    config: ExtractConfig,
    origin: Origin,
    profile: dict,
    bar: tqdm,
) -> dict[Path, Manifest]:
    """Pass 2: writes each hook point's store into its folder. Returns the manifests, which are not yet on disk.

    A row is stored where its norm is at most `norm_multiple` x the median norm, at every hook point.
    """
    limits = norm_limits(config.norm_multiple, median_norms)
    with contextlib.ExitStack() as threads:
        writers = []
        for kind, folder in enumerate(folders.values()):
            _begin_store(split, folder)
            width = split.record[f"acts{kind}"].shape[0]
            writer = ShardWriter(folder, width, config.dtype, config.shard_rows, len(config.sources))
            writers.append(threads.enter_context(contextlib.closing(writer)))
        for records in parts.shuffled():
            kept = within_limits(records, limits)
            for kind, writer in enumerate(writers):
                writer.add(kept[f"acts{kind}"], kept["row"])
            bar.update(len(records))
            del records, kept  # frees their memory before the next bucket is read
        manifests = {}
        for (hook_point, folder), writer, median_norm in zip(folders.items(), writers, median_norms, strict=True):
            manifests[folder] = _manifest(split, hook_point, folder, writer, median_norm, config, origin, profile)
    return manifests


def _begin_store(split: Split, folder: Path) -> None:
    """Copies the split's texts into the folder and removes what an attempt that was killed left half done."""
    make_folder(folder)
    for left in [*folder.glob(".*.tmp"), folder / MANIFEST]:
        left.unlink(missing_ok=True)
    for name in TEXT_FILES:
        with open(split.folder / name, "rb") as text:
            write_atomic(folder / name, partial(shutil.copyfileobj, text))


def _manifest(
    split: Split,
    hook_point: str,
    folder: Path,
    writer: ShardWriter,
    median_norm: float,
    config: ExtractConfig,
    origin: Origin,
    profile: dict,
) -> Manifest:
    statistics = writer.finish()
    if statistics is None:
        raise UserError(f"norm_multiple={config.norm_multiple} drops every row of the {split.name} split; raise it")
    limit = None if config.norm_multiple is None else config.norm_multiple * median_norm
    return Manifest(
        format_version=FORMAT_VERSION,
        split=split.name,
        profile=profile,
        model=origin.model,
        tokenizer=origin.tokenizer,
        hook_point=hook_point,
        d_model=writer.d_model,
        dtype=config.dtype,
        context_length=config.context_length,
        seed=config.seed,
        sources=_sources(split, config, writer.rows_by_source),
        norm_filter=NormFilter(config.norm_multiple, median_norm, limit, split.rows - writer.rows),
        rows=writer.rows,
        shards=tuple(writer.shards),
        files_sha256={file: sha256_of(folder / file) for file in TEXT_FILES},
        mean=tuple(statistics.mean_D.tolist()),
        mean_squared_norm=statistics.mean_squared_norm,
        variance=statistics.variance,
        config=to_dict(config),
    )


def _sources(split: Split, config: ExtractConfig, rows_by_source: np.ndarray) -> tuple[SourceInfo, ...]:
    table, n = split.contexts.table, len(config.sources)
    # a document's first context is the one at offset 0
    documents = np.bincount(table["source"][table["offset"] == 0], minlength=n)
    tokens = np.bincount(table["source"], table["length"] - split.first_position, minlength=n)
    return tuple(
        SourceInfo(source.name, source.path, source.weight, int(documents[i]), int(tokens[i]), int(rows_by_source[i]))
        for i, source in enumerate(config.sources)
    )
