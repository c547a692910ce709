"""A small shuffled store of several documents and sources, as extraction leaves one, and a tokenizer for its tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hafs_jax.store.manifest import CONTEXT, ROW, SourceInfo, TokenizerInfo
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify
from tests.support.stores import save_store

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
    lines = [{"document": n, "source": ["a", "b"][n % 2], "labels": {"title": f"Title {n}"}} for n in range(documents)]
    sources = [SourceInfo(name, name, 1.0, 0, 0, int((rows["source"] == n).sum())) for n, name in enumerate("ab")]
    fields: dict[str, Any] = {"split": "heldout", "hook_point": "blocks.1.hook_resid_post", "sources": tuple(sources)}
    fields["tokenizer"] = TokenizerInfo("tiny", 18, 1, True)
    save_store(
        folder,
        acts,
        rows,
        table,
        tokens,
        lines,
        [min(40, len(rows) - start) for start in range(0, len(rows), 40)],
        **fields,
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
