"""The result files of a run, read: the one module that knows how they are laid out. No torch, no jax.

Each file is brought into a form in which every measure of it has a path (`measures.Measure`). A file without a form of
its own is taken as it is.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hafs_evaluate.hierarchy.tree_means import counted, with_means
from hafs_evaluate.results.measures import FIRST_LETTER, HIERARCHY, MEASURES, PROBING, K, Measure
from hafs_evaluate.results.probing_means import mean_over_shared, sae_probing
from hafs_evaluate.results.result_shapes import check_latents, check_result
from hafs_jax.base.files import read_json

OTHERS = "latents_others.json"  # of the latents that latents.json has not
LATENTS = "latents.json"  # of single latents: no measure reads it, the report and Neuronpedia's export do


def read_result(folder: Path, name: str) -> dict[str, Any]:
    """The result file `name` of the run whose folder in eval/ is `folder`; empty where its stage did not run.

    `UserError` where it has not the shape of such a file.
    """
    path = folder / name
    if not path.exists():
        return {}
    check = check_latents if name in (LATENTS, OTHERS) else check_result
    values = check(read_json(path, "an evaluation's result"), path)
    return with_means(values) if name == HIERARCHY and values else values


def weights_of(result: dict[str, Any]) -> str | None:
    """The SHA-256 of the SAE's weights that a result was computed from, where it says so."""
    return result.get("sae_sha256") or (result.get("eval_result_unstructured") or {}).get("sae_sha256")


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """{file: its contents} of every result file of a run that a measure reads; empty where its stage did not run."""
    found = {}
    for measure in MEASURES.values():
        if measure.file in found:
            continue
        if measure.is_of_all_runs:
            found[measure.file] = (read_result(folder.parent, measure.file).get("runs") or {}).get(folder.name) or {}
        else:
            found[measure.file] = read_result(folder, measure.file)
    return found


def dataset_figures(found: dict[str, dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(measure, dataset, value) of one run's result files `found`; the dataset is "" where the measure has none."""
    formed = _formed(found)
    return [
        figure
        for measure in MEASURES.values()
        for figure in _figures(measure, formed, measure.per_dataset or measure.path)
    ]


def run_figures(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """{run: {measure: its one figure}} of the result files `found` of each run.

    It is what lies at the measure's path. Without a path, it is the mean over the datasets that all runs with the
    measure have, so that the means compare.
    """
    formed = {run: _formed(by_file) for run, by_file in found.items()}
    figures: dict[str, dict[str, float]] = {run: {} for run in found}
    for measure in MEASURES.values():
        by_run: dict[str, dict[str, dict[str, float]]] = {}
        for run, by_file in formed.items():
            for name, dataset, value in _figures(measure, by_file, measure.path or measure.per_dataset):
                by_run.setdefault(run, {}).setdefault(dataset, {})[name] = value
        for known, means in mean_over_shared(by_run)[1].items():
            if known is not None:
                figures[known] |= means
    return figures


def _formed(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: FORMS[name](values) if name in FORMS else values for name, values in found.items()}


def _figures(measure: Measure, formed: dict[str, Any], path: str) -> Iterator[tuple[str, str, float]]:
    for k, datasets, value in _walk(formed.get(measure.file) or {}, path.split(".")):
        name = measure.name.replace(K, k)
        own = name == measure.name or name not in MEASURES  # a measure with a record of its own is read by that one
        if own and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield name, ":".join(datasets), float(value)


def _walk(values: Any, path: Sequence[str], k: str = "", datasets: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """(k, datasets, value) at every place that the path leads to."""
    if not path:
        yield k, datasets, values
    elif isinstance(values, dict):
        key, *rest = path
        if key == "*":
            for dataset, inner in values.items():
                yield from _walk(inner, rest, k, (*datasets, dataset))
        elif K in key:
            pattern = re.compile(re.escape(key).replace(re.escape(K), r"(\d+)"))
            for name, inner in values.items():
                if match := pattern.fullmatch(name):
                    yield from _walk(inner, rest, match[1], datasets)
        elif key in values:
            yield from _walk(values[key], rest, k, datasets)


def _hierarchy(values: dict[str, Any]) -> dict[str, Any]:
    """With each tree's classes as `nodes`, those of them that have children as `parents`, the others as `children`.

    Figures that a mean would count twice are left out.
    """
    trees = (values.get("trees") or {}).items()
    nodes = {tree: counted(found["nodes"], found.get("texts")) for tree, found in trees}
    parents = {tree: {node.get("parent") for node in found.values()} for tree, found in nodes.items()}

    def those(are_parents: bool) -> dict[str, Any]:
        return {
            tree: {path: node for path, node in found.items() if (path in parents[tree]) == are_parents}
            for tree, found in nodes.items()
        }

    return {**values, "nodes": nodes, "parents": those(True), "children": those(False)}


def _first_letter(values: dict[str, Any]) -> dict[str, Any]:
    """With each letter's figures by letter; empty where the figures are not valid, so that none enters a mean."""
    if not values.get("valid"):
        return {}
    details = (values.get("result") or {}).get("eval_result_details") or []
    return {**values, "letters": {detail["first_letter"]: detail for detail in details}}


FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    PROBING: sae_probing,
    HIERARCHY: _hierarchy,
    FIRST_LETTER: _first_letter,
}
"""What brings a result file into the form that the paths of its measures are of."""
