"""One experiment: arms x architectures x L0 x seeds, from one TOML file. Standard library only."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hafs_evaluate.experiment.measurements import Cell
from hafs_jax import config
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_toml
from hafs_jax.base.options import check, from_dict, option

_OWN_FLAGS = {
    "extract": ("--out", "--profile"),
    "train": ("--out", "--profile", "--grid", "--arch", "--seed"),
    "evaluate": ("--out", "--profile", "--runs", "--sae", "--name"),
}
"""The flags of each command that an experiment sets itself: one of its own would be overridden without a word."""


@dataclass(frozen=True)
class ExperimentConfig:
    """What an experiment trains, measures and compares."""

    name: str = option("experiment", "its folder: OUT/<name>/<profile>")
    profile: str = option("auto", "what is extracted: a profile of `hafs extract`")
    arms: tuple[str, ...] = option(
        ("baseline", "strict", "adaptive"), "variants, each with further axes of a sweep's grid: 'strict lam=0.3'"
    )
    architectures: tuple[str, ...] = option(("batchtopk",), "architectures that every arm is trained on")
    ks: tuple[int, ...] = option((32,), "L0 levels, the same for all arms", least=1)
    seeds: int = option(
        5, "seeds 0 up to it, shared by all arms; each has its own weights and data order", least=1, most=10_000
    )
    extract: tuple[str, ...] = option((), "further flags of `hafs extract`")
    train: tuple[str, ...] = option((), "further flags of `hafs sweep`")
    evaluate: tuple[str, ...] = option((), "further flags of `hafs evaluate`")
    latents_seeds: int = option(1, "seeds whose latents are shown in the report, from 0 on", least=0)
    latents_ks: tuple[int, ...] = option((), "L0 levels whose latents are shown; none: all")
    primaries: tuple[str, ...] = option(("hierarchy_parent_top_1", "hole"), "the measures that the verdict is about")
    secondaries: tuple[str, ...] = option(
        ("fvu", "top_1", "top_5", "absorption_fraction", "absorption_full", "mean_coherence", "ce_score"),
        "further measures compared, without a claim",
    )
    method: str = option("adaptive", "the arm that the verdict is about: it is compared with every other")
    references: tuple[str, ...] = option(("random_init", "frozen_decoder"), "arms that are references, not methods")
    fvu_margin: float = option(
        0.02, "a method is non-inferior where the interval of its FVU's rise ends below it", least=0
    )
    l0_margin: float = option(0.02, "largest share by which a run's held-out L0 may be off its level", least=0)
    bootstrap: int = option(10_000, "samples of the hierarchical bootstrap", least=1, most=1_000_000)

    def __post_init__(self) -> None:
        check(self)
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name in (".", ".."):
            raise UserError(f"name={self.name!r}: expected letters, digits and any of _ . -")
        for field in ("arms", "architectures", "ks"):
            values = getattr(self, field)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{field}={values}: expected at least one, each once")
        if self.method != "adaptive" and self.method not in self.arms:
            raise UserError(f"method={self.method!r}: expected one of the arms {', '.join(self.arms)}")
        for arm in self.arms:
            variant, *axes = arm.split() or [""]
            if (
                "=" in variant
                or not variant
                or any(not re.fullmatch(r"[\w.]+=[^,.\s]+(\.\d+)?", axis) for axis in axes)
            ):
                raise UserError(f"arm {arm!r}: expected a variant and axes of one value, like 'strict lam=0.3'")
        for field, own in _OWN_FLAGS.items():
            for flag in getattr(self, field):
                if flag.split("=")[0] in own:
                    raise UserError(
                        f"{field}: expected none of {', '.join(own)}, which the experiment sets; found {flag}"
                    )

    def cells(self) -> Iterator[Cell]:
        """Every SAE of the experiment, architecture by architecture, seed by seed."""
        for architecture in self.architectures:
            for seed in range(self.seeds):
                for arm in self.arms:
                    for k in self.ks:
                        yield Cell(run_name(arm, architecture, k, seed), architecture, arm, k, seed)

    def grid(self) -> str:
        """The arms and L0 levels as a grid of `hafs sweep`."""
        levels = ",".join(map(str, self.ks))
        return "; ".join(f"variant={arm} k={levels}" for arm in self.arms)


def run_name(arm: str, architecture: str, k: int, seed: int) -> str:
    """The name that a sweep gives the run of an arm such as "strict lam=0.3"."""
    variant, *axes = arm.split()
    point = dict(axis.split("=", 1) for axis in axes)
    return config.run_name(variant, architecture, seed, config.axes_tag({**point, "k": str(k)}))


def read_experiment(path: Path) -> ExperimentConfig:
    """The experiment in the TOML file `path`; `UserError` for an unknown key or a value of the wrong type."""
    values = read_toml(path, "an experiment's TOML file")
    if not values:
        raise UserError(
            f"expected an experiment's TOML file at {path}, found one that says nothing; name its arms, say"
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return from_dict(ExperimentConfig, values, str(path))
