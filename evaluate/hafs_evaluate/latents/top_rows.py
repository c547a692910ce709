"""Each latent's density, maximum and best rows, in one pass over a store with bounded memory. Torch; no jax."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hafs_jax.store.reader import Store

BATCH_FLOATS = 1 << 24  # floats that a batch's activations and latents may take together: 64 MiB


@dataclass(frozen=True)
class Scan:
    """One pass over a store. Rows are numbered through the store's shards; an empty place in the top is row -1."""

    rows: int
    density_F: np.ndarray  # float64, share of the rows on which the latent is positive
    max_activation_F: np.ndarray  # float32
    top_rows_FN: np.ndarray  # int64, best first; at most one row a document; of equal activations the earlier row
    top_values_FN: np.ndarray  # float32


@torch.no_grad()
def scan(sae: Any, store: Store, max_rows: int, examples: int) -> Scan:
    """Density, maximum and the `examples` best rows of every latent over the store's first `max_rows` rows.

    Memory is bounded by the batch and by F x examples; only rows that beat a latent's present n-th best are looked at.
    """
    n_latents = sae.W_dec.shape[0]
    count_F = torch.zeros(n_latents, dtype=torch.int64)
    max_F = torch.zeros(n_latents)
    top = TopRows(n_latents, examples)
    seen = 0
    for first, acts_BD, rows_B in batches(store, max_rows, batch_rows(store, n_latents)):
        latents_BF = sae.encode(torch.from_numpy(acts_BD).to(sae.device, sae.dtype)).float().cpu()
        count_F += (latents_BF > 0).sum(0, dtype=torch.int32)
        max_F = torch.maximum(max_F, latents_BF.amax(0))
        beats = np.flatnonzero((latents_BF > torch.from_numpy(top.floor_F)).numpy())  # 2x as fast as torch.nonzero
        row, latent = np.divmod(beats, n_latents)
        top.add(latent, latents_BF.numpy()[row, latent], rows_B["document"][row], first + row)
        seen += len(acts_BD)
    return Scan(seen, count_F.numpy() / max(seen, 1), max_F.numpy(), top.rows_FN, top.values_FN)


def batch_rows(store: Store, n_latents: int) -> int:
    """Rows a batch, so that activations, latents and one comparison of them stay within BATCH_FLOATS."""
    return max(1, min(8192, BATCH_FLOATS // (store.manifest.d_model + 2 * n_latents)))


class TopRows:
    """The running best `n` rows of every latent, of distinct documents; beside each a payload of the caller's."""

    def __init__(self, n_latents: int, n: int) -> None:
        self.n = n
        self.values_FN = np.zeros((n_latents, n), np.float32)
        self.rows_FN = np.full((n_latents, n), -1, np.int64)
        self.payload_FN = np.zeros((n_latents, n), np.float32)
        self._documents_FN = np.full((n_latents, n), -1, np.int64)

    @property
    def floor_F(self) -> np.ndarray:
        """What a value must exceed to enter. An equal one never does: it is of a later row."""
        return self.values_FN[:, -1]

    def add(
        self,
        latent: np.ndarray,
        value: np.ndarray,
        document: np.ndarray,
        row: np.ndarray,
        payload: np.ndarray | None = None,
    ) -> None:
        touched = np.unique(latent)
        slot, place = np.nonzero(self.rows_FN[touched] >= 0)
        kept = touched[slot]
        latent = np.concatenate([kept, latent])
        payload = np.concatenate([self.payload_FN[kept, place], value if payload is None else payload])
        value = np.concatenate([self.values_FN[kept, place], value])
        document = np.concatenate([self._documents_FN[kept, place], document])
        row = np.concatenate([self.rows_FN[kept, place], row])

        order = np.lexsort((row, -value, document, latent))  # each document's best row
        is_best = np.ones(len(order), bool)
        is_best[1:] = (np.diff(latent[order]) != 0) | (np.diff(document[order]) != 0)
        order = order[is_best]
        order = order[np.lexsort((row[order], -value[order], latent[order]))]
        latent = latent[order]
        rank = np.arange(len(latent)) - np.searchsorted(latent, latent)
        fits = rank < self.n
        at, order = (latent[fits], rank[fits]), order[fits]
        self.values_FN[at], self.payload_FN[at] = value[order], payload[order]
        self._documents_FN[at], self.rows_FN[at] = document[order], row[order]


def batches(store: Store, max_rows: int, rows_at_once: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the first row, activations [B, D] float32, rows [B] of ROW) over the store's first `max_rows`."""
    base = 0
    for shard, size in enumerate(store.shard_sizes):
        table = store.rows(shard)
        for start in range(0, min(size, max_rows - base), rows_at_once):
            stop = min(start + rows_at_once, size, max_rows - base)
            yield base + start, store.read(shard, start, stop), np.array(table[start:stop])
        base += size
