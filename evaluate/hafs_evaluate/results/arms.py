"""Arms: runs that differ only in their seed, with the uncertainty of their means. Must not import torch or jax.

An arm is an architecture, a k (or target L0) and what its runs call their arm, which is a variant and further axes of a
sweep. Its runs are its seeds.
"""

import math
from dataclasses import dataclass
from typing import Any

from scipy import stats

from hafs_jax.config import SAEConfig

VARIANT_ORDER = ("baseline", "strict", "adaptive")
ABLATIONS = ("yielding", "ramp_only", "gate_only", "ortsae", "frob")
DEFAULT_ARCHITECTURE, DEFAULT_K = SAEConfig().architecture, SAEConfig().k  # not part of a name
LEAST_SEEDS = 3  # with fewer, a t interval is too wide to say anything
CONFIDENCE = 0.95
REFERENCES = ("random_init", "frozen_decoder")  # variants that are only there to be compared with
GROUP_ARMS = 8  # more arms than this are shown by architecture and k, one group at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. `low` and `high` bound its 95% confidence interval, for which it takes three seeds."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    values: list[float]


def estimate(values: list[float]) -> Estimate:
    """The mean of `values`, their sample SD, and Student's t interval: mean ± t(0.975, n - 1) SD / sqrt(n)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None, None, None, values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if n < LEAST_SEEDS:
        return Estimate(mean, sd, None, None, values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Estimate(mean, sd, mean - half, mean + half, values)


def build_arms(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{arm: {architecture, variant, k, arm, tag, seeds, runs, measures}} of the variants in `results`.

    `runs` are keys of results["variants"]; `measures` is {measure: the fields of an Estimate}.
    """
    members: dict[tuple[Any, ...], list[str]] = {}
    for name, values in results["variants"].items():
        members.setdefault(_identity(values), []).append(name)
    arms = {}
    for identity in sorted(members, key=_order):
        architecture, variant, k, arm = identity
        runs = members[identity]
        known: dict[str, list[float]] = {}
        for run in runs:
            for measure, value in results["variants"][run]["measures"].items():
                known.setdefault(measure, []).append(value)
        arms[_name(identity, list(members))] = {
            "architecture": architecture,
            "variant": variant,
            "k": k,
            "arm": arm,
            "tag": _tag(variant, arm),
            "seeds": [results["variants"][run]["seed"] for run in runs],
            "runs": runs,
            "measures": {measure: vars(estimate(values)) for measure, values in known.items()},
        }
    return arms


def groups(arms: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """{title: arms} of the groups that are drawn together: all arms where they are few, else by architecture and k."""
    if len(arms) <= GROUP_ARMS:
        return {"all": list(arms)} if arms else {}
    ks = {arm["k"] for arm in arms.values()}
    found: dict[str, list[str]] = {}
    for name, arm in arms.items():
        title = arm["architecture"] + (f", k = {_k(arm['k'])}" if len(ks) > 1 else "")
        found.setdefault(title, []).append(name)
    return found


def compared(arms: dict[str, dict[str, Any]]) -> tuple[str, float | None] | None:
    """The (architecture, k) that the verdict is about: the defaults where they were trained, else the commonest k."""
    architectures = [arm["architecture"] for arm in arms.values()]
    if not architectures:
        return None
    chosen = DEFAULT_ARCHITECTURE if DEFAULT_ARCHITECTURE in architectures else architectures[0]
    ks = [arm["k"] for arm in arms.values() if arm["architecture"] == chosen]
    return chosen, DEFAULT_K if DEFAULT_K in ks else max(ks, key=ks.count)


def is_reference(arm: dict[str, Any]) -> bool:
    """Whether the arm is only there to be compared with."""
    return arm["variant"] in REFERENCES


def _identity(values: dict[str, Any]) -> tuple[Any, ...]:
    return values["architecture"], values["variant"], values["k"], values["arm"]


def _tag(variant: str, arm: str) -> str:
    """What an arm's name says beside its variant: of "strict lam=0.3 lr=1" it is "lam=0.3,lr=1"."""
    return ",".join(part for part in arm.split() if part != variant)


def _order(identity: tuple[Any, ...]) -> tuple[Any, ...]:
    architecture, variant, k, arm = identity
    known = (*VARIANT_ORDER, *ABLATIONS)
    place = known.index(variant) if variant in known else len(known) + (variant in REFERENCES)
    return architecture != DEFAULT_ARCHITECTURE, architecture, k is not None, k or 0, place, variant, arm


def _name(identity: tuple[Any, ...], every: list[tuple[Any, ...]]) -> str:
    """`<variant>[-<architecture>][-k<k>][-<tag>]`, each part only where arms could be confused without it."""
    architecture, variant, k, arm = identity
    name = variant if architecture == DEFAULT_ARCHITECTURE else f"{variant}-{architecture}"
    if k != DEFAULT_K and len({other[2] for other in every if other[0] == architecture}) > 1:
        name += f"-k{_k(k)}"
    if len({other[3] for other in every if other[:3] == identity[:3]}) > 1 and arm != variant:
        name += f"-{_tag(variant, arm)}"
    return name


def _k(k: float | None) -> str:
    return "?" if k is None else f"{k:g}"
