"""Small activation stores for tests, written through the published format alone."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hafs_jax.base.files import sha256_of, write_npy
from hafs_jax.store.manifest import (
    CONTEXT,
    FORMAT_VERSION,
    ROW,
    Manifest,
    ModelInfo,
    NormFilter,
    ShardInfo,
    SourceInfo,
    TokenizerInfo,
    from_float32,
    read_manifest,
    rows_name,
    shard_name,
    to_float32,
    write_manifest,
)


def save_store(
    folder: Path,
    acts_ND: np.ndarray,
    rows: np.ndarray,
    contexts: np.ndarray,
    tokens: np.ndarray,
    documents: list[dict[str, Any]],
    shards: Sequence[int],
    dtype: str = "float32",
    /,
    **fields: Any,
) -> Path:
    """A store of `acts_ND` and their `rows` in shards of the sizes `shards`; returns `folder`.

    `fields` replace entries of the manifest, which otherwise tells of a tiny model and one source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    N, D = acts_ND.shape
    assert len(rows) == N == sum(shards)
    write_npy(folder / "contexts.npy", contexts)
    write_npy(folder / "tokens.npy", tokens)
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    kept, infos = from_float32(acts_ND.astype(np.float32), dtype), []
    for index, (start, count) in enumerate(zip(np.cumsum([0, *shards]), shards, strict=False)):
        paths = folder / shard_name(index), folder / rows_name(index)
        write_npy(paths[0], kept[start : start + count])
        write_npy(paths[1], rows[start : start + count])
        infos.append(ShardInfo(count, sha256_of(paths[0]), sha256_of(paths[1])))
    values = to_float32(kept, dtype).astype(np.float64)
    mean = values.mean(0)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        split="train",
        profile={"requested": "test", "resolved": "test", "reason": "a test"},
        model=ModelInfo("tiny", None, "folder:tiny", "float32", 2, D),
        tokenizer=TokenizerInfo("tiny", 64, 1, True),
        hook_point="blocks.0.hook_resid_post",
        d_model=D,
        dtype=dtype,
        context_length=int(contexts["length"].max()),
        seed=0,
        sources=(SourceInfo("text", "test", 1.0, len(documents), N, N),),
        norm_filter=NormFilter(None, float(np.median(np.linalg.norm(values, axis=1))), None, 0),
        rows=N,
        shards=tuple(infos),
        files_sha256={name: sha256_of(folder / name) for name in ("contexts.npy", "tokens.npy", "documents.jsonl")},
        mean=tuple(mean.tolist()),
        mean_squared_norm=float((values**2).sum(1).mean()),
        variance=float(((values - mean) ** 2).sum(1).mean()),
        config={},
    )
    write_manifest(folder, dataclasses.replace(manifest, **fields))
    return folder


def write_store(
    folder: Path,
    acts_ND: np.ndarray,
    dtype: str = "float32",
    shard_rows: int = 64,
    length: int = 8,
    **fields: Any,
) -> Path:
    """A whole store of the rows `acts_ND`, in contexts of `length` tokens with a BOS in front; returns `folder`."""
    N = len(acts_ND)
    n_contexts = -(-N // (length - 1))
    lengths = np.full(n_contexts, length, np.int32)
    lengths[-1] = N - (n_contexts - 1) * (length - 1) + 1
    table = np.zeros(n_contexts, CONTEXT)
    table["length"], table["start"], table["document"] = lengths, np.cumsum(lengths) - lengths, np.arange(n_contexts)
    rows = np.zeros(N, ROW)
    rows["context"] = rows["document"] = np.arange(N) // (length - 1)
    rows["position"] = np.arange(N) % (length - 1) + 1
    tokens = np.ones(int(lengths.sum()), np.int32)
    rows["token"] = 2 + np.arange(N) % 50
    tokens[table["start"][rows["context"]] + rows["position"]] = rows["token"]
    documents = [{"document": number} for number in range(n_contexts)]
    sizes = [min(shard_rows, N - start) for start in range(0, N, shard_rows)]
    fields = {"context_length": length, **fields}
    return save_store(folder, acts_ND, rows, table, tokens, documents, sizes, dtype, **fields)


def planted(rows: int, d_model: int, n_features: int, active: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse non-negative combinations of random unit directions and an offset: (acts [rows, D], directions [n, D])."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(n_features, d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = np.zeros((rows, n_features))
    for row in codes:
        row[random.choice(n_features, active, replace=False)] = random.uniform(1.0, 2.0, active)
    return (codes @ directions + 0.5).astype(np.float32), directions


def resealed(folder: Path) -> Path:
    """The store, whose files a test has changed, with the checksums that they now have."""
    manifest = read_manifest(folder)
    shards = tuple(
        dataclasses.replace(
            shard, sha256=sha256_of(folder / shard_name(index)), rows_sha256=sha256_of(folder / rows_name(index))
        )
        for index, shard in enumerate(manifest.shards)
    )
    files = {name: sha256_of(folder / name) for name in manifest.files_sha256}
    write_manifest(folder, dataclasses.replace(manifest, shards=shards, files_sha256=files))
    return folder
