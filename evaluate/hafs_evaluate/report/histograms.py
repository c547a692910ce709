"""Histograms over all latents of each arm, seeds taken together. Pure: no drawing, no files."""

import math
from typing import Any

import numpy as np

from hafs_evaluate.report.figures import Panel, Series
from hafs_evaluate.results.arms import estimate

Values = dict[str, list[np.ndarray]]  # {arm: an array over latents for each seed}


def latent_panels(latents: dict[str, list[dict[str, Any]]], prefix: str = "") -> list[Panel]:
    """Histograms over all latents: density on a log10 axis (those that never fired apart), and the nearest cosine.

    `latents` is {arm: what latents.json holds of each seed}. The share of a bin is the mean over seeds.
    """
    panels = []
    densities = _arrays(latents, "density")
    if densities:
        rows = max(values["rows_scanned"] for seeds in latents.values() for values in seeds)
        panels.append(_density_panel(densities, rows, prefix))
    cosines = _arrays(latents, "nearest_cosine")
    if cosines:
        low = min(0.0, *(float(values.min()) for seeds in cosines.values() for values in seeds))
        series = [_outline(name, np.linspace(low, 1, 41), seeds) for name, seeds in cosines.items()]
        title, unit = "Coherence", "cosine of a dictionary vector with its nearest"
        panels.append(Panel(prefix + "coherence", title, unit, "share of latents", series, y_limits=(0, None)))
    return panels


def _arrays(latents: dict[str, list[dict[str, Any]]], key: str) -> Values:
    found = {name: [np.array(values[key]) for values in seeds if values.get(key)] for name, seeds in latents.items()}
    return {name: seeds for name, seeds in found.items() if seeds}


def _outline(name: str, edges: np.ndarray, seeds: list[np.ndarray]) -> Series:
    """The outline of the mean histogram over seeds, as shares, with each bin's 95% interval where it has one."""
    bins = [estimate(list(column)) for column in zip(*[_shares(values, edges) for values in seeds], strict=True)]
    interval = ([one.low for one in bins], [one.high for one in bins])
    return Series(name, name, edges.tolist(), [one.mean for one in bins], steps=True, y_interval=interval)


def _shares(values: np.ndarray, edges: np.ndarray) -> list[float]:
    return (np.histogram(values, edges)[0] / len(values)).tolist()


def _density_panel(densities: Values, rows: int, prefix: str) -> Panel:
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
        "share of tokens on which it fires (log10)",
        "share of latents",
        series,
        x_log=True,
        x_ticks=ticks,
        y_limits=(0, None),
    )


def _percent(power: int) -> str:
    return f"{100 * 10.0**power:.{max(0, -2 - power)}f}%"
