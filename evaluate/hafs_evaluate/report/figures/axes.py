"""One panel on one set of matplotlib's axes: curves, intervals, levels, ticks, and what lies beyond."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hafs_evaluate.report.figures.shapes import Beyond, Panel, Series
from hafs_evaluate.report.figures.styles import LLM, Style, css_name

BAND = 0.16  # opacity of an interval's band
ARROW = {"arrowstyle": "-|>", "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
LINE = 10.5  # points, of the lines that name what lies beyond


def gid(key: str) -> str:
    """The name, in a drawing, of everything that belongs to the curve of a style key."""
    return f"curve-{css_name(key)}"


def draw(axes: Axes, panel: Panel, styles: dict[str, Style]) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.x_log:
        axes.set_xscale("log")
    if panel.y_log:
        axes.set_yscale("log")
    for series in panel.series:
        style = styles[series.key]
        look: dict[str, Any] = {
            "color": style.colour,
            "linewidth": style.width,
            "linestyle": (0, style.dashes) if style.dashes else "solid",
            "label": series.label,
            "gid": gid(series.key),
        }
        _draw_intervals(axes, series, panel.scatter, style)
        if series.steps:
            axes.stairs(series.y, series.x, **look)
        else:
            marker = style.marker if series.markers or panel.scatter or len(series.x) == 1 else ""
            axes.plot(series.x, series.y, marker=marker, markersize=5 if panel.scatter else 4, **look)
    for key, label, level in panel.levels:
        style = styles[key]
        if key in LLM:  # named in the legend
            axes.axhline(level, color=style.colour, linewidth=style.width, label=label, gid=gid(key))
            continue
        axes.axhline(level, color=style.colour, linewidth=1.1, linestyle=(0, (1, 1.5)), gid=gid(key))
        axes.annotate(
            label,
            (0, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, 2),
            textcoords="offset points",
            color=style.colour,
            fontsize=8,
            gid=gid(key),
        )
    _draw_beyond(axes, panel.beyond, styles)
    axes.set_ylim(*panel.y_limits)
    axes.set_xlim(*panel.x_limits)
    if panel.end_values:
        _draw_end_values(axes, panel, styles)
    if panel.x_ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator([place for place, _ in panel.x_ticks]))
        axes.xaxis.set_major_formatter(FuncFormatter(dict(panel.x_ticks).get))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.y_log:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=log_steps(low, high)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


LOG_STEPS = (
    (1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0),
)  # fmt: skip
LEAST_TICKS = 4


def log_steps(low: float, high: float) -> tuple[float, ...]:
    """The coarsest steps of a logarithmic axis from `low` to `high` that give it LEAST_TICKS ticks."""
    decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in LOG_STEPS:
        if sum(low <= step * decade <= high for decade in decades for step in steps) >= LEAST_TICKS:
            return steps
    return LOG_STEPS[-1]


def _draw_beyond(axes: Axes, beyond: list[Beyond], styles: dict[str, Style]) -> None:
    """An arrow at the edge for each point beyond it, and a line for each arm in the corner: its name and its values."""
    for one in beyond:
        right, up = one.direction
        arrow = axes.annotate(
            "",
            (one.x, one.y),
            xytext=(-13 * right, -13 * up),
            textcoords="offset points",
            arrowprops={**ARROW, "color": styles[one.key].colour},
        )
        if arrow.arrow_patch is not None:
            arrow.arrow_patch.set_gid(gid(one.key))
    labels = list(dict.fromkeys(one.label for one in beyond))
    is_above = any(one.direction[1] > 0 for one in beyond)
    for place, label in enumerate(labels):
        own = [one for one in beyond if one.label == label]
        line = -20 - LINE * place if is_above else 5 + LINE * (len(labels) - 1 - place)
        axes.annotate(
            f"{label}: {', '.join(one.text for one in own)}",
            (1, int(is_above)),
            xycoords="axes fraction",
            xytext=(-16, line),
            textcoords="offset points",
            color=styles[own[0].key].colour,
            fontsize=7.5,
            gid=gid(own[0].key),
            ha="right",
            va="top" if is_above else "bottom",
        )


def _draw_end_values(axes: Axes, panel: Panel, styles: dict[str, Style]) -> None:
    """Writes the last value of each curve right of the axes, moved apart where two would overlap."""
    ends = sorted((series.y[-1], series.key) for series in panel.series if series.y)
    low, high = axes.get_ylim()
    place = (
        (lambda y: math.log(y / low) / math.log(high / low)) if panel.y_log else (lambda y: (y - low) / (high - low))
    )
    heights = spread([place(y) for y, _ in ends], 0.065)
    for (value, key), height in zip(ends, heights, strict=True):
        axes.annotate(
            f"{value:.3f}",
            (1, height),
            xycoords="axes fraction",
            xytext=(3, 0),
            textcoords="offset points",
            color=styles[key].colour,
            fontsize=8,
            gid=gid(key),
            va="center",
        )


def spread(places: list[float], gap: float) -> list[float]:
    """The ascending places, moved as little as it takes that none is nearer to the next than `gap`."""
    groups = [[place] for place in places]
    middles = list(places)
    at = 0
    while at + 1 < len(groups):
        reach = gap * (len(groups[at]) + len(groups[at + 1])) / 2
        if middles[at + 1] - middles[at] >= reach - 1e-12:
            at += 1
            continue
        groups[at] += groups.pop(at + 1)
        middles.pop(at + 1)
        middles[at] = sum(groups[at]) / len(groups[at])
        at = max(0, at - 1)
    return [
        middle + gap * (n - (len(group) - 1) / 2)
        for middle, group in zip(middles, groups, strict=True)
        for n in range(len(group))
    ]


def _draw_intervals(axes: Axes, series: Series, as_bars: bool, style: Style) -> None:
    """Draws the 95% intervals of the series, under its line."""
    if as_bars:
        for axis, interval, place in (("y", series.y_interval, series.y), ("x", series.x_interval, series.x)):
            if interval is None or not any(low is not None for low in interval[0]):
                continue
            low, high = (_array(part) for part in interval)
            lengths = np.clip([np.array(place) - low, high - np.array(place)], 0, None)
            bars: dict[str, Any] = {f"{axis}err": lengths}
            drawn = axes.errorbar(
                series.x, series.y, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2.5, **bars
            )
            for part in drawn.get_children():
                part.set_gid(gid(series.key))
    elif series.y_interval is not None and any(low is not None for low in series.y_interval[0]):
        low, high = (_array(part) for part in series.y_interval)
        band: dict[str, Any] = {"color": style.colour, "alpha": BAND, "linewidth": 0, "gid": gid(series.key)}
        if series.steps:
            axes.stairs(high, series.x, baseline=low, fill=True, **band)
        else:
            axes.fill_between(series.x, low, high, **band)


def _array(values: list[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values])
