"""Named worlds, whose true features are known, and the `sae_lens` model of each. Imports torch when needed; no JAX."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import option


@dataclass(frozen=True)
class World:
    """A forest of features and how they fire. Features are numbered level by level: roots, their children, and so on.

    A feature's probability of firing follows a Zipf law: over n features it falls from max to min as rank^-exponent,
    rescaled. If `child_max` is given, one law holds for the roots, and one for the children of each parent, given that
    the parent fires and before siblings exclude each other. If it is none, one law holds for all features.
    """

    seed: int = option(70_000, "seed of the model (directions, bias, magnitudes); samples have their own")
    d_model: int = option(64, "D, width of an activation")
    roots: int = option(12, "trees")
    branching: int = option(3, "children of each feature above the last level")
    depth: int = option(2, "levels below the roots")
    n_features: int | None = option(
        None, "features in all, those outside the trees fire on their own; none: those of the trees"
    )
    firing_max: float = option(0.4, "probability of the most frequent feature, a root")
    firing_min: float = option(0.12, "probability of the least frequent root; of all features where child_max is none")
    exponent: float = option(0.25, "exponent of the Zipf law")
    child_max: float | None = option(
        0.45, "probability of the most frequent child, given its parent, before siblings exclude it"
    )
    child_min: float = option(
        0.36, "probability of the least frequent child, given its parent, before siblings exclude it"
    )
    exclusive: float = option(1.0, "share of the parents at most one of whose children fires in a row")
    compensate: bool = option(
        False, "raise children's probabilities by what their ancestors take from them, as sae_lens does"
    )
    scale_children: bool = option(False, "multiply a child's coefficient by its parent's, divided by the parent's mean")
    mean_first: float = option(1.2, "mean coefficient of feature 0; it is linear in the number of the feature")
    mean_last: float = option(1.0, "mean coefficient of the last feature")
    std_mean: float = option(
        0.15, "mean of a normal law; its absolute values are the coefficients' standard deviations"
    )
    std_std: float = option(0.1, "standard deviation of that law")
    correlation_rank: int = option(0, "rank of the firing's correlation; 0: features fire independently")
    correlation_scale: float = option(0.1, "size of the correlation")
    orthogonal_steps: int = option(200, "steps that push directions apart; 0: random directions")
    orthogonal_lr: float = option(0.01, "learning rate of those steps")
    bias_norm: float = option(0.5, "norm of the bias that every row has")

    def __post_init__(self) -> None:
        if self.child_max is not None and (self.compensate or self.correlation_rank):
            raise UserError("child_max: expected none with compensate or correlation_rank, whose tables are sae_lens's")
        if self.n_features is not None and self.n_features < self.in_trees:
            raise UserError(f"n_features={self.n_features}: expected at least the {self.in_trees} of the trees")

    @property
    def in_trees(self) -> int:
        """Features of all trees."""
        return self.roots * sum(self.branching**level for level in range(self.depth + 1))

    @property
    def n(self) -> int:
        """Features in all."""
        return self.n_features or self.in_trees


WORLDS: dict[str, World] = {
    # Seeds are far from those of SAEs: torch.randn of the same seed would begin with the world's directions.
    # toy-0 is for tuning, toy-1 and toy-2 are for the result alone.
    "toy-0": World(),
    "toy-1": World(
        seed=70_001, roots=8, branching=4, firing_min=0.25, exponent=0.5, child_max=0.4, child_min=0.36, mean_first=1.1
    ),
    "toy-2": World(
        seed=70_002,
        roots=10,
        branching=2,
        depth=3,
        exponent=0.75,
        firing_min=0.15,
        child_max=0.5,
        child_min=0.42,
        scale_children=True,
        std_mean=0.2,
    ),
    "tiny": World(seed=70_003, d_model=16, roots=4, branching=2, orthogonal_steps=50, firing_min=0.2),
    "synthsaebench-16k": World(
        seed=42,
        d_model=768,
        roots=128,
        branching=4,
        depth=3,
        n_features=16_384,
        firing_max=0.4,
        firing_min=5e-4,
        exponent=0.5,
        child_max=None,
        compensate=True,
        scale_children=True,
        mean_first=5.0,
        mean_last=4.0,
        std_mean=0.5,
        std_std=0.5,
        correlation_rank=25,
        correlation_scale=0.1,
        orthogonal_steps=100,
        orthogonal_lr=3e-4,
        bias_norm=0.5,
    ),
}
"""Every world by name. synthsaebench-16k is SAELens's benchmark of that name; it needs a GPU."""


def model_config(world: World) -> Any:
    """The world as a `SyntheticModelConfig`, with one Zipf law over all features; `build` sets one for each family."""
    try:
        from sae_lens import synthetic
    except ImportError:
        raise UserError("synthetic worlds need sae-lens: pip install 'hafs-jax[evaluate]'") from None
    orthogonal, correlation = None, None
    if world.orthogonal_steps:
        orthogonal = synthetic.OrthogonalizationConfig(num_steps=world.orthogonal_steps, lr=world.orthogonal_lr)
    if world.correlation_rank:
        correlation = synthetic.LowRankCorrelationConfig(world.correlation_rank, world.correlation_scale)
    return synthetic.SyntheticModelConfig(
        num_features=world.n,
        hidden_dim=world.d_model,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(world.exponent, world.firing_max, world.firing_min),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=world.roots,
            branching_factor=world.branching,
            max_depth=world.depth,
            mutually_exclusive_portion=world.exclusive,
            compensate_probabilities=world.compensate,
            scale_children_by_parent=world.scale_children,
        ),
        orthogonalization=orthogonal,
        correlation=correlation,
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(world.mean_first, world.mean_last),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(world.std_mean, world.std_std),
        bias=world.bias_norm,
        seed=world.seed,
    )


def build(world: World, device: str = "cpu") -> Any:
    """The world's `SyntheticModel`. It is the same at every call."""
    config = model_config(world)

    from sae_lens.synthetic import SyntheticModel

    model = SyntheticModel(config, device=device).requires_grad_(False)
    if world.child_max is not None:
        import torch

        generator, parents_N = model.activation_generator, forest(model)[0]
        firing_N = torch.from_numpy(_firing_by_family(world, parents_N))
        generator.firing_probabilities = firing_N.to(generator.firing_probabilities)
    return model


def forest(model: Any) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Each feature's parent (-1: none) and level (0: a root, or outside the trees), both [n] int32."""
    parents_N, levels_N = np.full(model.cfg.num_features, -1, np.int32), np.zeros(model.cfg.num_features, np.int32)
    todo = [(root, 0) for root in model.hierarchy.roots]
    while todo:
        node, level = todo.pop()
        levels_N[node.feature_index] = level
        for child in node.children:
            parents_N[child.feature_index] = node.feature_index
            todo.append((child, level + 1))
    return parents_N, levels_N


def world_record(name: str) -> dict[str, Any]:
    """The world's name and all its fields, as they are saved with its stores."""
    return {"name": name, **asdict(WORLDS[name])}


def _zipf(count: int, largest: float, smallest: float, exponent: float) -> Float[np.ndarray, "count"]:
    powers = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    spread = (powers - powers[-1]) / (powers[0] - powers[-1]) if count > 1 else np.ones(1)
    return smallest + (largest - smallest) * spread


def _firing_by_family(world: World, parents_N: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Each feature's probability of firing, if its parent fires and no sibling excludes it, [n] float32."""
    assert world.child_max is not None
    firing_N = np.zeros(world.n, np.float32)
    for parent in np.unique(parents_N):
        family = np.flatnonzero(parents_N == parent)
        law = (world.firing_max, world.firing_min) if parent < 0 else (world.child_max, world.child_min)
        firing_N[family] = _zipf(len(family), *law, world.exponent)
    return firing_N
