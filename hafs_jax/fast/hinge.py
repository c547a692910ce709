"""The value and gradient of a penalty: a fast form for the hinge, autodiff for any other. Pure functions.

The plain twin is `hafs_jax.method.penalties`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hafs_jax.config import PenaltyConfig
from hafs_jax.fast.plan import Plan
from hafs_jax.method.penalties import PENALTIES, Structure, pair_weights, partition, tangent, turning

_UNROLLED = 4  # chunks per iteration of the loop on a CPU; one per iteration takes 8% longer


def penalty_and_gradient(
    W_dec: Float[Array, "F D"],
    alpha: Float[Array, ""],
    structure: Structure,
    mu0: float,
    config: PenaltyConfig,
    key: Key[Array, ""],
    plan: Plan,
) -> tuple[Float[Array, ""], Float[Array, "F D"]]:
    """The config's penalty on a decoder of unit rows, before lambda, and the part of its gradient that turns them."""
    if config.kind == "hinge":
        return hinge_and_gradient(W_dec, alpha, structure, mu0, config, key, plan)
    value, gradient_FD = jax.value_and_grad(PENALTIES[config.kind].value)(W_dec, alpha, structure, mu0, config, key)
    return value, tangent(gradient_FD, W_dec)


def hinge_and_gradient(
    W_dec: Float[Array, "F D"],
    alpha: Float[Array, ""],
    structure: Structure,
    mu0: float,
    config: PenaltyConfig,
    key: Key[Array, ""],
    plan: Plan,
) -> tuple[Float[Array, ""], Float[Array, "F D"]]:
    """`hinge_penalty` on a decoder of unit rows, and the part of its gradient that turns them.

    For latent i this gradient is a product with the chunk's own rows:

        sum_j H_ij u_j - (sum_j H_ij u_i . u_j) u_i

    H_ij is the derivative for the cosine of i and j. So each chunk is read only once. On a CPU the chunks are taken one
    after the other, each while it is in the cache.

    A chunk shows a latent n = m - 1 of its N = F - 1 others, drawn without replacement. So the mean squared error of
    its gradient is N (N - n) / n times the variance over all others j of H_ij (u_j - (u_i . u_j) u_i), computed with
    the divisor N - 1.
    """
    F, D = W_dec.shape
    chunks = partition(F, config.chunk_size, key)
    scale = (F - 1) / max(chunks.pairs, 1)

    def of_chunk(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        ids_1M, real_1M = chunk[0][None], chunk[1][None]
        rows_MD = W_dec[chunk[0]]
        cosines_MM = rows_MD @ rows_MD.T
        above_MM = pair_weights(ids_1M, real_1M, alpha, structure, config)[0] * jax.nn.relu(cosines_MM - mu0)
        total = jnp.sum(above_MM * jax.nn.relu(cosines_MM - mu0))
        slopes_MM = 4 * above_MM * turning(ids_1M, structure, config)[0]
        along_M = jnp.sum(slopes_MM * cosines_MM, axis=1)
        return scale * total, scale * (slopes_MM - jnp.diag(along_M)) @ rows_MD

    each = chunks.ids_CM, chunks.real_CM
    if plan.on_cpu:
        _, of_each = jax.lax.scan(lambda _, chunk: (None, of_chunk(chunk)), None, each, unroll=_UNROLLED)
    else:
        of_each = jax.vmap(of_chunk)(each)
    totals_C, gradient_CMD = of_each
    numbers_F = jnp.arange(F, dtype=jnp.int32)
    places_F = jnp.zeros_like(numbers_F).at[chunks.ids_CM.reshape(-1)[:F]].set(numbers_F, unique_indices=True)
    return jnp.sum(totals_C), gradient_CMD.reshape(-1, D)[places_F]
