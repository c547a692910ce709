"""Paired comparisons of arms over seeds and datasets: differences, bootstrap intervals, Holm. Numpy and scipy.

The values of an arm are an array [S, T] of S seeds, which are the same in every arm, and T datasets: tasks, classes, or
one where the measure has no datasets. Both are samples, crossed with each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESOLVED = 2.0  # a difference of fewer reseed SDs than this is not resolved


@dataclass(frozen=True)
class Difference:
    """How much higher a is than b, in the measure's unit."""

    mean: float
    low: float  # of the 95% interval
    high: float
    p: float  # two-sided, of Student's paired test over the seeds' means
    reseed_sd: float  # of one arm's mean over datasets when the seed alone changes
    seeds: int

    @property
    def is_resolved(self) -> bool:
        """Whether the interval excludes 0 and the difference is at least twice the reseed SD."""
        return (self.low > 0 or self.high < 0) and abs(self.mean) >= RESOLVED * self.reseed_sd


def difference(
    a_ST: Float[np.ndarray, "S T"], b_ST: Float[np.ndarray, "S T"], samples: int = 10_000, seed: int = 0
) -> Difference:
    """The paired difference mean(a - b) with a hierarchical bootstrap's percentile interval.

    Each bootstrap sample draws S seeds and T datasets with replacement, and averages over their product. The percentile
    interval of few seeds is too narrow, by a factor of about sqrt((S - 1) / S), so deviations from the mean are divided
    by it. p is from Student's test, since a bootstrap of five seeds that agree in sign never crosses 0.
    """
    if a_ST.shape != b_ST.shape or a_ST.ndim != 2:
        raise ValueError(f"expected two [seeds, datasets] arrays of one shape, found {a_ST.shape} and {b_ST.shape}")
    delta_ST = a_ST - b_ST
    n_seeds, n_sets = delta_ST.shape
    mean = float(delta_ST.mean())
    reseed = pooled_sd([a_ST.mean(1), b_ST.mean(1)])
    if n_seeds < 2:
        return Difference(mean, float("-inf"), float("inf"), 1.0, reseed, n_seeds)
    random = np.random.default_rng(seed)
    weights_RS = random.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=samples) / n_seeds
    weights_RT = random.multinomial(n_sets, np.full(n_sets, 1 / n_sets), size=samples) / n_sets
    means_R = ((weights_RS @ delta_ST) * weights_RT).sum(1)
    means_R = mean + (means_R - mean) * np.sqrt(n_seeds / (n_seeds - 1))
    low, high = np.percentile(means_R, [2.5, 97.5])
    return Difference(mean, float(low), float(high), paired_p(delta_ST.mean(1)), reseed, n_seeds)


def paired_p(delta_S: Float[np.ndarray, "S"]) -> float:
    """Student's two-sided p that the seeds' mean difference is 0."""
    from scipy.stats import t

    error = float(np.std(delta_S, ddof=1) / np.sqrt(len(delta_S)))
    if error == 0:
        return float(delta_S.mean() == 0)
    return float(2 * t.sf(abs(float(delta_S.mean())) / error, len(delta_S) - 1))


def pooled_sd(arms: Sequence[Float[np.ndarray, "S"]]) -> float:
    """The SD over seeds, from the mean of the arms' variances; NaN where each has one seed."""
    variances = [np.var(values, ddof=1) for values in arms if len(values) > 1]
    return float(np.sqrt(np.mean(variances))) if variances else float("nan")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values of one family of tests, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = np.zeros(len(order)), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted.tolist()
