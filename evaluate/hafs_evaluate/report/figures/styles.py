"""How each arm is drawn: its colour on light and on dark pages, its dashes and its marker. No drawing, no files."""

import re
from dataclasses import dataclass
from typing import Any

from hafs_evaluate.results.arms import GROUP_ARMS

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
