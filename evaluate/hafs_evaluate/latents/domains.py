"""Latents as detectors of one source of text against the others. Imports torch, not jax.

This asks the question of unlearning (which latents stand for a domain?) without ablating anything, and needs no
language model. Every text source of the held-out store is measured against all others. With the hub's profile the
source of interest is WMDP-bio against WikiText; offline it is biology against the rest of Wikipedia.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from hafs_evaluate.core.encode import TorchSAE, encode_store, to_numpy
from hafs_evaluate.latents.firing import documents_of
from hafs_evaluate.latents.neighbours import rounded
from hafs_evaluate.latents.selectivity import auroc
from hafs_evaluate.latents.settings import DomainsConfig
from hafs_jax.store.reader import Store


@dataclass(frozen=True)
class Detections:
    """On which rows and documents each of the F latents fires. There are S sources and N documents."""

    rows_S: Int[np.ndarray, "S"]  # rows of each source
    fired_FS: Int[np.ndarray, "F S"]  # rows of each source on which the latent fires
    maximum_FN: Float[np.ndarray, "F N"]  # the latent's highest activation on each document; 0 where it is silent
    source_N: Int[np.ndarray, "N"]  # the source of each document


@torch.no_grad()
def detections(sae: TorchSAE, store: Store, config: DomainsConfig) -> Detections:
    """`Detections` over all rows of the documents drawn, in one pass. Memory holds F x N floats."""
    n_latents, n_sources = sae.W_dec.shape[0], len(store.manifest.sources)
    documents_N = documents_of(store)
    if len(documents_N) > config.documents:
        drawn = np.random.default_rng(config.seed).choice(documents_N, config.documents, replace=False)
        documents_N = np.sort(drawn)
    rows_S, source_N = np.zeros(n_sources, np.int64), np.zeros(len(documents_N), np.int64)
    fired_FS = np.zeros((n_latents, n_sources), np.int64)
    maximum_FN = np.zeros((n_latents, len(documents_N)), np.float32)
    for batch in encode_store(sae, store, keep=lambda rows: np.flatnonzero(np.isin(rows["document"], documents_N))):
        latents_BF, source_B = to_numpy(batch.latents_BF), batch.rows_B["source"].astype(np.int64)
        document_B = np.searchsorted(documents_N, batch.rows_B["document"])
        row, latent = np.divmod(np.flatnonzero(latents_BF > 0), n_latents)
        np.maximum.at(maximum_FN, (latent, document_B[row]), latents_BF[row, latent])
        fired = np.bincount(latent * n_sources + source_B[row], minlength=n_latents * n_sources)
        fired_FS += fired.reshape(n_latents, n_sources)
        rows_S += np.bincount(source_B, minlength=n_sources)
        source_N[document_B] = source_B
    return Detections(rows_S, fired_FS, maximum_FN, source_N)


def domain_metrics(found: Detections, sources: list[str], config: DomainsConfig) -> dict[str, dict[str, Any]]:
    """{source: its detectors}, for every source with at least 4 documents of its own and 4 of others.

    A document counts as detected where the latent fires on any of its rows. Then:

    - precision = documents of the source that are detected / documents detected;
    - recall = documents of the source that are detected / documents of the source;
    - f1 = 2 precision recall / (precision + recall);
    - row_precision, row_recall, row_f1: the same with rows in the place of documents;
    - auroc: of the latent's highest activation on a document (`selectivity.auroc`);
      best_auroc: the highest of all latents;
    - detectors: latents with at least the config's precision and recall;
    - prevalence: the source's share of the documents, which is the precision of a latent that fires everywhere;
      always_f1: the F1 of such a latent;
    - best_1, best_<union>: F1 of the best latent, and of a union of latents grown greedily by F1. They are chosen on
      one half of the documents and measured on the other, then the other way round; f1 is the mean of the two;
    - best_1_threshold: the same for one latent over a threshold, both chosen.
    """
    values = {}
    for index, source in enumerate(sources):
        of_N = found.source_N == index
        if min(of_N.sum(), (~of_N).sum()) >= 4:
            values[source] = _one_source(found, index, of_N, config)
    return values


def _one_source(found: Detections, index: int, of_N: np.ndarray, config: DomainsConfig) -> dict[str, Any]:
    fired_FN = found.maximum_FN > 0
    by_document = scores(fired_FN @ of_N.astype(np.float32), fired_FN.sum(1), of_N.sum())
    by_row = scores(found.fired_FS[:, index], found.fired_FS.sum(1), found.rows_S[index])
    auroc_F = auroc(found.maximum_FN, of_N[None])[:, 0]
    precision_F, recall_F, f1_F = by_document
    is_detector_F = (precision_F >= config.precision) & (recall_F >= config.recall)
    prevalence = float(of_N.mean())
    best = np.argsort(-f1_F, kind="stable")[: config.shown]
    top = int(np.argmax(auroc_F))
    return {
        "documents": int(of_N.sum()),
        "documents_outside": int((~of_N).sum()),
        "rows": int(found.rows_S[index]),
        "rows_outside": int(found.rows_S.sum() - found.rows_S[index]),
        "prevalence": prevalence,
        "always_f1": 2 * prevalence / (1 + prevalence),
        "detectors": int(is_detector_F.sum()),
        "best_auroc": {"latent": top, "auroc": float(auroc_F[top])},
        "best_1_threshold": _cross_threshold(found.maximum_FN, of_N, config.seed),
        "best_1": _cross_chosen(fired_FN, of_N, 1, config.seed),
        f"best_{config.union}": _cross_chosen(fired_FN, of_N, config.union, config.seed),
        "latents": [
            {
                "index": int(latent),
                "precision": rounded(precision_F[latent]),
                "recall": rounded(recall_F[latent]),
                "f1": rounded(f1_F[latent]),
                "auroc": rounded(auroc_F[latent]),
                "row_precision": rounded(by_row[0][latent]),
                "row_recall": rounded(by_row[1][latent]),
                "row_f1": rounded(by_row[2][latent]),
            }
            for latent in best
        ],
    }


def scores(hits: Any, detected: Any, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(precision, recall, F1) = (hits / detected, hits / wanted, 2 hits / (detected + wanted)) of each detector.

    `detected` counts what the detector says, `hits` how much of that is wanted, and `wanted` what there is. 0 for 0/0.
    """
    hits = np.asarray(hits, np.float64)
    precision = np.divide(hits, detected, out=np.zeros_like(hits), where=np.asarray(detected) > 0)
    return precision, hits / max(wanted, 1), 2 * hits / np.maximum(detected + wanted, 1)


def grow_union(fired_FN: np.ndarray, of_N: np.ndarray, size: int) -> list[int]:
    """At most `size` latents, each the one that raises the F1 of "any of them fires" most, while one raises it."""
    chosen: list[int] = []
    any_N, best = np.zeros(len(of_N), bool), 0.0
    for _ in range(size):
        # hits and detected of the union with each latent: what the union has, and what the latent adds to it
        added_FN = fired_FN[:, ~any_N]
        hits_F = any_N[of_N].sum() + added_FN @ of_N[~any_N].astype(np.float32)
        f1_F = scores(hits_F, any_N.sum() + added_FN.sum(1), int(of_N.sum()))[2]
        latent = int(np.argmax(f1_F))
        if f1_F[latent] <= best:
            break
        best = float(f1_F[latent])
        chosen.append(latent)
        any_N |= fired_FN[latent]
    return chosen


def _cross_chosen(fired_FN: np.ndarray, of_N: np.ndarray, size: int, seed: int) -> dict[str, Any]:
    """{"f1": the mean, "by_half": [F1 on each half], "latents": [the latents chosen for it on the other half]}."""
    by_half, latents = [], []
    for chosen_on, measured_on in _halves(of_N, seed):
        union = grow_union(fired_FN[:, chosen_on], of_N[chosen_on], size)
        fires_N = fired_FN[union][:, measured_on].max(0, initial=False)
        by_half.append(_f1(fires_N, of_N[measured_on]))
        latents.append(union)
    return {"f1": float(np.mean(by_half)), "by_half": by_half, "latents": latents}


def best_threshold(maximum_FN: np.ndarray, of_N: np.ndarray) -> tuple[int, float, float]:
    """(latent, threshold, F1) of the highest F1 of "the latent's maximum on the document is at least the threshold".

    The threshold lies half-way between two activations that occur.
    """
    best = (0, np.inf, -1.0)
    rank_N = np.arange(1, len(of_N) + 1)
    for latent, maximum_N in enumerate(maximum_FN):
        order = np.argsort(-maximum_N, kind="stable")
        value_N = maximum_N[order]
        f1_N = scores(np.cumsum(of_N[order]), rank_N, int(of_N.sum()))[2]
        f1_N[:-1][value_N[:-1] == value_N[1:]] = 0  # a threshold can't part equal activations
        f1_N[value_N <= 0] = 0
        at = int(np.argmax(f1_N))
        if f1_N[at] > best[2]:
            lower = max(float(value_N[at + 1]), 0.0) if at + 1 < len(value_N) else 0.0
            best = (latent, (float(value_N[at]) + lower) / 2, float(f1_N[at]))
    return best


def _cross_threshold(maximum_FN: np.ndarray, of_N: np.ndarray, seed: int) -> dict[str, Any]:
    """As `_cross_chosen`, of one latent over a threshold."""
    by_half, latents, thresholds = [], [], []
    for chosen_on, measured_on in _halves(of_N, seed):
        latent, threshold, _ = best_threshold(maximum_FN[:, chosen_on], of_N[chosen_on])
        by_half.append(_f1(maximum_FN[latent, measured_on] >= threshold, of_N[measured_on]))
        latents.append(latent)
        thresholds.append(rounded(threshold))
    return {"f1": float(np.mean(by_half)), "by_half": by_half, "latents": latents, "thresholds": thresholds}


def _halves(of_N: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(documents to choose on, documents to measure on), and the other way round]; each class is halved."""
    generator = np.random.default_rng(seed)
    first_N: np.ndarray = np.zeros(len(of_N), bool)
    for group in (np.flatnonzero(of_N), np.flatnonzero(~of_N)):
        first_N[generator.permutation(group)[: len(group) // 2]] = True
    return [(first_N, ~first_N), (~first_N, first_N)]


def _f1(detected_N: np.ndarray, of_N: np.ndarray) -> float:
    return float(scores((detected_N & of_N).sum(), detected_N.sum(), int(of_N.sum()))[2])
