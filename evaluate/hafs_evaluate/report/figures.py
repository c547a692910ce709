"""Drawing: a `Panel` of curves as an inline SVG in the page's colours, or several as one PNG. Matplotlib alone.

In the SVG, text stays text and every colour is a CSS variable (`var(--baseline)`), so that one drawing serves light
and dark pages. The numbers come beside it, for the page's hover. Equal panels give equal bytes. Curves differ in
colour, dashes and marker, for print and for readers who do not tell colours apart.
"""

import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hafs_evaluate.results.arms import GROUP_ARMS
from hafs_jax.base.files import write_atomic

INK, MUTED, GRID = "#1f2430", "#5c6470", "#e2e5ea"


@dataclass(frozen=True)
class Style:
    """How a curve is drawn: its colour on light and on dark pages, its dashes, marker and width."""

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
    "yielding": Style("#a8488a", "#e595c8", (1.2, 1.2), "h", 2.0),
    "ramp_only": Style("#8f6a00", "#e3bd3f", (5, 1.5, 1.2, 1.5), "^"),
    "gate_only": Style("#5a55b0", "#a9a4f5", (2.5, 1.2), "P"),
    "ortsae": Style("#7a3b2e", "#d99a8b", (6, 2), "X"),
    "frob": Style("#3c7a89", "#84c5d4", (3, 1, 1, 1, 1, 1), "*"),
    "random_init": Style("#6f7681", "#99a1ad", (1, 1), "v", 1.2),
    "frozen_decoder": Style("#484e59", "#bcc2cc", (5, 1, 1, 1), "<", 1.2),
}
# For a variant's second arm on the same axes, and for variants not named above.
SPARE_STYLES = (
    Style("#6b7a1f", "#c3d26a", (1.2, 1.2), "v"),
    Style("#5c7f00", "#a9cc4c", (7, 1.5, 1.5, 1.5), "h"),
    Style("#b03060", "#f08aa8", (2, 1), "p"),
    Style("#2f4f9e", "#8ea8f0", (8, 2), "d"),
    Style("#00708f", "#4fc3e8", (1.5, 2.5), ">"),
    Style("#8a4fbf", "#c9a2f2", (4, 1, 1, 1, 1, 1, 1, 1), "H"),
)
LLM_FULL = Style(INK, "#e8eaee", (), "", 1.2)
LLM_TOP_K = Style(MUTED, "#a3abb8", (2, 1.6), "x", 1.2)
LLM_PCA = Style("#7d6b52", "#c2ae92", (4, 1.2, 1, 1.2), "+", 1.2)
LLM = {"llm-full": LLM_FULL, "llm-top-k": LLM_TOP_K, "llm-pca": LLM_PCA}
SYMBOLS = {  # of the markers, for the page's legends
    "o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "<": "◀", ">": "▶", "P": "✚", "X": "✖", "*": "★", "h": "⬢",
    "p": "⬟", "d": "♦", "H": "⬣", "x": "×", "+": "+", "": "",
}  # fmt: skip
LLM_LABELS = {
    "llm-full": "language model, full probe",
    "llm-top-k": "language model, top-k activations",
    "llm-pca": "language model, top-k principal components",
}


def styles_of(arms: dict[str, dict[str, Any]]) -> dict[str, Style]:
    """{arm, or one of the language model's probes: its style}.

    Few arms share axes, so each has a style of its own: its variant's, or a spare one where another arm has that. Many
    arms are drawn by architecture and k, and a variant looks the same in all of them.
    """
    styles = dict(LLM)
    spare = 0
    taken: dict[Any, Style] = {}
    for name, arm in arms.items():
        together = len(arms) <= GROUP_ARMS
        place = (arm["variant"], arm.get("tag"))
        style = None if together else taken.get(place)
        own = STYLES.get(arm["variant"])
        if style is None and own is not None and own not in taken.values():
            style = own
        if style is None:
            style = SPARE_STYLES[spare % len(SPARE_STYLES)]
            spare += 1
        taken[name if together else place] = style
        styles[name] = style
    return styles


def css_name(key: str) -> str:
    """The CSS variable of a style key."""
    return "--s-" + re.sub(r"[^a-z0-9]+", "-", key.lower())


def style_variables(styles: dict[str, Style]) -> str:
    """CSS that defines every style's variable, for light and dark pages."""

    def block(light: bool) -> str:
        return "".join(f"{css_name(key)}:{style.colour if light else style.dark};" for key, style in styles.items())

    return f":root{{{block(True)}}}\n@media (prefers-color-scheme:dark){{:root{{{block(False)}}}}}"


BAND = 0.16  # opacity of an interval's band
WIDTH, HEIGHT = 4.1, 2.75  # inches: 295 x 198 points, so that 9 point text is readable on a 390 px wide phone


@dataclass(frozen=True)
class Series:
    """One curve. `key` chooses its style: an arm's name, or one of the language model's probes.

    `y_interval` and `x_interval` are (lower ends, upper ends) of 95% intervals, with None where a point has none. They
    are drawn as a band round a curve, or as bars at the points of a scatter panel.
    """

    key: str
    label: str
    x: list[float]
    y: list[float]
    markers: bool = False
    steps: bool = False  # a histogram's outline: x holds one edge more than y
    y_interval: tuple[list[float | None], list[float | None]] | None = None
    x_interval: tuple[list[float | None], list[float | None]] | None = None
    notes: list[str] = field(default_factory=list)  # a word a point, for the hover


@dataclass(frozen=True)
class Panel:
    """One set of axes with its curves. `levels` are horizontal lines: (style key, label, y)."""

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
    scatter: bool = False  # points with bars, the line only joins them
    note: str = ""  # shown under the figure


def svg(panel: Panel, styles: dict[str, Style]) -> tuple[str, dict[str, Any]]:
    """(the panel as an SVG element, what the page's hover needs: the axes' box, limits and scales, and the curves)."""
    with matplotlib.rc_context(_rc(panel.key)):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, panel, styles)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        box = axes.get_position()
        hover: dict[str, Any] = {
            "box": [72 * WIDTH * box.x0, 72 * HEIGHT * (1 - box.y1), 72 * WIDTH * box.x1, 72 * HEIGHT * (1 - box.y0)],
            "x": [*axes.get_xlim(), panel.x_log],
            "y": [*axes.get_ylim(), panel.y_log],
            "label": panel.x_label,
            "y_label": panel.y_label,
            "scatter": panel.scatter,
            "series": [_hover(series, panel) for series in panel.series],
            "levels": [
                {"label": label, "colour": css_name(key), "y": _short(value)} for key, label, value in panel.levels
            ],
        }
        hover["box"] = [_short(value) for value in hover["box"]]
    return _themed(buffer.getvalue(), panel, styles), hover


def write_png(path: Path, panels: list[Panel], styles: dict[str, Style], columns: int) -> None:
    """Writes the panels as one PNG on white, with one legend, atomically."""
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_rc(path.name)):
        spaced = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)  # inches
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.6), layout=spaced)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        labels: dict[str, Any] = {}
        for axes, panel in zip(grid, panels, strict=False):
            _draw(axes, panel, styles)
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
                labels.setdefault(label, line)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        if labels:
            across = max(1, min(len(labels), 2 * columns))
            figure.legend(labels.values(), labels, loc="outside lower center", ncols=across, frameon=False)
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
        _draw_intervals(axes, series, panel.scatter, style)
        if series.steps:
            axes.stairs(series.y, series.x, **look)
        else:
            marker = style.marker if series.markers or panel.scatter or len(series.x) == 1 else ""
            axes.plot(series.x, series.y, marker=marker, markersize=5 if panel.scatter else 4, **look)
    for key, label, level in panel.levels:
        style = styles[key]
        if key in LLM:  # named in the legend
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


def _draw_intervals(axes: Axes, series: Series, as_bars: bool, style: Style) -> None:
    """Draws the 95% intervals of the series, under its line."""
    if as_bars:
        for axis, interval, place in (("y", series.y_interval, series.y), ("x", series.x_interval, series.x)):
            if interval is None or not any(low is not None for low in interval[0]):
                continue
            low, high = (_array(part) for part in interval)
            lengths = np.clip([np.array(place) - low, high - np.array(place)], 0, None)
            bars: dict[str, Any] = {f"{axis}err": lengths}
            axes.errorbar(series.x, series.y, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2.5, **bars)
    elif series.y_interval is not None and any(low is not None for low in series.y_interval[0]):
        low, high = (_array(part) for part in series.y_interval)
        band: dict[str, Any] = {"color": style.colour, "alpha": BAND, "linewidth": 0}
        if series.steps:
            axes.stairs(high, series.x, baseline=low, fill=True, **band)
        else:
            axes.fill_between(series.x, low, high, **band)


def _array(values: list[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values])


def _hover(series: Series, panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {
        "label": series.label,
        "colour": css_name(series.key),
        "x": [_short(value) for value in _middles(series, panel.x_log)],
        "y": [_short(value) for value in series.y],
    }
    for key, interval in {"y_interval": series.y_interval, "x_interval": series.x_interval}.items():
        if interval is not None and any(low is not None for low in interval[0]):
            found[key] = [[None if value is None else _short(value) for value in part] for part in interval]
    if series.notes:
        found["notes"] = series.notes
    return found


def _middles(series: Series, x_log: bool) -> list[float]:
    if not series.steps:
        return series.x
    pairs = zip(series.x, series.x[1:], strict=False)
    return [math.sqrt(low * high) if x_log else (low + high) / 2 for low, high in pairs]


def _themed(text: str, panel: Panel, styles: dict[str, Style]) -> str:
    """The SVG element of `text`, with CSS variables for its colours, the page's font, and ids of this panel alone."""
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
