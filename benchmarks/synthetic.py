"""The ground-truth table: arms, architectures and kinds of sharing on held-out synthetic worlds.

    python benchmarks/synthetic.py run --out artifacts [--world toy-1] [--part main]     trains and scores, resumable
    python benchmarks/synthetic.py table --out artifacts --write docs/results.md

There are some 420 SAEs. Each takes about 12 s on one CPU core. Two processes with different --world share the work.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hafs_jax.config import run_name
from hafs_jax.runs import Run

HELD_OUT = ("toy-1", "toy-2")
SEEDS = range(4)
FOREVER = ("--penalty.alpha-values", "1", "1", "1", "1", "1")
LEVELS = {"toy-0": (12, 36, 108), "toy-1": (8, 32, 128), "toy-2": (10, 20, 40, 80)}  # features per level
COMMON = ("--passes", "1.5", "--batch-size", "512")
RATE = {"relu": "0.004", "gated": "0.004", "matryoshka_relu": "0.004"}  # learning rate, else 0.006; chosen on toy-0


@dataclass(frozen=True)
class Arm:
    """One line of a table: the grid of a sweep without its seeds, and further flags."""

    name: str
    grid: str
    flags: tuple[str, ...] = ()
    tag: str = ""

    def run_name(self, architecture: str, seed: int) -> str:
        variant, *rest = self.grid.split()
        return run_name(variant.removeprefix("variant="), architecture, seed, ",".join(rest) or self.tag)


MAIN = [
    Arm("baseline", "variant=baseline"),
    Arm("ortsae 1", "variant=ortsae lam=1"),
    Arm("frob 0.1", "variant=frob lam=0.1"),
    Arm("strict 0.3", "variant=strict lam=0.3"),
    Arm("strict 3", "variant=strict lam=3"),
    Arm("ramp only 1", "variant=ramp_only lam=1"),
    Arm("gate only 1", "variant=gate_only lam=1"),
    Arm("adaptive 1", "variant=adaptive lam=1"),
    Arm("adaptive 3", "variant=adaptive lam=3"),
    Arm("random_init", "variant=random_init"),
    Arm("frozen_decoder", "variant=frozen_decoder"),
]
FEW = [arm for arm in MAIN if arm.name in ("baseline", "strict 3", "adaptive 3", "random_init", "frozen_decoder")]
YIELD = ("--penalty.yielding", "rarer")
LATER = ("--penalty.yielding", "later")
COFIRE, LEVEL = ("--penalty.sharing", "cofiring"), ("--penalty.sharing", "level")
PARENT = ("--penalty.sharing", "parent", "--penalty.parents", "16")
SHARING = {
    "batchtopk": [
        Arm("yield", "variant=adaptive", YIELD, "yield"),
        Arm("cofire", "variant=adaptive", COFIRE, "cofire"),
        Arm("cofire-forever", "variant=adaptive", (*COFIRE, *FOREVER), "cofire-forever"),
        Arm("parent", "variant=adaptive", PARENT, "parent"),
        Arm("strict-yield", "variant=strict", YIELD, "yield"),
        Arm("ramp-yield", "variant=ramp_only", YIELD, "yield"),
    ],
    "matryoshka": [
        Arm("level", "variant=adaptive", LEVEL, "level"),
        Arm("level-forever", "variant=adaptive", (*LEVEL, *FOREVER), "level-forever"),
        Arm("level-yield", "variant=adaptive", (*LEVEL, *FOREVER, *LATER), "level-yield"),
        Arm("matryoshka-yield", "variant=adaptive", LATER, "yield"),
    ],
    "relu": [Arm("yield", "variant=adaptive", YIELD, "yield")],
}
EIGHTHS = ("--penalty.chunk-size", "20")  # of some 160 latents; the same fraction as 2,048 of 16,384
CHEAPER = [
    Arm("every 4th step", "variant=adaptive", ("--penalty.every-steps", "4"), "every4"),
    Arm("every 16th step", "variant=adaptive", ("--penalty.every-steps", "16"), "every16"),
    Arm("chunks of an eighth", "variant=adaptive", EIGHTHS, "eighths"),
    Arm("eighths, every 8th step", "variant=adaptive", (*EIGHTHS, "--penalty.every-steps", "8"), "eighths8"),
]
PARTS: dict[str, dict[str, list[Arm]]] = {
    "main": {
        "batchtopk": MAIN,
        "relu": [arm for arm in MAIN if arm.name not in ("frob 0.1", "random_init", "frozen_decoder")],
    },
    "sharing": {**SHARING, "matryoshka": [*FEW[:1], FEW[2], *SHARING["matryoshka"]]},
    "architectures": dict.fromkeys(("topk", "jumprelu", "gated", "matryoshka_relu"), FEW[:3]),
    "cheaper": {"batchtopk": CHEAPER, "relu": CHEAPER},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--out", type=Path, default=Path("artifacts"))
    parser.add_argument("--world", choices=tuple(LEVELS), action="append")
    parser.add_argument("--part", choices=tuple(PARTS), action="append")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.action == "run":
        for part in options.part or PARTS:
            for world in options.world or HELD_OUT:
                run(options.out, world, PARTS[part])
    else:
        text = table(options.out, options.world or HELD_OUT)
        if options.write:
            options.write.write_text(text)
        print(text)


def run(out: Path, world: str, arms: dict[str, list[Arm]]) -> None:
    """Samples the world, trains the arms with all seeds, and scores them. What exists already is kept."""
    profile = f"synth-{world}"
    place = ("--out", str(out), "--profile", profile)
    command("synth-world", "--out", str(out), "--world", world, "--samples", "1000000")
    truth = json.loads((out / profile / "truth.json").read_text())
    size = ("--sae.n-latents", str(truth["features"]), "--sae.k", str(round(truth["true_l0"]["train"])))
    ends = np.cumsum(LEVELS[world]) / sum(LEVELS[world])
    for architecture, lines in arms.items():
        form = ["--optimizer.learning-rate", RATE.get(architecture, "0.006")]
        if architecture.startswith("matryoshka"):
            form += ["--sae.prefixes", *map(str, ends)]
        for arm in lines:
            grid = f"arch={architecture} {arm.grid} seed={SEEDS.start}..{SEEDS.stop - 1}"
            tag = ("--tag", arm.tag) if arm.tag else ()
            command("sweep", *place, "--grid", grid, *COMMON, *size, *form, *arm.flags, *tag)
    command("synth-score", *place)


def command(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "hafs_jax", name, *arguments], check=True)


def scores(out: Path, world: str, name: str) -> dict[str, float] | None:
    """The metrics of one run; None if it has not been scored."""
    path = out / f"synth-{world}" / "eval" / name / "synthetic.json"
    if not path.exists():
        return None
    metrics = json.loads(path.read_text())["metrics"]
    final = Run(out / f"synth-{world}" / "runs" / name).summary().final
    return {**metrics, "roots": metrics["by_level"][0]["absorption"], "coherence": final["coherence_mean"]}


def table(out: Path, worlds: Any) -> str:
    """Markdown: means and standard deviations over seeds, and paired differences with 95% intervals."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    everything: dict[str, list[Arm]] = defaultdict(list)
    for arms in PARTS.values():
        for architecture, lines in arms.items():
            everything[architecture] += [arm for arm in lines if arm not in everything[architecture]]
    for architecture, lines in everything.items():
        for arm in lines:
            for world in worlds:
                for seed in SEEDS:
                    if (values := scores(out, world, arm.run_name(architecture, seed))) is not None:
                        found[architecture, arm.name, world].append({**values, "seed": seed})
    parts = [header(worlds)]
    for architecture, lines in everything.items():
        if not any(found[architecture, arm.name, world] for arm in lines for world in worlds):
            continue
        parts.append(f"\n## {architecture}\n\n| arm | " + " | ".join(f"{w}: {' / '.join(HEAD)}" for w in worlds) + " |")
        parts.append("|---|" + "---|" * len(worlds))
        for arm in lines:
            cells = [cell(found[architecture, arm.name, world]) for world in worlds]
            if any(cells):
                parts.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    parts.append(paired(found, worlds))
    return "\n".join(parts) + "\n"


HEAD = ("FVU", "MCC", "F1", "root absorption", "absorption", "dead")
SHOWN = ("fvu", "mcc", "f1", "roots", "absorption", "dead_fraction")


def cell(values: list[dict[str, float]]) -> str:
    if not values:
        return ""
    means = [np.mean([value[name] for value in values]) for name in SHOWN]
    spreads = [np.std([value[name] for value in values], ddof=1) if len(values) > 1 else 0 for name in SHOWN]
    return " / ".join(f"{mean:.3f} ±{spread:.3f}" for mean, spread in zip(means, spreads, strict=True))


COMPARISONS = [
    ("batchtopk", "adaptive 3", "strict 3"),
    ("batchtopk", "adaptive 3", "strict 0.3"),
    ("batchtopk", "adaptive 3", "ortsae 1"),
    ("batchtopk", "adaptive 3", "baseline"),
    ("batchtopk", "adaptive 1", "ramp only 1"),
    ("batchtopk", "adaptive 1", "gate only 1"),
    ("relu", "adaptive 3", "strict 3"),
    ("relu", "adaptive 3", "strict 0.3"),
    ("relu", "adaptive 3", "ortsae 1"),
    ("relu", "adaptive 3", "baseline"),
    ("relu", "adaptive 1", "ramp only 1"),
    ("relu", "adaptive 1", "gate only 1"),
    ("batchtopk", "yield", "adaptive 3"),
    ("relu", "yield", "adaptive 3"),
    ("batchtopk", "cofire", "adaptive 3"),
    ("batchtopk", "cofire-forever", "adaptive 3"),
    ("batchtopk", "parent", "adaptive 3"),
    ("batchtopk", "strict-yield", "strict 3"),
    ("batchtopk", "ramp-yield", "yield"),
    ("matryoshka", "adaptive 3", "baseline"),
    ("matryoshka", "level", "adaptive 3"),
    ("matryoshka", "level-forever", "baseline"),
    ("matryoshka", "level-yield", "baseline"),
    ("matryoshka", "matryoshka-yield", "adaptive 3"),
    *((architecture, arm.name, "adaptive 3") for architecture in ("batchtopk", "relu") for arm in CHEAPER),
]


def paired(found: dict, worlds: Any) -> str:
    """A table of differences paired by world and seed: mean and 95% t interval over the pairs."""
    from scipy.stats import t

    names = (*SHOWN[:5], "coherence")
    lines = [
        "\n## Paired differences\n\nFirst minus second, paired by world and seed: mean and 95% t interval.\n",
        "| architecture | first | second | pairs | " + " | ".join((*HEAD[:5], "mean coherence")) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for architecture, first, second in COMPARISONS:
        pairs = []
        for world in worlds:
            other = {value["seed"]: value for value in found[architecture, second, world]}
            pairs += [
                (value, other[value["seed"]]) for value in found[architecture, first, world] if value["seed"] in other
            ]
        if len(pairs) < 2:
            continue
        cells = []
        for name in names:
            differences = np.array([a[name] - b[name] for a, b in pairs])
            half = t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
            mark = "**" if abs(differences.mean()) > half else ""
            cells.append(f"{mark}{differences.mean():+.3f}{mark} ±{half:.3f}")
        lines.append(f"| {architecture} | {first} | {second} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def header(worlds: Any) -> str:
    return (
        "# Ground truth: arms and architectures on synthetic worlds\n\n"
        "`python benchmarks/synthetic.py run` and `table` make this page. Each cell is the mean over seeds "
        f"{', '.join(map(str, SEEDS))}\n"
        f"± the standard deviation. The worlds {', '.join(worlds)} are held out: settings were chosen on toy-0.\n"
        "The number in an arm's name is its lam_max. `hafs_evaluate.truth.scores` defines the metrics.\n"
    )


if __name__ == "__main__":
    main()
