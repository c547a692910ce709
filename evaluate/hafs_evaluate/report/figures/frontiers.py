"""Frontiers: a point for each arm, one measure over another. References far off are arrows at the edge. No drawing."""

import re
from typing import Any

from hafs_evaluate.report.figures.shapes import Beyond, Panel, Series
from hafs_evaluate.results.arms import GROUP_ARMS, is_reference

# key, title, measure of x, unit of x, measure of y, unit of y, logarithmic x
FRONTIERS = (
    ("fvu-absorption", "FVU and absorption", "fvu", "held-out FVU", "absorption_fraction", "absorbed share", False),
    ("fvu-hole", "FVU and the worst-child hole", "fvu", "held-out FVU", "hole", "hole (difference of recalls)", False),
    ("fvu-l0", "L0 and FVU", "l0", "L0: active latents a token", "fvu", "held-out FVU", True),
)
PADDING = 0.08  # of the span, on each side
LEAST_SPAN = {"l0": 0.2}  # of the value: a smaller one would make a trade-off of noise
ROOM = 0.16  # of the span of y
FAR = 0.5  # of the span of the other arms: a reference that is further out is drawn as an arrow


def frontier_panels(results: dict[str, Any]) -> list[Panel]:
    """A panel for each frontier and architecture, with a point for each arm and a line through an arm's L0 levels.

    Few arms share one panel. A frontier is left out where fewer than two arms have its figures, and an architecture
    where none has.
    """
    arms = results["arms"]
    few = len(arms) <= GROUP_ARMS
    architectures = [""] if few else list(dict.fromkeys(arm["architecture"] for arm in arms.values()))
    panels = []
    for key, title, x, x_label, y, y_label, x_log in FRONTIERS:
        known = {name: arm for name, arm in arms.items() if x in arm["measures"] and y in arm["measures"]}
        if len(known) < 2:
            continue
        for architecture in architectures:
            own = {name: arm for name, arm in known.items() if few or arm["architecture"] == architecture}
            if not own:
                continue
            by_line: dict[tuple[str, ...], list[str]] = {}
            for name, arm in own.items():
                by_line.setdefault((arm["architecture"], arm["variant"], arm["tag"]), []).append(name)
            limits = {axis: _limits(own, axis, x_log and axis == x) for axis in (x, y)}
            far = {name: direction for name, arm in own.items() if any(direction := _far(arm, (x, y), limits))}
            limits[y] = _with_room(limits[y], far)
            series = [
                _series(arms, near, x, y) for names in by_line.values() if (near := [n for n in names if n not in far])
            ]
            beyond = [_beyond(name, _label(arms, name), own[name], (x, y), limits, far[name]) for name in far]
            shown = f"{title}: {architecture}" if len(architectures) > 1 else title
            levels = sorted({arm["k"] for arm in own.values() if arm["k"] is not None})
            wide = x_log and max(arm["measures"][x]["mean"] for arm in own.values()) > 1.5 * min(
                arm["measures"][x]["mean"] for arm in own.values()
            )
            ticks = [(float(level), f"{level:g}") for level in levels] if wide else None
            name = f"{key}-{re.sub(r'[^a-z0-9]+', '-', architecture.lower())}".rstrip("-")
            panels.append(
                Panel(
                    name,
                    shown,
                    x_label,
                    y_label,
                    series,
                    x_log=wide,
                    x_limits=limits[x],
                    y_limits=limits[y],
                    x_ticks=ticks,
                    beyond=beyond,
                    scatter=True,
                )
            )
    return panels


def _limits(arms: dict[str, dict[str, Any]], measure: str, is_log: bool) -> tuple[float, float]:
    """The range of an axis: that of the arms' intervals and a little more; references count where they are near."""
    ends: dict[bool, list[float]] = {True: [], False: []}
    for arm in arms.values():
        found = arm["measures"][measure]
        ends[is_reference(arm)] += [found["mean"] if found[end] is None else found[end] for end in ("low", "high")]
    low, high = (end(ends[False] or ends[True]) for end in (min, max))
    reach = FAR * (high - low)
    near = [value for value in ends[True] if low - reach <= value <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    span = max(high - low, LEAST_SPAN.get(measure, 0.0) * high, 1e-9)
    if is_log and low > 0:
        ratio = max((high / low) ** PADDING, 1.05)
        return low / ratio, high * ratio
    middle, half = (low + high) / 2, span / 2 + PADDING * span
    return middle - half, middle + half


def _with_room(limits: tuple[float, float], far: dict[str, tuple[int, int]]) -> tuple[float, float]:
    """The range of y with room for the lines that name the references beyond, see `axes`."""
    low, high = limits
    room = ROOM * (high - low) if far else 0.0
    return (low, high + room) if any(up > 0 for _, up in far.values()) else (low - room, high)


def _far(arm: dict[str, Any], axes: tuple[str, str], limits: dict[str, tuple[float, float]]) -> tuple[int, int]:
    """Where a reference lies beyond the axes: -1, 0 or 1 for x and for y. Other arms are always within."""
    means = [arm["measures"][axis]["mean"] for axis in axes]
    x, y = ((mean > limits[axis][1]) - (mean < limits[axis][0]) for mean, axis in zip(means, axes, strict=True))
    return (x, y) if is_reference(arm) else (0, 0)


def _beyond(
    name: str,
    label: str,
    arm: dict[str, Any],
    axes: tuple[str, str],
    limits: dict[str, tuple[float, float]],
    direction: tuple[int, int],
) -> Beyond:
    means = [arm["measures"][axis]["mean"] for axis in axes]
    x, y = (min(max(mean, limits[axis][0]), limits[axis][1]) for mean, axis in zip(means, axes, strict=True))
    said = [f"{mean:.2g}" for mean, out in zip(means, direction, strict=True) if out]
    return Beyond(name, label, x, y, said[0] if len(said) == 1 else f"({', '.join(said)})", direction)


def _series(arms: dict[str, dict[str, Any]], names: list[str], x: str, y: str) -> Series:
    names = sorted(names, key=lambda name: arms[name]["k"] or 0)
    found = [(arms[name]["measures"][x], arms[name]["measures"][y]) for name in names]
    label = _label(arms, names[0])
    return Series(
        names[0],
        label,
        [one["mean"] for one, _ in found],
        [other["mean"] for _, other in found],
        x_interval=([one["low"] for one, _ in found], [one["high"] for one, _ in found]),
        y_interval=([other["low"] for _, other in found], [other["high"] for _, other in found]),
        notes=[_note(arms[name]) for name in names],
    )


def _label(arms: dict[str, dict[str, Any]], name: str) -> str:
    """What an arm's line is called: of many arms, its variant."""
    arm = arms[name]
    return name if len(arms) <= GROUP_ARMS else arm["variant"] + (f" ({arm['tag']})" if arm["tag"] else "")


def _note(arm: dict[str, Any]) -> str:
    n = len(arm["seeds"])
    return f"k = {arm['k']:g}, {n} seed{'' if n == 1 else 's'}" if arm["k"] is not None else f"{n} seeds"
