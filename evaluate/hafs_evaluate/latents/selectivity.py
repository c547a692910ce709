"""How well a latent's activation tells one kind of document from the others."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from hafs_evaluate.latents.neighbours import rounded

LEAST_DOCUMENTS = 20  # a value that fewer documents have is left out: the AUROC of a handful is noise
MOST_VALUES = 64  # a label with more values than this names documents, as a title does, and not kinds of them


def auroc(
    score_CN: Float[np.ndarray, "C N"] | sparse.csr_array, is_of_GN: Bool[np.ndarray, "G N"]
) -> Float[np.ndarray, "C G"]:
    """P(x > y) + P(x = y) / 2, with x the score of a document of the group and y that of one of the rest; [C, G].

    No score is below 0. `is_of_GN` marks the documents of each group; the rest are all others. NaN where either is
    empty.
    """
    score_CN = sparse.csr_array(score_CN)
    n_documents = score_CN.shape[1]
    n_G = is_of_GN.sum(1).astype(np.float64)
    scale_G = n_G * (n_documents - n_G)
    # every document has the rank of those whose score is 0, which are tied, and each of the others some ranks more
    zeros_C = n_documents - np.diff(score_CN.indptr)
    more_P = _ranks(score_CN) + np.repeat(zeros_C - (zeros_C + 1) / 2, np.diff(score_CN.indptr))
    more_CN = sparse.csr_array((more_P, score_CN.indices, score_CN.indptr), score_CN.shape)
    rank_CG = np.outer((zeros_C + 1) / 2, n_G) + more_CN @ is_of_GN.T.astype(np.float64)
    excess_CG = rank_CG - n_G * (n_G + 1) / 2
    return np.divide(excess_CG, scale_G, out=np.full(excess_CG.shape, np.nan), where=scale_G > 0)


def _ranks(values: sparse.csr_array) -> Float[np.ndarray, "P"]:
    """The rank of each stored value among those of its row, from 1; equal ones have the mean of their ranks.

    The values are above 0, so that as float32 their bits have their order, and one sort takes rows and values.
    """
    rows_P = np.repeat(np.arange(values.shape[0], dtype=np.uint64), np.diff(values.indptr))
    order_P = np.argsort(rows_P << np.uint64(32) | values.data.astype(np.float32).view(np.uint32))
    sorted_P = values.data[order_P]
    is_first_P = np.ones(len(sorted_P), bool)
    is_first_P[1:] = (np.diff(sorted_P) != 0) | (np.diff(rows_P) != 0)
    starts = np.flatnonzero(is_first_P)
    equal = np.diff([*starts, len(sorted_P)])
    rank_P = np.empty(len(sorted_P))
    rank_P[order_P] = np.repeat(starts - values.indptr[rows_P[starts].astype(np.int64)] + (equal + 1) / 2, equal)
    return rank_P


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
    maximum_CN: sparse.csr_array,
    mass_CN: sparse.csr_array,
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
    best: list[dict[str, Any] | None] = [None] * maximum_CN.shape[0]
    by_label: dict[str, list[DocumentGroup]] = {}
    for group in document_groups(documents, rows_N > 0):
        by_label.setdefault(group.label, []).append(group)
    for label, groups in by_label.items():
        has_N = groups[0].has_N
        of_GN = np.stack([group.of_N[has_N] for group in groups])
        auroc_CG = auroc(maximum_CN[:, has_N], of_GN)
        own_CN = mass_CN[:, has_N].astype(np.float64)
        mass_CG, total_C = own_CN @ of_GN.T.astype(np.float64), own_CN.sum(1)
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
