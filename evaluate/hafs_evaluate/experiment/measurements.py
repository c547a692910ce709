"""Every figure of an experiment's runs as one long table: a row for each run, measure and dataset. Numpy; no torch.

Columns: run, architecture, variant (the arm's name), k, seed, measure, dataset ("" where the measure has none), value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hafs_evaluate.results.readings import dataset_figures, read_results


@dataclass(frozen=True)
class Cell:
    """One trained SAE of an experiment."""

    run: str
    architecture: str
    variant: str  # the arm's name
    k: int
    seed: int


def rows_of(cell: Cell, evaluated: Path) -> list[dict[str, Any]]:
    """The rows of one run, from its folder OUT/<profile>/eval/<run>. A stage that did not run gives none."""
    return [
        {**vars(cell), "measure": measure, "dataset": dataset, "value": value}
        for measure, dataset, value in dataset_figures(read_results(evaluated))
    ]


class Values:
    """The rows sorted by arm, so that the values of one can be looked up."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        # {(architecture, variant, k, measure): {dataset: {seed: value}}}
        self._found: dict[tuple[str, str, int, str], dict[str, dict[int, float]]] = {}
        for row in rows:
            arm = (row["architecture"], row["variant"], row["k"], row["measure"])
            self._found.setdefault(arm, {}).setdefault(row["dataset"], {})[row["seed"]] = row["value"]

    @property
    def measures(self) -> list[str]:
        return sorted({measure for *_, measure in self._found})

    def array(
        self, measure: str, architecture: str, ks: Sequence[int], variant: str, seeds: Sequence[int]
    ) -> tuple[Float[np.ndarray, "S T"], list[str]]:
        """(the measure of one arm, its columns' names "<k>/<dataset>"); datasets that a seed lacks are left out."""
        columns: dict[str, list[float]] = {}
        for k in ks:
            for dataset, by_seed in sorted(self._found.get((architecture, variant, k, measure), {}).items()):
                if all(seed in by_seed for seed in seeds):
                    columns[f"{k}/{dataset}"] = [by_seed[seed] for seed in seeds]
        return np.array(list(columns.values()), np.float64).reshape(len(columns), len(seeds)).T, list(columns)
