"""Loss terms that revive dead latents. Pure functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hafs_jax.config import SAEConfig
from hafs_jax.method.sae import pre_activations
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.products import Params, matmul
from hafs_jax.ops.selection import kth_largest_of_rows


def auxiliary_error(
    params: Params,
    is_dead_F: Bool[Array, " F"],
    acts_BD: Float[Array, "B D"],
    residual_BD: Float[Array, "B D_out"],
    aux_k: int,
    config: SAEConfig,
    axes: Axes = Axes(),
) -> Float[Array, ""]:
    """The sum over rows of |e - e_hat|^2: e is the residual, e_hat its reconstruction by dead latents.

    Each row is reconstructed by its `aux_k` most active dead latents. e is a constant here. `params` and `is_dead_F`
    may hold only some of the latents. Source: Gao et al. 2024 (arXiv 2406.04093), appendix A.2.
    """
    dead_BF = jnp.where(is_dead_F[None], jax.nn.relu(pre_activations(params, acts_BD, config, axes)), 0.0)
    if aux_k < dead_BF.shape[1] * axes.latent:
        smallest_B = kth_largest_of_rows(jax.lax.stop_gradient(dead_BF), aux_k, axes)
        dead_BF = jnp.where(dead_BF >= smallest_B[:, None], dead_BF, 0.0)
    change_BD = axes.over_latents(matmul(dead_BF, params["W_dec"], config.compute_dtype))
    return jnp.sum((residual_BD - change_BD) ** 2)


def auxiliary_weight(
    residual_BD: Float[Array, "B D_out"], is_dead_F: Bool[Array, " F"], weight: float, axes: Axes = Axes()
) -> Float[Array, ""]:
    """weight / |e|^2, the factor of `auxiliary_error` in the loss; 0 while no latent is dead."""
    squares = axes.over_rows(jnp.sum(residual_BD**2))
    return jnp.where(axes.any_latent(jnp.any(is_dead_F)), weight, 0.0) / jnp.maximum(squares, 1e-20)


def pre_activation_loss(
    params: Params, pre_BF: Float[Array, "B F"], is_dead_F: Bool[Array, " F"], axes: Axes = Axes()
) -> Float[Array, ""]:
    """The mean over rows of the sum over dead latents of relu(threshold - pre).

    A latent that never reaches its threshold has no other gradient. The threshold is a constant here, and 0 for
    architectures that learn none. Source: Anthropic's "update on the SAE training" (January 2025), restricted here to
    dead latents.
    """
    threshold_F = jax.lax.stop_gradient(params.get("threshold", jnp.zeros_like(params["b_enc"])))
    below_BF = jnp.where(is_dead_F[None], jax.nn.relu(threshold_F[None] - pre_BF), 0.0)
    return axes.over_latents(jnp.mean(jnp.sum(below_BF, axis=1)))
