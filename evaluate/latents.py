"""Single latents over a store: densities, top contexts, nearest vectors, promoted tokens. Torch; writes latents.json.

Needs no language model: a store keeps every row's context and position, so that the activations of a top row's
neighbours are found in the store itself. Must not import jax.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from evaluate import top_rows
from evaluate.token_text import TokenText
from evaluate.top_rows import scan
from extract.format.config import option
from extract.format.errors import UserError
from extract.format.files import write_text
from extract.format.store import Store, to_float32

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")  # Llama and most others; GPT-2; GPT-NeoX; Phi


@dataclass(frozen=True)
class LatentsConfig:
    """What latents.json holds."""

    max_rows: int = option(131_072, "rows scanned; a store is shuffled, so that its first rows are a sample of it")
    latents: int = option(40, "latents shown, spread evenly over the live ones' density ranks [latents]")
    most_active: int = option(8, "of those, how many are the ones with the highest activation [latents]")
    examples: int = option(12, "top contexts a latent, each from another document [contexts]")
    tokens_before: int = option(24, "tokens shown before the peak [tokens]")
    tokens_after: int = option(12, "tokens shown after the peak [tokens]")
    promoted: int = option(10, "promoted and suppressed tokens a latent, each [tokens]")

    def __post_init__(self) -> None:
        for name, least in {"max_rows": 1, "examples": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: expected at least {least}")
        for name in ("latents", "most_active", "tokens_before", "tokens_after", "promoted"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: expected 0 or more")


def write_latents(
    sae: Any, store: Store, model: Any, path: Path, *, run: str, config: LatentsConfig | None = None
) -> dict[str, Any]:
    """Writes latents.json for one SAE to `path` and returns what it wrote.

    `sae` is a `sae_lens.SAE` for the store's hook point. `model` is a `LanguageModel` or only its tokenizer; without
    the model, `promoted` and `suppressed` stay empty. A latent's promoted tokens are the highest entries of its
    dictionary vector through the final norm's gain and the unembedding, and its suppressed the lowest: direct logit
    attribution, with the later layers and the final norm's data-dependent scale left out.
    """
    config = config or LatentsConfig()
    _check_width(sae, store)
    text = TokenText(getattr(model, "tokenizer", model))
    found = scan(sae, store, config.max_rows, config.examples)
    chosen = choose_latents(found.density_F, found.max_activation_F, config.latents, config.most_active)
    windows = read_windows(sae, store, chosen, found.top_rows_FN[chosen], config.tokens_before, config.tokens_after)
    nearest_F, cosine_F = nearest_vectors(sae.W_dec.detach())
    through_CV = _logits(sae.W_dec.detach()[chosen], model) if hasattr(model, "hf") else None
    titles = [(entry.get("labels") or {}).get("title") for entry in store.documents()]
    sources = [source.name for source in store.manifest.sources]
    latents = []
    for slot, index in enumerate(chosen.tolist()):
        contexts = [_shown(window, titles, sources, text) for window in windows[slot]]
        latents.append(
            {
                "index": index,
                "density": _rounded(found.density_F[index]),
                "max_activation": _rounded(found.max_activation_F[index]),
                "nearest": {"index": int(nearest_F[index]), "cosine": _rounded(cosine_F[index])},
                "top_tokens": _token_shares([context["tokens"][context["peak"]] for context in contexts]),
                "promoted": _best(through_CV[slot], config.promoted, text) if through_CV is not None else [],
                "suppressed": _best(-through_CV[slot], config.promoted, text) if through_CV is not None else [],
                "contexts": contexts,
            }
        )
    values = {
        "run": run,
        "rows_scanned": found.rows,
        "density": [_rounded(value) for value in found.density_F],
        "max_activation": [_rounded(value) for value in found.max_activation_F],
        "nearest_cosine": [_rounded(value) for value in cosine_F],
        "latents": latents,
    }
    write_text(path, json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
    return values


def choose_latents(density_F: np.ndarray, max_activation_F: np.ndarray, latents: int, most_active: int) -> np.ndarray:
    """Indices of the latents to show, ascending: the most active, then the live rest at evenly spaced density ranks."""
    live = np.flatnonzero(density_F > 0)
    active = live[np.argsort(-max_activation_F[live], kind="stable")][: min(most_active, latents)]
    rest = np.setdiff1d(live, active)
    rest = rest[np.argsort(density_F[rest], kind="stable")]
    wanted = min(latents - len(active), len(rest))
    middles = ((np.arange(wanted) + 0.5) * len(rest) / max(wanted, 1)).astype(np.int64)
    return np.sort(np.concatenate([active, rest[middles]]))


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
    places = _rows_at(store, top_rows_CN[top_rows_CN >= 0])
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


@torch.no_grad()
def nearest_vectors(W_dec: Float[torch.Tensor, "F D"]) -> tuple[np.ndarray, np.ndarray]:
    """Of each dictionary vector, the index of the other one with the highest cosine, and that cosine: ([F], [F])."""
    unit_FD = torch.nn.functional.normalize(W_dec.float(), dim=1)
    index_parts, cosine_parts = [], []
    chunk = max(1, top_rows.BATCH_FLOATS // len(unit_FD))
    for start in range(0, len(unit_FD), chunk):
        cosine_CF = unit_FD[start : start + chunk] @ unit_FD.T
        cosine_CF.diagonal(start).fill_(-2.0)  # never its own neighbour
        best = cosine_CF.max(1)
        index_parts.append(best.indices.cpu())
        cosine_parts.append(best.values.clamp(-1, 1).cpu())
    return torch.cat(index_parts).numpy(), torch.cat(cosine_parts).numpy()


def _rows_at(store: Store, numbers: np.ndarray) -> dict[int, np.void]:
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
    batch_rows = top_rows.batch_rows(store, n_latents)
    for shard in range(len(store.shard_sizes)):
        table = store.rows(shard)
        token = starts[table["context"]] + table["position"]
        nearest = np.minimum(np.searchsorted(wanted, token), len(wanted) - 1)
        hits = np.flatnonzero(wanted[nearest] == token)
        raw = store.raw(shard)
        for start in range(0, len(hits), batch_rows):
            batch = hits[start : start + batch_rows]
            yield to_float32(raw[batch], store.manifest.dtype), token[batch]


def _check_width(sae: Any, store: Store) -> None:
    width = sae.W_dec.shape[1]
    if width != store.manifest.d_model:
        raise UserError(
            f"{store.folder}: expected activations of the SAE's width {width}, found d_model="
            f"{store.manifest.d_model}; evaluate the SAE on a store of its own hook point"
        )


def _logits(vectors_CD: torch.Tensor, model: Any) -> torch.Tensor:
    """The vectors through the final norm's gain, where the model has one, and the unembedding, [C, V] float32."""
    vectors = vectors_CD.float().cpu()
    final_norm = next((norm for name, norm in model.hf.base_model.named_children() if name in FINAL_NORMS), None)
    if final_norm is not None:
        vectors = vectors * final_norm.weight.detach().float().cpu()
    return vectors @ model.hf.get_output_embeddings().weight.detach().float().cpu().T


def _best(scores_V: torch.Tensor, n: int, text: TokenText) -> list[str]:
    return [text(int(index)) for index in torch.sort(scores_V, descending=True, stable=True).indices[:n]]


def _token_shares(tokens: list[str]) -> list[list[Any]]:
    """[token, share of the list], most frequent first and then by first appearance, at most 5."""
    counts: dict[str, int] = {}
    for token in tokens:
        counts[token] = counts.get(token, 0) + 1
    return [[token, _rounded(n / len(tokens))] for token, n in sorted(counts.items(), key=lambda item: -item[1])[:5]]


def _shown(window: Window, titles: list[str | None], sources: list[str], text: TokenText) -> dict[str, Any]:
    return {
        "source": sources[window.source],
        "document": window.document,
        "title": titles[window.document],
        "peak": window.peak,
        "tokens": [text(int(token)) for token in window.token_ids],
        "values": [_rounded(value) for value in window.values],
    }


def _rounded(value: float) -> float:
    """Five significant digits: what a page shows, in a fraction of the bytes."""
    return float(f"{float(value):.5g}")
