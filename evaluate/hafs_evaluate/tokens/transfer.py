"""Transfer to unseen children: do latents that were chosen on some tokens of a property find its other tokens?

A latent for the property does. A latent for a token does not. Nothing here looks at directions, so a penalty on the
decoder can't win by construction. `token_transfer` is the whole measure in one call. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array, issparse

from hafs_evaluate.tokens.trials import LEAST_CHILDREN, LEAST_ROWS, SPLITS, Plan, Property, Trial, plan

KS = (1, 2, 5)
RIDGE = 1e-3  # of a probe on k latents, relative to their variances
CUTS = (0.005, 0.02, 0.06, 0.2, 0.5, 0.8, 0.94, 0.98, 0.995)
"""Quantiles at which a coordinate without a natural threshold is cut, to rank it."""
CHILD_ROWS = 5  # a child's recall is of at least so many rows

_DENSE = 0.05  # share of entries from which a dense product is faster


def token_transfer(
    latents: Any,
    token_ids: Int[np.ndarray, "N"],
    documents: Int[np.ndarray, "N"],
    properties: Mapping[str, Bool[np.ndarray, "V"]],
    *,
    children: Int[np.ndarray, "V"] | None = None,
    ks: Sequence[int] = KS,
    n_splits: int = SPLITS,
    seed: int = 0,
    least_children: int = LEAST_CHILDREN,
    least_rows: int = LEAST_ROWS,
    signed: bool = False,
) -> dict[str, Any]:
    """Transfer of N rows' latents, [N, F] as a scipy.sparse array or a numpy array, to unseen children.

    `token_ids` and `documents` are those of the rows, `properties` masks over the V token ids (`token_properties` makes
    them from a tokenizer). `plan` says how children and documents are split and which properties are left out,
    `transfer` what is returned. Take held-out rows.
    """
    trials = plan(token_ids, documents, properties, children, n_splits, seed, least_children, least_rows)
    return transfer(latents, trials, ks, signed)


def transfer(latents: Any, trials: Plan, ks: Sequence[int] = KS, signed: bool = False) -> dict[str, Any]:
    """`token_transfer` over trials that are planned already, so that several SAEs share them.

    In each trial the latents are ranked by the balanced accuracy of "it fires", (sensitivity + specificity) / 2, on the
    rows to choose on. For each k:

    - top_1: the first of them, as it stands: it says yes where it fires (is above 0);
    - top_k: a probe on the first k: ridge regression on their activations, both classes with the same weight. It says
      yes above the threshold of the best balanced accuracy on the same rows; for f1, of the best F1 there.

    Each is measured on the unseen children in the other documents: `balanced_accuracy`, `f1`, `recall`. `seen` is the
    balanced accuracy on the children that it was chosen on, in those other documents: what lies between the two is
    knowledge of tokens. All are means over the trials.

    With `signed`, for coordinates without a natural threshold (activations, principal components): they are ranked by
    the better side of the best of the quantiles CUTS, and top_1 says yes on that side of the best of all thresholds.

    Returns {"properties": {name: figures}, "mean": their means over the properties, "left_out": {name: why}}. A
    property's figures are its `children` and `rows`, {"top_<k>": {...}} and

    - `child_recall`: mean over its children of the recall of top_1 on the child's rows, in the trials that have not
      seen it; children with at least 5 rows there. `child_spread` is the standard deviation over the children;
    - `latents`: the latent of top_1 in each trial; `splits`: its balanced accuracy in each trial.

    The means are named `transfer_top_<k>`, `f1_top_<k>`, `recall_top_<k>`, `seen_top_<k>`, `child_recall` and
    `child_spread`; None where no property has trials.
    """
    detectors = _Coordinates(latents, trials) if signed else _Latents(latents, trials)
    found: dict[str, dict[str, Any]] = {}
    for start in range(0, len(trials.properties), detectors.block):
        block = trials.properties[start : start + detectors.block]
        for each, ranked in zip(block, detectors.ranked(block, max(ks)), strict=True):
            found[each.name] = _of_property(each, ranked, detectors, trials, ks)
    return {"mean": means(found, ks), "properties": found, "left_out": dict(trials.left_out)}


def best_latents(latents: Any, trials: Plan) -> list[list[int]]:
    """For each property the latent of the best balanced accuracy in each half of the documents, on all children."""
    detectors, n_cells = _Latents(latents, trials), len(trials.rows_U)
    half_U = np.arange(n_cells) >= n_cells // 2
    halves = tuple(Trial(at_U, ~at_U, ~at_U) for at_U in (~half_U, half_U))
    every = [replace(each, trials=halves) for each in trials.properties]
    return [[int(order[0]) for order in ranked] for ranked in detectors.ranked(every, 1)] if every else []


def means(found: Mapping[str, dict[str, Any]], ks: Sequence[int]) -> dict[str, float | None]:
    """The means over the properties, by their names; see `transfer`."""
    names = {"transfer": "balanced_accuracy", "f1": "f1", "recall": "recall", "seen": "seen"}
    paths = {f"{name}_top_{k}": (f"top_{k}", key) for k in ks for name, key in names.items()}
    values = {name: [figures[at][key] for figures in found.values()] for name, (at, key) in paths.items()}
    for name in ("child_recall", "child_spread"):
        values[name] = [figures[name] for figures in found.values() if figures[name] is not None]
    return {name: float(np.mean(each)) if each else None for name, each in values.items()}


class Counted:
    """What a detector said of rows: true and false positives, of how many rows of each class."""

    def __init__(self, true: float, false: float, positives: float, negatives: float) -> None:
        self.recall = true / positives
        self.balanced_accuracy = (self.recall + 1 - false / negatives) / 2
        self.f1 = 2 * true / (true + false + positives)

    @classmethod
    def of_rows(cls, said_n: Bool[np.ndarray, "n"], is_positive_n: Bool[np.ndarray, "n"]) -> "Counted":
        """Of a yes or no for each row."""
        positives = int(is_positive_n.sum())
        true = int(said_n[is_positive_n].sum())
        return cls(true, int(said_n.sum()) - true, positives, len(said_n) - positives)

    @classmethod
    def of_cells(
        cls, fired_U: np.ndarray, cells_U: np.ndarray, is_positive_U: np.ndarray, rows_U: np.ndarray
    ) -> "Counted":
        """Of the number of rows of each cell on which it said yes."""
        positive_U, negative_U = cells_U & is_positive_U, cells_U & ~is_positive_U
        said = fired_U[positive_U].sum(), fired_U[negative_U].sum()
        return cls(float(said[0]), float(said[1]), int(rows_U[positive_U].sum()), int(rows_U[negative_U].sum()))


class Thresholds(NamedTuple):
    """Where "score > threshold" does best, half-way between two scores that occur."""

    balanced_accuracy: float
    f1: float


def fit_probe(
    inputs_nk: Float[np.ndarray, "n k"],
    is_positive_n: Bool[np.ndarray, "n"],
    counts_n: Int[np.ndarray, "n"] | None = None,
    ridge: float = RIDGE,
) -> tuple[Float[np.ndarray, "k"], Thresholds]:
    """(w, thresholds): the score of a row is w . x. A row may stand for `counts_n` equal ones.

    w minimises the mean of (w . x + b - y)^2 over the rows, y = 1 or -1 and both classes of the same weight, plus
    ridge times the sum of w_j^2 var(x_j). The thresholds do best on the same rows.
    """
    x, counts = inputs_nk.astype(np.float64), np.ones(len(inputs_nk)) if counts_n is None else counts_n
    share_n = np.where(is_positive_n, counts / counts[is_positive_n].sum(), counts / counts[~is_positive_n].sum())
    means = [share_n[of_class] @ x[of_class] for of_class in (is_positive_n, ~is_positive_n)]
    mean_k = (means[0] + means[1]) / 2
    covariance_kk = (x * share_n[:, None]).T @ x / 2 - np.outer(mean_k, mean_k)
    variance_k = np.maximum(np.diag(covariance_kk), 0)
    scale = max(float(variance_k.max(initial=0)), 1e-30)
    covariance_kk[np.diag_indices(len(mean_k))] += ridge * variance_k + 1e-9 * scale
    w_k = np.linalg.solve(covariance_kk, (means[0] - means[1]) / 2)
    return w_k, best_thresholds(x @ w_k, is_positive_n, counts)


def best_thresholds(
    scores_n: Float[np.ndarray, "n"], is_positive_n: Bool[np.ndarray, "n"], counts_n: np.ndarray | None = None
) -> Thresholds:
    """The best of all thresholds on these rows, each of which stands for `counts_n` rows [1]."""
    order = np.argsort(-scores_n, kind="stable")
    score_n, counts = scores_n[order], np.ones(len(order)) if counts_n is None else counts_n[order]
    true_n, false_n = np.cumsum(counts * is_positive_n[order]), np.cumsum(counts * ~is_positive_n[order])
    may_cut_n = np.append(score_n[:-1] > score_n[1:], True)  # a threshold can't part equal scores
    gain_n = true_n / max(true_n[-1], 1) - false_n / max(false_n[-1], 1)
    f1_n = 2 * true_n / (true_n + false_n + true_n[-1])
    below_n = np.append(score_n[1:], score_n[-1] - 1.0)
    best = [int(np.where(may_cut_n, quality_n, -np.inf).argmax()) for quality_n in (gain_n, f1_n)]
    return Thresholds(*(float((score_n[at] + below_n[at]) / 2) for at in best))


class _Latents:
    """Latents that fire where they are above 0."""

    block = 16  # properties that are ranked at once: as many as the product with a sparse array is fastest with

    def __init__(self, latents: Any, trials: Plan) -> None:
        values = csr_array(latents if issparse(latents) else np.asarray(latents, np.float32))
        if values.shape[0] != len(trials.cell_N):
            raise ValueError(f"expected the latents of {len(trials.cell_N)} rows, found {values.shape[0]}")
        n_rows, self.n_latents = values.shape
        fires = csr_array(((values.data > 0).astype(np.float32), values.indices, values.indptr), shape=values.shape)
        ones = np.ones(n_rows, np.float32)
        cells = csr_array((ones, (trials.cell_N, np.arange(n_rows))), shape=(len(trials.rows_U), n_rows))
        self.fired = csc_array(cells @ fires)  # [2U, F] rows of each cell on which the latent fires
        self.values, self.rows_U = csc_array(values), trials.rows_U

    def ranked(self, block: Sequence[Property], k: int) -> list[list[np.ndarray]]:
        """For each property and each of its trials the k latents of the best balanced accuracy, best first."""
        chosen = _Chosen(block, self.rows_U)
        gain_FQ = np.empty((self.n_latents, len(chosen.positives_Q)))
        step = max(1, (1 << 25) // len(self.rows_U))
        for start in range(0, self.n_latents, step):
            part = self.fired[:, start : start + step]
            is_dense = part.nnz > _DENSE * part.shape[0] * part.shape[1]
            gain_FQ[start : start + step] = chosen.gains(part.toarray().T if is_dense else part.T)
        return chosen.by_property([_first(gain_FQ[:, q], k) for q in range(gain_FQ.shape[1])])

    def said(self, latent: int, trial: Trial, each: Property) -> np.ndarray:
        """[2U] the number of rows of each cell on which the latent says yes."""
        column_U = np.zeros(len(self.rows_U), np.float32)
        part = slice(self.fired.indptr[latent], self.fired.indptr[latent + 1])
        column_U[self.fired.indices[part]] = self.fired.data[part]
        return column_U

    def columns(self, latents: np.ndarray) -> np.ndarray:
        """[N, k] the activations of these latents."""
        return self.values[:, latents].toarray()


class _Coordinates:
    """Coordinates of either sign, cut where they tell most."""

    block = 200  # as many as there are, since most of the time is spent on where each coordinate is above its cuts

    def __init__(self, values: Any, trials: Plan) -> None:
        self.values_ND = np.asarray(values, np.float32)
        if len(self.values_ND) != len(trials.cell_N):
            raise ValueError(f"expected the values of {len(trials.cell_N)} rows, found {len(self.values_ND)}")
        self.rows_U, self.cell_N = trials.rows_U, trials.cell_N
        self.cuts_TD = np.quantile(self.values_ND, CUTS, axis=0)
        order_N = np.argsort(trials.cell_N, kind="stable")
        self.sorted_ND = self.values_ND[order_N]
        self.cells, self.starts = np.unique(trials.cell_N[order_N], return_index=True)

    def _fired(self, coordinates: slice | list[int]) -> np.ndarray:
        """[2U, T, d] rows of each cell on which the coordinate is above its cut."""
        above = self.sorted_ND[:, None, coordinates] > self.cuts_TD[None, :, coordinates]
        fired = np.zeros((len(self.rows_U), *above.shape[1:]), np.float32)
        fired[self.cells] = np.add.reduceat(above, self.starts, axis=0, dtype=np.float32)
        return fired

    def ranked(self, block: Sequence[Property], k: int) -> list[list[np.ndarray]]:
        chosen, width = _Chosen(block, self.rows_U), self.values_ND.shape[1]
        gain_DQ = np.empty((width, len(chosen.positives_Q)))
        step = max(1, (1 << 25) // (len(CUTS) * max(len(self.rows_U), len(self.values_ND))))
        for start in range(0, width, step):
            fired_UTd = self._fired(slice(start, start + step))
            gain_CQ = np.abs(chosen.gains(fired_UTd.reshape(len(fired_UTd), -1).T))
            gain_DQ[start : start + step] = gain_CQ.reshape(*fired_UTd.shape[1:], -1).max(0)
        return chosen.by_property([_first(gain_DQ[:, q], k) for q in range(gain_DQ.shape[1])])

    def said(self, coordinate: int, trial: Trial, each: Property) -> np.ndarray:
        chosen = np.flatnonzero(trial.chosen_U[self.cell_N])
        is_positive_n = each.is_positive_U[self.cell_N[chosen]]
        best = (-np.inf, self.values_ND[:, 0] > np.inf)
        for sign in (1, -1):
            score_N = sign * self.values_ND[:, coordinate]
            said_N = score_N > best_thresholds(score_N[chosen], is_positive_n).balanced_accuracy
            quality = Counted.of_rows(said_N[chosen], is_positive_n).balanced_accuracy
            if quality > best[0]:
                best = quality, said_N
        return np.bincount(self.cell_N, weights=best[1], minlength=len(self.rows_U))

    def columns(self, coordinates: np.ndarray) -> np.ndarray:
        return self.values_ND[:, coordinates]


class _Chosen:
    """The cells on which the detectors of some properties are chosen, in all Q of their trials."""

    def __init__(self, block: Sequence[Property], rows_U: np.ndarray) -> None:
        pairs = [(trial.chosen_U, each.is_positive_U) for each in block for trial in each.trials]
        self.positive_UQ = np.stack([chosen_U & is_positive_U for chosen_U, is_positive_U in pairs], 1)
        self.negative_UQ = np.stack([chosen_U & ~is_positive_U for chosen_U, is_positive_U in pairs], 1)
        self.positives_Q, self.negatives_Q = rows_U @ self.positive_UQ, rows_U @ self.negative_UQ
        self.trials = [len(each.trials) for each in block]

    def gains(self, fired_CU: Any) -> np.ndarray:
        """[C, Q] sensitivity - (1 - specificity) of C detectors, from the rows of each cell on which they say yes.

        The counts are below 2^24, so that float32 holds them exactly in whatever order they are added.
        """
        true_CQ, false_CQ = (
            fired_CU @ cells_UQ.astype(np.float32) for cells_UQ in (self.positive_UQ, self.negative_UQ)
        )
        return true_CQ / self.positives_Q - false_CQ / self.negatives_Q

    def by_property(self, found: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """What was found for each of the Q trials, property by property."""
        rest = iter(found)
        return [[next(rest) for _ in range(count)] for count in self.trials]


def _first(score_F: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k highest scores, highest first; of equal ones the lowest index first."""
    k = min(k, len(score_F))
    least = np.partition(score_F, len(score_F) - k)[len(score_F) - k]
    candidates = np.flatnonzero(score_F >= least)
    return candidates[np.argsort(-score_F[candidates], kind="stable")][:k]


def _of_property(
    each: Property, ranked: list[np.ndarray], detectors: Any, trials: Plan, ks: Sequence[int]
) -> dict[str, Any]:
    scores: dict[str, list[Counted]] = {f"top_{k}": [] for k in ks}
    seen: dict[str, list[float]] = {f"top_{k}": [] for k in ks}
    hits_U, tried_U = np.zeros(len(trials.rows_U)), np.zeros(len(trials.rows_U))
    union, place = np.unique(np.concatenate(ranked), return_inverse=True)
    columns = detectors.columns(union) if max(ks) > 1 else None
    place = place.reshape(len(ranked), -1)
    positive_N = each.is_positive_U[trials.cell_N]
    for number, (trial, order) in enumerate(zip(each.trials, ranked, strict=True)):
        said_U = detectors.said(int(order[0]), trial, each)
        parts = [Counted.of_cells(said_U, at_U, each.is_positive_U, trials.rows_U) for at_U in trial[1:]]
        if "top_1" in scores:
            scores["top_1"].append(parts[0])
            seen["top_1"].append(parts[1].balanced_accuracy)
        new_U = trial.unseen_U & each.is_positive_U
        hits_U[new_U] += said_U[new_U]
        tried_U[new_U] += trials.rows_U[new_U]
        if columns is not None:
            chosen, unseen, known = (np.flatnonzero(at_U[trials.cell_N]) for at_U in trial)
            inputs = columns[:, place[number]]
            fitted = _with_silent_rows(inputs[chosen], positive_N[chosen])
            for k in (k for k in ks if k > 1):
                w_k, cuts = fit_probe(fitted[0][:, :k], *fitted[1:])
                score_n, known_n = inputs[unseen, :k] @ w_k, inputs[known, :k] @ w_k
                found = Counted.of_rows(score_n > cuts.balanced_accuracy, positive_N[unseen])
                found.f1 = Counted.of_rows(score_n > cuts.f1, positive_N[unseen]).f1
                scores[f"top_{k}"].append(found)
                counted = Counted.of_rows(known_n > cuts.balanced_accuracy, positive_N[known])
                seen[f"top_{k}"].append(counted.balanced_accuracy)
    recalls = _child_recalls(hits_U, tried_U, trials)
    values: dict[str, Any] = {"children": each.children, "rows": each.rows}
    for k in ks:
        of_k = scores[f"top_{k}"]
        names = ("balanced_accuracy", "f1", "recall")
        mean = {name: float(np.mean([getattr(one, name) for one in of_k])) for name in names}
        values[f"top_{k}"] = {**mean, "seen": float(np.mean(seen[f"top_{k}"]))}
    values["child_recall"] = float(np.mean(recalls)) if len(recalls) else None
    values["child_spread"] = float(np.std(recalls)) if len(recalls) else None
    values["latents"] = [int(order[0]) for order in ranked]
    if "top_1" in scores:
        values["splits"] = [round(one.balanced_accuracy, 4) for one in scores["top_1"]]
    return values


def _with_silent_rows(inputs_nk: np.ndarray, is_positive_n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs, is positive, counts): all rows without any activation are two rows, one of each class."""
    active_n = inputs_nk.any(1)
    silent = [int((~active_n & of_class).sum()) for of_class in (is_positive_n, ~is_positive_n)]
    inputs = np.concatenate([inputs_nk[active_n], np.zeros((2, inputs_nk.shape[1]), inputs_nk.dtype)])
    counts = np.concatenate([np.ones(int(active_n.sum())), silent])
    return inputs, np.append(is_positive_n[active_n], [True, False]), counts


def _child_recalls(hits_U: np.ndarray, tried_U: np.ndarray, trials: Plan) -> np.ndarray:
    n_children = int(trials.child_U.max()) + 1
    hits_C, tried_C = (np.bincount(trials.child_U, values, n_children) for values in (hits_U, tried_U))
    enough_C = tried_C >= CHILD_ROWS
    return hits_C[enough_C] / tried_C[enough_C]
