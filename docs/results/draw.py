"""Draws the figures of docs/results/README.md and prints its tables: `python docs/results/draw.py`, from anywhere.

It reads the results.parquet that `hafs experiment` left for each layer, and transfer/forms.csv, the forms that were
tried on one seed. An interval is Student's, of the differences paired over the seeds.
"""

from pathlib import Path

import matplotlib
import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from hafs_evaluate.report.figures.styles import INK, MUTED, STYLES

HERE = Path(__file__).parent
LAYERS = {
    "layer3": "block 3, F = 8 D, L0 32",
    "layer8": "block 8, F = 4 D, L0 40",
}
CONTROL = "baseline, higher k"  # whose held-out L0 is that of yielding
ARMS = ("baseline", "ortsae", "yielding")
ARCHITECTURES = {"batchtopk": "BatchTopK", "matryoshka": "Matryoshka"}
MEASURES = {
    "transfer_top_1": "top-1",
    "transfer_top_5": "top-5",
    "transfer_recall": "recall",
    "transfer_f1_1": "F1",
    "fvu": "FVU",
}
PAIRS = (  # (what, its architecture, against whom, its architecture)
    ("yielding", "batchtopk", "baseline", "batchtopk"),
    ("yielding", "batchtopk", CONTROL, "batchtopk"),
    ("yielding", "batchtopk", "ortsae", "batchtopk"),
    ("yielding", "batchtopk", "baseline", "matryoshka"),
    ("yielding", "matryoshka", "baseline", "matryoshka"),
)


WORLD_ARMS = {  # (section of docs/results.md, arm): (its name here, whose style it has)
    ("batchtopk", "baseline"): ("baseline", "baseline"),
    ("batchtopk", "ortsae 1"): ("ortsae, 1", "ortsae"),
    ("batchtopk", "strict 0.3"): ("strict, 0.3", "strict"),
    ("batchtopk", "adaptive 3"): ("adaptive, 3", "adaptive"),
    ("batchtopk", "yield"): ("adaptive, 3, the rarer latent turns", "yielding"),
    ("matryoshka", "baseline"): ("Matryoshka", "baseline"),
}


def means(layer: str) -> pandas.Series:
    """The mean over properties of each measure, by architecture, variant, measure and seed."""
    table = pandas.read_parquet(HERE / layer / "results.parquet")
    table.loc[table.k > table.k.min(), "variant"] = CONTROL
    return table.groupby(["architecture", "variant", "measure", "seed"]).value.mean()


def difference(a: pandas.Series, b: pandas.Series) -> tuple[float, float]:
    """(the mean of a - b over the seeds that both have, half of its 95% interval)."""
    delta = (a - b).dropna().to_numpy()
    return float(delta.mean()), float(student.ppf(0.975, len(delta) - 1) * delta.std(ddof=1) / np.sqrt(len(delta)))


def label(variant: str, architecture: str) -> str:
    return variant if architecture == "batchtopk" else {"baseline": "Matryoshka"}.get(variant, f"{variant} Matryoshka")


def frontiers(found: dict[str, pandas.Series]) -> Figure:
    """FVU against transfer, a panel for each layer: small marks are seeds, large ones their means."""
    figure = Figure(figsize=(10.5, 3.7), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(found)))
    for axes, (layer, values) in zip(panels, found.items(), strict=True):
        for architecture in _trained(values):
            for variant in ARMS:
                fvu, top = values[architecture, variant, "fvu"], values[architecture, variant, "transfer_top_1"]
                style = STYLES[variant]
                fill = style.colour if architecture == "batchtopk" else "none"
                marks = {"marker": style.marker, "color": style.colour, "linestyle": "", "markerfacecolor": fill}
                axes.plot(fvu, top, markersize=3.5, alpha=0.6, **marks)
                axes.plot(fvu.mean(), top.mean(), markersize=9, label=label(variant, architecture), **marks)
        axes.set_title(LAYERS[layer], fontsize=10)
        axes.set_xlabel("FVU on held-out rows")
        _plain(axes)
    panels[0].set_ylabel("top-1 balanced accuracy\non unseen words")
    handles, names = max((axes.get_legend_handles_labels() for axes in panels), key=lambda pair: len(pair[0]))
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def differences(found: dict[str, pandas.Series]) -> Figure:
    """The differences of `PAIRS` with intervals: a panel for each measure, a row for each layer and pair."""
    rows = [(layer, *pair) for layer, values in found.items() for pair in _known(values)]
    figure = Figure(figsize=(10.5, 0.4 * len(rows) + 1), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    names = []
    for row, (layer, variant, architecture, other, others) in enumerate(rows):
        names.append(f"{LAYERS[layer].split(',')[0]}: {label(variant, architecture)} - {label(other, others)}")
        for axes, measure in zip(panels, MEASURES, strict=True):
            values = found[layer]
            mean, half = difference(values[architecture, variant, measure], values[others, other, measure])
            is_clear = abs(mean) > half
            axes.errorbar(mean, row, xerr=half, fmt="o", markersize=4, capsize=2, color=INK if is_clear else MUTED,
                          markerfacecolor=INK if is_clear else "white")  # fmt: skip
    for axes, title in zip(panels, MEASURES.values(), strict=True):
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_title(title, fontsize=10)
        _plain(axes)
        for row in range(1, len(rows)):
            if rows[row][0] != rows[row - 1][0]:
                axes.axhline(row - 0.5, color=MUTED, linewidth=0.4)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return figure


def forms() -> Figure:
    """What each tried form gains in transfer and costs in FVU, against the baseline, on one seed of block 8."""
    table = pandas.read_csv(HERE / "transfer" / "forms.csv").set_index("form")
    delta = table - table.loc["baseline"]
    figure = Figure(figsize=(7.2, 4.9), layout="constrained")
    axes = figure.subplots()
    lines = {
        "yielding: gate and ramp, the rarer latent turns": (
            "yielding",
            ["yielding lam=0.1", "yielding", "yielding lam=1", "yielding lam=3"],
        ),
        "the same without gate and ramp": (
            "strict",
            ["strict lam=0.1 yielding=rarer", "strict lam=0.3 yielding=rarer"],
        ),
        "squared maximum over more frequent latents": ("ortsae", [f"squared nearest {x}" for x in (1, 4, 16)]),
    }
    for name, (variant, points) in lines.items():
        style = STYLES[variant]
        axes.plot(delta.fvu[points], delta.transfer_top_1[points], color=style.colour, marker=style.marker, label=name)
        for point in points:
            strength = next((part.removeprefix("lam=") for part in point.split() if part[-1].isdigit()), "0.3")
            at = (delta.fvu[point], delta.transfer_top_1[point])
            axes.annotate(strength, at, xytext=(0, 6), textcoords="offset points", fontsize=8, color=style.colour)
    drawn = {"baseline", *(point for _, points in lines.values() for point in points)}
    for name in delta.index.difference(list(drawn)):
        x, y = delta.fvu[name], delta.transfer_top_1[name]
        if y > -0.02:  # latent dropout, at -0.074, is in the table
            axes.plot(x, y, marker=".", color=MUTED)
            axes.annotate(name, (x, y), xytext=(4, -3), textcoords="offset points", fontsize=8, color=MUTED)
    axes.axvline(0.01, color=MUTED, linewidth=0.8, linestyle=":")
    axes.text(0.0103, 0.0275, "margin: 0.01", fontsize=8, color=MUTED)
    axes.set_xlabel("FVU above the baseline's")
    axes.set_ylabel("top-1 balanced accuracy on unseen words,\nabove the baseline's")
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    _plain(axes)
    return figure


def worlds() -> Figure:
    """On the synthetic worlds, whose features are known: FVU against F1 and root absorption, from docs/results.md."""
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    panels = figure.subplots(1, 4)
    places = [(world, column) for world in (0, 1) for column in (2, 3)]
    for section, is_filled in (("batchtopk", True), ("matryoshka", False)):
        for arm, cells in _true_scores(section).items():
            name, variant = WORLD_ARMS.get((section, arm), ("", ""))
            if not name:
                continue
            style = STYLES[variant]
            marks = {"marker": style.marker, "color": style.colour, "linestyle": "", "markersize": 8}
            for axes, (world, column) in zip(panels, places, strict=True):
                fill = style.colour if is_filled else "none"
                axes.plot(cells[world][0], cells[world][column], markerfacecolor=fill, label=name, **marks)
    for axes, (world, column) in zip(panels, places, strict=True):
        axes.set_title(f"toy-{world + 1}: {'root absorption' if column == 3 else 'F1'}", fontsize=10)
        axes.set_xlabel("FVU on held-out rows")
        axes.margins(0.12)
        _plain(axes)
    handles, names = panels[0].get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _true_scores(section: str) -> dict[str, list[list[float]]]:
    """{arm: for each world [FVU, MCC, F1, root absorption, absorption, dead]} of one section of docs/results.md."""
    text = (HERE.parent / "results.md").read_text(encoding="utf-8").split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ") and "±" in line]
    return {
        arm.strip(): [[float(part.split("±")[0]) for part in cell.split("/")] for cell in cells] for arm, *cells in rows
    }


def print_tables(found: dict[str, pandas.Series]) -> None:
    for layer, values in found.items():
        print(f"\n{LAYERS[layer]}\n\n| arm | {' | '.join(MEASURES.values())} | L0 |\n|{'---|' * (len(MEASURES) + 2)}")
        for architecture in _trained(values):
            for variant in (*ARMS, CONTROL)[: 4 if architecture == "batchtopk" else 3]:
                own = [values[architecture, variant, name].mean() for name in MEASURES]
                l0 = values[architecture, variant, "l0"].mean()
                cells = " | ".join(f"{value:.3f}" for value in own)
                print(f"| {label(variant, architecture)} | {cells} | {l0:.1f} |")
        print(f"\n| | {' | '.join(MEASURES.values())} |\n|{'---|' * (len(MEASURES) + 1)}")
        for variant, architecture, other, others in _known(values):
            cells = []
            for name in MEASURES:
                mean, half = difference(values[architecture, variant, name], values[others, other, name])
                cells.append(f"{mean:+.3f} ± {half:.3f}")
            print(f"| {label(variant, architecture)} - {label(other, others)} | {' | '.join(cells)} |")


def _trained(values: pandas.Series) -> list[str]:
    """The architectures of one layer's experiment."""
    return [name for name in ARCHITECTURES if name in values.index.get_level_values("architecture")]


def _known(values: pandas.Series) -> list[tuple[str, str, str, str]]:
    return [pair for pair in PAIRS if {pair[1], pair[3]} <= set(_trained(values))]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "hafs"
    found = {layer: means(layer) for layer in LAYERS if (HERE / layer / "results.parquet").exists()}
    folder = HERE / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in (
        ("frontiers", frontiers(found)),
        ("differences", differences(found)),
        ("forms", forms()),
        ("worlds", worlds()),
    ):
        figure.savefig(folder / f"{name}.png", dpi=130)
    print_tables(found)


if __name__ == "__main__":
    main()
