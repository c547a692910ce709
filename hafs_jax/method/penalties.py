"""The decoder's orthogonality penalties, the margin mu0, and the coherence figures in the log. Pure functions.

These are the plain forms. `hafs_jax.fast.hinge` computes the value and gradient of the hinge faster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from hafs_jax.config import PenaltyConfig, SAEConfig
from hafs_jax.method.matryoshka import bands
from hafs_jax.method.sae import unit_rows
from hafs_jax.ops.axes import Axes


class Structure(struct.PyTreeNode):
    """What the penalty reads beside the directions of the latents. Constants: they get no gradient."""

    groups_F: Int[Array, " F"]  # group numbers; latents of one group may share direction under alpha
    rate_F: Float[Array, " F"]  # fraction of recent rows in which each latent fires
    active_BF: Bool[Array, "B F"] | None = None  # which latents fire in this batch; only `cofiring` reads it
    axes: Axes = struct.field(pytree_node=False, default=Axes())  # the devices that have other rows of the batch


def first_groups(config: PenaltyConfig, sae: SAEConfig) -> Int[Array, " F"]:
    """The initial group of each latent, where T_ij = [group of i = group of j].

    - contiguous: neighbours, `group_size` of them.
    - level: Matryoshka's levels.
    - parent: one group of all, as for `global`, until the first call of `assign_parents`.
    - others: one group of all.
    """
    if config.sharing == "contiguous":
        return jnp.arange(sae.F, dtype=jnp.int32) // config.group_size
    if config.sharing == "level":
        return bands(sae)
    return jnp.zeros(sae.F, jnp.int32)


def assign_parents(W_dec: Float[Array, "O D"], parents: int, axes: Axes = Axes()) -> Int[Array, " O"]:
    """The number of each latent's parent: the one of the first `parents` latents with the largest cosine.

    These first latents are their own parents. On several devices each has the rows of the latents that it owns.
    """
    units_OD, count = unit_rows(W_dec), len(W_dec)
    parents = min(parents, count * axes.devices)
    first_PD = axes.rows_of_owned(units_OD, jnp.arange(parents))
    nearest_O = jnp.argmax(units_OD @ first_PD.T, axis=1).astype(jnp.int32)
    ids_O = axes.first_owned(count) + jnp.arange(count, dtype=jnp.int32)
    return jnp.where(ids_O < parents, ids_O, nearest_O)


def sharing_weights(
    ids_CM: Int[Array, "C M"], structure: Structure, config: PenaltyConfig
) -> Float[Array, "C M M"] | float:
    """T_ij in [0, 1], the degree to which latents i and j may share direction under alpha, for each pair in a chunk.

    - global: 1.
    - contiguous, parent, level: 1 within a group, else 0.
    - cofiring: of the batch's rows in which the rarer of the two fires, the fraction in which the other fires too; 0 if
      the rarer one does not fire at all.
    """
    if config.sharing == "global":
        return 1.0
    if config.sharing == "cofiring":
        assert structure.active_BF is not None
        active_BCM = structure.active_BF.astype(jnp.float32)[:, ids_CM]
        both_CMM = structure.axes.sum_of_rows(jnp.einsum("bci,bcj->cij", active_BCM, active_BCM))
        counts_CM = structure.axes.sum_of_rows(jnp.sum(active_BCM, axis=0))
        rarer_CMM = jnp.minimum(counts_CM[:, :, None], counts_CM[:, None, :])
        return both_CMM / jnp.maximum(rarer_CMM, 1.0)
    groups_CM = structure.groups_F[ids_CM]
    return (groups_CM[:, :, None] == groups_CM[:, None, :]).astype(jnp.float32)


def tangent(gradient_FD: Float[Array, "F D"], unit_FD: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """The gradient without its component along the unit rows: the part that turns them."""
    return gradient_FD - jnp.sum(gradient_FD * unit_FD, axis=1, keepdims=True) * unit_FD


def tangent_norms(gradient_FD: Float[Array, "F D"], unit_FD: Float[Array, "F D"]) -> Float[Array, " F"]:
    """The norm of each row of `tangent`, |g - (g . u) u|^2 = |g|^2 - (g . u)^2 (2 - |u|^2), from one pass over both.

    Its error is that of |g|^2: a tangent of less than about a thousandth of the gradient is lost in rounding.
    """
    along_F = jnp.sum(gradient_FD * unit_FD, axis=1)
    squares_F = jnp.sum(gradient_FD**2, axis=1) - along_F**2 * (2 - jnp.sum(unit_FD**2, axis=1))
    return jnp.sqrt(jnp.maximum(squares_F, 0.0))


def hinge_penalty(
    W_dec: Float[Array, "F D"],
    alpha: Float[Array, ""],
    structure: Structure,
    mu0: float,
    config: PenaltyConfig,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    """O: the one-sided squared hinge on cosines above mu0, estimated on a random partition into chunks of m latents.

        O = w * mean_i sum_{j in chunk(i), j != i} (1 - alpha T_ij) relu(u_i . u_j - mu0)^2

    u_i are the unit rows of W_dec. w is the inverse probability that a pair shares a chunk: (F - 1)/(m - 1) if m
    divides F. The estimate is unbiased over partitions, and exact if one chunk holds all latents. It costs F m D and
    never needs an F x F array. `yielding` decides which row of a pair the gradient turns. It changes neither the value
    nor the size of the gradient of a row that is turned. Tests hold `hafs_jax.fast.hinge` to this plain form.
    """
    F = W_dec.shape[0]
    chunks = partition(F, config.chunk_size, key)
    rows_CMD = unit_rows(W_dec)[chunks.ids_CM]
    fixed_CMD = jax.lax.stop_gradient(rows_CMD)
    onto_fixed = jnp.einsum("cid,cjd->cij", rows_CMD, fixed_CMD, preferred_element_type=jnp.float32)
    value = jax.lax.stop_gradient(onto_fixed)
    turns_CMM = turning(chunks.ids_CM, structure, config)
    cosines_CMM = value + 2 * turns_CMM * (onto_fixed - value)  # one product backward, not autodiff's two
    weights_CMM = pair_weights(chunks.ids_CM, chunks.real_CM, alpha, structure, config)
    return jnp.sum(weights_CMM * jax.nn.relu(cosines_CMM - mu0) ** 2) * ((F - 1) / max(chunks.pairs, 1))


def pair_weights(
    ids_CM: Int[Array, "C M"],
    real_CM: Bool[Array, "C M"],
    alpha: Float[Array, ""],
    structure: Structure,
    config: PenaltyConfig,
) -> Float[Array, "C M M"]:
    """1 - alpha T_ij for pairs of distinct latents; 0 for a latent with itself and for pairs with padding."""
    pairs_CMM = real_CM[:, :, None] & real_CM[:, None, :] & ~jnp.eye(ids_CM.shape[1], dtype=bool)[None]
    return jnp.where(pairs_CMM, 1.0 - alpha * sharing_weights(ids_CM, structure, config), 0.0)


def turning(ids_CM: Int[Array, "C M"], structure: Structure, config: PenaltyConfig) -> Float[Array, "C M #M"]:
    """1 where the penalty of the pair (i, j) turns i, else 0. The pair (j, i) turns j.

    Nothing else distinguishes the two: weights and cosines are symmetric.
    """
    if config.yielding == "both":
        return jnp.ones((*ids_CM.shape, 1))
    order_CM = ids_CM if config.yielding == "later" else -structure.rate_F[ids_CM]
    return (order_CM[:, :, None] >= order_CM[:, None, :]).astype(jnp.float32)


def ortsae_penalty(W_dec: Float[Array, "F D"], config: PenaltyConfig, key: Key[Array, ""]) -> Float[Array, ""]:
    """OrtSAE's penalty: mean_i (max_{j in chunk(i), j != i} u_i . u_j)^2, with chunks of at most `chunk_size` latents.

    The published method (arXiv 2509.22033) uses chunks of 8,192 latents. Smaller chunks lower the maximum, so the value
    depends on their size.
    """
    F = W_dec.shape[0]
    count = -(-F // config.chunk_size)
    chunks = partition(F, -(-F // count), key)
    rows_CMD = unit_rows(W_dec)[chunks.ids_CM]
    cosines_CMM = jnp.einsum("cid,cjd->cij", rows_CMD, rows_CMD, preferred_element_type=jnp.float32)
    others_CMM = chunks.real_CM[:, None, :] & ~jnp.eye(chunks.ids_CM.shape[1], dtype=bool)[None]
    largest_CM = jnp.max(jnp.where(others_CMM, cosines_CMM, -1.0), axis=-1)
    return jnp.sum(jnp.where(chunks.real_CM, largest_CM**2, 0.0)) / F


def frobenius_penalty(W_dec: Float[Array, "F D"]) -> Float[Array, ""]:
    """mean_i sum_{j != i} (u_i . u_j)^2 = (|U^T U|_F^2 - F) / F: exact over all pairs, at a cost of F D^2."""
    units_FD = unit_rows(W_dec)
    return jnp.sum((units_FD.T @ units_FD) ** 2) / len(units_FD) - 1.0


@dataclass(frozen=True)
class Penalty:
    """The facts about a penalty that training reads."""

    value: "Value"
    has_margin: bool = False  # it reads mu0, which is solved from the noise floor if the config has none


Value = Callable[
    [Float[Array, "F D"], Float[Array, ""], Structure, float, PenaltyConfig, Key[Array, ""]], Float[Array, ""]
]
"""(W_dec of unit rows, alpha, structure, mu0, config, key) -> the penalty O, before lambda."""


def _ortsae(
    W_dec: Array, alpha: Array, structure: Structure, mu0: float, config: PenaltyConfig, key: Array
) -> Float[Array, ""]:
    return (1.0 - alpha) * ortsae_penalty(W_dec, config, key)


def _frobenius(
    W_dec: Array, alpha: Array, structure: Structure, mu0: float, config: PenaltyConfig, key: Array
) -> Float[Array, ""]:
    return (1.0 - alpha) * frobenius_penalty(W_dec)


PENALTIES: dict[str, Penalty] = {
    "hinge": Penalty(hinge_penalty, has_margin=True),
    "ortsae": Penalty(_ortsae),
    "frob": Penalty(_frobenius),
}
"""Every penalty, by its name in `penalty.kind`. `hafs_jax.register_penalty` adds one."""


@dataclass(frozen=True)
class Chunks:
    """A random partition of the latents into chunks of one size."""

    ids_CM: Int[Array, "C M"]  # latent numbers; the last chunk is padded with the number of the last latent
    real_CM: Bool[Array, "C M"]  # False for this padding
    pairs: int  # number of ordered pairs of distinct latents that share a chunk


def partition(F: int, size: int, key: Key[Array, ""]) -> Chunks:
    """A random partition of F latents into chunks of `size`, at most F."""
    m = min(size, F)
    count = -(-F // m)
    order = jax.random.permutation(key, F).astype(jnp.int32)
    ids_CM = jnp.concatenate([order, jnp.full(count * m - F, F, jnp.int32)]).reshape(count, m)
    last = F - (count - 1) * m
    return Chunks(jnp.minimum(ids_CM, F - 1), ids_CM < F, (count - 1) * m * (m - 1) + last * (last - 1))


def noise_floor_margin(n_latents: int, d_model: int, floor: float) -> float:
    """mu0 at which the expected hinge penalty of F random unit rows in R^D is `floor`.

    It solves ((F-1)/D) G(mu0 sqrt D) = floor, where G(s) = (1 + s^2) Phi(-s) - s phi(s) is E[relu(z - s)^2] of a
    standard normal z. It is 0 if the penalty is below `floor` even without a margin.
    """

    def expected(mu0: float) -> float:
        s = mu0 * math.sqrt(d_model)
        upper_tail = 0.5 * math.erfc(s / math.sqrt(2))
        density = math.exp(-s * s / 2) / math.sqrt(2 * math.pi)
        return (n_latents - 1) / d_model * ((1 + s * s) * upper_tail - s * density)

    low, high = 0.0, 1.0
    if expected(low) <= floor:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > floor else (low, middle)
    return high


def coherence(
    W_dec: Float[Array, "O D"], most: int | None = None, chunk: int = 256, axes: Axes = Axes()
) -> dict[str, Float[Array, ""]]:
    """Measures of how far dictionary vectors share direction, by name.

    - coherence_mean: mean_i max_{j != i} u_i . u_j, the cosine of a latent with its nearest other latent.
    - coherence_max: max_i max_{j != i} u_i . u_j.
    - frobenius_excess: (|U^T U|_F^2 - F) / (F (F-1) / D), the mean squared cosine of distinct pairs over 1/D, its value
      for random rows.

    If there are more than `most` latents, the first two are over `most` evenly spaced latents i. Over all latents they
    cost as much as F / (5 B) dense steps. Cosines are computed in pieces [`chunk`, F]. On several devices each has the
    rows of the latents that it owns.
    """
    (own, D), units_OD = W_dec.shape, unit_rows(W_dec)
    F, own_O = own * axes.devices, axes.first_owned(own) + jnp.arange(own)
    count = F if most is None else min(most, F)
    chunks = -(-count // chunk)
    ids_CM = jnp.asarray(np.minimum(np.arange(chunks * chunk), count - 1) * F // count).reshape(chunks, chunk)

    def nearest(ids_M: Int[Array, " M"]) -> Float[Array, " M"]:
        cosines_MO = axes.rows_of_owned(units_OD, ids_M) @ units_OD.T
        return axes.largest(jnp.max(jnp.where(ids_M[:, None] == own_O[None], -jnp.inf, cosines_MO), axis=1))

    nearest_N = jax.lax.map(nearest, ids_CM).reshape(-1)[:count]
    squares = jnp.sum(axes.sum_of_all(units_OD.T @ units_OD) ** 2)
    return {
        "coherence_mean": jnp.mean(nearest_N),
        "coherence_max": jnp.max(nearest_N),
        "frobenius_excess": (squares - F) / (F * (F - 1) / D),
    }
