"""Loss terms that bring dead latents back. Pure functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hafs_jax.config import SAEConfig
from hafs_jax.method.sae import pre_bias
from hafs_jax.ops.products import Params, matmul
from hafs_jax.ops.selection import kth_largest_of_rows


def auxiliary_error(
    params: Params,
    is_dead_F: Bool[Array, " F"],
    acts_BD: Float[Array, "B D"],
    residual_BD: Float[Array, "B D_out"],
    aux_k: int,
    config: SAEConfig,
) -> Float[Array, ""]:
    """sum |e - e_hat|^2 over rows: e the residual (a constant), e_hat the sum of the top `aux_k` dead latents.

    Gao et al. 2024 (arXiv 2406.04093), appendix A.2. Params may hold some of the latents alone: `is_dead_F` is then of
    those.
    """
    pre_BF = matmul(acts_BD, params["W_enc"], config.compute_dtype) + pre_bias(params, config)[None]
    dead_BF = jnp.where(is_dead_F[None], jax.nn.relu(pre_BF), 0.0)
    if aux_k < dead_BF.shape[1]:
        smallest_B = kth_largest_of_rows(jax.lax.stop_gradient(dead_BF), aux_k)
        dead_BF = jnp.where(dead_BF >= smallest_B[:, None], dead_BF, 0.0)
    return jnp.sum((residual_BD - matmul(dead_BF, params["W_dec"], config.compute_dtype)) ** 2)


def auxiliary_weight(
    residual_BD: Float[Array, "B D_out"], is_dead_F: Bool[Array, " F"], weight: float
) -> Float[Array, ""]:
    """weight / |e|^2: what `auxiliary_error` counts in the loss. 0 while no latent is dead."""
    return jnp.where(jnp.any(is_dead_F), weight, 0.0) / jnp.maximum(jnp.sum(residual_BD**2), 1e-20)


def pre_activation_loss(params: Params, pre_BF: Float[Array, "B F"], is_dead_F: Bool[Array, " F"]) -> Float[Array, ""]:
    """Mean over rows of the sum over dead latents of relu(threshold - pre), the threshold 0 where none is learned.

    Anthropic's "update on the SAE training" (January 2025), here for dead latents alone: what never reaches its
    threshold has no other gradient. The threshold is a constant of it.
    """
    threshold_F = jax.lax.stop_gradient(params.get("threshold", jnp.zeros_like(params["b_enc"])))
    short_BF = jnp.where(is_dead_F[None], jax.nn.relu(threshold_F[None] - pre_BF), 0.0)
    return jnp.mean(jnp.sum(short_BF, axis=1))
