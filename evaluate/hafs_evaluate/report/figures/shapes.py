"""What a figure is before it is drawn: a `Panel` of curves. No drawing, no files."""

from dataclasses import dataclass, field


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
class Beyond:
    """A point that lies outside of the axes: an arrow at their edge, at (x, y); `text` is where it lies."""

    key: str
    label: str
    x: float
    y: float
    text: str
    direction: tuple[int, int]  # (1, 0): it lies further right; (0, 1): further up; (1, 1): both


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
    x_limits: tuple[float | None, float | None] = (None, None)
    x_ticks: list[tuple[float, str]] | None = None
    beyond: list["Beyond"] = field(default_factory=list)
    end_values: bool = False  # the last value of each curve, at its end
    scatter: bool = False  # points with bars, the line only joins them
    note: str = ""  # shown under the figure
