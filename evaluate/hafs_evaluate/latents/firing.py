"""What each latent of an SAE fires on: passes over a store in bounded memory. Imports torch, not jax.

A latent fires on a row where its activation is positive. `scan` sees all latents: how often each fires, and its top
rows. `observe` sees a few chosen latents more closely: with which other latents they fire, on which documents, and on
rows drawn at random.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from hafs_evaluate.core.fired import Block, FiredRows
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


def scan(fired: FiredRows, examples: int) -> Scan:
    """`Scan` of the rows in `fired`, with `examples` top rows of each latent. Memory is bounded by F x examples."""
    count_F = np.zeros(fired.n_latents, np.int64)
    max_F = np.zeros(fired.n_latents, np.float32)
    top, seen = TopRows(fired.n_latents, examples), 0
    for block in fired:
        count_F += np.bincount(block.latents.indices, minlength=fired.n_latents)
        max_F = np.maximum(max_F, block.latents.max(axis=0).toarray().ravel())
        top.add_best(block, block.latents.data)
        seen += len(block.numbers_B)
    return Scan(seen, count_F / max(seen, 1), max_F, top.rows_FN)


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

    def add_best(
        self, block: Block, value_P: Float[np.ndarray, "P"], payload_P: Float[np.ndarray, "P"] | None = None
    ) -> None:
        """Offers the firings of a block, later rows than those before, with the values `value_P`.

        Of each latent only those are sorted that are no lower than the n-th best of the block's documents.
        """
        runs = block.runs
        if not len(runs.start_S):
            return
        sorted_P = value_P[runs.order_P]
        latent_P = np.repeat(runs.latent_S, np.diff([*runs.start_S, len(sorted_P)]))
        floor_F = _nth_best(np.maximum.reduceat(sorted_P, runs.start_S), runs.latent_S, len(self.rows_FN), self.n)
        enters_P = (sorted_P >= floor_F[latent_P]) & (sorted_P > self.floor_F[latent_P])
        place, row = runs.order_P[enters_P], block.row_P[runs.order_P[enters_P]]
        payload = None if payload_P is None else payload_P[place]
        self.add(latent_P[enters_P], value_P[place], block.document_B[row], block.numbers_B[row], payload)


@dataclass(frozen=True)
class Firing:
    """How C chosen latents fire over the first `rows` rows of a store, which come from N documents."""

    rows: int
    count_F: Int[np.ndarray, "F"]  # rows on which each latent of the dictionary fires
    together_CF: Int[np.ndarray, "C F"]  # int32, rows on which the chosen latent and the other one both fire
    documents_N: Int[np.ndarray, "N"]  # the documents' numbers, ascending
    maximum_CN: sparse.csr_array  # float32, the chosen latent's highest activation on each document
    mass_CN: sparse.csr_array  # float32, the sum of its activations on each document
    rows_N: Int[np.ndarray, "N"]  # rows of each document
    random_rows_CR: Int[np.ndarray, "C R"]  # rows drawn from those on which it fires, see `spread_rows`; -1: none
    histogram_CH: Int[np.ndarray, "C H"]  # rows by activation, in BINS equal bins from 0 to the highest


def observe(
    fired: FiredRows,
    chosen_C: Int[np.ndarray, "C"],
    max_activation_C: Float[np.ndarray, "C"],
    random_rows: int,
    seed: int,
) -> Firing:
    """`Firing` of the latents `chosen_C` over the rows in `fired`, with `random_rows` rows of each drawn.

    `max_activation_C` are their highest activations on these rows, at which their histograms end.
    Memory is bounded by C x F counts, and by the maxima and sums of the documents on which the latents fire.
    """
    n_latents, n_chosen, documents_N = fired.n_latents, len(chosen_C), documents_of(fired.store, fired.max_rows)
    count_F = np.zeros(n_latents, np.int64)
    together_CF = np.zeros((n_chosen, n_latents), np.int32)
    histogram_CH = np.zeros((n_chosen, BINS), np.int64)
    bins_C = BINS / np.maximum(max_activation_C, 1e-30)
    maximum_CN = mass_CN = sparse.csr_array((n_chosen, len(documents_N)), dtype=np.float32)
    rows_N = np.zeros(len(documents_N), np.int64)
    # the rows of the highest random keys are a uniform draw; their payload is the activation
    draw, generator, seen = TopRows(n_chosen, DRAWN_PER_SHOWN * random_rows), np.random.default_rng(seed), 0
    for block in fired:
        own = block.columns(chosen_C)
        value_P, which_P = own.latents.data, own.latents.indices
        count_F += np.bincount(block.latents.indices, minlength=n_latents)
        together_CF += (_ones(own.latents).T @ _ones(block.latents)).toarray()
        rows_N += np.bincount(np.searchsorted(documents_N, block.document_B), minlength=len(documents_N))
        bin_P = np.minimum((value_P * bins_C[which_P]).astype(np.int64), BINS - 1)
        histogram_CH += np.bincount(which_P * BINS + bin_P, minlength=n_chosen * BINS).reshape(n_chosen, BINS)
        maximum_CN = maximum_CN.maximum(_of_documents(own, np.maximum, documents_N))
        mass_CN = mass_CN + _of_documents(own, np.add, documents_N)
        key_P = generator.random(len(value_P), np.float32)
        if random_rows:
            draw.add_best(own, key_P, value_P)
        seen += len(block.numbers_B)
    random_rows_CR = spread_rows(draw.rows_FN, draw.payload_FN, random_rows)
    return Firing(seen, count_F, together_CF, documents_N, maximum_CN, mass_CN, rows_N, random_rows_CR, histogram_CH)


def _of_documents(block: Block, reduce: np.ufunc, documents_N: Int[np.ndarray, "N"]) -> sparse.csr_array:
    """[F, N]: `reduce` over the activations of each latent on each document."""
    runs, shape = block.runs, (block.latents.shape[1], len(documents_N))
    if not len(runs.start_S):
        return sparse.csr_array(shape, dtype=np.float32)
    values_S = reduce.reduceat(block.latents.data[runs.order_P], runs.start_S)
    return sparse.csr_array((values_S, (runs.latent_S, np.searchsorted(documents_N, runs.document_S))), shape)


def _ones(latents: sparse.csr_array) -> sparse.csr_array:
    """1 where a latent fires."""
    return sparse.csr_array((np.ones(latents.nnz, np.int32), latents.indices, latents.indptr), latents.shape)


def _nth_best(
    best_S: Float[np.ndarray, "S"], latent_S: Int[np.ndarray, "S"], n_latents: int, n: int
) -> Float[np.ndarray, "F"]:
    """The n-th highest value of each latent's runs; 0 where it has fewer. The runs are ordered by latent."""
    found_F = np.zeros(n_latents, np.float32)
    ends = np.searchsorted(latent_S, np.arange(n_latents + 1))
    for latent in np.flatnonzero(np.diff(ends) >= n).tolist():
        own = best_S[ends[latent] : ends[latent + 1]]
        found_F[latent] = np.partition(own, len(own) - n)[len(own) - n]
    return found_F


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
