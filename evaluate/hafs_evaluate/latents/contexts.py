"""The tokens around rows of a store, with a latent's activation on each: what a reader sees of a latent.

A store is shuffled, but keeps every row's context and position, so that the neighbours of a row can be found.

Imports torch, not jax.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hafs_evaluate.core.encode import PairEncoder, TorchSAE, store_rows
from hafs_jax.store.reader import Store


@dataclass(frozen=True)
class Context:
    """The W tokens around one row, and a latent's activation on each; 0 on tokens of which the store has no row."""

    document: int
    source: int
    context: int  # number of the store's context that the tokens are a part of
    peak: int  # the row's own token, as an index into the W tokens
    token_ids: Int[np.ndarray, "W"]
    values: Float[np.ndarray, "W"]


def read_contexts(
    sae: TorchSAE,
    store: Store,
    latents_C: Int[np.ndarray, "C"],
    rows_CN: Int[np.ndarray, "C N"],
    before: int | Int[np.ndarray, "C"],
    after: int | Int[np.ndarray, "C"],
) -> list[list[Context]]:
    """For each latent, the contexts around its rows: `before` tokens before each row's token and `after` after it.

    A row of -1 is left out. The latents' activations come from a second pass over all shards, since a row's neighbours
    lie anywhere in a shuffled store. BOS and the tokens that the norm filter dropped have no row: their value is 0.
    """
    rows = rows_at(store, rows_CN[rows_CN >= 0])
    table, tokens = store.contexts().table, store.contexts().tokens
    before_C, after_C = (np.broadcast_to(number, len(latents_C)).tolist() for number in (before, after))
    spans: list[list[tuple[np.void, int, int]]] = []  # of each context: the row, and the places of its tokens
    for own, n_before, n_after in zip(rows_CN.tolist(), before_C, after_C, strict=True):
        spans.append([])
        for row in (rows[number] for number in own if number >= 0):
            entry, position = table[row["context"]], int(row["position"])
            first, length = int(entry["start"]), int(entry["length"])
            spans[-1].append(
                (row, first + max(0, position - n_before), first + min(length, position + n_after + 1)),
            )
    lengths = [stop - start for own in spans for _, start, stop in own]
    place_P = _ranges([start for own in spans for _, start, _ in own], lengths)
    latent_P = np.repeat(np.repeat(latents_C, [len(own) for own in spans]), lengths)
    value_P = _values(sae, store, place_P, latent_P)
    found: list[list[Context]] = []
    at = 0
    for own in spans:
        found.append([])
        for row, start, stop in own:
            found[-1].append(
                Context(
                    document=int(row["document"]),
                    source=int(row["source"]),
                    context=int(row["context"]),
                    peak=int(table[row["context"]]["start"]) + int(row["position"]) - start,
                    token_ids=np.array(tokens[start:stop]),
                    values=value_P[at : at + stop - start],
                )
            )
            at += stop - start
    return found


def _values(
    sae: TorchSAE, store: Store, place_P: Int[np.ndarray, "P"], latent_P: Int[np.ndarray, "P"]
) -> Float[np.ndarray, "P"]:
    """Each latent's activation on the token at its place in the store's tokens.npy; 0 where the store has no row."""
    value_P = np.zeros(len(place_P), np.float32)
    if not len(place_P):
        return value_P
    order_P = np.argsort(place_P, kind="stable")
    sorted_P = place_P[order_P]
    starts, wanted = np.array(store.contexts().table["start"]), np.unique(sorted_P)

    def place_of(rows: np.ndarray) -> np.ndarray:
        return starts[rows["context"]] + rows["position"]

    def is_wanted(rows: np.ndarray) -> np.ndarray:
        place = place_of(rows)
        nearest = np.minimum(np.searchsorted(wanted, place), len(wanted) - 1)
        return np.flatnonzero(wanted[nearest] == place)

    encode_pairs = PairEncoder(sae)
    for _, acts_BD, rows_B in store_rows(sae, store, sae.W_dec.shape[0], keep=is_wanted):
        place_B = place_of(rows_B)
        first_B, last_B = (np.searchsorted(sorted_P, place_B, side) for side in ("left", "right"))
        shown = order_P[_ranges(first_B, last_B - first_B)]  # of every context that holds one of these rows' tokens
        row_P = np.repeat(np.arange(len(place_B)), last_B - first_B)
        value_P[shown] = encode_pairs(acts_BD, row_P, latent_P[shown])
    return value_P


def _ranges(starts: Any, lengths: Any) -> Int[np.ndarray, "_"]:
    """`range(start, start + length)` of each pair, one after the other."""
    lengths = np.asarray(lengths, np.int64)
    before = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    return np.arange(lengths.sum()) + np.repeat(np.asarray(starts, np.int64) - before, lengths)


def rows_at(store: Store, numbers: Int[np.ndarray, "_"]) -> dict[int, np.void]:
    """The ROW of each row number, counted through all shards."""
    found: dict[int, np.void] = {}
    for first, _, rows in store.batches(max(1, len(store)), raw=True):
        own = np.unique(numbers[(numbers >= first) & (numbers < first + len(rows))])
        found |= zip(own.tolist(), np.array(rows[own - first]), strict=True)
    return found
