"""What the language model itself knows of a property: linear probes on its activations. Imports no torch.

All probes on the rows of one half of the documents are ridge regressions with the same second moments, so that those of
a hundred properties cost little more than one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array

from hafs_evaluate.tokens.transfer import Counted, best_thresholds
from hafs_evaluate.tokens.trials import Plan, Property, Trial

RIDGE = 1e-3  # relative to the mean variance of a coordinate
CEILING_RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)  # a weak one knows tokens by heart; the best that carries over is taken


@dataclass
class ModelProbes:
    """Linear probes of the properties of a plan on its N rows' activations.

    A probe says yes where w . x > c, with w = (covariance + ridge mean variance)^-1 (mean of the rows with the property
    - mean of the others). The covariance is of all rows in the half of the documents that it is fitted on.
    """

    acts_ND: Float[np.ndarray, "N D"]
    trials: Plan

    def answers(self) -> dict[str, tuple[Bool[np.ndarray, "N"], float]]:
        """{property: (what a probe says of each row, its F1)}: fitted on the other half of the documents, all children.

        c has the best F1 on the rows that the probe was fitted on.
        """
        half_N, properties = self._half_U[self.trials.cell_N], self.trials.properties
        if not properties:
            return {}
        said_PN = np.zeros((len(properties), len(half_N)), bool)
        for half in (0, 1):
            cells_U = self._half_U == half
            directions_PD = self._inverse(half, RIDGE) @ self._differences([(cells_U, each) for each in properties]).T
            score_PN = (self.acts_ND @ directions_PD.astype(np.float32)).T
            fitted_N = half_N == half
            for said_N, score_N, each in zip(said_PN, score_PN, properties, strict=True):
                is_positive_n = each.is_positive_U[self.trials.cell_N[fitted_N]]
                said_N[~fitted_N] = score_N[~fitted_N] > best_thresholds(score_N[fitted_N], is_positive_n).f1
        positive_PN = [each.is_positive_U[self.trials.cell_N] for each in properties]
        f1 = [Counted.of_rows(*pair).f1 for pair in zip(said_PN, positive_PN, strict=True)]
        return {each.name: (said_N, one) for each, said_N, one in zip(properties, said_PN, f1, strict=True)}

    def ceiling(self, properties: Sequence[Property]) -> dict[str, Any]:
        """{"ridge", "properties": {property: {"balanced_accuracy", "f1", "recall"}}}: probes on half of the children.

        They are fitted and measured on the same rows as the probes on an SAE's latents are in `transfer`, with the same
        two thresholds. The covariance knows no labels. The ridge is the one of CEILING_RIDGES that has the best mean
        balanced accuracy.
        """
        best: dict[str, Any] = {"ridge": None, "properties": {}}
        highest = -np.inf
        for ridge in CEILING_RIDGES if properties else ():
            found = self._transfer(properties, ridge)
            mean = float(np.mean([figures["balanced_accuracy"] for figures in found.values()]))
            if mean > highest:
                highest, best = mean, {"ridge": ridge, "properties": found}
        return best

    def class_directions(self, properties: Sequence[Property], half: int) -> Float[np.ndarray, "P D"]:
        """(mean of the rows with the property - mean of the others) in one half of the documents, normalised."""
        differences_PD = self._differences([(self._half_U == half, each) for each in properties])
        return differences_PD / np.maximum(np.linalg.norm(differences_PD, axis=1, keepdims=True), 1e-8)

    def _transfer(self, properties: Sequence[Property], ridge: float) -> dict[str, dict[str, float]]:
        found: dict[str, list[Counted]] = {each.name: [] for each in properties}
        for half in (0, 1):
            tried = [(trial, each) for each in properties for trial in each.trials if self._is_of(trial, half)]
            w_DQ = self._inverse(half, ridge) @ self._differences([(trial.chosen_U, each) for trial, each in tried]).T
            score_NQ = self.acts_ND @ w_DQ.astype(np.float32)
            for score_N, (trial, each) in zip(score_NQ.T, tried, strict=True):
                chosen, unseen = (np.flatnonzero(at_U[self.trials.cell_N]) for at_U in (trial.chosen_U, trial.unseen_U))
                positive_N = each.is_positive_U[self.trials.cell_N]
                cuts = best_thresholds(score_N[chosen], positive_N[chosen])
                counted = Counted.of_rows(score_N[unseen] > cuts.balanced_accuracy, positive_N[unseen])
                counted.f1 = Counted.of_rows(score_N[unseen] > cuts.f1, positive_N[unseen]).f1
                found[each.name].append(counted)
        names = ("balanced_accuracy", "f1", "recall")
        return {
            property: {name: float(np.mean([getattr(one, name) for one in counted])) for name in names}
            for property, counted in found.items()
        }

    def _is_of(self, trial: Trial, half: int) -> bool:
        """Whether it chooses in this half of the documents."""
        return bool(trial.chosen_U[self._half_U == half].any())

    def _differences(self, wanted: Sequence[tuple[np.ndarray, Property]]) -> Float[np.ndarray, "Q D"]:
        """For each (cells, property): mean of the rows with the property - mean of the others, among these cells."""
        positive_QU = np.stack([cells_U & each.is_positive_U for cells_U, each in wanted]).astype(np.float64)
        negative_QU = np.stack([cells_U & ~each.is_positive_U for cells_U, each in wanted]).astype(np.float64)
        means = [
            (cells_QU @ self._sums_UD) / (cells_QU @ self.trials.rows_U)[:, None]
            for cells_QU in (positive_QU, negative_QU)
        ]
        return means[0] - means[1]

    @cached_property
    def _half_U(self) -> np.ndarray:
        return np.repeat([0, 1], len(self.trials.rows_U) // 2)

    @cached_property
    def _sums_UD(self) -> np.ndarray:
        """The sum of the activations of each cell, less the mean of all rows: float32 would not hold large ones."""
        n_rows = len(self.acts_ND)
        cells = csr_array((np.ones(n_rows), (self.trials.cell_N, np.arange(n_rows))), shape=(len(self._half_U), n_rows))
        return cells @ (self.acts_ND - self.acts_ND.mean(0)).astype(np.float64)

    def _inverse(self, half: int, ridge: float) -> np.ndarray:
        """(covariance + ridge)^-1 of the rows in one half of the documents, [D, D]."""
        covariance_DD = self._covariances[half]
        scale = float(np.trace(covariance_DD)) / len(covariance_DD)
        return np.linalg.inv(covariance_DD + (ridge * scale + 1e-12) * np.eye(len(covariance_DD)))

    @cached_property
    def _covariances(self) -> list[np.ndarray]:
        found = []
        for half in (0, 1):
            acts_nD = self.acts_ND[self._half_U[self.trials.cell_N] == half]
            centred_nD = acts_nD - acts_nD.mean(0)
            found.append((centred_nD.T @ centred_nD).astype(np.float64) / len(centred_nD))
        return found
