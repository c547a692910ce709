"""Label absorption and the worst-child hole: what a concept's main latent misses, and which latents have it.

The rows are tokens, or texts whose latents and activations are averaged over their tokens (`pooled`). Terms:

- A latent fires on a row where it is above its threshold, which is 0 for tokens. Averaged over a text, nearly every
  latent is a little above 0, so for texts it is the threshold of the best F1 in the half that chooses the main latents.
- A concept's main latent is the one whose firing says best (by F1) which rows have the concept.
- Absorption: on a row of the concept, other latents, the absorbers, carry the concept's direction in the place of the
  main latent, which is weak or silent there. Typically they are the latents of the concept's children.
- The worst-child hole: how much less often the main latent of a parent fires on the texts of its worst child than on
  texts of the parent that belong to no child.

Both figures are about the one main latent. A grown set, to which latents are added while F1 gains, takes in the latents
of the children, which fire exactly where the main latent is silent, and so it hides what is to be measured. On
synthetic worlds its figures do not rank SAEs as the truth does, while those of the single latent do
(docs/agreement.md). Only the size of the grown set is reported beside them.

Everything is cross-fitted: the direction, the main latents and their thresholds come from one half of the documents,
the measurement from the other half, and then the other way round.

Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

MAX_MAINS = 5  # latents in the grown set
MIN_GAIN = 0.03  # gain of F1 at which the grown set takes one more latent
MIN_COSINE = 0.1  # least cosine of an absorber's dictionary vector with the concept's direction
ABSORBERS = 3  # latents that may absorb a concept on one row
MIN_SHARE = 0.4  # least share of the row's projection that the absorbers must carry to count
MIN_ROWS = 20  # fewest rows of a child, or of a parent without any child, on which a recall is measured
CANDIDATES = 100  # latents that are looked at for the main ones, those that separate best

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
class Absorption:
    """Absorption and hole of one label.

    `fraction` and `full` are the means of `absorbed_rows` over the rows counted: those of the label that a probe on the
    activations finds too, and whose projection (x - b_dec) . direction is above 0. None where there is no such row.
    """

    fraction: float | None
    full: float | None
    mains: float  # size of the grown set, mean of the two halves
    texts: int  # rows counted
    hole: float | None  # `worst_child_hole`; None without children


@dataclass(frozen=True)
class MainLatents:
    """The latents that stand for a concept, best first, and the threshold above which each of them fires."""

    latents: Int[np.ndarray, "mains"]
    thresholds: Float[np.ndarray, "mains"]

    @property
    def first(self) -> "MainLatents":
        """The best one alone."""
        return MainLatents(self.latents[:1], self.thresholds[:1])

    def fires(self, latents_NF: Float[np.ndarray, "N F"]) -> Bool[np.ndarray, "N"]:
        """Whether any of them fires on each row."""
        return np.any(latents_NF[:, self.latents] > self.thresholds, axis=1)


def separation(latents_NF: Float[np.ndarray, "N F"], is_positive_N: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "F"]:
    """(mean over the positive rows - mean over the others) / standard deviation over all rows, of each latent.

    0 for a latent that does not vary.
    """
    sd_F = latents_NF.std(0)
    difference_F = latents_NF[is_positive_N].mean(0) - latents_NF[~is_positive_N].mean(0)
    return np.where(sd_F > 1e-8, difference_F / np.maximum(sd_F, 1e-8), 0.0)


def main_latents(
    latents_NF: Float[np.ndarray, "N F"], is_positive_N: Bool[np.ndarray, "N"], pooled: bool = False
) -> MainLatents:
    """The grown set: latents whose firing says best that a row is positive, added greedily.

    The first is the main latent, of the best F1 alone. The next is each time the one that raises F1 of "any of them
    fires" most, while it gains more than MIN_GAIN, up to MAX_MAINS latents. Only the CANDIDATES of the largest
    `separation` above 0 are looked at. The set is empty where no latent separates.
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
    return MainLatents(order_C[chosen], threshold_C[chosen])


def concept_direction(
    acts_ND: Float[np.ndarray, "N D"], is_positive_N: Bool[np.ndarray, "N"]
) -> Float[np.ndarray, "D"]:
    """The concept's direction: (mean of the positive rows - mean of the others), normalised."""
    difference_D = acts_ND[is_positive_N].mean(0) - acts_ND[~is_positive_N].mean(0)
    return difference_D / np.maximum(np.linalg.norm(difference_D), 1e-8)


def absorbed_rows(
    latents_NF: Float[np.ndarray, "N F"],
    projection_N: Float[np.ndarray, "N"],
    W_dec_FD: Float[np.ndarray, "F D"],
    direction_D: Float[np.ndarray, "D"],
    mains: MainLatents,
) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"]]:
    """(fraction, full) of each row: the share of the concept that absorbers carry, and whether it is wholly absorbed.

    Let a_j = f_j (W_dec_j . direction) be what latent j adds along the direction, and p = `projection_N` what the
    latents have to explain along it. Then

    - absorbed = sum of the ABSORBERS largest a_j > 0, over the latents j that are not main and whose dictionary vector
      has at least the cosine MIN_COSINE with the direction;
    - main = sum of max(a_j, 0) over the main latents;
    - fraction = absorbed / (absorbed + main) where 0 < absorbed >= MIN_SHARE p, else 0;
    - full: absorbed >= MIN_SHARE p in this way, and no main latent fires.
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
    """recall on the parent's rows without a child - lowest recall on any child's rows; 0 is no hole.

    The recall is the share of the rows on which a main latent of the parent fires (`is_hit_N`). Only children with at
    least MIN_ROWS rows count. Where fewer rows than that have the parent without a child, the first term is the recall
    over all rows of the parent. None where fewer than two children count, since an only child's recall is the parent's.
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
) -> Absorption:
    """Absorption and hole of one label, of its main latent or, with `grown`, of the grown set.

    `is_found_N` is what the probe on the activations, fitted on other documents, says of each row. `is_child_CN` has
    the rows of each child. `half_N` is 0 or 1 for each row, and the same for all rows of a document.
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
    return Absorption(
        fraction=float(fraction_N.mean()) if len(fraction_N) else None,
        full=float(is_full_N.mean()) if len(is_full_N) else None,
        mains=float(np.mean(mains_found)),
        texts=len(fraction_N),
        hole=worst_child_hole(is_hit_N, is_positive_N, children_CN),
    )


def _best_thresholds(
    values_NC: Float[np.ndarray, "N C"], is_positive_N: Bool[np.ndarray, "N"]
) -> Float[np.ndarray, "C"]:
    """For each column, the threshold above which "positive" has the best F1; it lies midway between two values."""
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
