"""The tables of single evaluations as plain values: probing tasks, sources, tokens, first letters. No files."""

import re
from typing import Any

from hafs_evaluate.report.tables import NOT_EVALUATED
from hafs_evaluate.results.arms import estimate
from hafs_evaluate.results.probing_means import mean_probing

BEST_LATENTS = 3  # of a source, named in its table
TOKEN_FIGURES = {
    "transfer_top_1": "top-1",
    "transfer_top_2": "top-2",
    "transfer_top_5": "top-5",
    "f1_top_1": "F1, top-1",
    "recall": "recall",
    "child_recall": "recall by word",
    "child_spread": "spread over words",
    "seen_top_1": "top-1, seen words",
    "enough_share": "10 latents are enough",
    "absorbed": "absorbed",
}
"""The figures of tokens.json that the table of token properties shows, and the heads of their columns."""


def task_table(results: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Top-1 test accuracy on each task (rows) of the arms `names`, mean over seeds, and of the language model."""
    tasks, _ = mean_probing(results)
    llm = results["llm"]["probing"]
    columns = [(name, [results["variants"][run]["probing"] for run in results["arms"][name]["runs"]]) for name in names]
    columns = [(name, seeds) for name, seeds in columns if any(seeds)]
    rows = []
    for task in tasks:
        values: list[float | None] = []
        for _, seeds in columns:
            known = [by_task[task]["top_1"] for by_task in seeds if "top_1" in by_task.get(task, {})]
            values.append(sum(known) / len(known) if known else None)
        if llm:
            values += [llm.get(task, {}).get(column) for column in ("top_1", "full")]
        rows.append({"task": task, "cells": [NOT_EVALUATED if value is None else f"{value:.3f}" for value in values]})
    return {"names": [name for name, _ in columns] + (["LM top-1", "LM full"] if llm else []), "rows": rows}


def by_source(results: dict[str, Any]) -> dict[str, Any] | None:
    """FVU on each source of text, mean over seeds, a row for each arm; None where no run has it."""
    found = {
        name: [results["variants"][run]["core"].get("by_source") or {} for run in arm["runs"]]
        for name, arm in results["arms"].items()
    }
    sources = sorted({source for seeds in found.values() for one in seeds for source in one})
    if not sources:
        return None
    rows = []
    for name, seeds in found.items():
        cells = []
        for source in sources:
            known = [one[source]["fvu"] for one in seeds if one.get(source, {}).get("fvu") is not None]
            cells.append(f"{sum(known) / len(known):.3f}" if known else NOT_EVALUATED)
        rows.append({"name": name, "cells": cells})
    return {"sources": sources, "rows": rows}


def core_table(results: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    """Every number of core.json (rows, named by path) of the arms `names`, mean over seeds; None where none has any."""
    found = {
        name: [_leaves(results["variants"][run]["core"]) for run in results["arms"][name]["runs"]] for name in names
    }
    found = {name: [one for one in seeds if one] for name, seeds in found.items()}
    paths = dict.fromkeys(path for seeds in found.values() for one in seeds for path in one)
    rows = []
    for path in paths:
        known = [[one[path] for one in seeds if path in one] for seeds in found.values()]
        rows.append({"path": path, "cells": [f"{sum(own) / len(own):.5g}" if own else "" for own in known]})
    return {"names": list(found), "rows": rows} if rows else None


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{dotted path: number} of all in `values` but the config and the sources of text, which have a table."""
    leaves: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("config", "by_source"):
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            leaves[prefix + key] = value
    return leaves


def domain_tables(results: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """How well latents of the arms `names` detect each source of text: [{source, note, header, rows}].

    A row is an arm. Its cells are means over seeds: the best latent's AUROC, the F1 of the best latent, of the best
    latent over a threshold and of a union of several latents, and the number of detectors. `latents` are the best
    latents of the first seed.
    """
    found = {
        name: [sources for run in results["arms"][name]["runs"] if (sources := _sources(results, run))]
        for name in names
    }
    found = {name: seeds for name, seeds in found.items() if seeds}
    tables = []
    for source in dict.fromkeys(source for seeds in found.values() for one in seeds for source in one):
        of_source = {name: [one[source] for one in seeds if source in one] for name, seeds in found.items()}
        of_source = {name: seeds for name, seeds in of_source.items() if seeds}
        first = next(iter(of_source.values()))[0]
        unions = [key for key in first if re.fullmatch(r"best_\d+", key) and key != "best_1"]
        f1 = {"best_1": "F1, best latent", "best_1_threshold": "F1, best over a threshold"}
        f1 |= {key: f"F1, any of {key.removeprefix('best_')}" for key in unions}
        rows = [
            {
                "name": name,
                "cells": [
                    _mean([one["best_auroc"]["auroc"] for one in seeds]),
                    *(_mean([figure for one in seeds if (figure := _f1(one, key)) is not None]) for key in f1),
                    _mean([one["detectors"] for one in seeds], 0 if len(seeds) == 1 else 1),
                ],
                "latents": [
                    {"index": latent["index"], "f1": f"{latent['f1']:.2f}"}
                    for latent in seeds[0].get("latents", [])[:BEST_LATENTS]
                ],
            }
            for name, seeds in of_source.items()
        ]
        tables.append(
            {
                "source": source,
                "note": f"{first['documents']:,} documents of {source} and {first['documents_outside']:,} others. A"
                f" latent that is always active would have an F1 of {first['always_f1']:.3f}.",
                "header": ["AUROC, best latent", *f1.values(), "detectors"],
                "rows": rows,
            }
        )
    return tables


def _f1(source: dict[str, Any], key: str) -> float | None:
    found = source.get(key)
    value = found.get("f1") if isinstance(found, dict) else None
    return value if isinstance(value, int | float) else None


def token_table(results: dict[str, Any]) -> dict[str, Any] | None:
    """Transfer to unseen tokens, a row for each arm that has it, then the language model's; None without any."""
    rows = []
    for name, arm in results["arms"].items():
        seeds = [found for run in arm["runs"] if (found := results["variants"][run].get("tokens"))]
        if seeds:
            rows.append({"name": name, "is_arm": True, "cells": _token_cells(seeds)})
    if not rows:
        return None
    llm = results["llm"].get("tokens") or {}
    for key, label in (("ceiling", "LM, own probes"), ("neurons", "LM, neurons"), ("pca", "LM, PCA")):
        if mean := (llm.get(key) or {}).get("mean"):
            rows.append({"name": label, "is_arm": False, "cells": _token_cells([mean], "")})
    counted = [name for name in llm.get("probe_f1") or {} if name not in (llm.get("left_out") or {})]
    note = f"{len(counted)} properties count on {llm.get('rows', 0):,} held-out rows: {', '.join(counted)}."
    return {"header": list(TOKEN_FIGURES.values()), "rows": rows, "note": note if counted else ""}


def token_property_table(properties: dict[str, list[dict[str, Any]]], ceiling: dict[str, Any]) -> dict[str, Any] | None:
    """Each property of tokens (rows) of each arm: balanced accuracy and F1 of the best latent on unseen tokens.

    `properties` is {arm: `properties` of each seed's tokens.json}, `ceiling` that of the language model's own probes.
    """
    known = {name: seeds for name, seeds in properties.items() if seeds}
    every = sorted({key for seeds in known.values() for one in seeds for key in one})
    if not every:
        return None
    rows = []
    for key in every:
        cells = [
            _property_cell([one[key].get("top_1") or {} for one in seeds if key in one]) for seeds in known.values()
        ]
        rows.append({"name": key.replace("_", " "), "cells": [*cells, _property_cell([ceiling.get(key) or {}])]})
    return {"header": [*known, "LM, own probe"], "rows": rows}


def _property_cell(found: list[dict[str, Any]]) -> dict[str, str]:
    accuracy, f1 = ([one[key] for one in found if one.get(key) is not None] for key in ("balanced_accuracy", "f1"))
    return {"text": _mean(accuracy) if accuracy else "", "small": f"F1 {_mean(f1)}" if f1 else ""}


def _token_cells(seeds: list[dict[str, Any]], missing: str = NOT_EVALUATED) -> list[str]:
    known = [[one[key] for one in seeds if one.get(key) is not None] for key in TOKEN_FIGURES]
    return [_mean(values) if values else missing for values in known]


def first_letter_table(results: dict[str, Any]) -> dict[str, Any] | None:
    """SAE-Bench's first-letter absorption, a row for each arm that has it, with its validity; None without any."""
    rows = []
    for name, arm in results["arms"].items():
        seeds = [found for run in arm["runs"] if (found := results["variants"][run].get("first_letter"))]
        if not seeds:
            continue
        means = [one["result"]["eval_result_metrics"]["mean"] for one in seeds if one.get("result")]
        reasons = list(dict.fromkeys(one.get("reason") or "no reason given" for one in seeds if not one.get("valid")))
        rows.append(
            {
                "name": name,
                "cells": [
                    _mean([one[key] for one in means if one.get(key) is not None])
                    for key in (
                        "mean_absorption_fraction_score",
                        "mean_full_absorption_score",
                        "mean_num_split_features",
                    )
                ],
                "validity": f"not valid: {'; '.join(reasons)}" if reasons else "valid",
            }
        )
    header = ["absorption fraction", "full absorption", "split latents a letter"]
    return {"header": header, "rows": rows} if rows else None


def _sources(results: dict[str, Any], run: str) -> dict[str, Any]:
    return (results["variants"][run].get("domains") or {}).get("sources") or {}


def _mean(values: list[float], digits: int = 3) -> str:
    """The mean over seeds, with half of its 95% interval where it has one."""
    if not values:
        return NOT_EVALUATED
    one = estimate(values)
    half = "" if one.low is None or one.high is None else f" ± {(one.high - one.low) / 2:.{digits}f}"
    return f"{one.mean:.{digits}f}{half}"
