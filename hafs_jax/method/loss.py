"""The loss of a batch without the penalty, in its plain form. Pure functions.

    L = reconstruction + sparsity + revival of dead latents

L is in units of FVU: the residual of the batch over the variance of the store. For relu this is the usual
|x - x_hat|^2 + l1 |f|_1 divided by that constant. The reconstruction term of a Matryoshka SAE is the mean over its
prefixes, that of HierarchicalTopK the mean over its budgets. `hafs_jax.fast.objective` computes the same value and its
gradient faster.
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from hafs_jax.config import TrainConfig
from hafs_jax.method.architectures import ARCHITECTURES, Encoding, OperatingPoint
from hafs_jax.method.budgets import budget_changes
from hafs_jax.method.matryoshka import prefix_changes, prefix_errors, prefix_shares
from hafs_jax.method.revival import auxiliary_error, auxiliary_weight, pre_activation_loss
from hafs_jax.method.sae import encode
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.products import Params, matmul

Metrics = dict[str, Array]


class Weights(struct.PyTreeNode):
    """What the loss of one step takes from schedules and state. Constants: they get no gradient."""

    k: Int[Array, ""]
    coefficient: Float[Array, ""]
    is_dead_F: Bool[Array, " F"]


class Forward(struct.PyTreeNode):
    """What a forward pass returns beside the loss."""

    residual_BD: Float[Array, "B D"]
    parts: Metrics  # the terms of the loss, and FVU
    firing_F: Float[Array, " F"]  # number of rows in which each latent fires
    smallest: Float[
        Array, ""
    ]  # the smallest active latent, if the architecture learns a threshold; inf if none is active
    encoding: Encoding | None  # None if products are sparse or the batch was taken in blocks


def forward(
    params: Params,
    acts_BD: Array,
    target_BD: Array,
    weights: Weights,
    variance: Array,
    key: Key[Array, ""],
    config: TrainConfig,
    axes: Axes = Axes(),
) -> Forward:
    """The terms of any architecture's loss except the auxiliary loss, by products with all latents.

    `key` samples the prefixes of a Matryoshka SAE. On several devices means over rows and counts are of this device's
    rows, `firing_F` of its latents, while sums over latents are of all.
    """
    architecture, settings = ARCHITECTURES[config.sae.architecture], config.sparsity
    encoding = encode(params, acts_BD, config.sae, OperatingPoint(weights.k, axes=axes))
    latents_BF, parts = encoding.latents_BF, cast(Metrics, {})
    if architecture.nested:
        changes = prefix_changes(latents_BF, params, config.sae, key, axes)
    elif architecture.budgets:
        changes = budget_changes(latents_BF, params, config.sae, weights.k, axes)
    else:
        changes = [axes.over_latents(matmul(latents_BF, params["W_dec"], config.sae.compute_dtype))]
    errors_G, residual_BD = prefix_errors(changes, target_BD, params["b_dec"])
    parts["fvu"], parts["loss_reconstruction"] = errors_G[-1] / variance, jnp.mean(errors_G) / variance
    if architecture.extra is not None:
        parts["loss_reconstruction"] += architecture.extra(encoding, params, config.sae, target_BD) / variance
    if architecture.cost is not None:
        counted = encoding
        if architecture.nested:
            shares_F = axes.own_of_all(prefix_shares(config.sae, key))
            counted = encoding.replace(latents_BF=latents_BF * shares_F[None])
        cost = jnp.mean(architecture.cost(counted, params, config.sae))
        parts["loss_sparsity"] = weights.coefficient * cost / variance
    if settings.pre_activation > 0:
        revival = pre_activation_loss(params, encoding.pre_BF, weights.is_dead_F, axes)
        parts["loss_aux"] = settings.pre_activation * revival / variance
    active_BF = latents_BF > 0
    return Forward(
        residual_BD,
        parts,
        firing_F=jnp.sum(active_BF, axis=0, dtype=jnp.float32),
        smallest=jnp.min(jnp.where(active_BF, latents_BF, jnp.inf)) if architecture.learns_threshold else jnp.zeros(()),
        encoding=encoding,
    )


def total(params: Params, run: Callable[..., Forward], *rows: Float[Array, "B _"]) -> tuple[Float[Array, ""], Forward]:
    """The sum of the terms of the forward pass `run(params, *rows)`, and what the pass returned."""
    found = run(params, *rows)
    parts = found.parts
    parts.setdefault("loss_sparsity", jnp.zeros(()))
    parts.setdefault("loss_aux", jnp.zeros(()))
    return parts["loss_reconstruction"] + parts["loss_sparsity"] + parts["loss_aux"], found


def loss(
    params: Params,
    acts_BD: Float[Array, "B D"],
    target_BD: Float[Array, "B D_out"],
    weights: Weights,
    variance: Float[Array, ""],
    key: Key[Array, ""],
    config: TrainConfig,
) -> tuple[Float[Array, ""], Forward]:
    """The loss of scaled activations, all terms except the penalty, and what the forward pass returned.

    A test holds `hafs_jax.fast.objective` to this value and its gradient.
    """

    def run(params: Params, acts_BD: Array, target_BD: Array) -> Forward:
        return forward(params, acts_BD, target_BD, weights, variance, key, config)

    value, found = total(params, run, acts_BD, target_BD)
    if config.sparsity.aux > 0:
        residual_BD = jax.lax.stop_gradient(found.residual_BD)
        scale = auxiliary_weight(residual_BD, weights.is_dead_F, config.sparsity.aux)
        aux = scale * auxiliary_error(
            params, weights.is_dead_F, acts_BD, residual_BD, config.sparsity.aux_k, config.sae
        )
        found.parts["loss_aux"] += aux
        value += aux
    return value, found
