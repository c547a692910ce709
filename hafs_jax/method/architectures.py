"""The SAE architectures: each one pure function from pre-activations to latents, and one line in ARCHITECTURES.

Parameters beyond W_enc, b_enc, W_dec and b_dec, what a sparsity coefficient multiplies, and further loss terms are
fields of that line. `sae` applies these functions, `step` trains with them; both work for any entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hafs_jax.config import SAEConfig
from hafs_jax.ops.products import Params, matmul
from hafs_jax.ops.selection import batch_threshold, top_of_rows

_TINY = float(jnp.finfo(jnp.float32).tiny)


class OperatingPoint(struct.PyTreeNode):
    """What the activation is set to: k of this step in training, the learned threshold at inference."""

    k: Int[Array, ""] | int
    threshold: Float[Array, ""] | None = None  # None in training


class Encoding(struct.PyTreeNode):
    """What the encoder computed: pre-activations and the latents that the architecture kept."""

    pre_BF: Float[Array, "B F"]
    latents_BF: Float[Array, "B F"]


Activate = Callable[[Float[Array, "B F"], Params, SAEConfig, OperatingPoint], Float[Array, "B F"]]
"""(pre_BF, params, config, at) -> latents_BF, not negative."""

Cost = Callable[[Encoding, Params, SAEConfig], Float[Array, " B"]]
"""(encoding, params, config) -> what each row pays, times the sparsity coefficient."""

Extra = Callable[[Encoding, Params, SAEConfig, Float[Array, "B D"]], Float[Array, ""]]
"""(encoding, params, config, target_BD) -> a further mean squared error, over the store's variance in the loss."""


@dataclass(frozen=True)
class SAELensForm:
    """How the library SAELens holds an architecture: the names in its cfg.json and among its tensors."""

    sae: str  # cfg.json's architecture of an autoencoder
    transcoder: str | None = None  # of a transcoder; None: SAELens has no such class
    repeats_threshold: bool = False  # SAELens wants a threshold per latent: ours is one number, written F times
    renamed: Mapping[str, str] = field(default_factory=dict)  # our parameter -> SAELens's name of that tensor


@dataclass(frozen=True)
class Architecture:
    """What training and export need to know of an architecture."""

    activate: Activate
    cost: Cost | None = None  # None: the activation itself fixes L0; otherwise a coefficient times this does
    extra: Extra | None = None  # a further loss term
    params: Mapping[str, Callable[[SAEConfig], float]] = field(default_factory=dict)  # name -> first value of each of F
    learns_threshold: bool = False  # inference compares with a moving average of training's smallest active latent
    starts_dense: bool = False  # zero biases leave about half of the latents active
    nested: bool = False  # the loss is the mean over nested prefixes of the dictionary
    saelens: SAELensForm | None = None  # None: it trains and loads here, but cannot be exported


def relu(pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint) -> Float[Array, "B F"]:
    """max(0, pre)."""
    return jax.nn.relu(pre_BF)


def topk(pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint) -> Float[Array, "B F"]:
    """The k largest of each row's relu(pre), the rest zero, in training and at inference (Gao et al. 2024, 2406.04093).

    Ties at a row's smallest kept value are all kept; entries that are not positive never are.
    """
    positive_BF = jax.nn.relu(pre_BF)
    largest_BK, _ = top_of_rows(jax.lax.stop_gradient(positive_BF), config.largest_k)
    smallest_B1 = jax.lax.dynamic_slice_in_dim(largest_BK, at.k - 1, 1, axis=1)
    return jnp.where(positive_BF >= jnp.maximum(smallest_B1, _TINY), positive_BF, 0.0)


def batchtopk(
    pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint
) -> Float[Array, "B F"]:
    """Training: the B*k largest of relu(pre) over the batch, the rest zero. Inference: relu(pre) where pre > threshold.

    Ties at the smallest kept value are all kept. The gradient passes through the kept entries unchanged
    (Bussmann et al. 2024, arXiv 2412.06410).
    """
    positive_BF = jax.nn.relu(pre_BF)
    if at.threshold is not None:
        return jnp.where(pre_BF > at.threshold, positive_BF, 0.0)
    B = len(pre_BF)
    smallest = batch_threshold(jax.lax.stop_gradient(positive_BF), B * config.largest_k, B * at.k)
    return jnp.where(positive_BF >= jnp.maximum(smallest, _TINY), positive_BF, 0.0)


def jumprelu(pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint) -> Float[Array, "B F"]:
    """pre where pre > threshold, else 0, with a learned threshold per latent (Rajamanoharan et al. 2024, 2407.14435).

    The threshold's gradient is the straight-through estimate with a rectangular kernel of width `bandwidth`:
    d/dtheta = -(theta / bandwidth) [|pre - theta| < bandwidth / 2]; with `threshold_gradient_to_input` the
    pre-activation gets its negative on top of the plain gradient. theta and the kernel stay float32.
    """
    threshold_F = params["threshold"]
    kept_BF = jnp.where(pre_BF > threshold_F[None], jax.nn.relu(pre_BF), 0.0)
    return kept_BF + jax.lax.stop_gradient(threshold_F)[None] * _edge(pre_BF, threshold_F, config)


def gated(pre_BF: Float[Array, "B F"], params: Params, config: SAEConfig, at: OperatingPoint) -> Float[Array, "B F"]:
    """[pre > 0] relu((pre - b_enc) exp(r_mag) + b_mag): the gate decides, the magnitude shares its directions.

    b_enc is the gate's bias (Rajamanoharan et al. 2024, arXiv 2404.16014). The gate passes no gradient here; it learns
    from its own L1 and from `gate_reconstruction`.
    """
    magnitude_BF = (pre_BF - params["b_enc"][None]) * jnp.exp(params["r_mag"])[None] + params["b_mag"][None]
    return jnp.where(pre_BF > 0, jax.nn.relu(magnitude_BF), 0.0)


def l1(encoding: Encoding, params: Params, config: SAEConfig) -> Float[Array, " B"]:
    """The sum of a row's latents: the decoder's rows have unit norm, so this is L1 x decoder norm."""
    return jnp.sum(encoding.latents_BF, axis=1)


def gate_l1(encoding: Encoding, params: Params, config: SAEConfig) -> Float[Array, " B"]:
    """The sum of relu(pre): L1 of the gate's pre-activations."""
    return jnp.sum(jax.nn.relu(encoding.pre_BF), axis=1)


def l0(encoding: Encoding, params: Params, config: SAEConfig) -> Float[Array, " B"]:
    """Of a row's number of active latents n, by `l0_loss`: `target`, `step` n, `quadratic` 2 (n - k)^2 / k, `tanh`.

    target: k (mean of n over the batch / k - 1)^2, the same for all rows. Thresholds take many steps to follow a
    coefficient, and reconstruction alone drives L0 below k early on, so that a controller of step's coefficient swings;
    this pulls from both sides at once.
    step: Rajamanoharan et al. 2024 (2407.14435); quadratic pulls L0 to k from both sides; tanh is the sum of
    tanh(4 latent). n's gradient is the straight-through estimate of `jumprelu`, without its factor theta.
    """
    if config.l0_loss == "tanh":
        return jnp.sum(jnp.tanh(4.0 * encoding.latents_BF), axis=1)
    threshold_F = params["threshold"]
    active_BF = jnp.where(encoding.pre_BF > threshold_F[None], 1.0, 0.0)
    active_B = jnp.sum(active_BF + _edge(encoding.pre_BF, threshold_F, config), axis=1)
    if config.l0_loss == "quadratic":
        return 2.0 / config.k * (active_B - config.k) ** 2
    if config.l0_loss == "step":
        return active_B
    return jnp.broadcast_to(config.k * (jnp.mean(active_B) / config.k - 1.0) ** 2, active_B.shape)


def gate_reconstruction(
    encoding: Encoding, params: Params, config: SAEConfig, target_BD: Float[Array, "B D"]
) -> Float[Array, ""]:
    """Mean of |target - (relu(pre) W_dec + b_dec)|^2 with the decoder held constant: what the gate learns from."""
    fixed = jax.lax.stop_gradient({"W_dec": params["W_dec"], "b_dec": params["b_dec"]})
    recon_BD = matmul(jax.nn.relu(encoding.pre_BF), fixed["W_dec"], config.compute_dtype) + fixed["b_dec"][None]
    return jnp.mean(jnp.sum((target_BD - recon_BD) ** 2, axis=1))


def _edge(pre_BF: Float[Array, "B F"], threshold_F: Float[Array, " F"], config: SAEConfig) -> Float[Array, "B F"]:
    """Zero, whose gradient is the rectangular kernel's estimate of the step's: -kernel for theta (+kernel for pre)."""
    distance_BF = pre_BF - threshold_F[None]
    near_BF = jax.lax.stop_gradient(jnp.abs(distance_BF) < 0.5 * config.bandwidth).astype(jnp.float32)
    moving_BF = distance_BF if config.threshold_gradient_to_input else jax.lax.stop_gradient(pre_BF) - threshold_F[None]
    return near_BF / config.bandwidth * (moving_BF - jax.lax.stop_gradient(moving_BF))


def _zero(config: SAEConfig) -> float:
    return 0.0


def _first_threshold(config: SAEConfig) -> float:
    """The config's, or the quantile of a standard normal above which 2 k of F lie.

    Inputs have mean square 1 in each direction, so that a random unit encoder's pre-activations are about that. From
    a low threshold the L0 controller overshoots, and latents that were switched off do not come back.
    """
    if config.first_threshold is not None:
        return config.first_threshold
    return max(NormalDist().inv_cdf(1 - min(2 * config.k / config.F, 0.5)), 0.0) * (config.encoder_scale or 1.0)


_STANDARD = SAELensForm("standard", "transcoder")
_ONE_THRESHOLD = SAELensForm("jumprelu", "jumprelu_transcoder", repeats_threshold=True)

ARCHITECTURES: dict[str, Architecture] = {
    "batchtopk": Architecture(batchtopk, learns_threshold=True, saelens=_ONE_THRESHOLD),
    "topk": Architecture(topk, saelens=SAELensForm("topk")),
    "relu": Architecture(relu, cost=l1, starts_dense=True, saelens=_STANDARD),
    "jumprelu": Architecture(
        jumprelu,
        cost=l0,
        params={"threshold": _first_threshold},
        saelens=SAELensForm("jumprelu", "jumprelu_transcoder"),
    ),
    "gated": Architecture(
        gated,
        cost=gate_l1,
        extra=gate_reconstruction,
        params={"r_mag": _zero, "b_mag": _zero},
        starts_dense=True,
        saelens=SAELensForm("gated", renamed={"b_enc": "b_gate"}),
    ),
    "matryoshka": Architecture(batchtopk, learns_threshold=True, nested=True, saelens=_ONE_THRESHOLD),
    "matryoshka_relu": Architecture(relu, cost=l1, starts_dense=True, nested=True, saelens=_STANDARD),
}
"""Every architecture by its name. `hafs_jax.register_architecture` adds one."""
