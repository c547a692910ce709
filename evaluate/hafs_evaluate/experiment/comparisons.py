"""What an experiment shows: comparisons with uncertainty, falsifiers, and the verdict in words. Numpy; no torch.

Two arms are compared within an architecture, at each L0 level and over all of them (then k is None). Holm's correction
has one family of tests: the primary measures of every comparison over all levels. A falsifier is a condition, fixed
beforehand, under which a statement about the method is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hafs_evaluate.experiment.config import ExperimentConfig
from hafs_evaluate.experiment.measurements import Values
from hafs_evaluate.results.arms import estimate
from hafs_evaluate.results.measures import find_measure, sentence_name
from hafs_evaluate.results.paired import Difference, difference, holm
from hafs_jax.base.options import to_dict

PLAIN, CONSTANT, RAMP, FROZEN = "baseline", "strict", "ramp_only", "frozen_decoder"
RIVALS = (PLAIN, CONSTANT, "ortsae")  # whom the verdict's sentences name


@dataclass(frozen=True)
class Comparison:
    """Arm a against arm b in one measure."""

    architecture: str
    k: int | None
    measure: str
    a: str
    b: str
    found: Difference
    p_holm: float | None
    verdict: str  # better, worse or not resolved

    def plain(self) -> dict[str, Any]:
        """The comparison as summary.json holds it."""
        found = self.found
        return {
            "architecture": self.architecture,
            "k": self.k,
            "measure": self.measure,
            "a": self.a,
            "b": self.b,
            "difference": found.mean,
            "low": found.low,
            "high": found.high,
            "p": found.p,
            "p_holm": self.p_holm,
            "reseed_sd": found.reseed_sd,
            "seeds": found.seeds,
            "verdict": self.verdict,
        }


def summary_of(rows: Sequence[dict[str, Any]], config: ExperimentConfig) -> dict[str, Any]:
    """What summary.json holds, from the rows of the experiment's table (`measurements`)."""
    values, runs = Values(rows), {row["run"] for row in rows}
    comparisons = comparisons_of(values, config)
    falsifiers = falsifiers_of(comparisons, config)
    return {
        "config": to_dict(config),
        "saes": len(runs),
        "arms": arms_of(values, config),
        "comparisons": [comparison.plain() for comparison in comparisons],
        "falsifiers": falsifiers,
        "verdict": verdict_of(comparisons, falsifiers, config, len(runs)),
        "off_level": off_level(rows, config.l0_margin),
        "missing": [cell.run for cell in config.cells() if cell.run not in runs],
    }


def off_level(rows: Sequence[dict[str, Any]], margin: float) -> dict[str, float]:
    """{run: its held-out L0} of the runs whose L0 is off their level by more than the share `margin`."""
    l0 = {row["run"]: (row["value"], row["k"]) for row in rows if row["measure"] == "l0"}
    return {run: value for run, (value, k) in l0.items() if abs(value / k - 1) > margin}


def arms_of(values: Values, config: ExperimentConfig) -> list[dict[str, Any]]:
    """Each arm's measures at each level: mean over datasets, then mean, SD and Student's interval over seeds."""
    found = []
    seeds = list(range(config.seeds))
    for architecture in config.architectures:
        for arm in config.arms:
            for k in config.ks:
                measures = {}
                for measure in values.measures:
                    values_S = values.array(measure, architecture, [k], arm, seeds)[0]
                    if values_S.size:
                        measures[measure] = vars(estimate(values_S.mean(1).tolist()))
                found.append(
                    {"architecture": architecture, "variant": arm, "k": k, "seeds": seeds, "measures": measures}
                )
    return found


def comparisons_of(values: Values, config: ExperimentConfig) -> list[Comparison]:
    """The comparisons of all pairs in all measures, at each L0 level and over all levels."""
    raw = []
    for architecture in config.architectures:
        for a, b in pairs_of(config.arms, config.method):
            for measure in (*config.primaries, *config.secondaries):
                for k in (None, *config.ks):
                    found = _compared(values, config, architecture, k, measure, a, b)
                    if found is not None:
                        raw.append((architecture, k, measure, a, b, found))
    family = [index for index, (_, k, measure, *_) in enumerate(raw) if k is None and measure in config.primaries]
    adjusted = dict(zip(family, holm([raw[index][-1].p for index in family]), strict=True))
    return [
        Comparison(*entry, adjusted.get(index), _verdict(entry[2], entry[5], adjusted.get(index)))
        for index, entry in enumerate(raw)
    ]


def pairs_of(arms: Sequence[str], method: str) -> list[tuple[str, str]]:
    """The pairs (a, b) that are compared: the method with every other arm, and every other arm with the baseline."""
    pairs = [(method, other) for other in arms if other != method and method in arms]
    return pairs + [(arm, PLAIN) for arm in arms if arm not in (method, PLAIN) and PLAIN in arms]


def falsifiers_of(comparisons: Sequence[Comparison], config: ExperimentConfig) -> list[dict[str, str]]:
    """The outcome of each falsifier for each architecture: pass, triggered or not decided.

    The falsifiers are those of `adaptive`. For another method, those that its file's arms cannot decide are left out.
    """
    found = []
    for architecture in config.architectures:
        own = {(c.measure, c.a, c.b): c for c in comparisons if c.architecture == architecture and c.k is None}
        found += [
            _gate_adds(own, config, architecture),
            _hierarchy_adds(own, config, architecture),
            _beats_tuned_strict(own, config, architecture),
            _beats_frozen(own, config, architecture),
            _keeps_reconstruction(own, config, architecture),
        ]
    own_arms = config.method == ExperimentConfig().method
    return [one for one in found if own_arms or one["outcome"] != "not decided" or one["name"] == "FVU inferior"]


def verdict_of(
    comparisons: Sequence[Comparison], falsifiers: Sequence[dict[str, str]], config: ExperimentConfig, n_saes: int
) -> list[str]:
    """Three sentences: what the method does to the primary measures, its cost in FVU, which falsifiers it meets."""
    first, second = [], []
    for architecture in config.architectures:
        own = [c for c in comparisons if c.architecture == architecture and c.k is None and c.a == config.method]
        for c in own:
            if c.b in RIVALS and c.measure in config.primaries:
                first.append(
                    f"{architecture}: {sentence_name(c.measure)} {_shown(c.found)} against {c.b} ({c.verdict})"
                )
            if c.b in RIVALS and c.measure == "fvu":
                second.append(f"{architecture}: {_shown(c.found)} against {c.b} ({c.verdict})")
    triggered = [f"{f['name']} ({f['architecture']})" for f in falsifiers if f["outcome"] == "triggered"]
    undecided = [f"{f['name']} ({f['architecture']})" for f in falsifiers if f["outcome"] == "not decided"]
    third = f"Falsifiers triggered: {', '.join(triggered) or 'none'}"
    third += f"; not decided: {', '.join(undecided)}." if undecided else "."
    who = f"{config.method.capitalize()} over {n_saes} SAEs and {config.seeds} seed{'s' * (config.seeds > 1)}"
    return [
        f"{who}: {'; '.join(first) or 'no primary was measured'}.",
        f"Held-out FVU: {'; '.join(second) or 'not measured'}.",
        third,
    ]


def _compared(
    values: Values, config: ExperimentConfig, architecture: str, k: int | None, measure: str, a: str, b: str
) -> Difference | None:
    seeds = list(range(config.seeds))
    ks = config.ks if k is None else [k]
    a_ST, names_a = values.array(measure, architecture, ks, a, seeds)
    b_ST, names_b = values.array(measure, architecture, ks, b, seeds)
    shared = [name for name in names_a if name in set(names_b)]
    if not shared:
        return None
    columns_a, columns_b = ([names.index(name) for name in shared] for names in (names_a, names_b))
    return difference(a_ST[:, columns_a], b_ST[:, columns_b], config.bootstrap)


def _verdict(name: str, found: Difference, p_holm: float | None) -> str:
    measure = find_measure(name)
    if not found.is_resolved or (p_holm is not None and p_holm > 0.05) or measure is None or not measure.better:
        return "not resolved"
    return "better" if (found.mean > 0) == (measure.better == "higher") else "worse"


def _falsifier(name: str, claim: str, architecture: str, outcome: str, why: str) -> dict[str, str]:
    return {"name": name, "claim": claim, "architecture": architecture, "outcome": outcome, "why": why}


def _gate_adds(own: dict[Any, Comparison], config: ExperimentConfig, architecture: str) -> dict[str, str]:
    name, claim = f"{config.method} = ramp_only", "the error-adaptive weight adds to the ramp alone"
    rivals = [own.get((measure, config.method, RAMP)) for measure in (*config.primaries, "fvu")]
    return _must_beat(name, claim, architecture, [c for c in rivals if c is not None], "the ramp alone")


def _hierarchy_adds(own: dict[Any, Comparison], config: ExperimentConfig, architecture: str) -> dict[str, str]:
    name, claim = "parent = global", "sharing by parents adds to sharing by all"
    arm = next((arm for arm in config.arms if "sharing=parent" in arm), "")
    rivals = [own.get((measure, config.method, arm)) for measure in config.primaries]
    known = [c for c in rivals if c is not None]
    if not known:
        return _falsifier(name, claim, architecture, "not decided", "no arm shares by parents here")
    better = [c for c in known if c.verdict == "worse"]  # adaptive (global) is the worse one
    why = "; ".join(f"{sentence_name(c.measure)}, global - parent, {_shown(c.found)}" for c in known)
    return _falsifier(name, claim, architecture, "pass" if better else "triggered", why)


def _beats_tuned_strict(own: dict[Any, Comparison], config: ExperimentConfig, architecture: str) -> dict[str, str]:
    name, claim = "best strict ties", f"{config.method} beats a constant penalty of the best strength"
    strengths = [arm for arm in config.arms if arm.split()[0] == CONSTANT]
    costs = {arm: own[("fvu", config.method, arm)].found for arm in strengths if ("fvu", config.method, arm) in own}
    # matched: a strength whose FVU is not resolvably above adaptive's
    matched = [arm for arm, cost in costs.items() if cost.high >= 0]
    if len(strengths) < 2 or not matched:
        return _falsifier(
            name, claim, architecture, "not decided", f"no second strength at {config.method}'s FVU or below"
        )
    rivals = [
        own[key] for arm in matched for measure in config.primaries if (key := (measure, config.method, arm)) in own
    ]
    if not rivals:
        return _falsifier(name, claim, architecture, "not decided", "no primary was measured")
    ties = sorted({c.b for c in rivals} - {c.b for c in rivals if c.verdict == "better"})
    why = "; ".join(f"{sentence_name(c.measure)} against {c.b} {_shown(c.found)}" for c in rivals)
    return _falsifier(name, claim, architecture, "triggered" if ties else "pass", why)


def _beats_frozen(own: dict[Any, Comparison], config: ExperimentConfig, architecture: str) -> dict[str, str]:
    name, claim = (
        "gains vanish against frozen_decoder",
        f"what {config.method} finds is more than a random dictionary's",
    )
    rivals = [own.get((measure, config.method, FROZEN)) for measure in config.primaries]
    return _must_beat(name, claim, architecture, [c for c in rivals if c is not None], "a decoder that never trained")


def _keeps_reconstruction(own: dict[Any, Comparison], config: ExperimentConfig, architecture: str) -> dict[str, str]:
    margin = config.fvu_margin
    name, claim = "FVU inferior", f"{config.method}'s FVU is at most {margin:g} above the baseline's"
    cost = own.get(("fvu", config.method, PLAIN))
    if cost is None:
        return _falsifier(name, claim, architecture, "not decided", "FVU was not measured")
    outcome = "pass" if cost.found.high <= margin else "triggered" if cost.found.low > margin else "not decided"
    return _falsifier(name, claim, architecture, outcome, _shown(cost.found))


def _must_beat(name: str, claim: str, architecture: str, rivals: Sequence[Comparison], whom: str) -> dict[str, str]:
    if not rivals:
        return _falsifier(name, claim, architecture, "not decided", f"{whom} was not trained or not measured")
    why = "; ".join(f"{sentence_name(c.measure)} {_shown(c.found)} ({c.verdict})" for c in rivals)
    is_better = any(c.verdict == "better" for c in rivals)
    return _falsifier(name, claim, architecture, "pass" if is_better else "triggered", why)


def _shown(found: Difference) -> str:
    interval = f"[{found.low:+.3f}, {found.high:+.3f}]" if found.seeds > 1 else "(one seed: no interval)"
    return f"{found.mean:+.3f} {interval}"
