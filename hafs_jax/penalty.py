"""The decoder's orthogonality penalty, its noise floor, and the coherence figures logged beside it. Pure functions."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from hafs_jax.config import PenaltyConfig
from hafs_jax.sae import unit_rows


def sharing_weights(ids_M: Int[Array, "... M"], config: PenaltyConfig) -> Float[Array, "... M M"]:
    """T_ij, 1 where latents i and j may share direction under alpha, else 0, for chunks of latent numbers.

    `global`: every pair. `contiguous`: pairs of the same group of `group_size` neighbouring latents.
    """
    if config.sharing == "global":
        return jnp.ones((*ids_M.shape, ids_M.shape[-1]), jnp.float32)
    groups_M = ids_M // config.group_size
    return (groups_M[..., :, None] == groups_M[..., None, :]).astype(jnp.float32)


def hinge_penalty(
    W_dec: Float[Array, "F D"],
    alpha: Float[Array, ""],
    mu0: float,
    config: PenaltyConfig,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    """O: the one-sided squared hinge on cosines above mu0, estimated on a random partition into chunks of m.

    O = w * mean_i sum_{j in chunk(i), j != i} (1 - alpha T_ij) relu(u_i . u_j - mu0)^2, u the unit rows of W_dec, with
    w the inverse probability that a pair shares a chunk: (F - 1)/(m - 1) where m divides F. Unbiased over partitions;
    exact where one chunk holds all latents. Cost F m D, never F x F.
    """
    F = W_dec.shape[0]
    m = min(config.chunk_size, F)
    chunks = -(-F // m)
    order = jax.random.permutation(key, F)
    ids_CM = jnp.concatenate([order, jnp.full(chunks * m - F, F, order.dtype)]).reshape(chunks, m)
    real_CM = ids_CM < F
    rows_CMD = unit_rows(W_dec)[jnp.minimum(ids_CM, F - 1)]
    cosines_CMM = jnp.einsum("cid,cjd->cij", rows_CMD, rows_CMD, preferred_element_type=jnp.float32)
    pairs_CMM = real_CM[:, :, None] & real_CM[:, None, :] & ~jnp.eye(m, dtype=bool)[None]
    weights_CMM = jnp.where(pairs_CMM, 1.0 - alpha * sharing_weights(ids_CM, config), 0.0)
    total = jnp.sum(weights_CMM * jax.nn.relu(cosines_CMM - mu0) ** 2)
    last = F - (chunks - 1) * m
    pairs_seen = (chunks - 1) * m * (m - 1) + last * (last - 1)
    return total / F * (F * (F - 1) / max(pairs_seen, 1))


def noise_floor_margin(n_latents: int, d_model: int, floor: float) -> float:
    """mu0 at which the penalty of F random unit rows in R^D is `floor`: solves ((F-1)/D) G(mu0 sqrt D) = floor.

    G(s) = (1 + s^2) Phi(-s) - s phi(s) is E[relu(z - s)^2] of a standard normal z. 0 where even the whole positive
    half is below the floor.
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


def coherence(W_dec: Float[Array, "F D"], chunk: int = 1024) -> dict[str, Float[Array, ""]]:
    """Mean and maximum over latents of the nearest other latent's cosine, and the Frobenius excess.

    coherence_mean = mean_i max_{j != i} u_i . u_j, coherence_max its maximum over i, and frobenius_excess =
    (|U^T U|_F^2 - F) / (F (F-1) / D): the mean squared cosine of distinct pairs relative to random rows' 1/D.
    Chunked: `chunk` x F cosines at a time.
    """
    F, D = W_dec.shape
    units_FD = unit_rows(W_dec)
    chunks = -(-F // chunk)
    ids_CM = jnp.minimum(jnp.arange(chunks * chunk), F - 1).reshape(chunks, chunk)

    def nearest(ids_M: Int[Array, " M"]) -> Float[Array, " M"]:
        cosines_MF = units_FD[ids_M] @ units_FD.T
        return jnp.max(jnp.where(ids_M[:, None] == jnp.arange(F)[None], -jnp.inf, cosines_MF), axis=1)

    nearest_F = jax.lax.map(nearest, ids_CM).reshape(-1)[:F]
    squares = jnp.sum((units_FD.T @ units_FD) ** 2)
    return {
        "coherence_mean": jnp.mean(nearest_F),
        "coherence_max": jnp.max(nearest_F),
        "frobenius_excess": (squares - F) / (F * (F - 1) / D),
    }
