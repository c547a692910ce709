"""Sparse probes of a label tree's contrasts, cross-validated by document. Numpy, scikit-learn; no files, no torch.

A node is told from the rest of the tree's texts, and from its siblings among its parent's texts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from hafs_evaluate.hierarchy.label_trees import LabelledTexts
from hafs_evaluate.hierarchy.logistic import balanced_accuracy, balanced_weights, fit_logistic, quality, standardised
from hafs_jax.base.errors import UserError

GRID = (0.001, 0.03, 1.0)  # of C, the inverse of the penalty: the weight of the summed log loss
FULL_GRID = (0.0001, 0.003, 0.1)  # of the probe on all D columns, which overfits sooner

Scores = dict[tuple[str, str], dict[str, "FoldScores"]]
"""By (node, contrast), by the name of the probe."""


@dataclass(frozen=True)
class FoldScores:
    """One probe's figures in each fold; NaN in a fold whose test texts are all of one class."""

    balanced_accuracy: Float[np.ndarray, "folds"]
    auroc: Float[np.ndarray, "folds"]

    def as_json(self) -> dict[str, float]:
        """Means over folds and their standard errors, sd / sqrt(folds)."""
        values: dict[str, float] = {}
        for name in ("balanced_accuracy", "auroc"):
            known = getattr(self, name)[~np.isnan(getattr(self, name))]
            values[name] = float(known.mean())
            values[f"{name}_se"] = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else 0.0
        return values


@dataclass(frozen=True)
class Contrast:
    """Which texts a probe is on, and which of them are positive."""

    node: str
    kind: str  # "rest" or "siblings"
    is_in_N: Bool[np.ndarray, "N"]
    is_positive_N: Bool[np.ndarray, "N"]


@dataclass(frozen=True)
class TreeData:
    """A tree's texts by number: paths, folds of the cross-validation, halves of the absorption's cross-fitting."""

    name: str
    paths: tuple[str, ...]
    fold_N: Int[np.ndarray, "N"]
    half_N: Int[np.ndarray, "N"]

    @cached_property
    def nodes(self) -> dict[str, Bool[np.ndarray, "N"]]:
        """Each node and its texts: those whose path begins with it. Parents first."""
        prefixes = {
            "/".join(path.split("/")[:depth])
            for path in set(self.paths)
            if path
            for depth in range(1, path.count("/") + 2)
        }
        return {
            node: np.array([path == node or path.startswith(node + "/") for path in self.paths])
            for node in sorted(prefixes, key=lambda node: (node.count("/"), node))
        }

    def children(self, node: str) -> list[str]:
        """The nodes right under `node`."""
        return [other for other in self.nodes if parent_of(other) == node]

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Every node against the rest of the tree, and against its siblings given the parent, where there are such."""
        found = []
        for node, is_positive_N in self.nodes.items():
            parent = parent_of(node)
            inside = {"rest": np.ones(len(self.paths), bool)}
            if parent is not None:
                inside["siblings"] = self.nodes[parent]
            for kind, is_in_N in inside.items():
                if (is_in_N & ~is_positive_N).any():
                    found.append(Contrast(node, kind, is_in_N, is_positive_N))
        return found


def parent_of(node: str) -> str | None:
    """The node above, None for one of the first level."""
    return node.rpartition("/")[0] or None


def tree_data(texts: LabelledTexts, folds: int, seed: int) -> TreeData:
    """`texts` with folds and halves, each with every leaf in its share and no document in two.

    `UserError` where a leaf's texts come from fewer documents than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    paths = [item.path for item in texts.items]
    groups = [item.group for item in texts.items]
    for leaf in texts.leaves:
        documents = len({item.group for item in texts.items if item.path == leaf})
        if documents < folds:
            raise UserError(
                f"tree {texts.tree}: leaf {leaf!r}: expected texts of at least {folds} documents, found {documents};"
                " add documents or take it out"
            )
    split = {}
    for parts in (folds, 2):
        split[parts] = np.zeros(len(paths), np.int64)
        splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
        for part, (_, held) in enumerate(splitter.split(paths, paths, groups)):
            split[parts][held] = part
    return TreeData(texts.tree, tuple(paths), split[folds], split[2])


def rankings(
    values_NF: Float[np.ndarray, "N F"], contrasts: Sequence[Contrast], is_train_N: Bool[np.ndarray, "N"], top: int
) -> Int[np.ndarray, "C top"]:
    """The `top` columns of largest |mean of positive - mean of negative texts| / sd, best first, of each contrast.

    Means and sd (over positive and negative texts together) are of the contrast's training texts alone. A column that
    does not vary comes last.
    """
    values_TF = values_NF[is_train_N].astype(np.float32)
    values_TF = values_TF - values_TF.mean(0)
    is_in_CT = np.stack([contrast.is_in_N[is_train_N] for contrast in contrasts]).astype(np.float32)
    positive_CT = np.stack([contrast.is_positive_N[is_train_N] for contrast in contrasts]) * is_in_CT
    n_C, positive_C = is_in_CT.sum(1, keepdims=True), positive_CT.sum(1, keepdims=True)
    sum_CF, positive_sum_CF = is_in_CT @ values_TF, positive_CT @ values_TF
    variance_CF = (is_in_CT @ np.square(values_TF)) / n_C - np.square(sum_CF / n_C)
    difference_CF = positive_sum_CF / positive_C - (sum_CF - positive_sum_CF) / (n_C - positive_C)
    sd_CF = np.sqrt(np.maximum(variance_CF, 0))
    score_CF = np.where(sd_CF > 1e-6, np.abs(difference_CF) / np.maximum(sd_CF, 1e-6), -1.0)
    return np.argsort(-score_CF, axis=1, kind="stable")[:, :top]


def sparse_scores(
    values: Float[np.ndarray, "N F"] | Callable[[Bool[np.ndarray, "N"]], Float[np.ndarray, "N F"]],
    data: TreeData,
    ks: Sequence[int],
    ranked: bool = True,
    contrasts: Sequence[Contrast] | None = None,
) -> Scores:
    """Scores of the probes on k columns of `values`, named top_1, top_2, ..., of each contrast (none: all).

    In each fold, columns are ranked (`ranked`, else taken in their order), standardised, and the probe and its C fitted
    on the training texts alone. `values` may be a function of which texts those are. C is the one of GRID with the best
    mean balanced accuracy when each of the other folds in turn is held out of the training texts.
    """
    contrasts = data.contrasts if contrasts is None else contrasts
    folds = range(int(data.fold_N.max()) + 1)
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {
        (contrast.node, contrast.kind): {k: np.full((2, len(folds)), np.nan) for k in ks} for contrast in contrasts
    }
    for fold in folds:
        is_train_N = data.fold_N != fold
        values_NF = values(is_train_N) if callable(values) else values
        top = min(max(ks), values_NF.shape[1])
        columns_CK = (
            rankings(values_NF, contrasts, is_train_N, top) if ranked else np.tile(np.arange(top), (len(contrasts), 1))
        )
        for contrast, columns_K in zip(contrasts, columns_CK, strict=True):
            rows = np.flatnonzero(contrast.is_in_N)
            inputs = standardised(values_NF[np.ix_(rows, columns_K)].astype(np.float64), is_train_N[rows])
            is_positive, own_fold = contrast.is_positive_N[rows], data.fold_N[rows]
            for k in ks:
                scores = held_out_scores(inputs[:, :k], is_positive, own_fold, fold)
                is_held = own_fold == fold
                found[contrast.node, contrast.kind][k][:, fold] = quality(scores[is_held], is_positive[is_held])
    return {
        key: {f"top_{k}": FoldScores(values[0], values[1]) for k, values in by_k.items()} for key, by_k in found.items()
    }


def held_out_scores(
    inputs_Nk: Float[np.ndarray, "N k"],
    is_positive_N: Bool[np.ndarray, "N"],
    fold_N: Int[np.ndarray, "N"],
    fold: int,
    grid: Sequence[float] = GRID,
) -> Float[np.ndarray, "N"]:
    """The log odds of all rows by the probe fitted without `fold`, its C chosen by holding out each other fold."""
    inner = [other for other in np.unique(fold_N) if other != fold]
    masks = [(fold_N != fold) & (fold_N != other) for other in inner] + [fold_N != fold]
    weights_MN = np.stack([balanced_weights(is_positive_N, mask) for mask in masks])
    every_MN = np.repeat(weights_MN, len(grid), axis=0)
    coefficients_Mk = fit_logistic(inputs_Nk, is_positive_N, every_MN, np.tile(grid, len(masks)))
    scores_MN = coefficients_Mk[:, :-1] @ inputs_Nk.T + coefficients_Mk[:, -1:]
    scores_MGN = scores_MN.reshape(len(masks), len(grid), -1)
    accuracy_MG = np.array(
        [
            [balanced_accuracy(scores_N[fold_N == other], is_positive_N[fold_N == other]) for scores_N in scores_GN]
            for other, scores_GN in zip(inner, scores_MGN[:-1], strict=True)
        ]
    )
    known_M = ~np.isnan(accuracy_MG).any(1)
    best = int(accuracy_MG[known_M].mean(0).argmax()) if known_M.any() else 0
    return scores_MGN[-1, best]


def full_scores(
    acts_ND: Float[np.ndarray, "N D"], data: TreeData
) -> tuple[dict[tuple[str, str], FoldScores], dict[str, Bool[np.ndarray, "N"]]]:
    """Scores of the probe on all D standardised columns, and each node's out-of-fold answers of "rest", [N].

    C is chosen with one of the other folds held out, the next one: all of them would take minutes.
    """
    from sklearn.linear_model import LogisticRegression

    folds = int(data.fold_N.max()) + 1
    scores, answers = {}, {}
    for contrast in data.contrasts:
        rows = np.flatnonzero(contrast.is_in_N)
        is_positive, own_fold = contrast.is_positive_N[rows], data.fold_N[rows]
        found = np.full((2, folds), np.nan)
        answers_N = np.zeros(len(data.paths), bool)
        for fold in range(folds):
            is_held, is_train = own_fold == fold, own_fold != fold
            is_inner = is_train & (own_fold != (fold + 1) % folds)
            inputs = standardised(acts_ND[rows], is_train).astype(np.float32)

            def fitted(C: float, is_used: np.ndarray, inputs: np.ndarray, is_positive: np.ndarray) -> np.ndarray:
                probe = LogisticRegression(C=C, class_weight="balanced", max_iter=300, tol=1e-3)
                return probe.fit(inputs[is_used], is_positive[is_used]).decision_function(inputs)

            is_chosen = is_train & ~is_inner
            best = max(
                FULL_GRID,
                key=lambda C: np.nan_to_num(  # the first, so the most regularised, of equals
                    balanced_accuracy(fitted(C, is_inner, inputs, is_positive)[is_chosen], is_positive[is_chosen])
                ),
            )
            odds = fitted(best, is_train, inputs, is_positive)
            found[:, fold] = quality(odds[is_held], is_positive[is_held])
            answers_N[rows[is_held]] = odds[is_held] > 0
        scores[contrast.node, contrast.kind] = FoldScores(found[0], found[1])
        if contrast.kind == "rest":
            answers[contrast.node] = answers_N
    return scores, answers


def principal_components(
    acts_ND: Float[np.ndarray, "N D"], count: int, is_train_N: Bool[np.ndarray, "N"]
) -> Float[np.ndarray, "N count"]:
    """All texts' coordinates along the first `count` principal components of the training texts."""
    centred_ND = (acts_ND - acts_ND[is_train_N].mean(0)).astype(np.float64)
    covariance_DD = centred_ND[is_train_N].T @ centred_ND[is_train_N]
    _, vectors_DD = np.linalg.eigh(covariance_DD)
    return centred_ND @ vectors_DD[:, ::-1][:, :count]


def macro(nodes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over the nodes of a tree's result, each node alike; none where no node has the figure.

    level_1, level_2, ...: of each probe against the rest, over the nodes of the level; siblings_2, ...: against the
    siblings given the parent. parents_top_1: balanced accuracy of top_1 against the rest, over nodes that have
    children. hole, absorption_fraction, absorption_full: over the nodes that have them.
    """
    values: dict[str, Any] = {}
    for kind, prefix in (("rest", "level"), ("siblings", "siblings")):
        for level in sorted({node["level"] for node in nodes.values()}):
            of_level = [node["contrasts"][kind] for node in nodes.values() if node["level"] == level]
            if known := [scores for scores in of_level if scores]:
                values[f"{prefix}_{level}"] = {
                    probe: {
                        name: float(np.mean([scores[probe][name] for scores in known]))
                        for name in ("balanced_accuracy", "auroc")
                    }
                    for probe in known[0]
                }
    parents = {node["parent"] for node in nodes.values()} - {None}
    top_1 = [(nodes[parent]["contrasts"]["rest"] or {}).get("top_1") for parent in sorted(parents)]
    values["parents_top_1"] = _mean([scores["balanced_accuracy"] for scores in top_1 if scores])
    values["hole"] = _mean([node.get("hole") for node in nodes.values()])
    for name in ("fraction", "full"):
        values[f"absorption_{name}"] = _mean([(node.get("absorption") or {}).get(name) for node in nodes.values()])
    return values


def mean_over_trees(macros: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The trees' `macro`s, averaged key by key over the trees that have the figure."""
    keys = dict.fromkeys(key for values in macros for key in values)
    found: dict[str, Any] = {}
    for key in keys:
        known = [values[key] for values in macros if values.get(key) is not None]
        found[key] = mean_over_trees(known) if known and isinstance(known[0], dict) else _mean(known)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
