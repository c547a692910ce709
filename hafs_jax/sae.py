"""The sparse autoencoder as a Flax module, and the affine map between the model's units and the SAE's.

Inside, activations are centred by the store's mean and scaled to a mean squared distance of D from it. The decoder's
rows are of unit norm: `unit_rows` is applied at initialisation and after each update (in `step`), and nowhere else.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from hafs_jax.architectures import ARCHITECTURES
from hafs_jax.config import SAEConfig

Params = dict[str, Array]
"""W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], float32."""


class InputScale(struct.PyTreeNode):
    """x -> (x - mean) * scale, kept in the checkpoint and folded into the weights at export."""

    mean_D: Float[Array, " D"]
    scale: Float[Array, ""]
    variance: Float[Array, ""]  # mean of |(x - mean) * scale|^2, the denominator of FVU

    def __call__(self, acts_BD: Array) -> Float[Array, "B D"]:
        """Raw activations of any float dtype, centred and scaled, in float32."""
        return (acts_BD.astype(jnp.float32) - self.mean_D[None]) * self.scale


class Encoding(struct.PyTreeNode):
    """What the encoder computed: pre-activations and the latents that the architecture kept."""

    pre_BF: Float[Array, "B F"]
    latents_BF: Float[Array, "B F"]


class SAE(nn.Module):
    """latents = activate((x - b_dec) @ W_enc + b_enc); reconstruction = latents @ W_dec + b_dec.

    Parameters are float32; the matrix products' inputs are cast to `config.compute_dtype` and accumulate in float32.
    The product with W_enc is written x @ W_enc + (b_enc - b_dec @ W_enc): the same function, whose gradient costs no
    product of B x D x F for an input gradient that nobody needs.
    """

    config: SAEConfig
    d_model: int

    def setup(self) -> None:
        F, D, scale = self.config.F, self.d_model, self.config.encoder_scale
        self.W_dec = self.param("W_dec", lambda key: unit_rows(jax.random.normal(key, (F, D), jnp.float32)))
        self.W_enc = self.param("W_enc", lambda _: scale * self.W_dec.T)
        self.b_enc = self.param("b_enc", nn.initializers.zeros, (F,), jnp.float32)
        self.b_dec = self.param("b_dec", nn.initializers.zeros, (D,), jnp.float32)

    def encode(self, acts_BD: Float[Array, "B D"], threshold: Float[Array, ""] | None = None) -> Encoding:
        """Pre-activations and latents of scaled activations; `threshold` None means training."""
        bias_F = self.b_enc - self.b_dec @ self.W_enc
        pre_BF = self._matmul(acts_BD, self.W_enc) + bias_F[None]
        return Encoding(pre_BF, ARCHITECTURES[self.config.architecture].activate(pre_BF, self.config, threshold))

    def decode(self, latents_BF: Float[Array, "B F"]) -> Float[Array, "B D"]:
        """The reconstruction, in scaled units."""
        return self._matmul(latents_BF, self.W_dec) + self.b_dec[None]

    def __call__(
        self, acts_BD: Float[Array, "B D"], threshold: Float[Array, ""] | None = None
    ) -> tuple[Encoding, Float[Array, "B D"]]:
        """The encoding and the reconstruction."""
        encoding = self.encode(acts_BD, threshold)
        return encoding, self.decode(encoding.latents_BF)

    def _matmul(self, left: Array, right: Array) -> Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        return jnp.matmul(left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32)


def init_params(config: SAEConfig, d_model: int, key: Key[Array, ""]) -> Params:
    """Fresh parameters: unit-norm random W_dec, W_enc its transpose times `encoder_scale`, zero biases.

    Activations are centred by the data mean before they reach the SAE, so a zero b_dec starts at that mean.
    """
    return SAE(config, d_model).init(key, jnp.zeros((1, d_model), jnp.float32))["params"]


def unit_rows(matrix: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Each row divided by its norm; an all-zero row stays zero."""
    norms = jnp.linalg.norm(matrix, axis=-1, keepdims=True)
    return matrix / jnp.where(norms > 0, norms, 1.0)


def folded(params: Params, scale: InputScale, threshold: Float[Array, ""]) -> tuple[Params, Float[Array, ""]]:
    """Weights and threshold that take raw activations: the same function, in the model's units.

    With x' = (x - m) s: b_dec = m + b_dec'/s, b_enc = b_enc'/s, threshold = threshold'/s and both matrices unchanged,
    so that pre = pre'/s, latents = latents'/s and the decoder's rows keep their unit norm.
    """
    raw = {
        "W_enc": params["W_enc"],
        "b_enc": params["b_enc"] / scale.scale,
        "W_dec": params["W_dec"],
        "b_dec": scale.mean_D + params["b_dec"] / scale.scale,
    }
    return raw, threshold / scale.scale
