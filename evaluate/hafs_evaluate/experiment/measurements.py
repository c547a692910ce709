"""Every figure of an experiment's runs as a tidy table: a row per run, measure and dataset. Numpy; no torch.

Columns: run, architecture, variant (the arm's name), k, seed, measure, dataset ("" where the measure has none), value.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hafs_evaluate.results.probing_means import sae_probing
from hafs_jax.base.files import read_json

CORE = {
    "fvu": ("reconstruction", "fvu"),
    "l0": ("sparsity", "l0"),
    "dead_fraction": ("sparsity", "dead_fraction"),
    "dense_fraction": ("sparsity", "dense_fraction"),
    "ce_score": ("model", "ce_score"),
    "kl_score": ("model", "kl_score"),
    "mean_coherence": ("geometry", "mean_coherence"),
    "max_coherence": ("geometry", "max_coherence"),
}
"""Measure -> where core.json has it."""

BETTER = {
    "fvu": "lower",
    "dead_fraction": "lower",
    "ce_score": "higher",
    "kl_score": "higher",
    "mean_coherence": "lower",
    "max_coherence": "lower",
    "hierarchy_parent_top_1": "higher",
    "hierarchy_child_top_1": "higher",
    "hole": "lower",
    "absorption_fraction": "lower",
    "absorption_full": "lower",
    "stability": "higher",
    **{f"top_{k}": "higher" for k in (1, 2, 5, 10, 20, 50)},
}
"""Which way a measure is better; l0 and dense_fraction are neither."""


@dataclass(frozen=True)
class Cell:
    """One trained SAE of an experiment."""

    run: str
    architecture: str
    variant: str  # the arm's name
    k: int
    seed: int


def rows_of(cell: Cell, evaluated: Path) -> list[dict[str, Any]]:
    """The rows of one run from its folder OUT/<profile>/eval/<run>; a stage that did not run has none."""
    facts = vars(cell)
    found = [*_core(evaluated), *_probing(evaluated), *_hierarchy(evaluated)]
    return [
        {**facts, "measure": measure, "dataset": dataset, "value": value}
        for measure, dataset, value in found
        if value is not None and math.isfinite(value)
    ]


class Values:
    """The rows by arm, for quick look-up: {(architecture, variant, k, measure): {dataset: {seed: value}}}."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
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
        """The measure of one arm, and its columns' names "<k>/<dataset>"; without datasets that some seed lacks."""
        columns: dict[str, list[float]] = {}
        for k in ks:
            for dataset, by_seed in sorted(self._found.get((architecture, variant, k, measure), {}).items()):
                if all(seed in by_seed for seed in seeds):
                    columns[f"{k}/{dataset}"] = [by_seed[seed] for seed in seeds]
        return np.array(list(columns.values()), np.float64).reshape(len(columns), len(seeds)).T, list(columns)


def _core(folder: Path) -> Iterator[tuple[str, str, float | None]]:
    values = _read(folder / "core.json")
    for measure, (part, name) in CORE.items():
        yield measure, "", values.get(part, {}).get(name)


def _probing(folder: Path) -> Iterator[tuple[str, str, float | None]]:
    for task, by_k in sae_probing(_read(folder / "probing.json")).items():
        for name, metrics in by_k.items():
            yield name, task, metrics.get("test_accuracy")
            yield f"{name}_auroc", task, metrics.get("test_auc")


def _hierarchy(folder: Path) -> Iterator[tuple[str, str, float | None]]:
    for tree, values in _read(folder / "hierarchy.json").get("trees", {}).items():
        parents = {node["parent"] for node in values["nodes"].values()}
        for path, node in values["nodes"].items():
            dataset = f"{tree}:{path}"
            measure = "hierarchy_parent" if path in parents else "hierarchy_child"
            for name, scores in (node["contrasts"].get("rest") or {}).items():
                yield f"{measure}_{name}", dataset, scores["balanced_accuracy"]
            for name, scores in (node["contrasts"].get("siblings") or {}).items():
                yield f"hierarchy_sibling_{name}", dataset, scores["balanced_accuracy"]
            absorbed = node.get("absorption") or {}
            yield "hole", dataset, node.get("hole")
            if path in parents:
                yield "absorption_fraction", dataset, absorbed.get("fraction")
                yield "absorption_full", dataset, absorbed.get("full")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "an evaluation's result") if path.exists() else {}
