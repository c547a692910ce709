"""What each figure shows: curves of training and of sparse probing, histograms. No drawing, no files.

An arm of several seeds is shown as their mean, with its 95% interval.
"""

import math
from typing import Any

import numpy as np

from hafs_evaluate.report.figures.shapes import Panel, Series
from hafs_evaluate.report.figures.styles import LLM_LABELS
from hafs_evaluate.results.arms import estimate
from hafs_evaluate.results.probing_means import mean_probing, top_k

POINTS = 240  # of a curve; more cannot be told apart at the page's width
BAND_POINTS = 80  # of a mean over seeds, whose interval is drawn too
MILLION = 1e6

TRAINING: tuple[tuple[str, str, str, bool, tuple[float | None, float | None]], ...] = (
    # key, title, unit of y, logarithmic y where it spans enough, limits of a linear y
    ("loss", "Loss", "loss (FVU units)", True, (None, None)),
    ("fvu_ema", "FVU", "FVU (EMA of the batches)", True, (None, None)),
    ("l0", "L0", "active latents a token", True, (0, None)),
    ("dead_fraction", "Dead in training", "share silent on the last rows", False, (0, None)),
    ("coherence_mean", "Mean coherence", "mean nearest cosine", False, (0, None)),
    ("coherence_max", "Max coherence", "largest cosine", False, (0, 1.02)),
    ("alpha", "alpha", "tolerance of sharing", False, (-0.03, 1.03)),
    ("lambda", "lambda", "weight of the penalty", False, (-0.03, None)),
    ("penalty", "Penalty O", "O (before lambda)", False, (0, None)),
)
LEAST_TOP = {"l0": 1.0, "dead_fraction": 0.02, "lambda": 1.0}  # so that a constant 0 lies at the foot

Lines = dict[str, list[dict[str, Any]]]  # {variant: its logged lines}
Arrays = dict[str, list[np.ndarray]]  # {arm: an array over latents for each seed}


def training_panels(lines: Lines, results: dict[str, Any], names: list[str], prefix: str = "") -> list[Panel]:
    """A panel for each metric over training tokens, with a curve for each arm of `names`.

    FVU also shows each gate's tau. Metrics that no run logged are left out.
    """
    panels = []
    for key, title, unit, wants_log, limits in TRAINING:
        series = [
            _arm_curve(name, [lines[run] for run in results["arms"][name]["runs"]], key, wants_log) for name in names
        ]
        series = [curve for curve in series if curve.x]
        values = [value for curve in series for value in curve.y]
        if not values:
            continue
        # A logarithmic axis over a constant (BatchTopK's L0) would have no ticks; a linear one reads better anyway.
        is_log = wants_log and max(values) > 3 * min(values)
        low, high = (None, None) if is_log else limits
        if key in LEAST_TOP and not is_log:
            high = max(1.05 * max(values), LEAST_TOP[key])
        levels = _taus(results, names) if key == "fvu_ema" else []
        x_label = "training tokens (millions)"
        panels.append(
            Panel(
                prefix + key,
                title,
                x_label,
                unit,
                series,
                levels,
                y_log=is_log,
                y_limits=(low, high),
                end_values=key == "fvu_ema",
            )
        )
    return panels


def probing_panels(results: dict[str, Any], names: list[str], prefix: str = "") -> tuple[list[Panel], list[Panel]]:
    """([the panel of the mean over tasks], [a panel for each task]): test accuracy over k of the arms `names`.

    The language model's own probes are drawn beside them.
    """
    shared, means = mean_probing(results)
    if not any(run in means for name in names for run in results["arms"][name]["runs"]):
        return [], []
    over = f"{len(shared)} task{'s' if len(shared) != 1 else ''}"
    mean = _probing_panel(
        f"{prefix}probing-mean", f"Probing, mean over {over}", _by_arm(results, names, means), means.get(None, {})
    )
    by_task = {}
    for task in shared:
        of_runs = {name: values["probing"].get(task, {}) for name, values in results["variants"].items()}
        by_task[task] = _by_arm(results, names, of_runs), results["llm"]["probing"].get(task, {})
    # One floor for all tasks, so that their panels compare.
    floor = _floor(
        [part for arms, llm in by_task.values() for part in [llm, *(by_k for of in arms.values() for by_k in of)]]
    )
    per_task = [
        _probing_panel(f"{prefix}probing-{task}", task, arms, llm, floor) for task, (arms, llm) in by_task.items()
    ]
    return [mean], per_task


def _by_arm(results: dict[str, Any], names: list[str], of_runs: dict[Any, dict[str, float]]) -> dict[str, list[Any]]:
    """{arm: what `of_runs` has of each of its seeds}; arms of which it has nothing are left out."""
    found = {name: [of_runs[run] for run in results["arms"][name]["runs"] if of_runs.get(run)] for name in names}
    return {name: seeds for name, seeds in found.items() if seeds}


def _arm_curve(name: str, runs: list[list[dict[str, Any]]], key: str, positive: bool) -> Series:
    """The curve of one run, or the mean of several over the tokens that all of them have seen."""
    curves = [curve for curve in (_curve(name, lines, key, positive) for lines in runs) if curve.x]
    if len(curves) < 2:
        return curves[0] if curves else Series(name, name, [], [])
    tokens = np.linspace(max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves), BAND_POINTS)
    values = [np.interp(tokens, curve.x, curve.y).tolist() for curve in curves]
    points = [estimate(list(column)) for column in zip(*values, strict=True)]
    # On a logarithmic axis an interval that reaches 0 would have no lower end.
    low = [max(one.low, 0.2 * one.mean) if positive and one.low is not None else one.low for one in points]
    interval = (low, [one.high for one in points])
    return Series(name, name, tokens.tolist(), [one.mean for one in points], y_interval=interval)


def _curve(name: str, lines: list[dict[str, Any]], key: str, positive: bool) -> Series:
    points = [
        (line["tokens"] / MILLION, line[key])
        for line in lines
        if line.get(key) is not None and math.isfinite(line[key]) and (not positive or line[key] > 0)
    ]
    if len(points) > POINTS:
        points = [tuple(np.mean(part, 0).tolist()) for part in np.array_split(np.array(points), POINTS)]
    return Series(name, name, [x for x, _ in points], [y for _, y in points])


def _taus(results: dict[str, Any], names: list[str]) -> list[tuple[str, str, float]]:
    """A horizontal line for each tau; arms with the same tau share one."""
    found: dict[float, str] = {}
    for name in names:
        for run in results["arms"][name]["runs"]:
            values = results["variants"][run]
            if values["tau"] and values["tau_reached"] is not None:
                found.setdefault(values["tau"], name)
    return [(name, f"tau of {name}", tau) for tau, name in found.items()]


def _floor(values: list[dict[str, float]]) -> float:
    """The lowest accuracy of the panels, rounded down to a twentieth."""
    return math.floor(20 * min((value for by_k in values for value in by_k.values()), default=0.5)) / 20


def _probing_panel(
    key: str, title: str, arms: dict[str, list[dict[str, float]]], llm: dict[str, float], floor: float | None = None
) -> Panel:
    series, levels = [], []
    for name, seeds in arms.items():
        columns = [column for column in seeds[0] if column.startswith("top_") and all(column in one for one in seeds)]
        points = [estimate([one[column] for one in seeds]) for column in columns]
        if points:
            interval = ([one.low for one in points], [one.high for one in points])
            means = [one.mean for one in points]
            series.append(Series(name, name, [*map(top_k, columns)], means, markers=True, y_interval=interval))
    for style, start in (("llm-top-k", "top_"), ("llm-pca", "pca_")):
        columns = [column for column in llm if column.startswith(start)]
        if columns:
            means = [llm[column] for column in columns]
            series.append(Series(style, LLM_LABELS[style], [*map(top_k, columns)], means, markers=True))
    if "full" in llm:
        levels.append(("llm-full", LLM_LABELS["llm-full"], llm["full"]))
    ks = {int(k) for one in series for k in one.x}
    floor = _floor([llm, *(one for seeds in arms.values() for one in seeds)]) if floor is None else floor
    return Panel(
        key,
        title,
        "k: latents that the probe may use",
        "test accuracy",
        series,
        levels,
        x_log=True,
        x_ticks=[(float(k), str(k)) for k in sorted(ks)],
        y_limits=(floor - 0.01, 1.01),
    )


def latent_panels(latents: dict[str, list[dict[str, Any]]], prefix: str = "") -> list[Panel]:
    """Histograms over all latents: of density on a log10 axis, with a bin for latents that never fired, and of the
    cosine with the nearest dictionary vector.

    `latents` is {arm: what latents.json holds of each seed}. The height of a bin is the mean over seeds.
    """
    panels = []
    densities = _arrays(latents, "density")
    if densities:
        rows = max(values.get("rows_scanned") or 1 for seeds in latents.values() for values in seeds)
        panels.append(_density_panel(densities, rows, prefix))
    cosines = _arrays(latents, "nearest_cosine")
    if cosines:
        low = min(0.0, *(float(values.min()) for seeds in cosines.values() for values in seeds))
        series = [_outline(name, np.linspace(low, 1, 41), seeds) for name, seeds in cosines.items()]
        title, unit = "Coherence", "cosine of a dictionary vector with its nearest"
        panels.append(Panel(prefix + "coherence", title, unit, "share of latents", series, y_limits=(0, None)))
    return panels


def _arrays(latents: dict[str, list[dict[str, Any]]], key: str) -> Arrays:
    """What each seed has under the key; a figure that is null or not finite is left out."""
    found = {
        name: [np.array(values[key], float) for values in seeds if values.get(key)] for name, seeds in latents.items()
    }
    found = {name: [values[np.isfinite(values)] for values in seeds] for name, seeds in found.items()}
    return {name: kept for name, seeds in found.items() if (kept := [values for values in seeds if len(values)])}


def _outline(name: str, edges: np.ndarray, seeds: list[np.ndarray]) -> Series:
    """The outline of the mean histogram over seeds: the fraction of latents in each bin, with its 95% interval."""
    bins = [estimate(list(column)) for column in zip(*[_shares(values, edges) for values in seeds], strict=True)]
    interval = ([one.low for one in bins], [one.high for one in bins])
    return Series(name, name, edges.tolist(), [one.mean for one in bins], steps=True, y_interval=interval)


def _shares(values: np.ndarray, edges: np.ndarray) -> list[float]:
    return (np.histogram(values, edges)[0] / len(values)).tolist()


def _density_panel(densities: Arrays, rows: int, prefix: str) -> Panel:
    low = math.floor(math.log10(1 / rows))
    edges = np.concatenate([[10 ** (low - 0.5)], np.logspace(low, 0, 5 * -low + 1)])
    never = math.sqrt(edges[0] * edges[1])
    series = [
        _outline(name, edges, [np.clip(np.where(values > 0, values, never), never, 1) for values in seeds])
        for name, seeds in densities.items()
    ]
    ticks = [(never, "never")] + [(10.0**power, _percent(power)) for power in range(low, 1) if power > low or low == 0]
    return Panel(
        prefix + "density",
        "Latent density",
        "share of tokens on which it fires (log scale)",
        "share of latents",
        series,
        x_log=True,
        x_ticks=ticks,
        y_limits=(0, None),
    )


def _percent(power: int) -> str:
    return f"{100 * 10.0**power:.{max(0, -2 - power)}f}%"
