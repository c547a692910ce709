"""The format of an activation store: its files, its manifest, its dtypes. Standard library and numpy only.

A store is a folder:

    manifest.json      written last; without it there is no store
    shard-00000.npy    [rows, D] activations, rows in globally shuffled order, every shard but the last full
    rows-00000.npy     [rows] of ROW: each activation's token id, document, context, position and source
    contexts.npy       [contexts] of CONTEXT: where each context's tokens lie in tokens.npy
    tokens.npy         [tokens] int32: the token ids of all contexts, one after another, BOS included
    documents.jsonl    one object a document: its number, source, text hash and labels
    timing.json        what extraction took; not part of the checksums, since it differs from run to run

npy has no bfloat16. A store of that dtype keeps the 16 bits as uint16, and the manifest's `dtype` says "bfloat16".
`to_float32` converts them; a JAX reader can view the bits as `ml_dtypes.bfloat16` at no cost.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_record
from hafs_jax.base.options import from_dict, to_dict

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TIMING = "timing.json"

ROW = np.dtype([("token", "<i4"), ("document", "<i4"), ("context", "<i4"), ("position", "<u2"), ("source", "<u2")])
"""What describes one activation row: token id, document, context, position in that context, source (all numbers)."""

CONTEXT = np.dtype([("start", "<i8"), ("length", "<i4"), ("document", "<i4"), ("offset", "<i4"), ("source", "<u2")])
"""What describes one context: its slice of tokens.npy, its document and source, and the offset in the document of its
first token that is not BOS."""

DISK_DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
"""The numpy dtype in which activations of each dtype lie on disk."""


UPSTREAM = {"local/SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""The hub's name of the model that a packaged one is a quantised copy of, by the packaged one's alias."""


@dataclass(frozen=True)
class ModelInfo:
    """The language model that a store came from; enough to load it again."""

    name: str  # hub name, or the alias of a packaged model
    revision: str | None  # hub commit, or the packaged file's sha256; None for a local folder
    origin: str  # "hub", "folder:<path>", "file:<path>" (GGUF), "wheel:<name>==<version>", or "array:<file>": no model
    dtype: str  # the dtype that the model computed in
    n_layers: int
    d_model: int
    fingerprint: str | None = None  # SHA-256 of a local model's config, tokenizer and weights; None where not recorded

    @property
    def hub_name(self) -> str | None:
        """What the hub calls the model, or the one that a packaged model is a copy of; None for any other model."""
        return UPSTREAM.get(self.name, self.name if self.origin == "hub" else None)

    @property
    def hub_revision(self) -> str | None:
        """The hub's commit; None for a model that did not come from the hub."""
        return self.revision if self.origin == "hub" else None

    @property
    def public_origin(self) -> str:
        """`origin` without the place of a local file: what others may read."""
        kind, _, _ = self.origin.partition(":")
        return self.origin if kind in ("hub", "wheel") else kind


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the token ids. A vocabulary of 0: there was none, see `Manifest.has_tokens`."""

    name: str
    vocab_size: int
    bos_token_id: int | None
    prepend_bos: bool  # every context begins with BOS; BOS rows themselves are never stored


@dataclass(frozen=True)
class SourceInfo:
    """One text source of the mix and what came of it. Its numbers are those of this store alone, not of both splits."""

    name: str
    path: str  # hub dataset, packaged data or local file
    weight: float  # share of tokens asked for, relative to the other sources
    documents: int
    tokens: int  # tokens run through the model, BOS excluded
    rows: int  # activation rows stored
    revision: str | None = None  # commit of a hub dataset; None for other text, and where it was not recorded
    fingerprint: str | None = None  # SHA-256 of a local source's files; None for other text, and where not recorded


@dataclass(frozen=True)
class NormFilter:
    """Rows whose norm exceeds `multiple` x the median norm of the training split are not stored.

    Where several hook points were extracted together, each has its own median. A row that one of them drops is dropped
    from all of their stores, which so stay aligned.
    """

    multiple: float | None  # None: no filter
    median_norm: float  # exact median over all training rows before the filter
    max_norm: float | None  # multiple x median_norm; None: no filter
    dropped_rows: int

    def summary(self, rows: int) -> str:
        """What was dropped beside the `rows` that were stored, in words."""
        if self.multiple is None:
            return "no norm filter"
        share = self.dropped_rows / (rows + self.dropped_rows)
        limit = f"{self.multiple:g} x the median norm {self.median_norm:.4g}"
        return f"{self.dropped_rows:,} ({share:.2%}) over {limit} dropped"


@dataclass(frozen=True)
class ShardInfo:
    """One shard and its rows file, with the checksums of both."""

    rows: int
    sha256: str
    rows_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that a reader needs to know of a store.

    Statistics are of the stored rows, in float64: sums of each shard, added in the order of the shards.
    """

    format_version: int
    split: str  # "train" or "heldout"; the two never share a document
    profile: dict[str, Any]  # {"requested", "resolved", "reason"}; of text also "suite", the probing suite
    model: ModelInfo
    tokenizer: TokenizerInfo
    hook_point: str
    d_model: int
    dtype: str  # float16, bfloat16 or float32
    context_length: int  # tokens, BOS included
    seed: int
    sources: tuple[SourceInfo, ...]
    norm_filter: NormFilter
    rows: int
    shards: tuple[ShardInfo, ...]
    files_sha256: dict[str, str]  # contexts.npy, tokens.npy, documents.jsonl
    mean: tuple[float, ...]  # [D]
    mean_squared_norm: float  # mean of |x|^2
    variance: float  # mean of |x - mean|^2, the denominator of FVU
    config: dict[str, Any]  # the resolved config that made the store

    @property
    def has_tokens(self) -> bool:
        """Whether the rows come from a language model over text. False for imported arrays and synthetic worlds."""
        return self.tokenizer.vocab_size > 0

    @property
    def fingerprint(self) -> str:
        """A short hash of all shards' activations: equal where two stores hold the same ones in the same order."""
        digest = hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode())
        return digest.hexdigest()[:16]


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.npy"


def rows_name(index: int) -> str:
    return f"rows-{index:05d}.npy"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes the folder a store. Everything else must be on disk already."""
    write_record(folder / MANIFEST, to_dict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store at `folder`; `UserError` where there is none, or one of another format."""
    path = folder / MANIFEST
    values = read_json(path, "an activation store's manifest (no manifest, no store: run `make extract`)")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; extract it again")
    manifest = from_dict(Manifest, values, str(path))
    if manifest.mean and len(manifest.mean) != manifest.d_model:
        raise UserError(
            f"{path}: expected a mean of {manifest.d_model} numbers (d_model), found {len(manifest.mean)}; restore it"
        )
    return manifest


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Activations as they lie on disk (DISK_DTYPES[dtype]), converted to float32. Exact."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 activations as they lie on disk (DISK_DTYPES[dtype]), rounded to nearest even.

    A value too large for `dtype` becomes infinity; the caller must check for it.
    """
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(DISK_DTYPES[dtype])
