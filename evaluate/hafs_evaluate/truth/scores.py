"""Scores an SAE's latents against a synthetic world's true features, in one pass over the held-out rows.

Notation: n features with unit directions d_j, F latents with unit dictionary vectors u_i, and c_ij = |u_i . d_j|.

- best(i) = argmax_j c_ij is the feature by which SAELens judges latent i.
- match(j) is the latent of feature j in the one-to-one matching of min(F, n) pairs with the largest sum of c. Where
  F < n, some features have none.
- A latent fires on a row where it is not 0, a feature where its coefficient is above 0.
- An edge leads from a feature, the parent, to one right below it in the hierarchy, the child.
- An edge is absorbed on a row where parent and child truly fire, match(child) fires and match(parent) is silent.

Imports torch, not jax.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_array, csr_array

from hafs_evaluate.core.encode import TorchSAE, encode_store, to_numpy
from hafs_evaluate.truth.ground_truth import Truth
from hafs_jax.base.errors import UserError
from hafs_jax.store.reader import Store

MIN_EDGE_ROWS = 20  # an edge whose ends both fire on fewer rows is left out of absorption
RECOVERED = 0.9  # a feature is recovered where c of it and its match is above this
MIN_NORM = 1e-6  # shorter rows are left out of shrinkage, as in SAELens

SETTINGS = {"min_edge_rows": MIN_EDGE_ROWS, "recovered_cosine": RECOVERED, "version": 1}
"""What the figures depend on besides SAE, store and truth. Raise `version` when figures of the same inputs change."""


def cosines(W_dec_FD: Float[np.ndarray, "F D"], directions_ND: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "F n"]:
    """c_ij = |W_i . d_j| / (|W_i| |d_j|), with W_i row i of W_dec, in float64; 0 where a vector is 0."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8) for x in (W_dec_FD, directions_ND)]
    return np.abs(unit[0].astype(np.float64) @ unit[1].astype(np.float64).T)


def matching(cosines_FN: Float[np.ndarray, "F n"]) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """(match(j), c of match(j) and j) of each feature j; (-1, 0) of a feature that has no match."""
    latents_N = np.full(cosines_FN.shape[1], -1)
    cosine_N = np.zeros(cosines_FN.shape[1])
    rows, columns = linear_sum_assignment(cosines_FN, maximize=True)
    latents_N[columns], cosine_N[columns] = rows, cosines_FN[rows, columns]
    return latents_N, cosine_N


def mcc(latents_N: Int[np.ndarray, "n"], cosine_N: Float[np.ndarray, "n"]) -> float:
    """Mean of c of match(j) and j over the min(F, n) matched features: SAELens's mean correlation coefficient."""
    return float(cosine_N[latents_N >= 0].mean())


def uniqueness(best_F: Int[np.ndarray, "F"]) -> float:
    """Number of different best(i) / F: 1 where no two latents are nearest to the same feature."""
    return len(np.unique(best_F)) / len(best_F)


def precision_each(both: Int[np.ndarray, "pairs"], fired: Int[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
    """Rows on which latent and feature fire / rows on which the latent fires, of each pair; 0 where it never fires."""
    return both / np.maximum(fired, 1)


def recall_each(both: Int[np.ndarray, "pairs"], true: Int[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
    """Rows on which latent and feature fire / rows on which the feature fires, of each pair; 0 where it never fires."""
    return both / np.maximum(true, 1)


def f1_each(
    both: Int[np.ndarray, "pairs"], fired: Int[np.ndarray, "pairs"], true: Int[np.ndarray, "pairs"]
) -> Float[np.ndarray, "pairs"]:
    """2 both / (fired + true), the harmonic mean of precision and recall, of each pair; 0 where neither fires.

    `both`, `fired` and `true` count the rows on which both fire, the latent fires, and the feature fires.
    """
    return 2 * both / np.maximum(fired + true, 1)


def absorption(absorbed_E: Int[np.ndarray, "E"], both_E: Int[np.ndarray, "E"]) -> tuple[float | None, int]:
    """(mean of absorbed / both over the edges, number of those edges), each edge with the same weight.

    `both` counts the rows on which parent and child truly fire, `absorbed` those of them on which the edge is absorbed.
    Only edges with both >= MIN_EDGE_ROWS count; None where there are none.
    """
    counts_E = both_E >= MIN_EDGE_ROWS
    shares = absorbed_E[counts_E] / both_E[counts_E]
    return (float(shares.mean()) if len(shares) else None), len(shares)


class Scorer:
    """Counts over blocks of rows, given in any order, and the scores that follow from them.

    Memory holds F x n cosines and one block.
    """

    def __init__(self, W_dec_FD: Float[np.ndarray, "F D"], truth: Truth) -> None:
        if W_dec_FD.shape[1] != truth.directions_ND.shape[1]:
            expected = truth.directions_ND.shape[1]
            raise UserError(f"the SAE has d_in={W_dec_FD.shape[1]}, the world d_model={expected}; score its own world")
        cosines_FN = cosines(W_dec_FD, truth.directions_ND)
        self.truth, self.F = truth, len(W_dec_FD)
        self.best_F = cosines_FN.argmax(1)
        self.latents_N, self.cosine_N = matching(cosines_FN)
        self.matched_M = np.flatnonzero(self.latents_N >= 0)
        parents_E, children_E = truth.edges
        kept_E = (self.latents_N[parents_E] >= 0) & (self.latents_N[children_E] >= 0)
        self.parents_E, self.children_E = parents_E[kept_E], children_E[kept_E]
        self.rows = self.valid_rows = 0
        self.residual = self.squared = self.ratios = 0.0
        self.sum_D = np.zeros(W_dec_FD.shape[1])
        self.fired_F, self.both_F = np.zeros(self.F, np.int64), np.zeros(self.F, np.int64)
        self.true_N, self.both_M = np.zeros(truth.n, np.int64), np.zeros(len(self.matched_M), np.int64)
        self.both_E, self.absorbed_E = (np.zeros(len(self.parents_E), np.int64) for _ in range(2))

    def add(
        self,
        start: int,
        latents_BF: Float[np.ndarray, "B F"],
        acts_BD: Float[np.ndarray, "B D"],
        recon_BD: Float[np.ndarray, "B D"],
    ) -> None:
        """Counts a block of rows, the first of which is the held-out row `start`."""
        stop = start + len(latents_BF)
        fired = csc_array(csr_array(latents_BF != 0), dtype=np.int32)
        true = csc_array(self.truth.coefficients[start:stop] > 0, dtype=np.int32)
        self.rows += stop - start
        self.fired_F += _column_sums(fired)
        self.true_N += _column_sums(true)
        self.both_F += _column_sums(fired * true[:, self.best_F])
        self.both_M += _column_sums(fired[:, self.latents_N[self.matched_M]] * true[:, self.matched_M])
        both = true[:, self.parents_E] * true[:, self.children_E]
        with_child = both * fired[:, self.latents_N[self.children_E]]
        with_both = with_child * fired[:, self.latents_N[self.parents_E]]
        self.both_E += _column_sums(both)
        self.absorbed_E += _column_sums(with_child) - _column_sums(with_both)
        acts, recon = acts_BD.astype(np.float64), recon_BD.astype(np.float64)
        self.sum_D += acts.sum(0)
        self.squared += float(np.square(acts).sum())
        self.residual += float(np.square(acts - recon).sum())
        norm_B = np.linalg.norm(acts, axis=1)
        valid_B = norm_B > MIN_NORM
        self.valid_rows += int(valid_B.sum())
        self.ratios += float((np.linalg.norm(recon[valid_B], axis=1) / norm_B[valid_B]).sum())

    def result(self) -> dict[str, Any]:
        """All scores. Notation: x is a row, y its reconstruction, and m the mean of the rows.

        - mcc, uniqueness: see there;
        - precision, recall, f1: mean over the latents i of `precision_each`, ... of the pair (i, best(i));
        - true_l0, l0: mean number of features, and of latents, that fire on a row;
        - dead_fraction: share of the latents that never fire;
        - fvu: sum |x - y|^2 / sum |x - m|^2; shrinkage: mean of |y| / |x|;
        - absorption, edges: of all edges whose two ends have a match;
        - parents_recovered: share of the features with children that are recovered;
        - by_level: the same for each level of the hierarchy. `features` counts those at the level. mcc is the mean of
          their matched cosines, f1 the mean of `f1_each` of (match(j), j) over those that ever fire; both count a
          feature without match as 0. absorption and edges are of the edges whose parent is at the level.
        """
        levels_N, is_parent_N = self.truth.levels_N, np.zeros(self.truth.n, bool)
        is_parent_N[self.truth.edges[0]] = True
        fired_M = self.fired_F[self.latents_N[self.matched_M]]
        f1_N = np.zeros(self.truth.n)
        f1_N[self.matched_M] = f1_each(self.both_M, fired_M, self.true_N[self.matched_M])
        by_level = []
        for level in range(int(levels_N.max()) + 1):
            at_N, at_E = levels_N == level, levels_N[self.parents_E] == level
            share, edges = absorption(self.absorbed_E[at_E], self.both_E[at_E])
            by_level.append(
                {
                    "level": level,
                    "features": int(at_N.sum()),
                    "mcc": float(self.cosine_N[at_N].mean()),
                    "f1": _mean(f1_N[at_N & (self.true_N > 0)]),
                    "absorption": share,
                    "edges": edges,
                }
            )
        share, edges = absorption(self.absorbed_E, self.both_E)
        variation = self.squared - float(self.sum_D @ self.sum_D) / self.rows
        true_F = self.true_N[self.best_F]
        return {
            "rows": self.rows,
            "n_latents": self.F,
            "mcc": mcc(self.latents_N, self.cosine_N),
            "uniqueness": uniqueness(self.best_F),
            "precision": float(precision_each(self.both_F, self.fired_F).mean()),
            "recall": float(recall_each(self.both_F, true_F).mean()),
            "f1": float(f1_each(self.both_F, self.fired_F, true_F).mean()),
            "true_l0": float(self.true_N.sum() / self.rows),
            "l0": float(self.fired_F.sum() / self.rows),
            "dead_fraction": float((self.fired_F == 0).mean()),
            "fvu": self.residual / variation if variation > 0 else None,
            "shrinkage": self.ratios / self.valid_rows if self.valid_rows else None,
            "absorption": share,
            "edges": edges,
            "parents_recovered": _mean(self.cosine_N[is_parent_N] > RECOVERED),
            "by_level": by_level,
        }


@torch.no_grad()
def score_sae(sae: TorchSAE, store: Store, truth: Truth) -> dict[str, Any]:
    """`Scorer.result` of an SAE on the held-out store of the truth; `UserError` where store and truth do not belong."""
    if truth.heldout_fingerprint not in (None, store.manifest.fingerprint) or len(store) != truth.rows:
        raise UserError(
            f"{store.folder} is not the truth's held-out store: expected {truth.rows} rows of fingerprint"
            f" {truth.heldout_fingerprint}, found {len(store)} of {store.manifest.fingerprint}; sample the world again"
        )
    scorer = Scorer(to_numpy(sae.W_dec), truth)
    for batch in encode_store(sae, store):
        recon_BD = to_numpy(sae.decode(batch.latents_BF))
        scorer.add(int(batch.numbers_B[0]), to_numpy(batch.latents_BF), batch.acts_BD, recon_BD)
    return scorer.result()


def _column_sums(array: csc_array) -> np.ndarray:
    return np.asarray(array.sum(axis=0, dtype=np.int64))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
