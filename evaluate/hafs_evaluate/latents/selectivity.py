"""How well a latent's activation tells one kind of document from the others. NumPy and SciPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from hafs_evaluate.latents.neighbours import rounded

LEAST_DOCUMENTS = 20  # a label value of fewer is left out: the AUROC of a handful of documents is noise
MOST_VALUES = 64  # a label of more values than this names documents (a title), not kinds of them
CHUNK_FLOATS = 1 << 24


def auroc(score_CN: np.ndarray, is_of_GN: np.ndarray) -> np.ndarray:
    """P(score of a document of the group > of another) + P(equal) / 2, by Mann-Whitney; [C, G] float64.

    `is_of_GN`: bool, the documents of each group; the others of the N are the rest. NaN where either is empty.
    """
    n_documents = score_CN.shape[1]
    n_G = is_of_GN.sum(1).astype(np.float64)
    scale_G = n_G * (n_documents - n_G)
    found = np.full((len(score_CN), len(is_of_GN)), np.nan)
    chunk = max(1, CHUNK_FLOATS // max(n_documents, 1))
    for start in range(0, len(score_CN), chunk):
        rank_CN = rankdata(score_CN[start : start + chunk], axis=1)
        excess_CG = rank_CN @ is_of_GN.T.astype(np.float64) - n_G * (n_G + 1) / 2
        np.divide(excess_CG, scale_G, out=found[start : start + chunk], where=scale_G > 0)
    return found


def document_groups(
    documents: Sequence[dict[str, Any]], looked_at_N: np.ndarray
) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """(label, value, documents of that value, documents that have the label), of `source` and of every text label.

    Only documents with rows count. Values of fewer than LEAST_DOCUMENTS, labels of more than MOST_VALUES values and of
    a single one are left out.
    """
    labels: dict[str, list[str | None]] = {"source": [entry.get("source") for entry in documents]}
    for key in sorted({key for entry in documents for key in entry.get("labels") or {}}):
        values = [(entry.get("labels") or {}).get(key) for entry in documents]
        labels.setdefault(key, [str(value) if isinstance(value, (str, int)) else None for value in values])
    groups = []
    for key, values in labels.items():
        named_N = np.array([value or "" for value in values])
        has_N = looked_at_N & (named_N != "")
        distinct, counts = np.unique(named_N[has_N], return_counts=True)
        if not 2 <= len(distinct) <= MOST_VALUES:
            continue
        for value in distinct[counts >= LEAST_DOCUMENTS].tolist():
            groups.append((key, value, has_N & (named_N == value), has_N))
    return groups


def selectivity(
    maximum_CN: np.ndarray, mass_CN: np.ndarray, rows_N: np.ndarray, documents: Sequence[dict[str, Any]]
) -> list[dict[str, Any] | None]:
    """Of each latent, the kind of document that its activation tells best from the others; None where there is none.

    {"label", "value", "auroc", "share", "base"}: of all groups of `document_groups`, the one with the highest AUROC of
    the latent's maximum over a document's rows (0 where silent), the group against the other documents that have the
    label; `share` is the share of the latent's summed activation on those documents that lies in the group, `base` the
    group's share of their rows. Being the best of G groups, an AUROC of about .6 is what chance gives.
    """
    best: list[dict[str, Any] | None] = [None] * len(maximum_CN)
    by_label: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for label, value, of_N, has_N in document_groups(documents, rows_N > 0):
        by_label.setdefault(label, []).append((value, of_N, has_N))
    for label, groups in by_label.items():
        has_N = groups[0][2]
        of_GN = np.stack([of_N[has_N] for _, of_N, _ in groups])
        auroc_CG = auroc(maximum_CN[:, has_N], of_GN)
        mass_CG = mass_CN[:, has_N].astype(np.float64) @ of_GN.T
        total_C = mass_CN[:, has_N].sum(1, dtype=np.float64)
        base_G = of_GN @ rows_N[has_N] / rows_N[has_N].sum()
        for slot, group in enumerate(np.nan_to_num(auroc_CG, nan=-1.0).argmax(1).tolist()):
            found, present = float(auroc_CG[slot, group]), best[slot]
            if total_C[slot] > 0 and np.isfinite(found) and (present is None or found > present["auroc"]):
                best[slot] = {
                    "label": label,
                    "value": groups[group][0],
                    "auroc": rounded(found),
                    "share": rounded(mass_CG[slot, group] / total_C[slot]),
                    "base": rounded(base_G[group]),
                }
    return best
