"""Sparse probes of the nodes of a label tree, cross-validated by document. Imports no torch.

A probe is a logistic regression on k columns, latents or dimensions, that tells the texts of a node from others. Each
node has two such contrasts: "rest", against all other texts of the tree, and "siblings", among the texts of its parent
alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from hafs_evaluate.hierarchy.label_trees import LabelledTexts
from hafs_evaluate.hierarchy.logistic import balanced_accuracy, balanced_weights, fit_logistic, quality, standardised
from hafs_jax.base.errors import UserError

GRID = (0.001, 0.03, 1.0)  # values of C, the weight of the summed log loss against the penalty, that are tried
FULL_GRID = (0.0001, 0.003, 0.1)  # those tried for the probe on all D columns, which overfits sooner

Scores = dict[tuple[str, str], dict[str, "FoldScores"]]
"""{(node, contrast): {name of the probe: its figures}}."""


@dataclass(frozen=True)
class FoldScores:
    """One probe's figures in each fold; NaN in a fold whose held-out texts are all of one class."""

    balanced_accuracy: Float[np.ndarray, "folds"]
    auroc: Float[np.ndarray, "folds"]

    def as_json(self) -> dict[str, float]:
        """Mean over the folds that have a figure, and its standard error, standard deviation / sqrt(folds)."""
        values: dict[str, float] = {}
        for name in ("balanced_accuracy", "auroc"):
            known = getattr(self, name)[~np.isnan(getattr(self, name))]
            values[name] = float(known.mean())
            values[f"{name}_se"] = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else 0.0
        return values


@dataclass(frozen=True)
class Contrast:
    """A node, and the texts that a probe tells it from."""

    node: str
    kind: str  # "rest" or "siblings"
    is_in_N: Bool[np.ndarray, "N"]  # the probe is about these texts
    is_positive_N: Bool[np.ndarray, "N"]  # the node's texts


@dataclass(frozen=True)
class TreeData:
    """A tree's N texts."""

    name: str
    paths: tuple[str, ...]
    fold_N: Int[np.ndarray, "N"]  # of the cross-validation
    half_N: Int[np.ndarray, "N"]  # 0 or 1, of the cross-fitting of absorption

    @cached_property
    def nodes(self) -> dict[str, Bool[np.ndarray, "N"]]:
        """Which texts each node has, those whose path begins with it. Parents come first."""
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
        """Both contrasts of every node, without those that have nothing to tell the node from."""
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
    """The node above; None for one of the first level."""
    return node.rpartition("/")[0] or None


def tree_data(texts: LabelledTexts, folds: int, seed: int) -> TreeData:
    """`texts` divided into folds and halves, so that each has its share of every leaf and no document is in two.

    Raises `UserError` where a leaf's texts come from fewer documents than there are folds.
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
    """For each contrast, the `top` columns of the largest |mean of positive - mean of negative texts| / sd, best first.

    The means, and sd, the standard deviation over positive and negative texts together, are taken over the contrast's
    training texts alone. A column that does not vary comes last.
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
    """Scores of the probes on k columns of `values`, called top_<k>, for each k of `ks` and each contrast.

    `contrasts` are by default all of the tree's. In each fold the columns are ranked (or taken in their order, where
    `ranked` is False) and standardised, and the probe and its C are fitted, all on the training texts alone. `values`
    may be a function of which texts those are. C is the one of GRID that has the best mean balanced accuracy when each
    of the other folds in turn is held out of the training texts.
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
    """The log odds that the probe fitted without `fold` gives all rows. C is chosen by holding out each other fold."""
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
    """(scores of the probe on all D standardised columns, what it says of each text), for each contrast and each node.

    What it says of a text is by the probe whose training texts did not include it, in the contrast "rest". C is chosen
    by holding out only the next one of the other folds, since holding out each in turn would take minutes.
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
                key=lambda C: np.nan_to_num(  # of equals the first, which is the most regularised
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
    """The coordinates of all texts along the first `count` principal components of the training texts."""
    centred_ND = (acts_ND - acts_ND[is_train_N].mean(0)).astype(np.float64)
    covariance_DD = centred_ND[is_train_N].T @ centred_ND[is_train_N]
    _, vectors_DD = np.linalg.eigh(covariance_DD)
    return centred_ND @ vectors_DD[:, ::-1][:, :count]
