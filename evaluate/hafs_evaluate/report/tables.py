"""The tables of arms, comparisons and falsifiers as plain values, and the definitions. No files, no markup."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from hafs_evaluate.results.arms import groups
from hafs_evaluate.results.measures import CORE, MEASURES, PROBING, K, Measure, column_measures, find_measure
from hafs_evaluate.results.probing_means import mean_probing

NOT_EVALUATED = "not evaluated"
NAMED = 5  # SAEs that a note names
PRIMARY = ("hierarchy_parent_top_1", "hole", "fvu")  # the experiment's primaries and FVU: shown first, and open
MARKS = {"better": "▲", "worse": "▼", "not resolved": "○", "non-inferior": "≈"}
SILENT = "dead_fraction"  # "dead" is training's word, which counts other rows
OUTCOMES = {"pass": "✓", "triggered": "✗"}


TAU = Measure(
    "tau",
    "run.json",
    "tau",
    "The FVU below which the adaptive weight switches on. It is fixed before training.",
    path="tau",
)
"""A column that is no evaluation's figure: the run's own threshold, and whether its error reached it."""
TERMS = {
    "penalty O": "The excess of the decoder's cosines over a margin, squared, summed over a latent's others and"
    " averaged over the latents; a pair counts with weight 1 - alpha. The loss is FVU + sparsity + lambda x O.",
    "alpha": "Share of the penalty that is waived, so that latents may share direction. A schedule ends it at 0.",
    "lambda": "Weight of the penalty. In adaptive runs it follows the error: it falls where FVU (an exponential moving"
    " average) is above tau.",
    TAU.label: TAU.definition,
    "95% CI": "Student's t interval of the mean over seeds. It needs at least three seeds.",
    "density": "Fraction of the scanned rows on which a latent is active.",
    "dead in training": "Fraction of the latents that fired on none of the last rows of training (dead-after-tokens of"
    " the config). The held-out figure has its own name, since it counts other rows.",
}
"""Terms of the page that are no column of a measure."""


def shown_columns(results: dict[str, Any]) -> list[Measure]:
    """The columns of the table of arms. An optional one is shown only where an arm has a figure."""
    columns = [
        column
        for column in column_measures()
        if not column.is_optional or any(column.name in arm["measures"] for arm in results["arms"].values())
    ]
    rows = results.get("heldout_rows")
    silent = f"silent on {rows:,} held-out rows" if rows else "silent on held-out rows"
    columns = [replace(column, label=silent) if column.name == SILENT else column for column in columns]
    first = [column for column in columns if column.file == CORE]
    return [*first, TAU, *(column for column in columns if column not in first)]


def definitions(results: dict[str, Any]) -> dict[str, str]:
    """{term: its definition} of every measure that has a column or a figure, and of the page's other terms."""
    names = [column.name for column in shown_columns(results)]
    names += [name for arm in results["arms"].values() for name in arm["measures"]]
    known = {found.definition for name in dict.fromkeys(names) if (found := find_measure(name)) is not None}
    shown = [measure for measure in MEASURES.values() if measure.definition in known]
    labels = {measure.name: measure.label.replace(K, "k") for measure in shown} | {SILENT: "silent on held-out rows"}
    return {labels[measure.name]: measure.definition for measure in shown} | TERMS


def arm_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of arms, with cells in the order of `shown_columns`; the language model's probes come last.

    The small figure of a cell is half of the 95% interval where there is one, or else the difference from the baseline
    of the same architecture and k. `group` is the title above the row, where there are several groups.
    """
    arms, columns = results["arms"], shown_columns(results)
    grouped = groups(arms)
    rows: list[dict[str, Any]] = []
    for title, names in grouped.items():
        for name in names:
            arm = arms[name]
            cells = [
                _tau_cell([results["variants"][run] for run in arm["runs"]])
                if column is TAU
                else _cell(arm, _baseline(arms, name), column)
                for column in columns
            ]
            head = title if len(grouped) > 1 and name == names[0] else ""
            rows.append({"name": name, "key": name, "group": head, "seeds": len(arm["seeds"]), "cells": cells})
    _, means = mean_probing(results)
    llm = means.get(None, {})
    probing = [column.name for column in columns if column.file == PROBING]
    for label, key, found in (
        ("LM, top-k activations", "llm-top-k", {name: llm.get(name) for name in probing}),
        ("LM, top-k PCA", "llm-pca", {name: llm.get(name.replace("top_", "pca_")) for name in probing}),
        ("LM, full probe", "llm-full", {name: llm.get("full") for name in probing}),
    ):
        if any(value is not None for value in found.values()):
            values = [found.get(column.name) for column in columns]
            cells = [
                {"text": "" if value is None else f"{value:.3f}", "change": "", "missing": False} for value in values
            ]
            rows.append({"name": label, "key": key, "group": "", "seeds": None, "cells": cells})
    return rows


def comparison_groups(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The experiment's comparisons: [{title, measures: [{name, is_primary, limits, rows}]}], primaries first.

    `low`, `high` and `difference` of a row are numbers. `limits` is the range over which a measure's rows are drawn.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    comparisons = results["experiment"].get("comparisons") or []
    many_ks = len({one.get("k") for one in comparisons}) > 1
    for one in comparisons:
        title = str(one.get("architecture")) + (f", k = {one['k']:g}" if many_ks and one.get("k") is not None else "")
        found.setdefault(title, {}).setdefault(one["measure"], []).append(_comparison(one))
    return [
        {
            "title": title,
            "measures": [
                {
                    "name": known.label if (known := find_measure(measure)) else measure.replace("_", "-"),
                    "better": f"{known.better} is better" if known and known.better else "",
                    "is_primary": measure in PRIMARY,
                    "limits": _limits(by_measure[measure]),
                    "rows": by_measure[measure],
                }
                for measure in sorted(by_measure, key=_measure_order)
            ],
        }
        for title, by_measure in found.items()
    ]


def falsifiers(results: dict[str, Any]) -> list[dict[str, str]]:
    """The experiment's falsifiers, each with a mark for its outcome."""
    return [
        {
            **{key: str(one.get(key) or "") for key in ("claim", "outcome", "why")},
            "name": ", ".join(str(one[key]) for key in ("architecture", "name") if one.get(key)),
            "mark": OUTCOMES.get(one.get("outcome", ""), "○"),
        }
        for one in results["experiment"].get("falsifiers") or []
    ]


def experiment_notes(results: dict[str, Any]) -> list[str]:
    """Sentences that name the SAEs that are off their L0 level, and those that were not measured."""
    summary = results["experiment"]
    n_saes = (summary.get("saes") or 0) + len(summary.get("missing") or [])
    notes = []
    if summary.get("off_level"):
        margin = (summary.get("config") or {}).get("l0_margin")
        by_more = "" if margin is None else f" by more than {100 * margin:g}%"
        notes.append(f"{_some(summary['off_level'], n_saes)} off their L0 level{by_more}.")
    if summary.get("missing"):
        notes.append(f"{_some(summary['missing'], n_saes)} not measured.")
    return notes


def _some(names: Collection[str], n_saes: int) -> str:
    """'2 of 180 SAEs (a, b) are', with the first few names."""
    first = ", ".join(list(names)[:NAMED])
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} of {n_saes} SAEs ({first}{more}) {'is' if len(names) == 1 else 'are'}"


def _baseline(arms: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The baseline of the same architecture and k, and of the same tag where there are several; None without one."""
    own = arms[name]
    near = [
        arm
        for other, arm in arms.items()
        if other != name
        and (arm["architecture"], arm["variant"], arm["k"]) == (own["architecture"], "baseline", own["k"])
    ]
    same = [arm for arm in near if arm["tag"] == own["tag"]]
    found = same or (near if len(near) == 1 else [])
    return found[0] if found and own["variant"] != "baseline" else None


def _cell(arm: dict[str, Any], baseline: dict[str, Any] | None, column: Measure) -> dict[str, Any]:
    own = arm["measures"].get(column.name)
    if own is None:
        return {"text": NOT_EVALUATED, "change": "", "missing": True}
    other = baseline["measures"].get(column.name) if baseline else None
    change = ""
    if own["low"] is not None:
        change = f"± {(own['high'] - own['low']) / 2:.{column.digits}f}"
    elif other is not None:
        change = signed(own["mean"] - other["mean"], column.digits)
    return {"text": f"{own['mean']:.{column.digits}f}", "change": change, "missing": False}


def _tau_cell(runs: list[dict[str, Any]]) -> dict[str, Any]:
    gated = [run for run in runs if run["tau_reached"] is not None and run["tau"] is not None]
    if not gated:
        return {"text": "no gate", "change": "", "missing": True}
    reached = sum(bool(run["tau_reached"]) for run in gated)
    taus = sorted({f"{run['tau']:.3f}" for run in gated})
    said = "reached" if reached == len(gated) else "never reached" if reached == 0 else f"{reached} of {len(gated)}"
    return {"text": f"{' to '.join(dict.fromkeys((taus[0], taus[-1])))} {said}", "change": "", "missing": False}


def _comparison(one: dict[str, Any]) -> dict[str, Any]:
    low, high = one.get("low"), one.get("high")
    interval = "" if low is None or high is None else f"{signed(low, 3)} to {signed(high, 3)}"
    difference = one.get("difference")
    said = str(one.get("verdict") or "not decided")
    return {
        "pair": f"{one['a']} − {one['b']}",
        "a": one["a"],
        "difference": difference,
        "low": low,
        "high": high,
        "text": NOT_EVALUATED if difference is None else signed(difference, 3),
        "interval": interval,
        "p": "" if one.get("p_holm") is None else _p(one["p_holm"]),
        "reseed_sd": "" if one.get("reseed_sd") is None else f"{one['reseed_sd']:.3f}",
        "verdict": said,
        "mark": MARKS.get(said, "○"),
        "class": said.replace(" ", "-"),
    }


def _limits(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """A range, symmetric about 0, that holds every row's interval."""
    ends = [abs(row[key]) for row in rows for key in ("low", "high", "difference") if row[key] is not None]
    most = 1.05 * max(ends, default=0.0) or 1.0
    return -most, most


def _measure_order(measure: str) -> tuple[int, int]:
    names = [column.name for column in column_measures()]
    primary = PRIMARY.index(measure) if measure in PRIMARY else len(PRIMARY)
    return primary, names.index(measure) if measure in names else len(names)


def _p(value: float) -> str:
    return "< 0.001" if value < 1e-3 else f"{value:.3f}"


def signed(change: float, digits: int) -> str:
    """A difference with its sign: a true minus, and ± where it rounds to 0."""
    text = f"{change:+.{digits}f}"
    return text.replace("-", "−") if float(text) else f"±{0:.{digits}f}"
