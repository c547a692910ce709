"""Frontiers: what a variant pays in FVU for sparsity or for less absorption, one panel an architecture. Pure."""

import re
from typing import Any

from hafs_evaluate.report.figures import Panel, Series
from hafs_evaluate.results.arms import GROUP_ARMS

# key, title, measure of x, unit of x, measure of y, unit of y, logarithmic x
FRONTIERS = (
    ("fvu-absorption", "FVU and absorption", "fvu", "held-out FVU", "absorption_fraction", "absorbed share", False),
    ("fvu-hole", "FVU and the worst-child hole", "fvu", "held-out FVU", "hole", "hole (difference of recalls)", False),
    ("fvu-l0", "L0 and FVU", "l0", "L0: active latents a token", "fvu", "held-out FVU", True),
)


def frontier_panels(results: dict[str, Any]) -> list[Panel]:
    """A panel a frontier and an architecture: a point an arm with its 95% intervals, lines joining an arm's L0 levels.

    Few arms share one panel. A frontier that fewer than two arms have figures for is left out, and so is an
    architecture that has none of them.
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
            series = [_series(arms, names, x, y) for names in by_line.values()]
            shown = f"{title}: {architecture}" if len(architectures) > 1 else title
            levels = sorted({arm["k"] for arm in own.values() if arm["k"] is not None})
            wide = x_log and max(arm["measures"][x]["mean"] for arm in own.values()) > 1.5 * min(
                arm["measures"][x]["mean"] for arm in own.values()
            )
            ticks = [(float(level), f"{level:g}") for level in levels] if wide else None
            name = f"{key}-{re.sub(r'[^a-z0-9]+', '-', architecture.lower())}".rstrip("-")
            panels.append(Panel(name, shown, x_label, y_label, series, x_log=wide, x_ticks=ticks, scatter=True))
    return panels


def _series(arms: dict[str, dict[str, Any]], names: list[str], x: str, y: str) -> Series:
    names = sorted(names, key=lambda name: arms[name]["k"] or 0)
    found = [(arms[name]["measures"][x], arms[name]["measures"][y]) for name in names]
    first = arms[names[0]]
    label = names[0] if len(arms) <= GROUP_ARMS else first["variant"] + (f" ({first['tag']})" if first["tag"] else "")
    return Series(
        names[0],
        label,
        [one["mean"] for one, _ in found],
        [other["mean"] for _, other in found],
        x_interval=([one["low"] for one, _ in found], [one["high"] for one, _ in found]),
        y_interval=([other["low"] for _, other in found], [other["high"] for _, other in found]),
        notes=[_note(arms[name]) for name in names],
    )


def _note(arm: dict[str, Any]) -> str:
    n = len(arm["seeds"])
    return f"k = {arm['k']:g}, {n} seed{'' if n == 1 else 's'}" if arm["k"] is not None else f"{n} seeds"
