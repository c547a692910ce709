"""results.json: every figure of a workspace in one plain object without NaN. Must not import torch or jax.

It is made from what the commands left under OUT/<profile>: the manifests of the stores, runs/, eval/ and experiment/.
What is not there yet is null or an empty object. Only a workspace without a training store is an error.
"""

import math
from pathlib import Path
from typing import Any

from hafs_evaluate.results.arms import DEFAULT_ARCHITECTURE, VARIANT_ORDER, build_arms
from hafs_evaluate.results.measures import CORE, DOMAINS, FIRST_LETTER, HIERARCHY, PROBING, TOKENS
from hafs_evaluate.results.probing_means import column, llm_probing, sae_probing
from hafs_evaluate.results.readings import read_result, read_results, run_figures
from hafs_evaluate.results.result_shapes import check_result
from hafs_jax.base.files import read_json
from hafs_jax.health import DEAD_L0, death
from hafs_jax.runs import Run, RunSummary, all_runs, finished_runs
from hafs_jax.store.manifest import TIMING, read_manifest

RESULTS_VERSION = 1
LANGUAGE_MODEL = "llm"  # its folder in eval/


def build_results(workspace_folder: Path) -> dict[str, Any]:
    """The results of a workspace, as results.json holds them. Only runs that finished training are variants.

    `variants` has a run each: `measures` ({name: its figure}, see results.measures), `probing` (test accuracy) and
    `probing_auc` (AUROC), both {task: {"top_1": ..., ...}}, and what its stages wrote: `core`, `hierarchy`, `domains`,
    `first_letter`, and of `tokens` the means over the properties. `arms` takes the seeds together (results.arms),
    `seconds` has the time of each stage, and `experiment` is the experiment's summary. Equal folders give equal
    results.
    """
    folder = Path(workspace_folder)
    manifest = read_manifest(folder / "store" / "train")
    heldout = folder / "store" / "heldout"
    runs = sorted((run.summary() for run in finished_runs(folder / "runs")), key=run_order)
    names = variant_names(runs)
    found = {run.name: read_results(folder / "eval" / run.name) for run in runs}
    llm_folder = folder / "eval" / LANGUAGE_MODEL
    llm = llm_probing(read_result(llm_folder, PROBING), (by_file[PROBING] for by_file in found.values()))
    figures = run_figures(found)
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
            "variants": {
                names[run.name]: {
                    **_variant(run, found[run.name], figures[run.name]),
                    "dead": _dead(Run(folder / "runs" / run.name)),
                }
                for run in runs
            },
            "llm": {
                "probing": column(llm, "test_accuracy"),
                "probing_auc": column(llm, "test_auc"),
                "hierarchy": read_result(llm_folder, HIERARCHY),
                "tokens": read_result(llm_folder, TOKENS),
            },
            "unfinished_runs": [run.name for run in all_runs(folder / "runs") if not run.finished()],
            "experiment": _optional(folder / "experiment" / "summary.json", "the experiment's summary"),
        }
    )
    return {**results, "arms": _plain(build_arms(results))}


def published(results: dict[str, Any]) -> dict[str, Any]:
    """The results as results.json has them: without the figures of single classes and single latents.

    These lie in the runs' hierarchy.json and domains.json. Of the language model's tokens the means are kept.
    """

    def without(values: dict[str, Any], part: str, key: str) -> dict[str, Any]:
        parts = {name: {k: v for k, v in of.items() if k != key} for name, of in (values.get(part) or {}).items()}
        return {**values, part: parts} if values else {}

    variants = {
        name: {
            **values,
            "hierarchy": without(values["hierarchy"], "trees", "nodes"),
            "domains": without(values["domains"], "sources", "latents"),
        }
        for name, values in results["variants"].items()
    }
    llm = {
        **results["llm"],
        "hierarchy": without(results["llm"]["hierarchy"], "trees", "nodes"),
        "tokens": {
            name: {"mean": values["mean"]} if isinstance(values, dict) and "mean" in values else values
            for name, values in results["llm"]["tokens"].items()
        },
    }
    return {**results, "variants": variants, "llm": llm}


def run_order(run: RunSummary) -> tuple[Any, ...]:
    """A key that sorts runs: the default architecture first, and in it baseline, strict, adaptive, others by name."""
    known = run.variant in VARIANT_ORDER
    return (
        run.architecture != DEFAULT_ARCHITECTURE,
        run.architecture,
        VARIANT_ORDER.index(run.variant) if known else len(VARIANT_ORDER),
        run.variant,
        run.seed,
    )


def variant_names(runs: list[RunSummary]) -> dict[str, str]:
    """{run: what it is called}: its name, without "-s0" where only one seed was trained."""
    seeds: dict[tuple[str, str], int] = {}
    for run in runs:
        seeds[run.variant, run.architecture] = seeds.get((run.variant, run.architecture), 0) + 1
    return {
        run.name: run.name if seeds[run.variant, run.architecture] > 1 else run.name.removesuffix("-s0") for run in runs
    }


def _variant(run: RunSummary, found: dict[str, dict[str, Any]], figures: dict[str, float]) -> dict[str, Any]:
    core, probing = found[CORE], sae_probing(found[PROBING])
    reconstruction = core.get("reconstruction") or {}
    return {
        "run": run.name,
        "variant": run.variant,
        "architecture": run.architecture,
        "seed": run.seed,
        "k": run.k,
        "tag": run.tag,
        "arm": run.arm,
        "n_latents": run.n_latents,
        **{name: figures.get(name) for name in ("fvu", "l0", "dead_fraction", "ce_score", "kl_score")},
        "explained_variance": reconstruction.get("explained_variance"),
        **{name: figures.get(name) for name in ("max_coherence", "mean_coherence")},
        "tau": run.tau,
        "tau_reached": run.tau_reached,
        "measures": figures,
        "probing": column(probing, "test_accuracy"),
        "probing_auc": column(probing, "test_auc"),
        "training": {"steps": run.steps, "tokens": run.tokens, "final": run.final},
        "core": core,
        "hierarchy": found[HIERARCHY],
        "domains": found[DOMAINS],
        "first_letter": found[FIRST_LETTER],
        "tokens": found[TOKENS].get("mean") or {},
    }


def _dead(run: Run) -> str | None:
    """What killed a dead SAE."""
    l0 = run.summary().final.get("l0")
    return death(run) if l0 is not None and l0 < DEAD_L0 else None


def _seconds(folder: Path, runs: list[RunSummary]) -> dict[str, float | None]:
    seconds: dict[str, float | None] = {}
    timing = _optional(folder / "store" / "train" / TIMING, "a store's timing")
    if "seconds" in timing:
        seconds["extract"] = timing["seconds"]
    for run in runs:
        seconds[f"train/{run.name}"] = run.seconds
    for what, taken in sorted(_optional(folder / "eval" / "seconds.json", "the evaluation's times").items()):
        seconds[f"eval/{what}"] = taken
    return seconds


def _optional(path: Path, what: str) -> dict[str, Any]:
    return check_result(read_json(path, what), path) if path.exists() else {}


def _plain(value: Any) -> Any:
    """`value` with None for every float that is not finite, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
