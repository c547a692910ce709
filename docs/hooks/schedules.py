"""Draws docs/schedules.svg, alpha(t) and lambda(e), by the functions of training: `python -m docs.hooks.schedules`."""

import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hafs_jax.config import PenaltyConfig
from hafs_jax.method.controllers import init_gate, update_gate
from hafs_jax.method.schedules import alpha_schedule
from hafs_jax.presets import preset

PLACE = Path(__file__).parents[1] / "schedules.svg"
_STEPS = 1000
_INK, _FAINT, _LINE = "#767676", "#76767655", "#3f7fbf"  # readable on white and on black


def alpha_curve(config: PenaltyConfig) -> np.ndarray:
    """alpha at each step of a training of 1,000 steps."""
    schedule = alpha_schedule(config, _STEPS)
    return np.asarray(jax.vmap(schedule)(jnp.arange(_STEPS + 1)))


def lambda_curve(config: PenaltyConfig, errors: np.ndarray, tau: float) -> np.ndarray:
    """lambda after 1,000 steps at each constant error."""

    def settled(error: jax.Array) -> jax.Array:
        step = lambda gate, _: (update_gate(gate, error, config, tau, config.lam_max), None)  # noqa: E731
        return jax.lax.scan(step, init_gate(config, config.lam_max), None, _STEPS)[0].lam

    return np.asarray(jax.vmap(settled)(jnp.asarray(errors)))


def drawn() -> str:
    """The figure as SVG."""
    config = preset("adaptive").penalty
    relative = np.linspace(0.2, 2.0, 181)
    lines = (
        ("alpha(t)", "fraction of training", np.linspace(0, 1, _STEPS + 1), alpha_curve(config)),
        (
            "lambda(e) / lam_max",
            "FVU e, in units of tau",
            relative,
            lambda_curve(config, relative, 1.0) / config.lam_max,
        ),
    )
    style = {"svg.hashsalt": "hafs", "svg.fonttype": "path", "font.size": 9, "text.color": _INK, "axes.edgecolor": _INK}
    style |= {"axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 2.5), layout="constrained")
        for axes, (title, label, x, y) in zip(figure.subplots(1, 2), lines, strict=True):
            axes.plot(x, np.round(y, 3), color=_LINE, linewidth=2)
            axes.set(title=title, xlabel=label, ylim=(-0.04, 1.08), xlim=(x[0], x[-1]))
            axes.grid(color=_FAINT, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


if __name__ == "__main__":
    PLACE.write_text(drawn())
