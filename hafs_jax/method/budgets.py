"""HierarchicalTopK: one SAE for several numbers of active latents, its *budgets*. Pure functions.

The loss is the mean over the budgets j of |x - x_hat_j|^2, where x_hat_j is the reconstruction by the row's j largest
latents alone. A *band* is what one budget has beyond the smaller one before it. Source: Balagansky et al. 2025 (arXiv
2505.24473), whose budgets are 1 to K, or a subset of these; a subset as here costs one sum over bands.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hafs_jax.config import SAEConfig
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.products import Params, matmul
from hafs_jax.ops.selection import largest_values


def budget_counts(config: SAEConfig, k: Int[Array, ""] | int) -> Int[Array, " G"]:
    """The budgets: each fraction in `config.budgets` times k, rounded, at least 1; rising, the last of them k."""
    return jnp.maximum(jnp.round(jnp.asarray(config.budgets) * k), 1).astype(jnp.int32)


def budget_changes(
    latents_BF: Float[Array, "B F"],
    params: Params,
    config: SAEConfig,
    k: Int[Array, ""] | int,
    axes: Axes = Axes(),
) -> list[Float[Array, "B D"]]:
    """What each band adds to the reconstruction, at one decoder product a band.

    Of entries that tie at the end of a band, all belong to it.
    """
    largest_BK = largest_values(jax.lax.stop_gradient(latents_BF), config.largest_k, axes)
    changes, before_B1 = [], jnp.full((len(latents_BF), 1), jnp.inf)
    for count in budget_counts(config, k):
        smallest_B1 = jax.lax.dynamic_slice_in_dim(largest_BK, count - 1, 1, axis=1)
        band_BF = jnp.where((latents_BF >= smallest_B1) & (latents_BF < before_B1), latents_BF, 0.0)
        changes.append(axes.over_latents(matmul(band_BF, params["W_dec"], config.compute_dtype)))
        before_B1 = smallest_B1
    return changes


def budget_bands(entries: int, config: SAEConfig, k: Int[Array, ""] | int) -> Int[Array, " N"]:
    """The number of the band of each of N entries: a row's `largest_k` largest latents, falling, row after row.

    Entries beyond the k largest, which must be zero, count as of the last band.
    """
    rank_N = jnp.arange(entries, dtype=jnp.int32) % config.largest_k
    band_N = jnp.searchsorted(budget_counts(config, k), rank_N, side="right")
    return jnp.minimum(band_N, len(config.budgets) - 1).astype(jnp.int32)
