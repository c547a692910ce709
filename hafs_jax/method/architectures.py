"""The SAE architectures: each is a pure function from pre-activations to latents and one line in ARCHITECTURES.

The fields of that line hold what else an architecture has:

- parameters beyond W_enc, b_enc, W_dec and b_dec;
- the sparsity cost, which the sparsity coefficient multiplies;
- further loss terms.

The model (`method.sae`) and the training step read only this line, so they work for every architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hafs_jax.config import SAEConfig
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.products import Params, matmul
from hafs_jax.ops.selection import batch_threshold, largest_values

_TINY = float(jnp.finfo(jnp.float32).tiny)


class OperatingPoint(struct.PyTreeNode):
    """The settings of the activation function at one call: k of this step; at inference also the learned threshold."""

    k: Int[Array, ""] | int
    threshold: Float[Array, ""] | None = None  # None in training
    axes: Axes = struct.field(pytree_node=False, default=Axes())  # the devices that rows and latents are split over


class Encoding(struct.PyTreeNode):
    """The output of the encoder: pre-activations and latents; on several devices those of this device's latents."""

    pre_BF: Float[Array, "B F"]
    latents_BF: Float[Array, "B F"]
    axes: Axes = struct.field(pytree_node=False, default=Axes())  # as in `OperatingPoint`


Activate = Callable[[Float[Array, "B F"], Params, SAEConfig, OperatingPoint], Float[Array, "B F"]]
"""(pre_BF, params, config, at) -> latents_BF, all at least 0."""

Cost = Callable[[Encoding, Params, SAEConfig], Float[Array, " B"]]
"""(encoding, params, config) -> the sparsity cost of each row, before the sparsity coefficient."""

Extra = Callable[[Encoding, Params, SAEConfig, Float[Array, "B D"]], Float[Array, ""]]
"""(encoding, params, config, target_BD) -> a further mean squared error, which the loss divides by the variance."""


@dataclass(frozen=True)
class SAELensForm:
    """How the library SAELens saves an architecture: its name in cfg.json and the names of its tensors."""

    sae: str  # `architecture` in cfg.json for an autoencoder
    transcoder: str | None = None  # the same for a transcoder; None: SAELens has no such class
    repeats_threshold: bool = False  # SAELens needs one threshold per latent: our single number is written F times
    renamed: Mapping[str, str] = field(default_factory=dict)  # our parameter -> SAELens's name for that tensor


@dataclass(frozen=True)
class Architecture:
    """The facts about an architecture that training and export read."""

    activate: Activate
    cost: Cost | None = None  # times a coefficient it decides L0; None: the activation function itself fixes L0
    extra: Extra | None = None  # a further loss term
    params: Mapping[str, Callable[[SAEConfig], float]] = field(default_factory=dict)  # name -> initial value of all F
    learns_threshold: bool = False  # inference uses a moving average of the smallest active latent of training batches
    starts_dense: bool = False  # with zero biases about half of the latents are active
    nested: bool = False  # the loss is the mean over nested prefixes of the dictionary
    budgets: bool = False  # the loss is the mean over several numbers of a row's largest latents
    splits: bool = False  # its functions are right on some of the latents: what they need of others they ask `axes` for
    saelens: SAELensForm | None = None  # None: the SAE trains and loads here, but cannot be exported


def relu(pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint) -> Float[Array, "B F"]:
    """max(0, pre)."""
    return jax.nn.relu(pre_BF)


def topk(pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint) -> Float[Array, "B F"]:
    """The k largest entries of each row of relu(pre), the rest zero, in training and at inference.

    All entries equal to a row's smallest selected one are selected too. Entries that are not positive never are.
    Source: Gao et al. 2024 (arXiv 2406.04093).
    """
    positive_BF = jax.nn.relu(pre_BF)
    largest_BK = largest_values(jax.lax.stop_gradient(positive_BF), config.largest_k, at.axes)
    smallest_B1 = jax.lax.dynamic_slice_in_dim(largest_BK, at.k - 1, 1, axis=1)
    return jnp.where(positive_BF >= jnp.maximum(smallest_B1, _TINY), positive_BF, 0.0)


def batchtopk(
    pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint
) -> Float[Array, "B F"]:
    """The B k largest entries of relu(pre) in the batch, the rest zero; at inference relu(pre) where pre > threshold.

    All entries equal to the smallest selected one are selected too. The gradient passes through the selected entries
    unchanged. Source: Bussmann et al. 2024 (arXiv 2412.06410).
    """
    positive_BF = jax.nn.relu(pre_BF)
    if at.threshold is not None:
        return jnp.where(pre_BF > at.threshold, positive_BF, 0.0)
    B = len(pre_BF) * at.axes.data
    smallest = batch_threshold(jax.lax.stop_gradient(positive_BF), B * config.largest_k, B * at.k, at.axes)
    return jnp.where(positive_BF >= jnp.maximum(smallest, _TINY), positive_BF, 0.0)


def jumprelu(pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint) -> Float[Array, "B F"]:
    """pre where pre > theta, else 0, with a learned threshold theta for each latent.

    The gradient for theta is the straight-through estimate with a rectangular kernel of width `bandwidth`:

        d/dtheta = -(theta / bandwidth) [|pre - theta| < bandwidth / 2]

    With `threshold_gradient_to_input`, the negative of this is added to the plain gradient for pre. theta and the
    kernel are float32. Source: Rajamanoharan et al. 2024 (arXiv 2407.14435).
    """
    threshold_F = params["threshold"]
    active_BF = jnp.where(pre_BF > threshold_F[None], jax.nn.relu(pre_BF), 0.0)
    return active_BF + jax.lax.stop_gradient(threshold_F)[None] * _step_estimator(pre_BF, threshold_F, config)


def gated(pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint) -> Float[Array, "B F"]:
    """[pre > 0] relu((pre - b_enc) exp(r_mag) + b_mag): a gate and a magnitude that share the directions W_enc.

    b_enc is the bias of the gate. No gradient passes through the gate here. It learns from its own L1 (`gate_l1`) and
    from `gate_reconstruction`. Source: Rajamanoharan et al. 2024 (arXiv 2404.16014).
    """
    magnitude_BF = (pre_BF - params["b_enc"][None]) * jnp.exp(params["r_mag"])[None] + params["b_mag"][None]
    return jnp.where(pre_BF > 0, jax.nn.relu(magnitude_BF), 0.0)


def l1(encoding: Encoding, params: Params, config: SAEConfig) -> Float[Array, " B"]:
    """The sum of each row's latents. It equals L1 x decoder norm, since the decoder's rows have unit norm."""
    return encoding.axes.over_latents(jnp.sum(encoding.latents_BF, axis=1))


def gate_l1(encoding: Encoding, params: Params, config: SAEConfig) -> Float[Array, " B"]:
    """The sum of each row's relu(pre): L1 of the gate's positive pre-activations."""
    return encoding.axes.over_latents(jnp.sum(jax.nn.relu(encoding.pre_BF), axis=1))


def l0(encoding: Encoding, params: Params, config: SAEConfig) -> Float[Array, " B"]:
    """The cost of each row's number of active latents n, of the kind that `l0_loss` names.

    - target: k (mean of n over the batch / k - 1)^2, the same for all rows. It brings L0 to k from both sides.
    - step: n (Rajamanoharan et al. 2024, arXiv 2407.14435).
    - quadratic: 2 (n - k)^2 / k. It also brings L0 to k from both sides.
    - tanh: the sum of tanh(4 latent).

    `target` is the default because a controller of the coefficient of `step` oscillates: thresholds take many steps to
    follow a coefficient, and reconstruction alone drives L0 below k early in training. The gradient of n is the
    straight-through estimate of `jumprelu` without its factor theta.
    """
    axes = encoding.axes
    if config.l0_loss == "tanh":
        return axes.over_latents(jnp.sum(jnp.tanh(4.0 * encoding.latents_BF), axis=1))
    threshold_F = params["threshold"]
    active_BF = jnp.where(encoding.pre_BF > threshold_F[None], 1.0, 0.0)
    active_B = jnp.sum(active_BF + _step_estimator(encoding.pre_BF, threshold_F, config), axis=1)
    active_B = axes.over_latents(active_B)
    if config.l0_loss == "quadratic":
        return 2.0 / config.k * (active_B - config.k) ** 2
    if config.l0_loss == "step":
        return active_B
    return jnp.broadcast_to(config.k * (axes.over_rows(jnp.mean(active_B)) / config.k - 1.0) ** 2, active_B.shape)


def gate_reconstruction(
    encoding: Encoding, params: Params, config: SAEConfig, target_BD: Float[Array, "B D"]
) -> Float[Array, ""]:
    """The mean over rows of |target - (relu(pre) W_dec + b_dec)|^2, from which the gate learns.

    The decoder is a constant here: it gets no gradient.
    """
    fixed = jax.lax.stop_gradient({"W_dec": params["W_dec"], "b_dec": params["b_dec"]})
    product_BD = matmul(jax.nn.relu(encoding.pre_BF), fixed["W_dec"], config.compute_dtype)
    recon_BD = encoding.axes.over_latents(product_BD) + fixed["b_dec"][None]
    return jnp.mean(jnp.sum((target_BD - recon_BD) ** 2, axis=1))


def _step_estimator(
    pre_BF: Float[Array, "B F"], threshold_F: Float[Array, " F"], config: SAEConfig
) -> Float[Array, "B F"]:
    """Zeros with the straight-through gradient of the step [pre > theta].

    That gradient is -kernel for theta and, with `threshold_gradient_to_input`, +kernel for pre. The kernel is
    1 / bandwidth where |pre - theta| < bandwidth / 2, else 0.
    """
    distance_BF = pre_BF - threshold_F[None]
    near_BF = jax.lax.stop_gradient(jnp.abs(distance_BF) < 0.5 * config.bandwidth).astype(jnp.float32)
    if not config.threshold_gradient_to_input:
        distance_BF = jax.lax.stop_gradient(pre_BF) - threshold_F[None]
    return near_BF / config.bandwidth * (distance_BF - jax.lax.stop_gradient(distance_BF))


def _zero(config: SAEConfig) -> float:
    return 0.0


def _first_threshold(config: SAEConfig) -> float:
    """`config.first_threshold`; if that is None, the value that 2 k of F standard normals exceed on average.

    Inputs have mean square 1 in each direction, so the pre-activations of a random unit encoder are roughly standard
    normal. The value is multiplied by `encoder_scale`. From a low threshold the L0 controller overshoots, and latents
    that were switched off do not come back.
    """
    if config.first_threshold is not None:
        return config.first_threshold
    return max(NormalDist().inv_cdf(1 - min(2 * config.k / config.F, 0.5)), 0.0) * (config.encoder_scale or 1.0)


_TOPK = SAELensForm("topk")
_STANDARD = SAELensForm("standard", "transcoder")
_ONE_THRESHOLD = SAELensForm("jumprelu", "jumprelu_transcoder", repeats_threshold=True)

ARCHITECTURES: dict[str, Architecture] = {
    "batchtopk": Architecture(batchtopk, learns_threshold=True, splits=True, saelens=_ONE_THRESHOLD),
    "topk": Architecture(topk, splits=True, saelens=_TOPK),
    "hierarchical_topk": Architecture(topk, budgets=True, splits=True, saelens=_TOPK),
    "relu": Architecture(relu, cost=l1, starts_dense=True, splits=True, saelens=_STANDARD),
    "jumprelu": Architecture(
        jumprelu,
        cost=l0,
        params={"threshold": _first_threshold},
        splits=True,
        saelens=SAELensForm("jumprelu", "jumprelu_transcoder"),
    ),
    "gated": Architecture(
        gated,
        cost=gate_l1,
        extra=gate_reconstruction,
        params={"r_mag": _zero, "b_mag": _zero},
        starts_dense=True,
        splits=True,
        saelens=SAELensForm("gated", renamed={"b_enc": "b_gate"}),
    ),
    "matryoshka": Architecture(batchtopk, learns_threshold=True, nested=True, splits=True, saelens=_ONE_THRESHOLD),
    "matryoshka_relu": Architecture(relu, cost=l1, starts_dense=True, nested=True, splits=True, saelens=_STANDARD),
}
"""Every architecture, by its name. `hafs_jax.register_architecture` adds one."""
