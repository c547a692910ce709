"""A small shuffled store of several documents and sources, as extraction leaves one, and a tokenizer for its tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

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
    rows_name,
    shard_name,
    write_manifest,
)
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify

D, F = 5, 11
LENGTH = 7  # tokens per context, BOS included


def shuffled_store(folder: Path, documents: int = 9, contexts_each: int = 2, seed: int = 0) -> Store:
    """A shuffled store of two contexts a document, every fifth token's row dropped as a norm filter would."""
    random = np.random.default_rng(seed)
    n_contexts = documents * contexts_each
    table = np.zeros(n_contexts, CONTEXT)
    table["length"], table["start"] = LENGTH, np.arange(n_contexts) * LENGTH
    table["document"] = np.arange(n_contexts) // contexts_each
    table["source"] = table["document"] % 2
    tokens = random.integers(4, 18, n_contexts * LENGTH).astype(np.int32)
    tokens[table["start"]] = 1
    places = [(c, p) for c in range(n_contexts) for p in range(1, LENGTH) if (c * LENGTH + p) % 5]
    rows = np.zeros(len(places), ROW)
    for index, (context, position) in enumerate(random.permutation(places).tolist()):
        entry = table[context]
        token = tokens[entry["start"] + position]
        rows[index] = (token, entry["document"], context, position, entry["source"])
    acts = random.normal(size=(len(rows), D)).astype(np.float32)
    exact = acts.astype(np.float64)
    folder.mkdir(parents=True)
    write_npy(folder / "contexts.npy", table)
    write_npy(folder / "tokens.npy", tokens)
    lines = [{"document": n, "source": ["a", "b"][n % 2], "labels": {"title": f"Title {n}"}} for n in range(documents)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = []
    for shard, start in enumerate(range(0, len(rows), 40)):
        write_npy(folder / shard_name(shard), acts[start : start + 40])
        write_npy(folder / rows_name(shard), rows[start : start + 40])
        digests = sha256_of(folder / shard_name(shard)), sha256_of(folder / rows_name(shard))
        shards.append(ShardInfo(len(acts[start : start + 40]), *digests))
    write_manifest(
        folder,
        Manifest(
            format_version=1,
            split="heldout",
            profile={"requested": "test", "resolved": "test", "reason": "a test"},
            model=ModelInfo("tiny", None, "folder:tiny", "float32", 3, D),
            tokenizer=TokenizerInfo("tiny", 18, 1, True),
            hook_point="blocks.1.hook_resid_post",
            d_model=D,
            dtype="float32",
            context_length=LENGTH,
            seed=0,
            sources=tuple(
                SourceInfo(name, name, 1.0, 0, 0, int((rows["source"] == n).sum())) for n, name in enumerate("ab")
            ),
            norm_filter=NormFilter(None, 1.0, None, 0),
            rows=len(rows),
            shards=tuple(shards),
            files_sha256={name: sha256_of(folder / name) for name in ("contexts.npy", "tokens.npy", "documents.jsonl")},
            mean=tuple(exact.mean(0).tolist()),
            mean_squared_norm=float((exact**2).sum(1).mean()),
            variance=float(((exact - exact.mean(0)) ** 2).sum(1).mean()),
            config={},
        ),
    )
    assert verify(folder) == []
    return Store(folder)


def everything(store: Store, sae: Any) -> tuple[np.ndarray, np.ndarray]:
    """(latents [N, F], rows [N]) of the whole store, in its order."""
    shards = range(len(store.shard_sizes))
    acts = np.concatenate([store.read(shard) for shard in shards])
    return sae.encode(torch.from_numpy(acts)).numpy(), np.concatenate([store.rows(shard) for shard in shards])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of 18 whole words."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"word{n}" for n in range(14))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
