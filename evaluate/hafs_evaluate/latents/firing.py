"""How chosen latents fire: with which others, on which documents, on which rows by chance. Torch; no jax.

One pass over a store, in memory bounded by the batch, chosen x F counts and chosen x documents maxima.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from hafs_evaluate.latents.top_rows import TopRows, batch_rows, batches
from hafs_jax.store.reader import Store

SAMPLED = 8  # rows drawn for each one shown, so that the shown ones can be spread over the activation's quantiles


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
