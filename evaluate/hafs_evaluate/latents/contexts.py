"""The tokens around rows of a store, with a latent's activation on each: what a reader sees of a latent.

A store is shuffled, but keeps every row's context and position, so that the neighbours of a row can be found.

Imports torch, not jax.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from hafs_evaluate.core.encode import TorchSAE, encode_store, to_numpy
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


@dataclass(frozen=True)
class _Tokens:
    """All tokens of all contexts that are read, sorted by their place in the store's tokens.npy."""

    place_P: Int[np.ndarray, "P"]  # in tokens.npy
    context_P: Int[np.ndarray, "P"]  # index into the list of contexts
    offset_P: Int[np.ndarray, "P"]  # index into the context's tokens


def read_contexts(
    sae: TorchSAE,
    store: Store,
    latents_C: Int[np.ndarray, "C"],
    rows_CN: Int[np.ndarray, "C N"],
    before: int,
    after: int,
) -> list[list[Context]]:
    """For each latent, the contexts around its rows: `before` tokens before each row's token and `after` after it.

    A row of -1 is left out. The latents' activations come from a second pass over all shards, since a row's neighbours
    lie anywhere in a shuffled store. BOS and the tokens that the norm filter dropped have no row: their value is 0.
    """
    rows = rows_at(store, rows_CN[rows_CN >= 0])
    table, tokens = store.contexts().table, store.contexts().tokens
    found: list[list[Context]] = []
    contexts, latents, places = [], [], []
    for latent, numbers in zip(latents_C.tolist(), rows_CN.tolist(), strict=True):
        own = []
        for row in (rows[number] for number in numbers if number >= 0):
            entry, position = table[row["context"]], int(row["position"])
            start = max(0, position - before)
            place_W = np.arange(start, min(int(entry["length"]), position + after + 1)) + int(entry["start"])
            own.append(
                Context(
                    document=int(row["document"]),
                    source=int(row["source"]),
                    context=int(row["context"]),
                    peak=position - start,
                    token_ids=np.array(tokens[place_W]),
                    values=np.zeros(len(place_W), np.float32),
                )
            )
            latents.append(latent)
            places.append(place_W)
        found.append(own)
        contexts += own
    if contexts:
        _fill_in(sae, store, contexts, np.array(latents), _sorted_tokens(places))
    return found


def _sorted_tokens(places: list[Int[np.ndarray, "_"]]) -> _Tokens:
    """The tokens of the contexts whose places are given."""
    place_P = np.concatenate(places)
    context_P = np.repeat(np.arange(len(places)), [len(place_W) for place_W in places])
    offset_P = np.concatenate([np.arange(len(place_W)) for place_W in places])
    order = np.argsort(place_P, kind="stable")
    return _Tokens(place_P[order], context_P[order], offset_P[order])


def _fill_in(
    sae: TorchSAE, store: Store, contexts: list[Context], latents: Int[np.ndarray, "_"], tokens: _Tokens
) -> None:
    """Writes each context's latent's activation on each of its tokens into the context's `values`."""
    starts, wanted = np.array(store.contexts().table["start"]), np.unique(tokens.place_P)

    def place_of(rows: np.ndarray) -> np.ndarray:
        return starts[rows["context"]] + rows["position"]

    def is_wanted(rows: np.ndarray) -> np.ndarray:
        place = place_of(rows)
        nearest = np.minimum(np.searchsorted(wanted, place), len(wanted) - 1)
        return np.flatnonzero(wanted[nearest] == place)

    latent_P = latents[tokens.context_P]
    for batch in encode_store(sae, store, keep=is_wanted):
        latents_BF, place_B = to_numpy(batch.latents_BF), place_of(batch.rows_B)
        first, last = (np.searchsorted(tokens.place_P, place_B, side) for side in ("left", "right"))
        for row, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            for token in range(low, high):  # of every context that holds this row's token
                value = latents_BF[row, latent_P[token]]
                contexts[tokens.context_P[token]].values[tokens.offset_P[token]] = value


def rows_at(store: Store, numbers: Int[np.ndarray, "_"]) -> dict[int, np.void]:
    """The ROW of each row number, counted through all shards."""
    found = {}
    for first, _, rows in store.batches(max(1, len(store)), raw=True):
        for number in np.unique(numbers[(numbers >= first) & (numbers < first + len(rows))]).tolist():
            found[number] = rows[number - first]
    return found
