"""Drawing: a `Panel` of curves as an inline SVG in the page's colours, or several as one PNG. Matplotlib alone.

In the SVG, text stays text and every colour is a CSS variable (`var(--baseline)`), so that one drawing serves light
and dark pages. The numbers come beside it, for the page's hover. Equal panels give equal bytes. Curves differ in
colour, dashes and marker, for print and for readers who do not tell colours apart.
"""

import io
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hafs_evaluate.report.figures.axes import draw
from hafs_evaluate.report.figures.shapes import Panel, Series
from hafs_evaluate.report.figures.styles import GRID, INK, MUTED, Style, css_name
from hafs_jax.base.files import write_atomic

WIDTH, HEIGHT = 4.1, 2.75  # inches: 295 x 198 points, so that 9 point text is readable on a 390 px wide phone


def svg(panel: Panel, styles: dict[str, Style]) -> tuple[str, dict[str, Any]]:
    """(the panel as an SVG element, what the page's hover needs: the axes' box, limits and scales, and the curves)."""
    with matplotlib.rc_context(_rc(panel.key)):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, panel, styles)
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
            "beyond": [
                {
                    "label": one.label,
                    "colour": css_name(one.key),
                    "x": _short(one.x),
                    "y": _short(one.y),
                    "text": one.text,
                }
                for one in panel.beyond
            ],
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
            draw(axes, panel, styles)
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
                labels.setdefault(label, line)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        if labels:
            _draw_legend(figure, labels, 2 * columns)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, facecolor="white", metadata={"Software": None})
    write_atomic(path, lambda file: file.write(buffer.getvalue()) and None)


def _draw_legend(figure: Figure, labels: dict[str, Any], most: int) -> None:
    """The legend under the panels, in as many columns, up to `most`, as are no wider than the figure."""
    for across in range(min(len(labels), most), 0, -1):
        legend = figure.legend(labels.values(), labels, loc="outside lower center", ncols=across, frameon=False)
        figure.draw_without_rendering()
        if across == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


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
    text = re.sub(r' id="curve-([^"]*)"', r' data-of="\1"', text)  # many parts of many figures are of one curve
    text = re.sub(r"font: ([\w. ]*?[\d.]+px) [^;\"]+", r"font: \1 var(--sans)", text)
    text = re.sub(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"| version="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img"', text, count=1)
    for name, colour in {"--ink": INK, "--muted": MUTED, "--grid": GRID}.items():
        text = text.replace(colour, f"var({name})")
    for series in panel.series:
        text = text.replace(styles[series.key].colour, f"var({css_name(series.key)})")
    for key in [*(key for key, _, _ in panel.levels), *(one.key for one in panel.beyond)]:
        text = text.replace(styles[key].colour, f"var({css_name(key)})")
    return re.sub(r"\n\s*", "\n", text).strip()


def _short(value: float) -> float:
    return float(f"{value:.5g}")
