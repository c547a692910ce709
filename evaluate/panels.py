"""Which curves the report shows, made from results, metrics and latents. Pure: no drawing, no files."""

import math
from typing import Any

import numpy as np

from evaluate.figures import Panel, Series
from evaluate.results import mean_probing, top_k

POINTS = 240  # a curve's points; more can't be told apart at the page's width
MILLION = 1e6

TRAINING: tuple[tuple[str, str, str, bool, tuple[float | None, float | None]], ...] = (
    # key, title, unit of y, logarithmic y where it spans enough, limits of a linear y
    ("loss", "Loss", "loss (FVU units)", True, (None, None)),
    ("fvu_ema", "FVU", "FVU (EMA of the batches)", True, (None, None)),
    ("l0", "L0", "active latents a token", True, (0, None)),
    ("dead_fraction", "Dead latents", "share of latents", False, (0, None)),
    ("coherence_mean", "Mean coherence", "mean nearest cosine", False, (0, None)),
    ("coherence_max", "Max coherence", "largest cosine", False, (0, 1.02)),
    ("alpha", "alpha", "tolerance of sharing", False, (-0.03, 1.03)),
    ("lambda", "lambda", "weight of the penalty", False, (-0.03, None)),
    ("penalty", "Penalty O", "O (before lambda)", False, (0, None)),
)
LEAST_TOP = {"l0": 1.0, "dead_fraction": 0.02, "lambda": 1.0}  # so that a constant 0 lies at the foot


def training_panels(lines: dict[str, list[dict[str, Any]]], results: dict[str, Any]) -> list[Panel]:
    """A panel a metric over training tokens; FVU with each gate's tau. Metrics that no run logged are left out."""
    panels = []
    for key, title, unit, wants_log, limits in TRAINING:
        series = [_curve(name, run, key, wants_log) for name, run in lines.items()]
        series = [curve for curve in series if curve.x]
        values = [value for curve in series for value in curve.y]
        if not values:
            continue
        # A logarithmic axis over a constant (BatchTopK's L0) would have no ticks; a linear one reads better anyway.
        is_log = wants_log and max(values) > 3 * min(values)
        low, high = (None, None) if is_log else limits
        if key in LEAST_TOP and not is_log:
            high = max(1.05 * max(values), LEAST_TOP[key])
        levels = _taus(results) if key == "fvu_ema" else []
        x_label = "training tokens (millions)"
        panels.append(Panel(key, title, x_label, unit, series, levels, y_log=is_log, y_limits=(low, high)))
    return panels


def probing_panels(results: dict[str, Any]) -> tuple[list[Panel], list[Panel]]:
    """([mean over tasks], [a panel a task]): test accuracy over k, the language model's own probes beside it."""
    shared, means = mean_probing(results)
    if not any(name for name in means):
        return [], []
    over = f"{len(shared)} task{'s' if len(shared) != 1 else ''}"
    mean = _probing_panel("probing-mean", f"Probing, mean over {over}", means, _floor([means]))
    by_task = {}
    for task in shared:
        by_task[task] = {name: values["probing"].get(task, {}) for name, values in results["variants"].items()}
        by_task[task][None] = results["llm"]["probing"].get(task, {})
    floor = _floor(list(by_task.values()))  # one for all tasks, so that their panels compare
    per_task = [_probing_panel(f"probing-{task}", task, values, floor) for task, values in by_task.items()]
    return [mean], per_task


def latent_panels(latents: dict[str, dict[str, Any]]) -> list[Panel]:
    """Histograms over all latents: density on a log10 axis (those that never fired apart), and the nearest cosine."""
    panels = []
    densities = {name: np.array(values["density"]) for name, values in latents.items() if values.get("density")}
    if densities:
        rows = max(values["rows_scanned"] for values in latents.values())
        panels.append(_density_panel(densities, rows))
    cosines = {name: np.array(v["nearest_cosine"]) for name, v in latents.items() if v.get("nearest_cosine")}
    if cosines:
        low = min(0.0, *(float(values.min()) for values in cosines.values()))
        edges = np.linspace(low, 1, 41)
        series = [
            Series(name, name, edges.tolist(), (np.histogram(values, edges)[0] / len(values)).tolist(), steps=True)
            for name, values in cosines.items()
        ]
        title, unit = "Coherence", "cosine of a dictionary vector with its nearest"
        panels.append(Panel("coherence", title, unit, "share of latents", series, y_limits=(0, None)))
    return panels


def _density_panel(densities: dict[str, np.ndarray], rows: int) -> Panel:
    low = math.floor(math.log10(1 / rows))
    edges = np.concatenate([[10 ** (low - 0.5)], np.logspace(low, 0, 5 * -low + 1)])
    never = math.sqrt(edges[0] * edges[1])
    series = []
    for name, values in densities.items():
        shown = np.clip(np.where(values > 0, values, never), never, 1)
        series.append(
            Series(name, name, edges.tolist(), (np.histogram(shown, edges)[0] / len(shown)).tolist(), steps=True)
        )
    ticks = [(never, "never")] + [(10.0**power, _percent(power)) for power in range(low, 1) if power > low or low == 0]
    return Panel(
        "density",
        "Latent density",
        "share of tokens on which it fires (log10)",
        "share of latents",
        series,
        x_log=True,
        x_ticks=ticks,
        y_limits=(0, None),
    )


def _percent(power: int) -> str:
    return f"{100 * 10.0**power:.{max(0, -2 - power)}f}%"


def _curve(name: str, lines: list[dict[str, Any]], key: str, positive: bool) -> Series:
    points = [
        (line["tokens"] / MILLION, line[key])
        for line in lines
        if line.get(key) is not None and math.isfinite(line[key]) and (not positive or line[key] > 0)
    ]
    if len(points) > POINTS:
        points = [tuple(np.mean(part, 0).tolist()) for part in np.array_split(np.array(points), POINTS)]
    return Series(name, name, [x for x, _ in points], [y for _, y in points])


def _taus(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    return [
        (name, f"tau of {name}", values["tau"])
        for name, values in results["variants"].items()
        if values["tau"] and values["tau_reached"] is not None
    ]


def _floor(panels: list[dict[str | None, dict[str, float]]]) -> float:
    """The lowest accuracy of the panels, rounded down to a twentieth."""
    values = [value for values in panels for by_k in values.values() for value in by_k.values()]
    return math.floor(20 * min(values, default=0.5)) / 20


def _probing_panel(key: str, title: str, values: dict[str | None, dict[str, float]], floor: float) -> Panel:
    series, levels = [], []
    ks: set[int] = set()
    for name, by_column in values.items():
        if not by_column:
            continue
        points = [(top_k(column), value) for column, value in by_column.items() if column.startswith("top_")]
        ks |= {k for k, _ in points}
        label, style = (name, name) if name else ("language model, top-k activations", "llm-top-k")
        if points:
            series.append(Series(style, label, [k for k, _ in points], [value for _, value in points], markers=True))
        if name is None and "full" in by_column:
            levels.append(("llm-full", "language model, full probe", by_column["full"]))
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
