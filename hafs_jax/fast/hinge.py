"""The value and gradient of a penalty: a fast form for the hinge, autodiff for any other. Pure functions.

The plain twin is `hafs_jax.method.penalties`. On several devices each owns some rows of the decoder, and gets the
gradient of these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hafs_jax.config import PenaltyConfig
from hafs_jax.fast.lanes import Lanes
from hafs_jax.fast.plan import Plan
from hafs_jax.method.penalties import PENALTIES, Structure, pair_weights, partition, tangent, turning

_UNROLLED = 4  # chunks per iteration of the loop on a CPU; one per iteration takes 8% longer


def penalty_and_gradient(
    W_dec: Float[Array, "O D"],
    alpha: Float[Array, ""],
    structure: Structure,
    mu0: float,
    config: PenaltyConfig,
    key: Key[Array, ""],
    plan: Plan,
) -> tuple[Float[Array, ""], Float[Array, "O D"]]:
    """The config's penalty on a decoder of unit rows, before lambda, and the part of its gradient that turns them.

    Several devices divide the hinge's chunks among them. Any other penalty, and a hinge that reads which latents fire
    together, gets the whole decoder and is computed on each device.
    """
    axes, own = plan.axes, len(W_dec)
    if config.kind == "hinge" and (axes.devices == 1 or config.sharing != "cofiring"):
        return hinge_and_gradient(W_dec, alpha, structure, mu0, config, key, plan)
    whole_FD = axes.all_owned(W_dec)
    value, gradient_FD = jax.value_and_grad(PENALTIES[config.kind].value)(whole_FD, alpha, structure, mu0, config, key)
    if axes.devices > 1:
        gradient_FD = jax.lax.dynamic_slice_in_dim(gradient_FD, axes.first_owned(own), own)
    return value, tangent(gradient_FD, W_dec)


def hinge_and_gradient(
    W_dec: Float[Array, "O D"],
    alpha: Float[Array, ""],
    structure: Structure,
    mu0: float,
    config: PenaltyConfig,
    key: Key[Array, ""],
    plan: Plan,
) -> tuple[Float[Array, ""], Float[Array, "O D"]]:
    """`hinge_penalty` on a decoder of unit rows, and the part of its gradient that turns them.

    For latent i this gradient is a product with the chunk's own rows:

        sum_j H_ij u_j - (sum_j H_ij u_i . u_j) u_i

    H_ij is the derivative for the cosine of i and j. So each chunk is read only once. On a CPU the chunks are taken one
    after the other, each while it is in the cache.

    A chunk shows a latent n = m - 1 of its N = F - 1 others, drawn without replacement. So the mean squared error of
    its gradient is N (N - n) / n times the variance over all others j of H_ij (u_j - (u_i . u_j) u_i), computed with
    the divisor N - 1.
    """
    axes, (own, D) = plan.axes, W_dec.shape
    F = own * axes.devices
    chunks = partition(F, config.chunk_size, key)
    scale = (F - 1) / max(chunks.pairs, 1)

    def of_chunk(chunk: tuple[Array, Array], rows_MD: Array) -> tuple[Array, Array]:
        ids_1M, real_1M = chunk[0][None], chunk[1][None]
        cosines_MM = rows_MD @ rows_MD.T
        above_MM = pair_weights(ids_1M, real_1M, alpha, structure, config)[0] * jax.nn.relu(cosines_MM - mu0)
        total = jnp.sum(above_MM * jax.nn.relu(cosines_MM - mu0))
        slopes_MM = 4 * above_MM * turning(ids_1M, structure, config)[0]
        along_M = jnp.sum(slopes_MM * cosines_MM, axis=1)
        return scale * total, scale * (slopes_MM - jnp.diag(along_M)) @ rows_MD

    numbers_F = jnp.arange(F, dtype=jnp.int32)
    places_F = jnp.zeros_like(numbers_F).at[chunks.ids_CM.reshape(-1)[:F]].set(numbers_F, unique_indices=True)
    if axes.devices == 1:
        totals_C, gradient_CMD = _each(
            lambda chunk: of_chunk(chunk, W_dec[chunk[0]]), (chunks.ids_CM, chunks.real_CM), plan
        )
        return jnp.sum(totals_C), gradient_CMD.reshape(-1, D)[places_F]
    lanes = Lanes(places_F, chunks.ids_CM.shape, own, axes)
    own_chunks = lanes.own_chunks(chunks.ids_CM), lanes.own_chunks(chunks.real_CM), lanes.to_chunks(W_dec)
    totals_C, gradient_CMD = _each(lambda chunk: of_chunk(chunk[:2], chunk[2]), own_chunks, plan)
    return axes.sum_of_all(jnp.sum(totals_C)), lanes.to_owners(gradient_CMD)


def _each(function: Callable[[Any], tuple[Array, Array]], chunks: Any, plan: Plan) -> tuple[Array, Array]:
    """The function of each chunk; on a CPU of one after the other."""
    if plan.on_cpu:
        _, found = jax.lax.scan(lambda _, chunk: (None, function(chunk)), None, chunks, unroll=_UNROLLED)
        return found
    return jax.vmap(function)(chunks)
