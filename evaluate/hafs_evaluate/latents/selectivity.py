"""How well a latent's activation tells one kind of document from the others."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from hafs_evaluate.latents.neighbours import rounded

LEAST_DOCUMENTS = 20  # a value that fewer documents have is left out: the AUROC of a handful is noise
MOST_VALUES = 64  # a label with more values than this names documents, as a title does, and not kinds of them
CHUNK_FLOATS = 1 << 24  # scores ranked at once


def auroc(score_CN: Float[np.ndarray, "C N"], is_of_GN: Bool[np.ndarray, "G N"]) -> Float[np.ndarray, "C G"]:
    """P(x > y) + P(x = y) / 2, with x the score of a document of the group and y that of one of the rest; [C, G].

    `is_of_GN` marks the documents of each group; the rest are all others. NaN where either is empty.
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


class DocumentGroup(NamedTuple):
    """The documents whose label has one value, among those that have the label."""

    label: str
    value: str
    of_N: Bool[np.ndarray, "N"]  # documents with that value
    has_N: Bool[np.ndarray, "N"]  # documents with the label


def document_groups(documents: Sequence[dict[str, Any]], looked_at_N: Bool[np.ndarray, "N"]) -> list[DocumentGroup]:
    """The groups of `source` and of every label that is text.

    Only the documents in `looked_at_N` count. Left out are values that fewer than LEAST_DOCUMENTS have, labels with
    more than MOST_VALUES values, and labels with a single one.
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
            groups.append(DocumentGroup(key, value, has_N & (named_N == value), has_N))
    return groups


def selectivity(
    maximum_CN: Float[np.ndarray, "C N"],
    mass_CN: Float[np.ndarray, "C N"],
    rows_N: Int[np.ndarray, "N"],
    documents: Sequence[dict[str, Any]],
) -> list[dict[str, Any] | None]:
    """For each latent, the kind of document that its activation tells best from the others; None where there is none.

    It is {"label", "value", "auroc", "share", "base"}, of the group (`document_groups`) with the highest AUROC. The
    score of a document is the latent's highest activation on it, 0 where the latent is silent, and the rest are the
    other documents that have the label. `share` is the share of the latent's summed activation on all these documents
    that lies in the group, `base` the group's share of their rows. As the best of many groups is taken, chance alone
    gives an AUROC of about 0.6.
    """
    best: list[dict[str, Any] | None] = [None] * len(maximum_CN)
    by_label: dict[str, list[DocumentGroup]] = {}
    for group in document_groups(documents, rows_N > 0):
        by_label.setdefault(group.label, []).append(group)
    for label, groups in by_label.items():
        has_N = groups[0].has_N
        of_GN = np.stack([group.of_N[has_N] for group in groups])
        auroc_CG = auroc(maximum_CN[:, has_N], of_GN)
        mass_CG = mass_CN[:, has_N].astype(np.float64) @ of_GN.T
        total_C = mass_CN[:, has_N].sum(1, dtype=np.float64)
        base_G = of_GN @ rows_N[has_N] / rows_N[has_N].sum()
        for place, g in enumerate(np.nan_to_num(auroc_CG, nan=-1.0).argmax(1).tolist()):
            found, present = float(auroc_CG[place, g]), best[place]
            if total_C[place] > 0 and np.isfinite(found) and (present is None or found > present["auroc"]):
                best[place] = {
                    "label": label,
                    "value": groups[g].value,
                    "auroc": rounded(found),
                    "share": rounded(mass_CG[place, g] / total_C[place]),
                    "base": rounded(base_G[g]),
                }
    return best
