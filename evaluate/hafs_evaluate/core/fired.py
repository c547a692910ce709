"""What fires on a store's rows, as sparse arrays: an SAE is run once, and what it found is read again and again.

A latent fires on a row where its activation is positive. Imports torch, not jax.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from hafs_evaluate.core.encode import TorchSAE, encode_store, to_numpy
from hafs_jax.store.reader import Store

BLOCK = 1 << 24  # firings at which a block ends: 128 MiB of latents and activations
KEPT = 1 << 25  # most firings that are kept for the next pass; with more of them the SAE is run again


class Runs(NamedTuple):
    """A block's P firings, latent by latent and in each document by document: S runs of one latent and document."""

    order_P: Int[np.ndarray, "P"]  # the firings' places in the block's own order, which is row by row
    start_S: Int[np.ndarray, "S"]  # where each run starts in `order_P`
    latent_S: Int[np.ndarray, "S"]
    document_S: Int[np.ndarray, "S"]


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a store, and what fires on them."""

    latents: sparse.csr_array  # [B, F] float32, the activations above 0
    numbers_B: Int[np.ndarray, "B"]  # each row's number, counted through all shards
    document_B: Int[np.ndarray, "B"]

    def columns(self, chosen_C: Int[np.ndarray, "C"]) -> "Block":
        """The block with the latents `chosen_C` alone, in their order."""
        if np.array_equal(chosen_C, np.arange(self.latents.shape[1])):
            return self
        return Block(self.latents[:, chosen_C], self.numbers_B, self.document_B)

    @cached_property
    def row_P(self) -> Int[np.ndarray, "P"]:
        """The row of each firing, as an index into the block."""
        return np.repeat(np.arange(len(self.numbers_B), dtype=np.int32), np.diff(self.latents.indptr))

    @cached_property
    def runs(self) -> Runs:
        """The firings in their runs; those of a run in the order of their rows."""
        by_document_B = np.argsort(self.document_B, kind="stable")
        places = sparse.csr_array(
            (np.arange(self.latents.nnz, dtype=np.int32), self.latents.indices, self.latents.indptr),
            self.latents.shape,
        )
        by_latent = places[by_document_B].tocsc()
        document_P = self.document_B[by_document_B][by_latent.indices]
        latent_P = np.repeat(np.arange(self.latents.shape[1], dtype=np.int32), np.diff(by_latent.indptr))
        is_first_P = np.ones(len(latent_P), bool)
        is_first_P[1:] = (np.diff(latent_P) != 0) | (np.diff(document_P) != 0)
        start_S = np.flatnonzero(is_first_P)
        return Runs(by_latent.data, start_S, latent_P[start_S], document_P[start_S])


class FiredRows:
    """What fires on a store's first `max_rows` rows, in blocks. The SAE is run on the first pass over them.

    It is run again on each further pass where there are more than KEPT firings. Memory is bounded by a batch, KEPT
    firings and a block.
    """

    def __init__(self, sae: TorchSAE, store: Store, max_rows: int) -> None:
        self.sae, self.store, self.max_rows = sae, store, max_rows
        self.n_latents: int = sae.W_dec.shape[0]
        self._kept: list[Block] | None = None

    def __iter__(self) -> Iterator[Block]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Block] = []
        firings = 0
        for block in self._blocks():
            firings += block.latents.nnz
            if firings <= KEPT:
                kept.append(block)
            else:
                kept.clear()
            yield block
        if firings <= KEPT:
            self._kept = kept

    def _blocks(self) -> Iterator[Block]:
        parts: list[Block] = []
        for batch in encode_store(self.sae, self.store, self.max_rows):
            document_B = batch.rows_B["document"].astype(np.int64)
            parts.append(Block(_positive(to_numpy(batch.latents_BF)), batch.numbers_B, document_B))
            if sum(part.latents.nnz for part in parts) >= BLOCK:
                yield _joined(parts)
                parts = []
        if parts:
            yield _joined(parts)


def _positive(latents_BF: Float[np.ndarray, "B F"]) -> sparse.csr_array:
    """The entries above 0."""
    n_rows, n_latents = latents_BF.shape
    flat_P = np.flatnonzero(latents_BF > 0)  # 2x as fast as torch.nonzero
    row_P, latent_P = np.divmod(flat_P, n_latents)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row_P, minlength=n_rows))])
    return sparse.csr_array((latents_BF.ravel()[flat_P], latent_P.astype(np.int32), indptr), latents_BF.shape)


def _joined(parts: list[Block]) -> Block:
    latents = sparse.csr_array(sparse.vstack([part.latents for part in parts], format="csr"))
    numbers_B = np.concatenate([part.numbers_B for part in parts])
    return Block(latents, numbers_B, np.concatenate([part.document_B for part in parts]))
