"""A trained SAE as a Python object: raw activations in, latents and reconstructions in the model's units out."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hafs_jax.base.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.method.architectures import OperatingPoint
from hafs_jax.method.sae import SAE, InputScale
from hafs_jax.ops.products import Params
from hafs_jax.runs import Run
from hafs_jax.training.checkpoint import load_checkpoint


@dataclass(frozen=True)
class TrainedSAE:
    """What training left behind, at inference. `params` and `threshold` are in scaled units (see `method.sae`)."""

    config: TrainConfig
    params: Params
    scale: InputScale
    threshold: Float[Array, ""]

    @property
    def d_model(self) -> int:
        return self.params["W_enc"].shape[0]

    @property
    def W_dec(self) -> Float[Array, "F D"]:
        """The dictionary: unit rows, in the model's directions."""
        return self.params["W_dec"]

    def encode(self, acts_BD: Any) -> Float[Array, "B F"]:
        """The latents of raw activations [B, D], in the model's units: reconstruction = latents @ W_dec + b_dec."""
        return _encode(self.params, jnp.asarray(acts_BD), self.scale, self.threshold, self.config)

    def decode(self, latents_BF: Any) -> Float[Array, "B D"]:
        """The raw reconstruction of latents in the model's units; a transcoder's is of its target's activations."""
        return _decode(self.params, jnp.asarray(latents_BF), self.scale, self.config)

    def __call__(self, acts_BD: Any) -> Float[Array, "B D"]:
        """The raw reconstruction of raw activations."""
        return self.decode(self.encode(acts_BD))


def load(run_folder: Path | str, which: str = "last") -> TrainedSAE:
    """The SAE of a run: its `last` checkpoint, or the `best` on held-out rows.

    Raises `UserError` where the folder holds no such checkpoint. A run that has not finished needs its store, too.
    """
    if which not in ("last", "best"):
        raise UserError(f"which={which!r}: expected last or best")
    run = Run(Path(run_folder))
    config, (d_model, d_out) = run.config(), run.widths()
    state, scale = load_checkpoint(run.best if which == "best" else run.checkpoints, config, d_model, d_out)
    return TrainedSAE(config, state.weights(), scale, state.threshold(config.sparsity.threshold_decay))


@functools.partial(jax.jit, static_argnames="config")
def _encode(params: Params, acts_BD: Array, scale: InputScale, threshold: Array, config: TrainConfig) -> Array:
    sae = SAE(config.sae, acts_BD.shape[1], params["W_dec"].shape[1])
    at = OperatingPoint(config.sae.k, threshold)
    return cast(Any, sae.apply({"params": params}, scale(acts_BD), at, method="encode")).latents_BF / scale.scale


@functools.partial(jax.jit, static_argnames="config")
def _decode(params: Params, latents_BF: Array, scale: InputScale, config: TrainConfig) -> Array:
    into = scale if scale.target is None else scale.target
    sae = SAE(config.sae, params["W_enc"].shape[0], params["W_dec"].shape[1])
    recon_BD = cast(Array, sae.apply({"params": params}, latents_BF * scale.scale, method="decode"))
    return recon_BD / into.scale + into.mean_D[None]
