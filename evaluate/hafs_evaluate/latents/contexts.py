"""The tokens around rows of a store and a latent's activation on each: what a reader sees of a latent. Torch; no jax.

A store is shuffled but keeps every row's context and position: a row's neighbours are found in the store itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hafs_evaluate.latents import firing
from hafs_jax.store.manifest import to_float32
from hafs_jax.store.reader import Store


@dataclass(frozen=True)
class Window:
    """The tokens around one top row and the latent's activation on each; 0 where the store has no such row."""

    context: int
    document: int
    source: int
    peak: int  # index into the window
    token_ids: np.ndarray  # [W] int32
    values: np.ndarray  # [W] float32


@torch.no_grad()
def read_windows(
    sae: Any, store: Store, latents_C: np.ndarray, top_rows_CN: np.ndarray, before: int, after: int
) -> list[list[Window]]:
    """For each latent, the window around each of its top rows (-1: none), by a second pass over the store's rows.

    All shards are looked through, since the neighbours of a row lie anywhere in a shuffled store. BOS and the tokens
    that the norm filter dropped have no row: their value is 0.
    """
    contexts = store.contexts()
    places = rows_at(store, top_rows_CN[top_rows_CN >= 0])
    windows: list[list[Window]] = []
    token_parts, window_parts, offset_parts = [], [], []  # one entry a (window, token): where the token lies, and whose
    flat: list[tuple[int, Window]] = []
    for latent, rows in zip(latents_C.tolist(), top_rows_CN.tolist(), strict=True):
        windows.append([])
        for row in rows:
            if row < 0:
                continue
            place = places[row]
            entry = contexts.table[place["context"]]
            start = max(0, int(place["position"]) - before)
            stop = min(int(entry["length"]), int(place["position"]) + after + 1)
            at = np.arange(start, stop) + int(entry["start"])
            window = Window(
                int(place["context"]),
                int(place["document"]),
                int(place["source"]),
                int(place["position"]) - start,
                np.array(contexts.tokens[at]),
                np.zeros(len(at), np.float32),
            )
            token_parts.append(at)
            window_parts.append(np.full(len(at), len(flat)))
            offset_parts.append(np.arange(len(at)))
            flat.append((latent, window))
            windows[-1].append(window)
    if not flat:
        return windows
    token_P, window_P, offset_P = map(np.concatenate, (token_parts, window_parts, offset_parts))
    order = np.argsort(token_P, kind="stable")
    token_P, window_P, offset_P = token_P[order], window_P[order], offset_P[order]
    latent_P = np.array([latent for latent, _ in flat])[window_P]
    for acts_BD, token_B in _rows_of_tokens(store, np.unique(token_P), sae.W_dec.shape[0]):
        latents_BF = sae.encode(torch.from_numpy(acts_BD).to(sae.device, sae.dtype)).float().cpu().numpy()
        first, last = np.searchsorted(token_P, token_B, "left"), np.searchsorted(token_P, token_B, "right")
        for row, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            for pair in range(low, high):
                flat[window_P[pair]][1].values[offset_P[pair]] = latents_BF[row, latent_P[pair]]
    return windows


def rows_at(store: Store, numbers: np.ndarray) -> dict[int, np.void]:
    """The ROW of each global row number."""
    found, base = {}, 0
    for shard, size in enumerate(store.shard_sizes):
        table = store.rows(shard)
        for number in np.unique(numbers[(numbers >= base) & (numbers < base + size)]).tolist():
            found[number] = table[number - base]
        base += size
    return found


def _rows_of_tokens(store: Store, wanted: np.ndarray, n_latents: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Activations [B, D] and places in tokens.npy [B] of the store's rows whose token is in the sorted `wanted`."""
    starts = np.array(store.contexts().table["start"])
    batch_rows = firing.batch_rows(store, n_latents)
    for shard in range(len(store.shard_sizes)):
        table = store.rows(shard)
        token = starts[table["context"]] + table["position"]
        nearest = np.minimum(np.searchsorted(wanted, token), len(wanted) - 1)
        hits = np.flatnonzero(wanted[nearest] == token)
        raw = store.raw(shard)
        for start in range(0, len(hits), batch_rows):
            batch = hits[start : start + batch_rows]
            yield to_float32(raw[batch], store.manifest.dtype), token[batch]
