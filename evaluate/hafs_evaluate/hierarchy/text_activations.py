"""Activations of labelled texts, computed by one pass of the language model for all trees and all SAEs.

The cache is a folder of parts, each written atomically and its index last. So an interrupted pass goes on where it
stopped, and new texts are added to old ones:

    <key>/<part>.npy    activations of the part's tokens, [tokens, D], as the store keeps them: in its dtype, without
                        BOS and without the tokens that its norm filter drops
    <key>/<part>.json   {"texts": [sha256, ...], "rows": [tokens of each], "sha256": of the npy file}

A part that is damaged is computed again.

`cache_key` says what the key is made of.

Imports torch, not jax.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from hafs_evaluate.core.encode import TorchSAE, batch_rows, encode, to_numpy
from hafs_evaluate.core.texts import text_batches
from hafs_evaluate.hierarchy.label_trees import text_sha256
from hafs_evaluate.workspace import fingerprint
from hafs_jax.base.checksums.checked import check_file
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of, write_npy, write_record
from hafs_jax.base.foreign import open_npy
from hafs_jax.base.log import bar_options
from hafs_jax.store.manifest import Manifest, from_float32, to_float32

LOG = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same key would hold other numbers
PART_TEXTS = 512
_AGAIN = "they are computed again"


class Span(NamedTuple):
    """Where the activations of one text lie."""

    part: str
    first: int  # row of the part's array
    rows: int  # tokens of the text that have an activation


@dataclass(frozen=True)
class TextActivations:
    """The activations of texts at one hook point, in parts of a folder."""

    folder: Path
    dtype: str  # in which the store keeps activations
    where: dict[str, Span]  # by the text's SHA-256

    def pooled(self, texts: Sequence[str], sae: TorchSAE | None = None) -> Float[np.ndarray, "N F"]:
        """Mean over each text's tokens of the SAE's latents (default: of the activations themselves), float32.

        A text all of whose tokens were left out has the mean 0.
        """
        n_latents = 0 if sae is None else sae.W_dec.shape[0]
        by_part: dict[str, list[tuple[int, Span]]] = {}
        for index, text in enumerate(texts):
            span = self.where[text_sha256(text)]
            by_part.setdefault(span.part, []).append((index, span))
        found: np.ndarray | None = None
        for part, spans in by_part.items():
            kept = open_npy(self.folder / f"{part}.npy", "activations of labelled texts")
            for batch in _batches(spans, batch_rows(kept.shape[1], n_latents)):
                raw = np.concatenate([kept[span.first : span.first + span.rows] for _, span in batch])
                acts_BD = torch.from_numpy(to_float32(raw, self.dtype))
                values_BF = acts_BD if sae is None else encode(sae, acts_BD).float().cpu()
                if found is None:
                    found = np.zeros((len(texts), values_BF.shape[1]), np.float32)
                counts = torch.tensor([span.rows for _, span in batch])
                owner = torch.repeat_interleave(torch.arange(len(batch)), counts)
                sums = torch.zeros(len(batch), values_BF.shape[1]).index_add_(0, owner, values_BF)
                found[[index for index, _ in batch]] = (sums / counts.clamp(min=1)[:, None]).numpy()
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


def fill_text_cache(
    texts: Sequence[str],
    manifest: Manifest,
    root: Path,
    model: Callable[[], Any],
    max_tokens: int = 64,
    batch_tokens: int = 4096,
) -> TextActivations:
    """The activations of all `texts`; those that the cache in `root` lacks are computed.

    Of each text, BOS and the first tokens are read, `max_tokens` in all. `model()` is called only where something is
    missing. Raises `UserError` for a text without a token.
    """
    folder = root / cache_key(manifest, max_tokens)
    where = _index(folder)
    missing = [text for text in dict.fromkeys(texts) if text_sha256(text) not in where]
    if missing:
        _compute(missing, manifest, folder, model(), max_tokens, batch_tokens)
        where = _index(folder)
    return TextActivations(folder, manifest.dtype, where)


def _index(folder: Path) -> dict[str, Span]:
    where = {}
    for path in sorted(folder.glob("*.json")):
        if (index := _whole(path)) is None:
            continue
        starts = np.cumsum([0, *index["rows"]])
        for digest, first, rows in zip(index["texts"], starts[:-1].tolist(), index["rows"], strict=True):
            where[digest] = Span(path.stem, first, rows)
    return where


def _whole(path: Path) -> dict[str, Any] | None:
    """The index of a part; None where it or its activations are damaged: a line says so, and the part is removed."""
    try:
        index = read_json(path, "an index of labelled texts")
        if "sha256" in index:  # of the versions before there is none
            check_file(path.with_suffix(".npy"), index["sha256"], "activations of labelled texts", _AGAIN)
    except UserError as error:
        LOG.warning(f"{error}; {_AGAIN}")
        path.unlink(missing_ok=True)
        path.with_suffix(".npy").unlink(missing_ok=True)
        return None
    return index


def _compute(
    texts: Sequence[str], manifest: Manifest, folder: Path, model: Any, max_tokens: int, batch_tokens: int
) -> None:
    """Writes the parts of `texts`. Texts of near lengths share a part, so that padding is nearly nothing."""
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
            digests = [text_sha256(texts[index]) for index in part]
            kept = _kept(model, [ids[index] for index in part], len(bos), manifest, batch_tokens, bar.update)
            name = fingerprint(digests)
            write_npy(folder / f"{name}.npy", np.concatenate(kept))
            digest = sha256_of(folder / f"{name}.npy")
            index = {"texts": digests, "rows": [len(rows) for rows in kept], "sha256": digest}
            write_record(folder / f"{name}.json", index)


def _kept(
    model: Any,
    ids: Sequence[Int[np.ndarray, "_"]],
    skip: int,
    manifest: Manifest,
    batch_tokens: int,
    progress: Callable[[int], Any],
) -> list[np.ndarray]:
    """Each text's rows as the store keeps rows: without the first `skip` tokens and what the norm filter drops."""
    found: list[np.ndarray] = [np.empty(0)] * len(ids)
    limit = manifest.norm_filter.max_norm
    for batch, acts in text_batches(model, ids, manifest.hook_point, batch_tokens, progress):
        acts_BLD = to_numpy(acts)
        for row, index in enumerate(batch):
            acts_TD = acts_BLD[row, skip : len(ids[index])]
            norm_T = np.linalg.norm(acts_TD.astype(np.float64), axis=1)
            is_kept_T = np.isfinite(norm_T) & (norm_T <= (np.inf if limit is None else limit))
            found[index] = from_float32(acts_TD[is_kept_T], manifest.dtype)
    return found


def _batches(spans: Sequence[tuple[int, Span]], rows: int) -> list[list[tuple[int, Span]]]:
    """`spans` in order, in batches of at most `rows` rows, or of one text."""
    batches: list[list[tuple[int, Span]]] = [[]]
    held = 0
    for index, span in spans:
        if batches[-1] and held + span.rows > rows:
            batches.append([])
            held = 0
        batches[-1].append((index, span))
        held += span.rows
    return batches
