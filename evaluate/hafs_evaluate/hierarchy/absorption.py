"""Label absorption and the worst-child hole: what a concept's main latents miss, and who has it. Pure numpy.

Rows are tokens, or texts with latents and activations averaged over their tokens (`pooled`). A latent fires on a row
where it is over its threshold: 0 for tokens. Averaged over a text, a latent is nearly always a little over 0, so its
threshold is then the one of best F1 in the half where the main latents are chosen.

A concept's main latent is the one whose firing says best (F1) that a row is positive. Absorption and hole are about
that one latent. Growing the set while F1 gains takes in the latents of the parent's children, which fire exactly where
the main latent is silent, and so hides what is to be measured: on synthetic worlds the grown set's figures do not rank
SAEs as the truth does, the single latent's do (docs/agreement.md). The size of the grown set is reported beside them.

Everything is cross-fitted: direction, main latents and thresholds come from one half of the documents, the
measurement from the other, and then the other way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

MAX_MAINS = 5
MIN_GAIN = 0.03  # of F1, for one more main latent
MIN_COSINE = 0.1  # of an absorber's dictionary vector with the concept's direction
ABSORBERS = 3
MIN_SHARE = 0.4  # of the projection, for absorbers to count
MIN_ROWS = 20  # of a child, or of the parent without any
CANDIDATES = 100  # latents that are looked at for the main ones, best ranked first

SETTINGS = {
    "max_mains": MAX_MAINS,
    "min_gain": MIN_GAIN,
    "min_cosine": MIN_COSINE,
    "absorbers": ABSORBERS,
    "min_share": MIN_SHARE,
    "min_rows": MIN_ROWS,
    "candidates": CANDIDATES,
    "version": 2,
}
"""What the figures depend on besides their inputs. Raise `version` when figures of the same inputs change."""


@dataclass(frozen=True)
class Mains:
    """The latents that stand for a concept, and over what each of them fires."""

    latents: Int[np.ndarray, "mains"]
    thresholds: Float[np.ndarray, "mains"]

    @property
    def first(self) -> "Mains":
        """The best one alone."""
        return Mains(self.latents[:1], self.thresholds[:1])

    def fires(self, latents_NF: Float[np.ndarray, "N F"]) -> Bool[np.ndarray, "N"]:
        """Whether any of them fires on each row."""
        return np.any(latents_NF[:, self.latents] > self.thresholds, axis=1)


def separation(latents_NF: Float[np.ndarray, "N F"], is_positive_N: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "F"]:
    """(mean over the positive rows - mean over the others) / sd over all rows; 0 for a latent that does not vary."""
    sd_F = latents_NF.std(0)
    difference_F = latents_NF[is_positive_N].mean(0) - latents_NF[~is_positive_N].mean(0)
    return np.where(sd_F > 1e-8, difference_F / np.maximum(sd_F, 1e-8), 0.0)


def main_latents(
    latents_NF: Float[np.ndarray, "N F"], is_positive_N: Bool[np.ndarray, "N"], pooled: bool = False
) -> Mains:
    """The latents whose firing says best that a row is positive: greedily, while F1 of "any fires" gains > MIN_GAIN.

    The first is the best alone. At most MAX_MAINS, of the CANDIDATES with the largest `separation` over 0; none where
    no latent separates.
    """
    separation_F = separation(latents_NF, is_positive_N)
    order_C = np.argsort(-separation_F, kind="stable")[:CANDIDATES]
    order_C = order_C[separation_F[order_C] > 0]
    values_NC = latents_NF[:, order_C]
    threshold_C = _best_thresholds(values_NC, is_positive_N) if pooled else np.zeros(len(order_C))
    fires_NC = values_NC > threshold_C
    chosen: list[int] = []
    is_hit_N, best = np.zeros(len(is_positive_N), bool), 0.0
    while len(chosen) < min(MAX_MAINS, len(order_C)):
        added_NC = fires_NC & ~is_hit_N[:, None]
        true_C = (is_hit_N & is_positive_N).sum() + added_NC[is_positive_N].sum(0)
        said_C = is_hit_N.sum() + added_NC.sum(0)
        f1_C = 2 * true_C / (said_C + is_positive_N.sum())
        index = int(f1_C.argmax())
        if f1_C[index] - best <= (MIN_GAIN if chosen else 0):
            break
        chosen.append(index)
        is_hit_N, best = is_hit_N | fires_NC[:, index], float(f1_C[index])
    return Mains(order_C[chosen], threshold_C[chosen])


def concept_direction(
    acts_ND: Float[np.ndarray, "N D"], is_positive_N: Bool[np.ndarray, "N"]
) -> Float[np.ndarray, "D"]:
    """Mean of the positive rows - mean of the others, normalised."""
    difference_D = acts_ND[is_positive_N].mean(0) - acts_ND[~is_positive_N].mean(0)
    return difference_D / np.maximum(np.linalg.norm(difference_D), 1e-8)


def absorbed_rows(
    latents_NF: Float[np.ndarray, "N F"],
    projection_N: Float[np.ndarray, "N"],
    W_dec_FD: Float[np.ndarray, "F D"],
    direction_D: Float[np.ndarray, "D"],
    mains: Mains,
) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """(fraction, full) of each row. With a_j = latent j x (W_dec_j . direction), what j adds along the direction:

    absorbed = sum of the ABSORBERS largest a_j over the latents that are not main, are active, and whose dictionary
    vector has cosine >= MIN_COSINE with the direction; main = sum of the mains' a_j over 0. fraction = absorbed /
    (absorbed + main) where absorbed >= MIN_SHARE x projection, else 0. full: so it is, and no main fires.
    """
    along_F = W_dec_FD @ direction_D
    cosine_F = along_F / np.maximum(np.linalg.norm(W_dec_FD, axis=1), 1e-8)
    may_absorb_F = cosine_F >= MIN_COSINE
    may_absorb_F[mains.latents] = False
    added_NA = np.maximum(latents_NF[:, may_absorb_F] * along_F[may_absorb_F], 0)
    if added_NA.shape[1] > ABSORBERS:
        added_NA = np.partition(added_NA, -ABSORBERS, axis=1)[:, -ABSORBERS:]
    absorbed_N = added_NA.sum(1)
    main_N = np.maximum(latents_NF[:, mains.latents] * along_F[mains.latents], 0).sum(1)
    counts_N = (absorbed_N > 0) & (absorbed_N >= MIN_SHARE * projection_N)
    fraction_N = np.where(counts_N, absorbed_N / np.maximum(absorbed_N + main_N, 1e-12), 0.0)
    return fraction_N, counts_N & ~mains.fires(latents_NF)


def worst_child_hole(
    is_hit_N: Bool[np.ndarray, "N"], is_parent_N: Bool[np.ndarray, "N"], is_child_CN: Bool[np.ndarray, "C N"]
) -> float | None:
    """recall(main | parent, no child) - min over children of recall(main | child), children of >= MIN_ROWS rows.

    is_hit_N: a main latent of the parent fires. Where fewer than MIN_ROWS rows have the parent without a child, the
    reference is the recall over all the parent's rows. None where fewer than two children have enough rows: an only
    child's recall is the parent's own.
    """
    recalls = [is_hit_N[is_child_N].mean() for is_child_N in is_child_CN if is_child_N.sum() >= MIN_ROWS]
    if len(recalls) < 2:
        return None
    is_alone_N = is_parent_N & ~is_child_CN.any(0)
    reference_N = is_alone_N if is_alone_N.sum() >= MIN_ROWS else is_parent_N
    return float(is_hit_N[reference_N].mean() - min(recalls))


def measure(
    latents_NF: Float[np.ndarray, "N F"],
    acts_ND: Float[np.ndarray, "N D"],
    W_dec_FD: Float[np.ndarray, "F D"],
    b_dec_D: Float[np.ndarray, "D"],
    is_positive_N: Bool[np.ndarray, "N"],
    is_found_N: Bool[np.ndarray, "N"],
    is_child_CN: Sequence[Bool[np.ndarray, "N"]],
    half_N: Int[np.ndarray, "N"],
    pooled: bool = False,
    grown: bool = False,
) -> dict[str, Any]:
    """Absorption and hole of one label, of its best main latent, or with `grown` of the grown set.

    `half_N`: 0 or 1, documents kept whole; `is_found_N`: the activation probe's out-of-fold answer.

    fraction, full: means of `absorbed_rows` over the `texts` positive rows that the probe finds and whose projection
    (x - b_dec) . direction, what the latents have to explain, is over 0; none where there is no such row. mains: mean
    size of the grown set in the two halves. dead_fraction: share of latents that are 0 on all rows. hole: see there;
    none without children.
    """
    is_hit_N = np.zeros(len(is_positive_N), bool)
    fractions, fulls, mains_found = [], [], []
    for half in (0, 1):
        is_fit_N, is_held_N = half_N == half, half_N != half
        all_mains = main_latents(latents_NF[is_fit_N], is_positive_N[is_fit_N], pooled)
        mains = all_mains if grown else all_mains.first
        direction_D = concept_direction(acts_ND[is_fit_N], is_positive_N[is_fit_N])
        is_hit_N[is_held_N] = mains.fires(latents_NF[is_held_N])
        projection_N = (acts_ND - b_dec_D) @ direction_D
        rows_N = is_held_N & is_positive_N & is_found_N & (projection_N > 0)
        fraction_N, is_full_N = absorbed_rows(latents_NF[rows_N], projection_N[rows_N], W_dec_FD, direction_D, mains)
        fractions.append(fraction_N)
        fulls.append(is_full_N)
        mains_found.append(len(all_mains.latents))
    fraction_N, is_full_N = np.concatenate(fractions), np.concatenate(fulls)
    children_CN = np.array(is_child_CN).reshape(len(is_child_CN), len(is_positive_N)).astype(bool)
    return {
        "fraction": float(fraction_N.mean()) if len(fraction_N) else None,
        "full": float(is_full_N.mean()) if len(is_full_N) else None,
        "mains": float(np.mean(mains_found)),
        "dead_fraction": float((latents_NF == 0).all(0).mean()),
        "texts": len(fraction_N),
        "hole": worst_child_hole(is_hit_N, is_positive_N, children_CN),
    }


def _best_thresholds(
    values_NC: Float[np.ndarray, "N C"], is_positive_N: Bool[np.ndarray, "N"]
) -> Float[np.ndarray, "C"]:
    """For each column the threshold (midway between two values) over which "positive" has the best F1."""
    order_NC = np.argsort(-values_NC, axis=0, kind="stable")
    sorted_NC = np.take_along_axis(values_NC, order_NC, axis=0)
    true_NC = np.cumsum(is_positive_N[order_NC], axis=0)
    said_N = np.arange(1, len(values_NC) + 1)[:, None]
    f1_NC = 2 * true_NC / (said_N + is_positive_N.sum())
    below_NC = np.concatenate([sorted_NC[1:], np.minimum(sorted_NC[-1:], 0) - 1.0])
    f1_NC[sorted_NC <= below_NC] = -1  # no threshold lies between equal values
    best_C = f1_NC.argmax(0)
    columns = np.arange(values_NC.shape[1])
    return (sorted_NC[best_C, columns] + below_NC[best_C, columns]) / 2
