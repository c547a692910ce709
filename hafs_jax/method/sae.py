"""The sparse autoencoder as a Flax module, and the affine map between the language model's units and the SAE's.

The SAE sees scaled activations: the store's mean is subtracted, and the mean squared norm is then D. The rows of the
decoder have unit norm: `unit_rows` is applied at initialisation and after each update of the optimizer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from hafs_jax.config import SAEConfig
from hafs_jax.method.architectures import ARCHITECTURES, Encoding, OperatingPoint
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.products import Params, affine, matmul


class InputScale(struct.PyTreeNode):
    """x -> (x - mean) * scale. It is saved in the checkpoint and folded into the weights at export."""

    mean_D: Float[Array, " D"]
    scale: Float[Array, ""]
    variance: Float[Array, ""]  # mean of |(x - mean) * scale|^2, the denominator of FVU
    target: "InputScale | None" = None  # the scale of a transcoder's target rows

    def __call__(self, acts_BD: Array) -> Float[Array, "B D"]:
        """The scaled activations in float32, from raw activations of any float dtype."""
        return (acts_BD.astype(jnp.float32) - self.mean_D[None]) * self.scale


class SAE(nn.Module):
    """latents = activate((x - b_dec) @ W_enc.T + b_enc); reconstruction = latents @ W_dec + b_dec.

    A transcoder (`config.transcode`) reconstructs rows of width `d_out` of another store, and its encoder does not
    subtract b_dec. Parameters are float32. The inputs of matrix products are cast to `config.compute_dtype`, and sums
    are float32.
    """

    config: SAEConfig
    d_model: int
    d_out: int | None = None  # None: d_model

    def setup(self) -> None:
        config, D, F = self.config, self.d_model, self.config.F
        D_out = D if self.d_out is None else self.d_out
        params = {"W_dec": self.param("W_dec", lambda key: unit_rows(jax.random.normal(key, (F, D_out), jnp.float32)))}
        scale = encoder_scale(config, D)
        if config.encoder == "tied" and not config.transcode:
            params["W_enc"] = self.param("W_enc", lambda _: scale * params["W_dec"])
        else:
            params["W_enc"] = self.param(
                "W_enc", lambda key: scale * unit_rows(jax.random.normal(key, (F, D), jnp.float32))
            )
        params["b_enc"] = self.param("b_enc", nn.initializers.zeros, (F,), jnp.float32)
        params["b_dec"] = self.param("b_dec", nn.initializers.zeros, (D_out,), jnp.float32)
        for name, first in ARCHITECTURES[config.architecture].params.items():
            params[name] = self.param(name, nn.initializers.constant(first(config)), (F,), jnp.float32)
        self.params = params

    def encode(self, acts_BD: Float[Array, "B D"], at: OperatingPoint) -> Encoding:
        """The pre-activations and latents of scaled activations."""
        return encode(dict(self.params), acts_BD, self.config, at)

    def decode(self, latents_BF: Float[Array, "B F"]) -> Float[Array, "B D_out"]:
        """The reconstruction, in scaled units."""
        return matmul(latents_BF, self.params["W_dec"], self.config.compute_dtype) + self.params["b_dec"][None]

    def __call__(self, acts_BD: Float[Array, "B D"], at: OperatingPoint) -> tuple[Encoding, Float[Array, "B D_out"]]:
        """The encoding and the reconstruction."""
        encoding = self.encode(acts_BD, at)
        return encoding, self.decode(encoding.latents_BF)


def encode(params: Params, acts_BD: Float[Array, "B D"], config: SAEConfig, at: OperatingPoint) -> Encoding:
    """The pre-activations and latents of scaled activations; on several devices those of this device's latents."""
    pre_BF = pre_activations(params, acts_BD, config, at.axes)
    activate = ARCHITECTURES[config.architecture].activate
    return Encoding(pre_BF, activate(pre_BF, params, config, at), at.axes)


def pre_activations(
    params: Params, acts_BD: Float[Array, "B D"], config: SAEConfig, axes: Axes = Axes()
) -> Float[Array, "B F"]:
    """(acts - b_dec) @ W_enc.T + b_enc; for a transcoder acts @ W_enc.T + b_enc."""
    centre_D = axes.to_latents(centre(params, config))
    return affine(acts_BD, centre_D, params["W_enc"], params["b_enc"], config.compute_dtype)


def centre(params: Params, config: SAEConfig) -> Float[Array, " D"]:
    """What the encoder subtracts from its input: b_dec; zeros for a transcoder."""
    return jnp.zeros(params["W_enc"].shape[1]) if config.transcode else params["b_dec"]


def encoder_scale(config: SAEConfig, d_model: int) -> float:
    """`config.encoder_scale`; if that is None, min(1, 2 D / F) for an architecture that starts dense, else 1.

    If half of F random unit latents are active, relu(W_dec x) W_dec is about F / (2 D) x. A tied encoder at scale 1
    would then start with an FVU far above 1. Its gradients would stay in Adam's second moments and slow the entire run.
    """
    if config.encoder_scale is not None:
        return config.encoder_scale
    return min(1.0, 2 * d_model / config.F) if ARCHITECTURES[config.architecture].starts_dense else 1.0


def init_params(config: SAEConfig, d_model: int, key: Key[Array, ""], d_out: int | None = None) -> Params:
    """Initial parameters: random unit rows W_dec, W_enc the same (or others) times `encoder_scale()`, zero biases.

    Scaled activations have mean 0, so b_dec = 0 is the mean of the store. Nothing is encoded: outside of a program, a
    selection's loops would be compiled anew at each call, and kept.
    """
    return SAE(config, d_model, d_out).init(key, method=lambda sae: sae.params["b_dec"])["params"]


def unit_rows(matrix: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Each row divided by its norm; a row of zeros stays zero."""
    norms = jnp.linalg.norm(matrix, axis=-1, keepdims=True)
    return matrix / jnp.where(norms > 0, norms, 1.0)
