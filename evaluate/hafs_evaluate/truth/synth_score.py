"""`hafs synth-score`: scores every finished run of a synthetic world against its truth. Imports torch, not jax.

OUT/<profile>/eval/<run>/synthetic.json   the run's config, the hashes of what was scored, and `metrics`
OUT/<profile>/eval/synthetic.csv          a row for each run, with those entries of the config in which the runs differ
"""

import csv
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from hafs_evaluate.core.loading import load_sae
from hafs_evaluate.truth.ground_truth import Truth, load_truth
from hafs_evaluate.truth.scores import SETTINGS, score_sae
from hafs_evaluate.workspace import Exported, FinishedRun, Workspace, export, finished_runs, hashed_export, read_result
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of, write_figures, write_text
from hafs_jax.base.log import bar_options
from hafs_jax.runs import Run
from hafs_jax.store.reader import Store

LOG = logging.getLogger(__name__)

RESULT, TABLE = "synthetic.json", "synthetic.csv"
FACTS = ("run", "variant", "architecture", "seed", "k")  # what a result says of its run, beside its config
SHOWN = ("l0", "fvu", "mcc", "f1", "absorption", "dead_fraction")  # columns of the table on the terminal


def score(exported: Exported, store: Store, truth: Truth, device: str = "cpu") -> dict[str, Any]:
    """`score_sae` of an exported run."""
    return score_sae(load_sae(exported, store.manifest, device), store, truth)


def evaluate_synthetic(
    workspace: Workspace,
    names: Sequence[str] = (),
    device: str = "auto",
    export: Callable[[FinishedRun], Exported] = export,
) -> list[dict[str, Any]]:
    """Scores the runs `names` (default: all that have finished), writes their results and the table, and returns them.

    A result stays as it is while the SAE's bytes, the truth and SETTINGS do. `export` is called for a run's SAE, but
    not where neither the run nor its SAELens folder has changed since.
    """
    from hafs_extract.models import pick_device

    truth, store, device = load_truth(workspace.folder), workspace.heldout, str(pick_device(device))
    results = []
    runs = finished_runs(workspace, names)
    for run in tqdm(runs, desc="scoring", unit="run", **bar_options(LOG)):
        results.append(_result(workspace, run, store, truth, device, export))
    known = [read_result(workspace.result(run.name, RESULT)) for run in finished_runs(workspace)]
    known = [result for result in known if result.get("truth_sha256") == truth.sha256]
    write_text(workspace.eval / TABLE, _csv(_rows(known)))
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as aligned columns. `roots` is the absorption of the edges whose parent is a root."""
    rows = [["run", "k", *SHOWN, "roots"]]
    for result in results:
        values = result["metrics"] | {"roots": result["metrics"]["by_level"][0]["absorption"]}
        cells = [_cell(values[name], 2 if name == "l0" else 3) for name in rows[0][2:]]
        rows.append([result["run"], str(result["k"]), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(padded))
        for padded in (list(zip(row, widths, strict=True)) for row in rows)
    )


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _result(
    workspace: Workspace,
    run: FinishedRun,
    store: Store,
    truth: Truth,
    device: str,
    export: Callable[[FinishedRun], Exported],
) -> dict[str, Any]:
    """The run's result: the earlier one where nothing has changed since, else a new one, which is written."""
    path = workspace.result(run.name, RESULT)
    before = read_result(path)
    marks: dict[str, Any] = {"truth_sha256": truth.sha256, "settings": SETTINGS}
    marks["run_sha256"] = [sha256_of(file) for file in (Run(run.folder).result_path, Run(run.folder).config_path)]
    if all(before.get(name) == value for name, value in marks.items()) and before == {**before, **_hashes(run)}:
        return before
    exported = export(run)
    marks |= {"sae_sha256": exported.weights_sha256, "cfg_sha256": exported.cfg_sha256}
    same = all(before.get(name) == value for name, value in marks.items() if name != "run_sha256")
    metrics = before["metrics"] if same else score(exported, store, truth, device)
    result = {**_facts(run), **marks, "metrics": metrics}
    write_figures(path, result)
    return result


def _hashes(run: FinishedRun) -> dict[str, str]:
    """The hashes of the SAE in the run's folder; where there is none, one that matches nothing."""
    try:
        exported = hashed_export(run.name, run.folder / "sae")
    except UserError:
        return {"sae_sha256": "none"}
    return {"sae_sha256": exported.weights_sha256, "cfg_sha256": exported.cfg_sha256}


def _facts(run: FinishedRun) -> dict[str, Any]:
    """The FACTS of a run, and its config."""
    summary = Run(run.folder).summary()
    named = {"variant": summary.variant, "architecture": summary.architecture, "seed": summary.seed, "k": summary.k}
    return {"run": run.name, **named, "config": Run(run.folder).record()["config"]}


def _rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each result its FACTS, those entries of its config that are not the same in all results, and its metrics."""
    configs = [_flat(result["config"]) for result in results]
    keys = dict.fromkeys(key for config in configs for key in config)
    known = {"variant", "seed", "sae.architecture", "sae.k"}
    differing = [key for key in keys if key not in known and len({str(config.get(key)) for config in configs}) > 1]
    rows = []
    for result, config in zip(results, configs, strict=True):
        row = {name: result[name] for name in FACTS} | {key: config.get(key) for key in differing}
        metrics = {name: value for name, value in result["metrics"].items() if name != "by_level"}
        for values in result["metrics"]["by_level"]:
            metrics |= {f"{name}_level{values['level']}": x for name, x in values.items() if name != "level"}
        rows.append(row | metrics)
    return rows


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of nested objects in one, their keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
