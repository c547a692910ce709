"""What each latent of an SAE fires on: passes over a store in bounded memory. Torch; no jax.

`scan` sees all latents: how often each fires, and its best rows. `observe` sees a few chosen ones: with which other
latents they fire, on which documents, and on which rows by chance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from hafs_jax.store.reader import Store

BATCH_FLOATS = 1 << 24  # floats that a batch's activations and latents may take together: 64 MiB
SAMPLED = 8  # rows drawn for each one shown, so that the shown ones can be spread over the activation's quantiles


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


@dataclass(frozen=True)
class Firing:
    """C chosen latents over the first `rows` rows of a store; a latent fires where its activation is positive."""

    rows: int
    count_F: np.ndarray  # int64, rows on which each latent of the dictionary fires
    together_CF: np.ndarray  # int64, rows on which the chosen latent and the other one both fire
    documents_N: np.ndarray  # int64, numbers of the N documents that the rows are of, ascending
    maximum_CN: np.ndarray  # float32, the chosen latent's highest activation on each document; 0 where it is silent
    mass_CN: np.ndarray  # float32, the sum of its activations on each document
    rows_N: np.ndarray  # int64, rows of each document looked at
    random_rows_CR: np.ndarray  # int64, see `spread_rows`; -1: none


@torch.no_grad()
def observe(sae: Any, store: Store, chosen_C: np.ndarray, max_rows: int, random_rows: int, seed: int) -> Firing:
    """What `Firing` holds of the latents `chosen_C`, over the store's first `max_rows` rows."""
    n_latents, n_chosen, documents_N = sae.W_dec.shape[0], len(chosen_C), documents_of(store, max_rows)
    n_documents = len(documents_N)
    count_F = np.zeros(n_latents, np.int64)
    together_CF = np.zeros((n_chosen, n_latents), np.int64)
    maximum_CN, mass_CN = np.zeros((2, n_chosen, n_documents), np.float32)
    rows_N = np.zeros(n_documents, np.int64)
    sample, generator, seen = TopRows(n_chosen, SAMPLED * random_rows), np.random.default_rng(seed), 0
    for first, acts_BD, rows_B in batches(store, max_rows, batch_rows(store, n_latents)):
        latents_BF = sae.encode(torch.from_numpy(acts_BD).to(sae.device, sae.dtype)).float().cpu().numpy()
        document_B = np.searchsorted(documents_N, rows_B["document"])
        row, latent = np.divmod(np.flatnonzero(latents_BF > 0), n_latents)
        fires_BF = sparse.csr_array((np.ones(len(row), np.int32), (row, latent)), latents_BF.shape)
        together_CF += (fires_BF[:, chosen_C].T @ fires_BF).toarray()
        count_F += np.bincount(latent, minlength=n_latents)
        rows_N += np.bincount(document_B, minlength=n_documents)
        row, slot = np.nonzero(latents_BF[:, chosen_C] > 0)
        value = latents_BF[row, chosen_C[slot]]
        np.maximum.at(maximum_CN, (slot, document_B[row]), value)
        np.add.at(mass_CN, (slot, document_B[row]), value)
        key = generator.random(len(row), np.float32)
        enters = key > sample.floor_F[slot] if random_rows else np.zeros(len(row), bool)
        sample.add(slot[enters], key[enters], document_B[row[enters]], first + row[enters], value[enters])
        seen += len(acts_BD)
    random_rows_CR = spread_rows(sample.rows_FN, sample.payload_FN, random_rows)
    return Firing(seen, count_F, together_CF, documents_N, maximum_CN, mass_CN, rows_N, random_rows_CR)


def documents_of(store: Store, max_rows: int | None) -> np.ndarray:
    """The numbers of the documents that the store's first `max_rows` rows are of, ascending, int64."""
    left = len(store) if max_rows is None else max_rows
    found = [np.empty(0, np.int64)]
    for shard, size in enumerate(store.shard_sizes):
        found.append(np.unique(store.rows(shard)["document"][: min(size, left)]).astype(np.int64))
        left -= min(size, left)
    return np.unique(np.concatenate(found))


def spread_rows(rows_CS: np.ndarray, values_CS: np.ndarray, n: int) -> np.ndarray:
    """Of each latent's drawn rows, `n` at the middles of n equal shares of them by activation, highest first; [C, n].

    The drawn rows are a uniform draw, at most one a document, of those on which the latent fires; so the i-th row
    stands for the i-th n-quantile of the latent's activation. Places that no row fills are -1 (and come last).
    """
    found = np.full((len(rows_CS), n), -1, np.int64)
    for slot, (rows, values) in enumerate(zip(rows_CS, values_CS, strict=True)):
        order = np.flatnonzero(rows >= 0)
        order = order[np.lexsort((rows[order], -values[order]))]
        take = min(n, len(order))
        middles = ((np.arange(take) + 0.5) * len(order) / max(take, 1)).astype(np.int64)
        found[slot, :take] = rows[order[middles]]
    return found
