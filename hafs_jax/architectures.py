"""The SAE architectures: each one pure function from pre-activations to latents, and one line in ARCHITECTURES."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hafs_jax.config import SAEConfig
from hafs_jax.selection import count_threshold

Activate = Callable[[Float[Array, "B F"], SAEConfig, Float[Array, ""] | None], Float[Array, "B F"]]
"""(pre_BF, config, threshold) -> latents_BF; `threshold` is None in training, the learned threshold at inference."""


@dataclass(frozen=True)
class Architecture:
    """What training and export need to know of an architecture."""

    activate: Activate
    uses_l1: bool  # its sparsity is paid for by L1 x decoder norm; otherwise the activation fixes L0
    learns_threshold: bool  # inference compares with a moving average of training's smallest active latent
    uses_aux: bool  # dead latents are revived by the auxiliary reconstruction


def relu(
    pre_BF: Float[Array, "B F"], config: SAEConfig, threshold: Float[Array, ""] | None = None
) -> Float[Array, "B F"]:
    """max(0, pre)."""
    return jax.nn.relu(pre_BF)


def topk(
    pre_BF: Float[Array, "B F"], config: SAEConfig, threshold: Float[Array, ""] | None = None
) -> Float[Array, "B F"]:
    """The k largest of each row's relu(pre), the rest zero, in training and at inference (Gao et al. 2024, 2406.04093).

    Ties at a row's smallest kept value are all kept; entries that are not positive never are.
    """
    positive_BF = jax.nn.relu(pre_BF)
    smallest_B1 = jax.lax.top_k(jax.lax.stop_gradient(positive_BF), config.k)[0][:, -1:]
    return jnp.where(positive_BF >= jnp.maximum(smallest_B1, jnp.finfo(jnp.float32).tiny), positive_BF, 0.0)


def batchtopk(
    pre_BF: Float[Array, "B F"], config: SAEConfig, threshold: Float[Array, ""] | None = None
) -> Float[Array, "B F"]:
    """Training: the B*k largest of relu(pre) over the batch, the rest zero. Inference: relu(pre) where pre > threshold.

    Ties at the smallest kept value are all kept. The gradient passes through the kept entries unchanged
    (Bussmann et al. 2024, arXiv 2412.06410).
    """
    positive_BF = jax.nn.relu(pre_BF)
    if threshold is not None:
        return jnp.where(pre_BF > threshold, positive_BF, 0.0)
    smallest = count_threshold(jax.lax.stop_gradient(positive_BF), pre_BF.shape[0] * config.k)
    return jnp.where(positive_BF >= jnp.maximum(smallest, jnp.finfo(jnp.float32).tiny), positive_BF, 0.0)


ARCHITECTURES: dict[str, Architecture] = {
    "batchtopk": Architecture(batchtopk, uses_l1=False, learns_threshold=True, uses_aux=True),
    "topk": Architecture(topk, uses_l1=False, learns_threshold=False, uses_aux=True),
    "relu": Architecture(relu, uses_l1=True, learns_threshold=False, uses_aux=False),
}
