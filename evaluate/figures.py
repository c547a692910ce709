"""Drawing: a `Panel` of curves as an inline SVG in the page's colours, or several as one PNG. Matplotlib alone.

In the SVG, text stays text and every colour is a CSS variable (`var(--baseline)`), so that one drawing serves light
and dark pages; the figures' numbers come beside it, for the page's hover. Equal panels give equal bytes.
"""

import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from extract.format.files import write_atomic

WIDTH, HEIGHT = 4.1, 2.75  # inches: 295 x 198 points, so that 9 point text is readable on a 390 px wide phone
INK, MUTED, GRID = "#1f2430", "#5c6470", "#e2e5ea"


@dataclass(frozen=True)
class Style:
    """How one variant is drawn everywhere: colours on light and dark pages, dashes and marker for the colour-blind."""

    colour: str
    dark: str
    dashes: tuple[float, ...] = ()  # lengths in line widths, on and off; empty: solid
    marker: str = "o"
    width: float = 1.5


# After Okabe and Ito, darkened on light and lightened on dark pages to a contrast of at least 3:1.
STYLES = {
    "baseline": Style("#0072b2", "#5ab0ea", (), "o"),
    "strict": Style("#c85400", "#ff9350", (4, 1.6), "s"),
    "adaptive": Style("#008a64", "#33cfa0", (), "D", 2.3),
    "baseline-relu": Style("#a8488a", "#e595c8", (1.2, 1.2), "v"),
}
SPARE_STYLES = (
    Style("#8f6a00", "#e3bd3f", (5, 1.5, 1.2, 1.5), "^"),
    Style("#5a55b0", "#a9a4f5", (2.5, 1.2), "P"),
    Style("#7a3b2e", "#d99a8b", (6, 2), "X"),
    Style("#3c7a89", "#84c5d4", (3, 1, 1, 1, 1, 1), "*"),
)
LLM_FULL = Style(INK, "#e8eaee", (), "", 1.2)
LLM_TOP_K = Style(MUTED, "#a3abb8", (2, 1.6), "x", 1.2)


@dataclass(frozen=True)
class Series:
    """One curve. `key` chooses its style: a variant's name, "llm-full" or "llm-top-k"."""

    key: str
    label: str
    x: list[float]
    y: list[float]
    markers: bool = False
    steps: bool = False  # a histogram's outline: x holds one edge more than y


@dataclass(frozen=True)
class Panel:
    """One set of axes. `levels` are horizontal lines: (style key, label, y)."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    levels: list[tuple[str, str, float]] = field(default_factory=list)
    x_log: bool = False
    y_log: bool = False
    y_limits: tuple[float | None, float | None] = (None, None)
    x_ticks: list[tuple[float, str]] | None = None
    note: str = ""  # shown under the figure


def styles_of(names: list[str]) -> dict[str, Style]:
    """The style of each variant: its own where it has one, else a spare one by its place; seeds share a style."""
    styles = {"llm-full": LLM_FULL, "llm-top-k": LLM_TOP_K}
    spare = 0
    by_arm: dict[str, Style] = {}
    for name in names:
        arm = re.sub(r"-s\d+$", "", name)
        if arm not in by_arm:
            by_arm[arm] = STYLES.get(arm) or SPARE_STYLES[spare % len(SPARE_STYLES)]
            spare += arm not in STYLES
        styles[name] = by_arm[arm]
    return styles


def css_name(key: str) -> str:
    """The CSS variable of a style key."""
    return "--s-" + re.sub(r"[^a-z0-9]+", "-", key.lower())


def svg(panel: Panel, styles: dict[str, Style]) -> tuple[str, dict[str, Any]]:
    """The panel as an SVG element, and what a hover needs: the axes' box, limits and scales, and the series."""
    with matplotlib.rc_context(_rc(panel.key)):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, panel, styles)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        box = axes.get_position()
        hover = {
            "box": [72 * WIDTH * box.x0, 72 * HEIGHT * (1 - box.y1), 72 * WIDTH * box.x1, 72 * HEIGHT * (1 - box.y0)],
            "x": [*axes.get_xlim(), panel.x_log],
            "y": [*axes.get_ylim(), panel.y_log],
            "label": panel.x_label,
            "series": [
                {
                    "label": series.label,
                    "colour": css_name(series.key),
                    "x": [_short(value) for value in _middles(series, panel.x_log)],
                    "y": [_short(value) for value in series.y],
                }
                for series in panel.series
            ],
            "levels": [
                {"label": label, "colour": css_name(key), "y": _short(value)} for key, label, value in panel.levels
            ],
        }
        hover["box"] = [_short(value) for value in hover["box"]]
    return _themed(buffer.getvalue(), panel, styles), hover


def write_png(path: Path, panels: list[Panel], styles: dict[str, Style], columns: int) -> None:
    """The panels as one PNG on white, with one legend, atomically."""
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_rc(path.name)):
        spaced = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)  # inches
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.35), layout=spaced)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        labels: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel, styles)
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
                labels.setdefault(label, line)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        if labels:
            figure.legend(labels.values(), labels, loc="outside lower center", ncols=6, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, facecolor="white", metadata={"Software": None})
    write_atomic(path, lambda file: file.write(buffer.getvalue()) and None)


def _rc(salt: str) -> Any:
    return {
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "ytick.major.size": 0,
        "legend.labelcolor": INK,
        "text.parse_math": False,  # a dollar in a task's name is a dollar
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }


def _draw(axes: Axes, panel: Panel, styles: dict[str, Style]) -> None:
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
        }
        if series.steps:
            axes.stairs(series.y, series.x, **look)
        else:
            marker = style.marker if series.markers or len(series.x) == 1 else ""
            axes.plot(series.x, series.y, marker=marker, markersize=4, **look)
    for key, label, level in panel.levels:
        style = styles[key]
        if key == "llm-full":  # named in the legend
            axes.axhline(level, color=style.colour, linewidth=style.width, label=label)
            continue
        axes.axhline(level, color=style.colour, linewidth=1.1, linestyle=(0, (1, 1.5)))
        axes.annotate(
            label,
            (0, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, 2),
            textcoords="offset points",
            color=style.colour,
            fontsize=8,
        )
    axes.set_ylim(*panel.y_limits)
    if panel.x_ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator([place for place, _ in panel.x_ticks]))
        axes.xaxis.set_major_formatter(FuncFormatter(dict(panel.x_ticks).get))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if panel.y_log:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _middles(series: Series, x_log: bool) -> list[float]:
    if not series.steps:
        return series.x
    pairs = zip(series.x, series.x[1:], strict=False)
    return [math.sqrt(low * high) if x_log else (low + high) / 2 for low, high in pairs]


def _themed(text: str, panel: Panel, styles: dict[str, Style]) -> str:
    """The SVG element alone, its colours as CSS variables, its font the page's, its ids this panel's own."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|[xy]tick|matplotlib\.axis|legend|LineCollection)_\d+"', "", text
    )
    text = re.sub(r"font: ([\w. ]*?[\d.]+px) [^;\"]+", r"font: \1 var(--sans)", text)
    text = re.sub(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"| version="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img"', text, count=1)
    for name, colour in {"--ink": INK, "--muted": MUTED, "--grid": GRID}.items():
        text = text.replace(colour, f"var({name})")
    for series in panel.series:
        text = text.replace(styles[series.key].colour, f"var({css_name(series.key)})")
    for key, _, _ in panel.levels:
        text = text.replace(styles[key].colour, f"var({css_name(key)})")
    return re.sub(r"\n\s*", "\n", text).strip()


def _short(value: float) -> float:
    return float(f"{value:.5g}")
