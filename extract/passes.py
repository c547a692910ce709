"""The two passes over one split: the model's rows into the shuffle's buckets, and the buckets into a store."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from extract.config import ExtractConfig
from extract.contexts import SPLITS, Batches, plan_batches
from extract.format.config import to_dict
from extract.format.errors import UserError
from extract.format.files import sha256_of
from extract.format.store import (
    FORMAT_VERSION,
    MANIFEST,
    ROW,
    Contexts,
    Manifest,
    NormFilter,
    SourceInfo,
    TokenizerInfo,
    from_float32,
    to_float32,
)
from extract.models import LanguageModel
from extract.shards import ShardWriter
from extract.shuffle import Spill, n_buckets, shuffle_keys, spilled

TEXT_FILES = ("contexts.npy", "tokens.npy", "documents.jsonl")


@dataclass(frozen=True)
class Split:
    """One split's text on disk, how it is run through the model, and how its rows are kept on their way."""

    name: str
    folder: Path
    contexts: Contexts
    batches: Batches
    first_position: int  # 1 where BOS is at 0, else 0
    record: np.dtype

    @property
    def rows(self) -> int:
        lengths = self.contexts.table["length"].astype(np.int64)
        return int((lengths - self.first_position).sum())

    @property
    def bytes_needed(self) -> int:
        """Disk space of buckets, norms, shards and rows files together, before the norm filter."""
        stored = self.record["acts"].itemsize + ROW.itemsize
        return self.rows * (self.record.itemsize + 4 + stored)


def open_split(name: str, folder: Path, config: ExtractConfig, model: LanguageModel, d_model: int) -> Split:
    """The split whose contexts lie in `folder`."""
    arrays = [np.load(folder / file, mmap_mode="r", allow_pickle=False) for file in ("contexts.npy", "tokens.npy")]
    contexts = Contexts(*arrays)
    batches = plan_batches(contexts.table["length"], config.batch_tokens)
    return Split(name, folder, contexts, batches, int(model.prepend_bos), spilled(d_model, config.dtype))


def spill_rows(
    split: Split,
    model: LanguageModel,
    config: ExtractConfig,
    spill_folder: Path,
    batches_done: int,
    counts: list[int],
    save: Callable[[int, list[int]], None],
    save_seconds: float,
    bar: tqdm,
) -> Spill:
    """Runs the model over the split's batches from `batches_done` on and appends every row to its bucket.

    Every `save_seconds` and at the end, `save(batches done, rows by bucket)` is called, once all of it is synced.
    """
    counts = counts or [0] * n_buckets(split.rows, split.record)
    stream, saved = SPLITS.index(split.name), time.monotonic()
    with contextlib.closing(Spill(spill_folder, split.record, counts)) as spill:
        for index in range(batches_done, len(split.batches)):
            records = _records(split, model, config, split.batches[index])
            records["key"] = shuffle_keys(config.seed, stream, spill.rows, len(records))
            spill.append(records)
            bar.update(len(records))
            if index + 1 == len(split.batches) or time.monotonic() - saved >= save_seconds:
                spill.sync()
                save(index + 1, spill.counts)
                saved = time.monotonic()
    return spill


def _records(split: Split, model: LanguageModel, config: ExtractConfig, numbers: np.ndarray) -> np.ndarray:
    """The rows of the contexts `numbers`, keys not yet filled in: positions in order, without BOS and padding."""
    table = split.contexts.table[numbers]
    longest = int(table["length"].max())
    tokens_BL = np.zeros((len(numbers), longest), np.int64)
    for row, number in enumerate(numbers):
        tokens_BL[row, : table["length"][row]] = split.contexts[number]
    position_L = np.arange(longest)
    kept_BL = (position_L >= split.first_position) & (position_L < table["length"][:, None])
    acts_BLD = model.activations(torch.from_numpy(tokens_BL), config.hook_point)
    acts_ND = acts_BLD[torch.from_numpy(kept_BL).to(acts_BLD.device)].float().cpu().numpy()

    context_N, position_N = np.nonzero(kept_BL)
    records = np.zeros(len(acts_ND), split.record)
    row_N = records["row"]
    row_N["token"], row_N["position"] = tokens_BL[kept_BL], position_N
    row_N["context"] = numbers[context_N]
    row_N["document"], row_N["source"] = table["document"][context_N], table["source"][context_N]
    records["acts"] = from_float32(acts_ND, config.dtype)
    kept_ND = to_float32(records["acts"], config.dtype)
    _check_finite(acts_ND, kept_ND, row_N, split, config)
    records["norm"] = np.sqrt(np.einsum("nd,nd->n", kept_ND, kept_ND, dtype=np.float64))
    return records


def _check_finite(
    acts_ND: Float[np.ndarray, "N D"],
    kept_ND: Float[np.ndarray, "N D"],
    row_N: np.ndarray,
    split: Split,
    config: ExtractConfig,
) -> None:
    bad = ~np.isfinite(kept_ND).all(1)
    if not bad.any():
        return
    first = int(np.argmax(bad))
    row, column = row_N[first], int(np.argmax(~np.isfinite(kept_ND[first])))
    value = float(acts_ND[first, column])
    why = f"does not fit into {config.dtype}; say --dtype bfloat16" if np.isfinite(value) else "is not finite"
    raise UserError(
        f"{config.hook_point} of document {row['document']} of the {split.name} split"
        f" (source {config.sources[row['source']].name}), position {row['position']} of context {row['context']}:"
        f" value {value:g} in dimension {column} {why} ({int(bad.sum())} such rows in this batch)"
    )


def write_store(
    split: Split,
    spill: Spill,
    median_norm: float,
    config: ExtractConfig,
    model: LanguageModel,
    profile: dict,
    bar: tqdm,
) -> Manifest:
    """Writes the shuffled shards of rows within `norm_multiple` x `median_norm`; the manifest, not yet on disk."""
    for left in [*split.folder.glob(".*.tmp"), split.folder / MANIFEST]:
        left.unlink(missing_ok=True)  # of an attempt that was killed
    limit = None if config.norm_multiple is None else config.norm_multiple * median_norm
    d_model = split.record["acts"].shape[0]
    writer = ShardWriter(split.folder, d_model, config.dtype, config.shard_rows, len(config.sources))
    for records in spill.shuffled():
        kept = records if limit is None else records[records["norm"].astype(np.float64) <= limit]
        writer.add(kept["acts"], kept["row"])
        bar.update(len(records))
    statistics = writer.finish()
    if statistics is None:
        raise UserError(f"norm_multiple={config.norm_multiple} drops every row of the {split.name} split; raise it")
    return Manifest(
        format_version=FORMAT_VERSION,
        split=split.name,
        profile=profile,
        model=model.info,
        tokenizer=TokenizerInfo(model.info.name, len(model.tokenizer), model.bos_token_id, model.prepend_bos),
        hook_point=config.hook_point,
        d_model=d_model,
        dtype=config.dtype,
        context_length=config.context_length,
        seed=config.seed,
        sources=_sources(split, config, writer.rows_by_source),
        norm_filter=NormFilter(config.norm_multiple, median_norm, limit, spill.rows - writer.rows),
        rows=writer.rows,
        shards=tuple(writer.shards),
        files_sha256={file: sha256_of(split.folder / file) for file in TEXT_FILES},
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
