"""Activations of labelled texts: one language-model pass for all trees and all SAEs, and their means. Torch; no jax.

A cache folder holds parts, each written atomically and its index last, so that an interrupted pass goes on and new
texts are added to old ones:

    <key>/<part>.npy    activations of the part's tokens, [tokens, D], as the store keeps them (its dtype; BOS and
                        tokens over the store's norm filter left out)
    <key>/<part>.json   {"texts": [sha256, ...], "rows": [tokens of each]}

The key names model, tokenizer, hook point, dtype, norm filter and tokens a text.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from hafs_evaluate.core.encode import TorchSAE, batch_rows, encode
from hafs_evaluate.saebench.task_activations import by_length
from hafs_evaluate.workspace import fingerprint
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_json, write_npy
from hafs_jax.base.log import bar_options
from hafs_jax.store.manifest import Manifest, from_float32, to_float32

LOG = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same key would hold other numbers
PART_TEXTS = 512


@dataclass(frozen=True)
class LabelledActs:
    """The activations of texts at one hook point, in parts of a folder. `where`: (part, first row, rows) by sha256."""

    folder: Path
    dtype: str
    where: dict[str, tuple[str, int, int]]

    def rows(self, texts: Sequence[str]) -> Int[np.ndarray, "N"]:
        """Tokens of each text that have an activation here."""
        return np.array([self.where[_sha256(text)][2] for text in texts])

    def pooled(self, texts: Sequence[str], sae: TorchSAE | None = None) -> Float[np.ndarray, "N F"]:
        """Mean over each text's tokens of the SAE's latents (default: of the activations themselves), float32.

        A text all of whose tokens were left out has mean 0.
        """
        n_latents = 0 if sae is None else sae.W_dec.shape[0]
        by_part: dict[str, list[tuple[int, int, int]]] = {}
        for index, text in enumerate(texts):
            part, first, rows = self.where[_sha256(text)]
            by_part.setdefault(part, []).append((index, first, rows))
        found: np.ndarray | None = None
        for part, spans in by_part.items():
            kept = np.load(self.folder / f"{part}.npy", mmap_mode="r", allow_pickle=False)
            for batch in _batches(spans, batch_rows(kept.shape[1], n_latents)):
                raw = np.concatenate([kept[first : first + rows] for _, first, rows in batch])
                acts_BD = torch.from_numpy(to_float32(raw, self.dtype))
                values_BF = acts_BD if sae is None else encode(sae, acts_BD).float().cpu()
                if found is None:
                    found = np.zeros((len(texts), values_BF.shape[1]), np.float32)
                counts = torch.tensor([rows for _, _, rows in batch])
                owner = torch.repeat_interleave(torch.arange(len(batch)), counts)
                sums = torch.zeros(len(batch), values_BF.shape[1]).index_add_(0, owner, values_BF)
                found[[index for index, _, _ in batch]] = (sums / counts.clamp(min=1)[:, None]).numpy()
        return np.zeros((len(texts), 0), np.float32) if found is None else found


def cache_key(manifest: Manifest, max_tokens: int) -> str:
    """A hash of all that a text's activations depend on besides the text."""
    return fingerprint(
        {
            "format": FORMAT,
            "model": asdict(manifest.model),
            "tokenizer": asdict(manifest.tokenizer),
            "hook_point": manifest.hook_point,
            "dtype": manifest.dtype,
            "max_norm": manifest.norm_filter.max_norm,
            "max_tokens": max_tokens,
        }
    )


def fill(
    texts: Sequence[str],
    manifest: Manifest,
    root: Path,
    model: Callable[[], Any],
    max_tokens: int = 64,
    batch_tokens: int = 4096,
) -> LabelledActs:
    """The activations of all `texts` (BOS and their first tokens, `max_tokens` in all); what is missing is computed.

    `model()` is called only if something is. Raises `UserError` for a text without a token.
    """
    folder = root / cache_key(manifest, max_tokens)
    where = _index(folder)
    missing = [text for text in dict.fromkeys(texts) if _sha256(text) not in where]
    if missing:
        _compute(missing, manifest, folder, model(), max_tokens, batch_tokens)
        where = _index(folder)
    return LabelledActs(folder, manifest.dtype, where)


def _index(folder: Path) -> dict[str, tuple[str, int, int]]:
    where = {}
    for path in sorted(folder.glob("*.json")):
        index = read_json(path, "an index of labelled texts")
        starts = np.cumsum([0, *index["rows"]])
        for digest, first, rows in zip(index["texts"], starts[:-1].tolist(), index["rows"], strict=True):
            where[digest] = (path.stem, first, rows)
    return where


def _compute(
    texts: Sequence[str], manifest: Manifest, folder: Path, model: Any, max_tokens: int, batch_tokens: int
) -> None:
    """Writes the parts of `texts`, those of near lengths together so that padding is nearly nothing."""
    bos = [manifest.tokenizer.bos_token_id] if manifest.tokenizer.prepend_bos else []
    ids = [np.concatenate([bos, own[: max_tokens - len(bos)]]).astype(np.int32) for own in model.tokenize(list(texts))]
    for text, own in zip(texts, ids, strict=True):
        if len(own) == len(bos):
            raise UserError(f"the labelled text {text!r} has no token, so it has no activation; leave it out")
    order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
    parts = [order[start : start + PART_TEXTS] for start in range(0, len(order), PART_TEXTS)]
    total = sum(map(len, ids))
    with tqdm(total=total, desc="labelled texts", unit="tok", unit_scale=True, **bar_options(LOG)) as bar:
        for part in parts:
            digests = [_sha256(texts[index]) for index in part]
            kept = _kept(model, [ids[index] for index in part], len(bos), manifest, batch_tokens, bar.update)
            name = fingerprint(digests)
            write_npy(folder / f"{name}.npy", np.concatenate(kept))
            write_json(folder / f"{name}.json", {"texts": digests, "rows": [len(rows) for rows in kept]})


@torch.no_grad()
def _kept(
    model: Any,
    ids: Sequence[np.ndarray],
    skip: int,
    manifest: Manifest,
    batch_tokens: int,
    progress: Callable[[int], Any],
) -> list[np.ndarray]:
    """Each text's rows as the store keeps rows: without the first `skip` tokens and those over the norm filter."""
    found: list[np.ndarray] = [np.empty(0)] * len(ids)
    limit = manifest.norm_filter.max_norm
    for batch in by_length([len(own) for own in ids], batch_tokens):
        tokens_BL = torch.zeros(len(batch), len(ids[batch[-1]]), dtype=torch.long)
        for row, index in enumerate(batch):
            tokens_BL[row, : len(ids[index])] = torch.from_numpy(ids[index].astype(np.int64))
        acts_BLD = model.activations(tokens_BL, manifest.hook_point).float().cpu().numpy()
        for row, index in enumerate(batch):
            acts_TD = acts_BLD[row, skip : len(ids[index])]
            norm_T = np.linalg.norm(acts_TD.astype(np.float64), axis=1)
            is_kept_T = np.isfinite(norm_T) & (norm_T <= (np.inf if limit is None else limit))
            found[index] = from_float32(acts_TD[is_kept_T], manifest.dtype)
        progress(sum(len(ids[index]) for index in batch))
    return found


def _batches(spans: Sequence[tuple[int, int, int]], rows: int) -> list[list[tuple[int, int, int]]]:
    """`spans` in order, in batches of at most `rows` rows (or one text)."""
    batches: list[list[tuple[int, int, int]]] = [[]]
    held = 0
    for span in spans:
        if batches[-1] and held + span[2] > rows:
            batches.append([])
            held = 0
        batches[-1].append(span)
        held += span[2]
    return batches


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
