"""results.json: every figure of a workspace in one plain, sorted, NaN-free object. No torch, no jax.

Reads what the stages left under O = OUT/<profile>: the stores' manifests, runs/, eval/. What is not there yet is null
or an empty object, never an error; only a workspace without a training store is one.
"""

import math
from pathlib import Path
from typing import Any

from hafs_evaluate.results.arms import DEFAULT_ARCHITECTURE, VARIANT_ORDER, build_arms
from hafs_evaluate.results.probing_means import column, llm_probing, sae_probing
from hafs_jax.base.files import read_json, read_jsonl
from hafs_jax.store.manifest import TIMING, read_manifest

RESULTS_VERSION = 1


def build_results(workspace_folder: Path) -> dict[str, Any]:
    """The results of a workspace, as results.json holds them. Only runs that finished training are variants.

    Beside the figures: `seconds` a stage, `unfinished_runs`, per variant `probing` (test accuracy) and `probing_auc`
    (AUROC), both {task: {"top_1": ..., ...}}, and `hierarchy`; `arms` takes the seeds together (evaluate/arms.py), and
    `experiment` is the experiment's summary. Equal folders give equal results.
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
    outputs = (_optional(folder / "eval" / run["name"] / "probing.json", "SAE-Bench's probing results") for run in runs)
    llm = llm_probing(_optional(folder / "eval" / "llm" / "probing.json", "the language model's probes"), outputs)
    experiment = _optional(folder / "experiment" / "summary.json", "the experiment's summary")
    results = _plain(
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
            "llm": {
                "probing": column(llm, "test_accuracy"),
                "probing_auc": column(llm, "test_auc"),
                "hierarchy": _optional(folder / "eval" / "llm" / "hierarchy.json", "the language model's hierarchies"),
            },
            "unfinished_runs": [path.name for path in unfinished],
            "experiment": experiment,
        }
    )
    return {**results, "arms": _plain(build_arms(results, results["experiment"]))}


def published(results: dict[str, Any]) -> dict[str, Any]:
    """The results as results.json has them: of the label trees the means alone, not each class (see hierarchy.json)."""

    def means(hierarchy: dict[str, Any]) -> dict[str, Any]:
        trees = {
            tree: {key: value for key, value in values.items() if key != "nodes"}
            for tree, values in (hierarchy.get("trees") or {}).items()
        }
        return {**hierarchy, "trees": trees} if hierarchy else {}

    variants = {
        name: {**values, "hierarchy": means(values["hierarchy"])} for name, values in results["variants"].items()
    }
    llm = {**results["llm"], "hierarchy": means(results["llm"]["hierarchy"])}
    return {**results, "variants": variants, "llm": llm}


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
        "k": run.get("k_or_target_l0"),
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
        "probing": column(probing, "test_accuracy"),
        "probing_auc": column(probing, "test_auc"),
        "training": {
            "steps": run.get("steps"),
            "tokens": run.get("tokens"),
            "final": run.get("final") or (lines[-1] if lines else {}),
        },
        "core": core,
        "hierarchy": _optional(evaluated / "hierarchy.json", "hierarchical probing"),
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


def _optional(path: Path, what: str) -> dict[str, Any]:
    return read_json(path, what) if path.exists() else {}


def _plain(value: Any) -> Any:
    """The value with every float that is not finite replaced by null, which is what JSON has for "no figure"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
