"""What each latent of an SAE fires on: passes over a store in bounded memory. Imports torch, not jax.

A latent fires on a row where its activation is positive. `scan` sees all latents: how often each fires, and its top
rows. `observe` sees a few chosen latents more closely: with which other latents they fire, on which documents, and on
rows drawn at random.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse

from hafs_evaluate.core.encode import TorchSAE, encode_store, to_numpy
from hafs_jax.store.reader import Store

BINS = 24  # of a latent's histogram of activations, from 0 to its highest
DRAWN_PER_SHOWN = 8  # rows drawn for each random row shown, so that those shown can be spread over the quantiles


@dataclass(frozen=True)
class Scan:
    """How often each latent fires, how strongly, and its top rows: those on which it is highest, one per document.

    Rows are numbered through all shards of the store. Where a latent has fewer than N top rows, the rest are -1.
    """

    rows: int  # rows of the store that were read
    density_F: Float[np.ndarray, "F"]  # float64, share of the rows on which the latent fires
    max_activation_F: Float[np.ndarray, "F"]
    top_rows_FN: Int[np.ndarray, "F N"]  # best first; of equal activations the earlier row


@torch.no_grad()
def scan(sae: TorchSAE, store: Store, max_rows: int, examples: int) -> Scan:
    """`Scan` of the store's first `max_rows` rows, with `examples` top rows of each latent.

    Memory is bounded by a batch and F x examples. Only activations above those of a latent's top rows are looked at.
    """
    n_latents = sae.W_dec.shape[0]
    count_F = torch.zeros(n_latents, dtype=torch.int64)
    max_F = torch.zeros(n_latents)
    top = TopRows(n_latents, examples)
    seen = 0
    for batch in encode_store(sae, store, max_rows):
        latents_BF = batch.latents_BF.float().cpu()
        count_F += (latents_BF > 0).sum(0, dtype=torch.int32)
        max_F = torch.maximum(max_F, latents_BF.amax(0))
        beats = np.flatnonzero((latents_BF > torch.from_numpy(top.floor_F)).numpy())  # 2x as fast as torch.nonzero
        row, latent = np.divmod(beats, n_latents)
        value, document = latents_BF.numpy()[row, latent], batch.rows_B["document"][row]
        top.add(latent, value, document, batch.numbers_B[row])
        seen += len(latents_BF)
    return Scan(seen, count_F.numpy() / max(seen, 1), max_F.numpy(), top.rows_FN)


class TopRows:
    """The N rows of the highest value seen so far, of each latent, from different documents.

    Each row may carry one more number of the caller's, the payload.
    """

    def __init__(self, n_latents: int, n: int) -> None:
        self.n = n
        self.values_FN = np.zeros((n_latents, n), np.float32)
        self.rows_FN = np.full((n_latents, n), -1, np.int64)
        self.payload_FN = np.zeros((n_latents, n), np.float32)
        self._documents_FN = np.full((n_latents, n), -1, np.int64)

    @property
    def floor_F(self) -> Float[np.ndarray, "F"]:
        """What a value must exceed to enter. An equal one never enters, since its row comes later."""
        return self.values_FN[:, -1]

    def add(
        self,
        latent: Int[np.ndarray, "P"],
        value: Float[np.ndarray, "P"],
        document: Int[np.ndarray, "P"],
        row: Int[np.ndarray, "P"],
        payload: Float[np.ndarray, "P"] | None = None,
    ) -> None:
        """Offers P pairs of a latent and a row, later rows than those before; `payload` is by default the value."""
        touched = np.unique(latent)
        which, rank = np.nonzero(self.rows_FN[touched] >= 0)
        known = touched[which]
        latent = np.concatenate([known, latent])
        payload = np.concatenate([self.payload_FN[known, rank], value if payload is None else payload])
        value = np.concatenate([self.values_FN[known, rank], value])
        document = np.concatenate([self._documents_FN[known, rank], document])
        row = np.concatenate([self.rows_FN[known, rank], row])

        order = np.lexsort((row, -value, document, latent))  # puts each document's best row first
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


@dataclass(frozen=True)
class Firing:
    """How C chosen latents fire over the first `rows` rows of a store, which come from N documents."""

    rows: int
    count_F: Int[np.ndarray, "F"]  # rows on which each latent of the dictionary fires
    together_CF: Int[np.ndarray, "C F"]  # int32, rows on which the chosen latent and the other one both fire
    documents_N: Int[np.ndarray, "N"]  # the documents' numbers, ascending
    maximum_CN: Float[np.ndarray, "C N"]  # the chosen latent's highest activation on each document; 0 where silent
    mass_CN: Float[np.ndarray, "C N"]  # the sum of its activations on each document
    rows_N: Int[np.ndarray, "N"]  # rows of each document
    random_rows_CR: Int[np.ndarray, "C R"]  # rows drawn from those on which it fires, see `spread_rows`; -1: none
    histogram_CH: Int[np.ndarray, "C H"]  # rows by activation, in BINS equal bins from 0 to the highest


@torch.no_grad()
def observe(
    sae: TorchSAE,
    store: Store,
    chosen_C: Int[np.ndarray, "C"],
    max_activation_C: Float[np.ndarray, "C"],
    max_rows: int,
    random_rows: int,
    seed: int,
) -> Firing:
    """`Firing` of the latents `chosen_C` over the store's first `max_rows` rows, with `random_rows` rows of each drawn.

    `max_activation_C` are their highest activations on these rows, at which their histograms end.
    Memory is bounded by a batch, C x F counts, and C x N maxima and sums.
    """
    n_latents, n_chosen, documents_N = sae.W_dec.shape[0], len(chosen_C), documents_of(store, max_rows)
    n_documents = len(documents_N)
    count_F = np.zeros(n_latents, np.int64)
    together_CF = np.zeros((n_chosen, n_latents), np.int32)
    histogram_CH = np.zeros((n_chosen, BINS), np.int64)
    bins_C = BINS / np.maximum(max_activation_C, 1e-30)
    maximum_CN, mass_CN = np.zeros((2, n_chosen, n_documents), np.float32)
    rows_N = np.zeros(n_documents, np.int64)
    # the rows of the highest random keys are a uniform draw; their payload is the activation
    draw, generator, seen = TopRows(n_chosen, DRAWN_PER_SHOWN * random_rows), np.random.default_rng(seed), 0
    for batch in encode_store(sae, store, max_rows):
        latents_BF = to_numpy(batch.latents_BF)
        document_B = np.searchsorted(documents_N, batch.rows_B["document"])
        row, latent = np.divmod(np.flatnonzero(latents_BF > 0), n_latents)
        fires_BF = sparse.csr_array((np.ones(len(row), np.int32), (row, latent)), latents_BF.shape)
        together_CF += (fires_BF[:, chosen_C].T @ fires_BF).toarray()
        count_F += np.bincount(latent, minlength=n_latents)
        rows_N += np.bincount(document_B, minlength=n_documents)
        row, which = np.nonzero(latents_BF[:, chosen_C] > 0)
        value = latents_BF[row, chosen_C[which]]
        bin = np.minimum((value * bins_C[which]).astype(np.int64), BINS - 1)
        histogram_CH += np.bincount(which * BINS + bin, minlength=n_chosen * BINS).reshape(n_chosen, BINS)
        np.maximum.at(maximum_CN, (which, document_B[row]), value)
        np.add.at(mass_CN, (which, document_B[row]), value)
        key = generator.random(len(row), np.float32)
        enters = key > draw.floor_F[which] if random_rows else np.zeros(len(row), bool)
        draw.add(which[enters], key[enters], document_B[row[enters]], batch.numbers_B[row[enters]], value[enters])
        seen += len(latents_BF)
    random_rows_CR = spread_rows(draw.rows_FN, draw.payload_FN, random_rows)
    return Firing(seen, count_F, together_CF, documents_N, maximum_CN, mass_CN, rows_N, random_rows_CR, histogram_CH)


def documents_of(store: Store, max_rows: int | None = None) -> Int[np.ndarray, "N"]:
    """The numbers of the documents that the store's first `max_rows` rows (default: all) come from, ascending."""
    found = [np.empty(0, np.int64)]
    for batch in store.batches(max(1, len(store)), max_rows, raw=True):
        found.append(np.unique(batch.rows_B["document"]).astype(np.int64))
    return np.unique(np.concatenate(found))


def spread_rows(rows_CS: Int[np.ndarray, "C S"], values_CS: Float[np.ndarray, "C S"], n: int) -> Int[np.ndarray, "C n"]:
    """`n` of each latent's S drawn rows, spread evenly over their activations, highest first.

    The drawn rows of a latent, ordered by activation, are divided into n equal parts, and the middle one of each is
    taken. Since they are a uniform draw from the rows on which the latent fires (at most one per document), the n rows
    stand for the n-quantiles of its activation. Of a latent with fewer drawn rows all are taken, and -1 fills up.
    """
    found = np.full((len(rows_CS), n), -1, np.int64)
    for latent, (rows, values) in enumerate(zip(rows_CS, values_CS, strict=True)):
        order = np.flatnonzero(rows >= 0)
        order = order[np.lexsort((rows[order], -values[order]))]
        take = min(n, len(order))
        middles = ((np.arange(take) + 0.5) * len(order) / max(take, 1)).astype(np.int64)
        found[latent, :take] = rows[order[middles]]
    return found
