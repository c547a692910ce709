"""results.json: every figure of a workspace in one plain, sorted, NaN-free object. Standard library and numpy only.

Reads what the stages left under O = OUT/<profile>: the stores' manifests, runs/, eval/. What is not there yet is null
or an empty object, never an error; only a workspace without a training store is one.
"""

import math
import re
from pathlib import Path
from typing import Any

from extract.format.files import read_json, read_jsonl
from extract.format.store import TIMING, read_manifest

RESULTS_VERSION = 1
VARIANT_ORDER = ("baseline", "strict", "adaptive")
DEFAULT_ARCHITECTURE = "batchtopk"
_TOP_K = re.compile(r"(sae|llm)_top_(\d+)_test_(accuracy|auc)")


def build_results(workspace_folder: Path) -> dict[str, Any]:
    """The results of a workspace, as results.json holds them. Only runs that finished training are variants.

    Beside the figures: `seconds` a stage, `unfinished_runs`, and per variant `probing` (test accuracy) and
    `probing_auc` (AUROC), both {task: {"top_1": ..., ...}}. Equal folders give equal results.
    """
    folder = Path(workspace_folder)
    manifest = read_manifest(folder / "store" / "train")
    heldout = folder / "store" / "heldout"
    finished: list[Path] = []
    unfinished: list[Path] = []
    for run_folder in sorted(path for path in (folder / "runs").glob("*") if path.is_dir()):
        (finished if (run_folder / "run.json").exists() else unfinished).append(run_folder)
    runs = [read_json(run_folder / "run.json", "a finished run") for run_folder in finished]
    runs.sort(key=run_order)
    names = variant_names(runs)
    llm = _llm_probing(folder, runs)
    return _plain(
        {
            "format_version": RESULTS_VERSION,
            "profile": manifest.profile.get("resolved"),
            "model": manifest.model.name,
            "hook": manifest.hook_point,
            "rows": manifest.rows,
            "heldout_rows": read_manifest(heldout).rows if heldout.exists() else None,
            "d_model": manifest.d_model,
            "seconds": _seconds(folder, runs),
            "variants": {names[run["name"]]: _variant(folder, run) for run in runs},
            "llm": {"probing": _column(llm, "test_accuracy"), "probing_auc": _column(llm, "test_auc")},
            "unfinished_runs": [path.name for path in unfinished],
        }
    )


def run_order(run: dict[str, Any]) -> tuple[Any, ...]:
    """The order of variants everywhere: the default architecture first; baseline, strict, adaptive, others by name."""
    known = run["variant"] in VARIANT_ORDER
    return (
        run["architecture"] != DEFAULT_ARCHITECTURE,
        run["architecture"],
        VARIANT_ORDER.index(run["variant"]) if known else len(VARIANT_ORDER),
        run["variant"],
        run["seed"],
    )


def variant_names(runs: list[dict[str, Any]]) -> dict[str, str]:
    """What each run is called: its name without "-s0", but with its seed where several seeds were trained."""
    seeds: dict[tuple[str, str], int] = {}
    for run in runs:
        arm = (run["variant"], run["architecture"])
        seeds[arm] = seeds.get(arm, 0) + 1
    return {
        run["name"]: run["name"] if seeds[run["variant"], run["architecture"]] > 1 else run["name"].removesuffix("-s0")
        for run in runs
    }


def training_lines(run_folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, one object a logged step, ascending; of a step logged again after a resume, the last."""
    by_step = {line["step"]: line for line in read_jsonl(run_folder / "metrics.jsonl")}
    return [by_step[step] for step in sorted(by_step)]


def _variant(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    evaluated = folder / "eval" / run["name"]
    core = _optional(evaluated / "core.json", "core metrics")
    probing = sae_probing(_optional(evaluated / "probing.json", "SAE-Bench's probing results"))
    lines = training_lines(folder / "runs" / run["name"])
    reconstruction, sparsity = core.get("reconstruction", {}), core.get("sparsity", {})
    geometry, model = core.get("geometry", {}), core.get("model", {})
    return {
        "run": run["name"],
        "variant": run["variant"],
        "architecture": run["architecture"],
        "seed": run["seed"],
        "n_latents": run.get("n_latents"),
        "fvu": reconstruction.get("fvu"),
        "explained_variance": reconstruction.get("explained_variance"),
        "l0": sparsity.get("l0"),
        "dead_fraction": sparsity.get("dead_fraction"),
        "ce_score": model.get("ce_score"),
        "kl_score": model.get("kl_score"),
        "max_coherence": geometry.get("max_coherence"),
        "mean_coherence": geometry.get("mean_coherence"),
        "tau": run.get("tau"),
        "tau_reached": run.get("tau_reached"),
        "probing": _column(probing, "test_accuracy"),
        "probing_auc": _column(probing, "test_auc"),
        "training": {
            "steps": run.get("steps"),
            "tokens": run.get("tokens"),
            "final": run.get("final") or (lines[-1] if lines else {}),
        },
        "core": core,
    }


def _seconds(folder: Path, runs: list[dict[str, Any]]) -> dict[str, float | None]:
    seconds: dict[str, float | None] = {}
    timing = _optional(folder / "store" / "train" / TIMING, "a store's timing")
    if "seconds" in timing:
        seconds["extract"] = timing["seconds"]
    for run in runs:
        seconds[f"train/{run['name']}"] = run.get("seconds")
    for what, taken in sorted(_optional(folder / "eval" / "seconds.json", "the evaluation's times").items()):
        seconds[f"eval/{what}"] = taken
    return seconds


def sae_probing(output: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {"top_<k>": {"test_accuracy", "test_auc"}}} of either of SAE-Bench's sparse-probing schemas."""
    return {
        detail["dataset_name"]: {f"top_{k}": metrics for k, metrics in sorted(_by_k(detail, "sae").items()) if metrics}
        for detail in sorted(output.get("eval_result_details") or [], key=lambda detail: detail["dataset_name"])
    }


def _llm_probing(folder: Path, runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The language model's own probes; where they have no file of their own, those inside SAE-Bench's results."""
    own = _optional(folder / "eval" / "llm" / "probing.json", "the language model's probes").get("tasks")
    if own:
        return {task: own[task] for task in sorted(own)}
    for run in runs:
        output = _optional(folder / "eval" / run["name"] / "probing.json", "SAE-Bench's probing results")
        found = {}
        for detail in sorted(output.get("eval_result_details") or [], key=lambda detail: detail["dataset_name"]):
            probes = {f"top_{k}": metrics for k, metrics in sorted(_by_k(detail, "llm").items())}
            if detail.get("llm_test_accuracy") is not None:
                full = {"test_accuracy": detail["llm_test_accuracy"], "test_auc": detail.get("llm_test_auc")}
                probes = {"full": full, **probes}
            if probes:
                found[detail["dataset_name"]] = probes
        if found:
            return found
    return {}


def _by_k(detail: dict[str, Any], of: str) -> dict[int, dict[str, float]]:
    if of == "sae" and detail.get("sae_metrics_by_k"):
        return {int(k): metrics for k, metrics in detail["sae_metrics_by_k"].items()}
    found: dict[int, dict[str, float]] = {}
    for key, value in detail.items():
        match = _TOP_K.fullmatch(key)
        if match and match[1] == of and value is not None:
            found.setdefault(int(match[2]), {})[f"test_{match[3]}"] = value
    return found


def _column(probes: dict[str, dict[str, dict[str, float]]], measure: str) -> dict[str, dict[str, float]]:
    """{task: {"full" | "top_<k>": the measure}}, full first and then by k; tasks without it are left out."""
    columns = {
        task: {
            name: values[measure]
            for name, values in sorted(by_name.items(), key=lambda item: top_k(item[0]))
            if values.get(measure) is not None
        }
        for task, by_name in probes.items()
    }
    return {task: values for task, values in columns.items() if values}


def mean_probing(results: dict[str, Any]) -> tuple[list[str], dict[str | None, dict[str, float]]]:
    """The tasks that every probed variant has, and {variant, or None for the language model: {"top_<k>": mean}}.

    The mean is over these tasks alone, so that means compare; a k that one of the tasks lacks is left out. The
    language model's are over the same tasks, and empty where it lacks one of them.
    """
    probed = {name: values["probing"] for name, values in results["variants"].items() if values["probing"]}
    llm = results["llm"]["probing"]
    shared = sorted(set.intersection(*map(set, probed.values())) if probed else llm, key=_by_number)
    means: dict[str | None, dict[str, float]] = {}
    for name, by_task in [*probed.items(), (None, llm)]:
        if not shared or not set(shared) <= set(by_task):
            continue
        columns = [column for column in by_task[shared[0]] if all(column in by_task[task] for task in shared)]
        means[name] = {column: sum(by_task[task][column] for task in shared) / len(shared) for column in columns}
    return shared, means


def _by_number(task: str) -> tuple[int, str]:
    """The order of tasks: sae-probes' by the number that begins their names, others after them by name."""
    number = re.match(r"\d+", task)
    return (int(number[0]) if number else 1 << 30, task)


def top_k(name: str) -> int:
    """The k of "top_<k>" or of any other "<name>_<k>"; 0 for "full" and whatever else has none."""
    number = name.rpartition("_")[2]
    return int(number) if number.isdecimal() else 0


def _optional(path: Path, what: str) -> dict[str, Any]:
    return read_json(path, what) if path.exists() else {}


def _plain(value: Any) -> Any:
    """The value with every float that is not finite replaced by null, which is what JSON has for "no figure"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
