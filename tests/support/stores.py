"""Small activation stores for tests, written through the published format alone."""

from pathlib import Path

import numpy as np

from hafs_jax.base.files import sha256_of, write_npy
from hafs_jax.store.manifest import (
    CONTEXT,
    ROW,
    Manifest,
    ModelInfo,
    NormFilter,
    ShardInfo,
    SourceInfo,
    TokenizerInfo,
    from_float32,
    rows_name,
    shard_name,
    to_float32,
    write_manifest,
)


def write_store(
    folder: Path,
    acts_ND: np.ndarray,
    dtype: str = "float32",
    shard_rows: int = 64,
    split: str = "train",
    length: int = 8,
) -> Path:
    """A whole store of the rows `acts_ND`, in contexts of `length` tokens with a BOS in front; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    N, D = acts_ND.shape
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
    write_npy(folder / "contexts.npy", table)
    write_npy(folder / "tokens.npy", tokens)
    (folder / "documents.jsonl").write_text("".join(f'{{"document": {i}}}\n' for i in range(n_contexts)))
    kept = from_float32(acts_ND.astype(np.float32), dtype)
    shards = []
    for index, start in enumerate(range(0, N, shard_rows)):
        write_npy(folder / shard_name(index), kept[start : start + shard_rows])
        write_npy(folder / rows_name(index), rows[start : start + shard_rows])
        count = len(kept[start : start + shard_rows])
        shards.append(ShardInfo(count, sha256_of(folder / shard_name(index)), sha256_of(folder / rows_name(index))))
    values = to_float32(kept, dtype).astype(np.float64)
    mean = values.mean(0)
    norms = np.linalg.norm(values, axis=1)
    write_manifest(
        folder,
        Manifest(
            format_version=1,
            split=split,
            profile={"requested": "test", "resolved": "test", "reason": "a test"},
            model=ModelInfo("tiny", None, "folder:tiny", "float32", 2, D),
            tokenizer=TokenizerInfo("tiny", 64, 1, True),
            hook_point="blocks.0.hook_resid_post",
            d_model=D,
            dtype=dtype,
            context_length=length,
            seed=0,
            sources=(SourceInfo("text", "test", 1.0, n_contexts, N, N),),
            norm_filter=NormFilter(None, float(np.median(norms)), None, 0),
            rows=N,
            shards=tuple(shards),
            files_sha256={name: sha256_of(folder / name) for name in ("contexts.npy", "tokens.npy", "documents.jsonl")},
            mean=tuple(mean.tolist()),
            mean_squared_norm=float((values**2).sum(1).mean()),
            variance=float(((values - mean) ** 2).sum(1).mean()),
            config={},
        ),
    )
    return folder


def planted(rows: int, d_model: int, n_features: int, active: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse non-negative combinations of random unit directions and an offset: (acts [rows, D], directions [n, D])."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(n_features, d_model))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    codes = np.zeros((rows, n_features))
    for row in codes:
        row[random.choice(n_features, active, replace=False)] = random.uniform(1.0, 2.0, active)
    return (codes @ directions + 0.5).astype(np.float32), directions
