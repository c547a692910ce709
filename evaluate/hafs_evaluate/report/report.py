"""The report: results.json, report.md with PNG figures, and index.html, one page that opens from disk.

The page loads nothing but the scripts in report/latents/, when a latent is asked for that it does not hold.

Everything comes from the files that the other commands left in the workspace. What is missing is said to be "not
evaluated". Equal workspaces give equal bytes under equal versions of the libraries. Must not import torch or jax.
"""

import re
from pathlib import Path
from typing import Any

from hafs_evaluate.labels.labels_file import LABELS, read_labels
from hafs_evaluate.report import evaluation_tables, tables
from hafs_evaluate.report.embedded import chosen_runs, embed
from hafs_evaluate.report.figures import draw, panels
from hafs_evaluate.report.figures.frontiers import frontier_panels
from hafs_evaluate.report.figures.shapes import Panel
from hafs_evaluate.report.figures.styles import styles_of
from hafs_evaluate.report.markdown import markdown
from hafs_evaluate.report.page import page
from hafs_evaluate.report.provenance import command, configs, measured_on, sources, store_note, versions
from hafs_evaluate.report.side_files import side_files, write_side_files
from hafs_evaluate.report.tree_view import tree_data, tree_notes, tree_tables
from hafs_evaluate.report.verdict import findings, what_ran
from hafs_evaluate.results.arms import compared, groups
from hafs_evaluate.results.measures import TOKENS
from hafs_evaluate.results.readings import LATENTS, OTHERS, read_result
from hafs_evaluate.results.results import build_results, published
from hafs_jax.base.files import write_json, write_text
from hafs_jax.runs import Run
from hafs_jax.store.manifest import Manifest, read_manifest

FEW_RUNS = 12  # of more runs than this, the page shows the config of each arm's first seed alone


def write_report(workspace_folder: Path) -> None:
    """Writes report/results.json, report.md with figures/*.png, and index.html with latents/*.js."""
    folder = Path(workspace_folder)
    report = folder / "report"
    results = build_results(folder)
    view = _view(folder, results, read_manifest(folder / "store" / "train"))
    write_json(report / "results.json", published(results))
    drawn = {}
    for name, (shown, columns) in _pngs(view).items():
        draw.write_png(report / "figures" / f"{name}.png", shown, view["styles"], columns)
        drawn[name] = f"figures/{name}.png"
    write_text(report / "report.md", markdown(view, drawn))
    write_side_files(report, view["side_texts"])
    write_text(report / "index.html", page(view))


def _view(folder: Path, results: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Everything that the page and the Markdown show, as plain values and panels."""
    arms = results["arms"]
    have = [
        name for name, values in results["variants"].items() if (folder / "eval" / values["run"] / LATENTS).exists()
    ]
    shown = chosen_runs(arms, have)
    histogrammed, embedded = _latents(folder, results, have, shown)
    run_names = {name: results["variants"][run]["run"] for name, run in shown.items()}
    strings, records = embed(embedded, run_names)
    kept = [record["name"] for record in records]
    others = {name: read_result(folder / "eval" / run_names[name], OTHERS) for name in kept}
    side, side_texts = side_files({name: found for name, found in others.items() if found}, run_names)
    grouped = _groups(folder, results, histogrammed)
    frontier = frontier_panels(results)
    main = next((group for group in grouped if group["is_main"]), None)
    return {
        "title": _title(folder, results),
        "measured_on": measured_on(folder, [values["run"] for values in results["variants"].values()]),
        "command": command(folder),
        "what_ran": what_ran(results, [vars(source) for source in manifest.sources]),
        "verdict": findings(results),
        "unfinished": results["unfinished_runs"],
        "names": list(arms),
        "styles": styles_of(arms),
        "columns": [vars(column) for column in tables.shown_columns(results)],
        "rows": tables.arm_rows(results),
        "n_tasks": len(evaluation_tables.task_table(results, list(arms))["rows"]),
        "many_seeds": any(len(arm["seeds"]) > 1 for arm in arms.values()),
        "has_intervals": any(
            "fvu" in arm["measures"] and arm["measures"]["fvu"]["low"] is not None for arm in arms.values()
        ),
        "comparisons": _comparisons(results, grouped),
        "falsifiers": tables.falsifiers(results),
        "experiment_notes": tables.experiment_notes(results),
        "frontiers": frontier,
        "frontier_legend": {key: label for label, key in _labels(frontier).items()},
        "groups": grouped,
        "main": main,
        "has_domains": any(group["domains"] for group in grouped),
        "tokens": evaluation_tables.token_table(results),
        "token_properties": _token_properties(folder, results),
        "first_letter": evaluation_tables.first_letter_table(results),
        "tree": tree_data(results),
        "tree_tables": tree_tables(results, main["names"] if main else []),
        "tree_notes": tree_notes(results),
        "side": side,
        "side_texts": side_texts,
        "labels": _latent_labels(folder, results, {name: run_names[name] for name in kept}),
        "layer": _layer(manifest),
        "strings": strings,
        "records": records,
        "seeds_shown": {name: run_names[name] for name in kept},
        "left_out": [name for name in shown if name not in kept],
        "latents": {name: embedded[name] for name in kept},
        "definitions": tables.definitions(results),
        "sources": sources(manifest),
        "store_note": store_note(manifest),
        "by_source": evaluation_tables.by_source(results),
        "seconds": _seconds(results["seconds"], len(results["variants"])),
        "versions": versions(),
        "configs": configs(folder, _configured(results), manifest),
    }


def _title(folder: Path, results: dict[str, Any]) -> str:
    """What was done: the experiment's name, or how many SAEs, and of which activations."""
    n = len(results["variants"])
    named = ((results["experiment"].get("config") or {}).get("name")) or folder.name
    what = f"{n} SAE{'' if n == 1 else 's'} of {results['model'].split('/')[-1]}, {results['hook']}"
    return f"{named}: {what}" if named else what


def _token_properties(folder: Path, results: dict[str, Any]) -> dict[str, Any] | None:
    """The table of single properties of tokens, from each run's tokens.json."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, arm in results["arms"].items():
        files = [read_result(folder / "eval" / results["variants"][run]["run"], TOKENS) for run in arm["runs"]]
        found[name] = [values["properties"] for values in files if values.get("properties")]
    ceiling = (results["llm"].get("tokens") or {}).get("ceiling") or {}
    return evaluation_tables.token_property_table(found, ceiling.get("properties") or {})


def _latent_labels(folder: Path, results: dict[str, Any], shown: dict[str, str]) -> dict[str, dict[int, list[Any]]]:
    """{arm: {latent: [label, source, score]}} of labels.csv, which may name arms or runs; `shown` is {arm: its run}."""
    runs = {values["run"] for values in results["variants"].values()}
    labels = read_labels(folder / LABELS, {*results["arms"], *runs})
    arm_of = {run: name for name, run in shown.items()} | {name: name for name in shown}
    found: dict[str, dict[int, list[Any]]] = {}
    for label in labels:
        own = found.setdefault(arm_of[label.variant], {}) if label.variant in arm_of else {}
        if label.is_by_person or label.latent not in own:  # a person's name, by run or by arm, is the one that stays
            own[label.latent] = [label.text, label.source, label.score]
    return found


def _layer(manifest: Manifest) -> list[int] | None:
    """[number of the block that the activations are of, number of blocks]; None where the hook point says no block."""
    block = re.match(r"blocks\.(\d+)\.", manifest.hook_point)
    return [int(block[1]), manifest.model.n_layers] if block and manifest.model.n_layers else None


def _comparisons(results: dict[str, Any], grouped: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The experiment's comparisons, each with the key of the group that it is shown with; None: it is always shown."""
    by_title = {group["title"]: group for group in grouped}
    found = []
    for block in tables.comparison_groups(results):
        group = by_title.get(block["title"], {})
        found.append({**block, "key": group.get("key"), "is_main": group.get("is_main", True)})
    return found


def _labels(some: list[Panel]) -> dict[str, str]:
    """{a curve's label: the key of its style}."""
    labels: dict[str, str] = {}
    for panel in some:
        for series in panel.series:
            labels.setdefault(series.label, series.key)
    return labels


def _latents(
    folder: Path, results: dict[str, Any], have: list[str], shown: dict[str, str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """({arm: the arrays over all latents of each seed}, {arm: what latents.json holds of the run that is shown})."""
    arrays: dict[str, list[dict[str, Any]]] = {}
    whole: dict[str, dict[str, Any]] = {}
    for name, arm in results["arms"].items():
        for run in arm["runs"]:
            if run not in have:
                continue
            values = read_result(folder / "eval" / results["variants"][run]["run"], LATENTS)
            arrays.setdefault(name, []).append({key: value for key, value in values.items() if key != "latents"})
            if shown.get(name) == run:
                whole[name] = values
    return arrays, {name: whole[name] for name in shown}


def _groups(folder: Path, results: dict[str, Any], latents: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What is drawn of each group of arms that share axes. `is_main` marks the group that the page opens with."""
    arms = results["arms"]
    lines = {name: Run(folder / "runs" / values["run"]).metrics() for name, values in results["variants"].items()}
    found = []
    grouped = groups(arms)
    for number, (title, names) in enumerate(grouped.items()):
        prefix = f"g{number}-" if len(grouped) > 1 else ""
        mean, per_task = panels.probing_panels(results, names, prefix)
        own = {name: latents[name] for name in names if name in latents}
        first = arms[names[0]]
        found.append(
            {
                "key": str(number),
                "title": title,
                "names": names,
                "is_main": len(grouped) == 1 or (first["architecture"], first["k"]) == compared(arms),
                "training": panels.training_panels(lines, results, names, prefix),
                "probing_mean": mean,
                "probing_tasks": per_task,
                "probing_names": [one.key for one in mean[0].series if one.key in arms] if mean else [],
                "probing_llm": ([one.key for one in mean[0].series if one.key not in arms] if mean else [])
                + ([key for key, _, _ in mean[0].levels] if mean else []),
                "task_table": evaluation_tables.task_table(results, names),
                "domains": evaluation_tables.domain_tables(results, names),
                "core": evaluation_tables.core_table(results, names),
                "dictionary": panels.latent_panels(own, prefix),
                "latent_names": list(own),
            }
        )
    return found


def _configured(results: dict[str, Any]) -> dict[str, str]:
    """{title: run} of the configs that the page shows."""
    if len(results["variants"]) <= FEW_RUNS:
        return {name: values["run"] for name, values in results["variants"].items()}
    return {
        f"{name} ({results['variants'][arm['runs'][0]]['run']})": results["variants"][arm["runs"][0]]["run"]
        for name, arm in results["arms"].items()
    }


def _seconds(seconds: dict[str, float | None], n_runs: int) -> list[tuple[str, str]]:
    """[(stage, seconds)]; with many runs, the sum over them."""
    if n_runs <= FEW_RUNS:
        return [(stage, f"{taken:,.1f}") for stage, taken in seconds.items() if taken is not None]
    sums: dict[str, float] = {}
    for stage, taken in seconds.items():
        parts = stage.split("/")
        name = "/".join(parts[:-1]) + f", {n_runs} runs" if len(parts) > 1 and parts[0] == "train" else stage
        name = "/".join(parts[:2]) + ", all runs" if len(parts) > 2 else name
        sums[name] = sums.get(name, 0.0) + (taken or 0.0)
    return [(stage, f"{taken:,.1f}") for stage, taken in sums.items()]


def _pngs(view: dict[str, Any]) -> dict[str, tuple[list[Panel], int]]:
    """{name: (panels, columns)} of the figures beside report.md, of the group that the page opens with."""
    main = view["main"]
    shown: dict[str, tuple[list[Panel], int]] = {}
    if main:
        by_key = {panel.key.split("-")[-1]: panel for panel in main["training"]}
        overview = [by_key[key] for key in ("fvu_ema", "coherence_mean") if key in by_key] + main["probing_mean"]
        shown = {
            "overview": (overview, 3),
            "training": (main["training"], 3),
            "probing": (main["probing_mean"] + main["probing_tasks"], 3),
            "dictionary": (main["dictionary"], 2),
        }
    per_frontier: dict[str, int] = {}
    for panel in view["frontiers"]:
        label = panel.x_label + panel.y_label
        per_frontier[label] = per_frontier.get(label, 0) + 1
    shown["frontiers"] = (view["frontiers"], max(2, *per_frontier.values()) if per_frontier else 1)
    return {name: (some, min(columns, len(some))) for name, (some, columns) in shown.items() if some}
