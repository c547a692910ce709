"""A run whose architecture has no SAELens form, as the torch SAE that the evaluations expect. Torch; JAX when needed.

It computes with the run's own JAX functions, on the CPU, and hands torch tensors in and out.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hafs_jax.store.manifest import Manifest


class OwnSAE(torch.nn.Module):
    """The SAE of a run's folder, of a store's width: raw activations in, latents and reconstructions in model units."""

    def __init__(self, run_folder: Path, manifest: Manifest) -> None:
        """Raises `UserError` where the run has no checkpoint or it is damaged."""
        from hafs_jax.api import load
        from hafs_jax.saelens import folded

        super().__init__()
        self._sae = load(run_folder)
        weights, _ = folded(self._sae.params, self._sae.scale, self._sae.threshold)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            self.register_buffer(name, torch.tensor(np.asarray(weights[name], np.float32)))
        config = self._sae.config.sae
        metadata = SimpleNamespace(
            model_name=manifest.model.name,
            hook_name=manifest.hook_point,
            prepend_bos=manifest.tokenizer.prepend_bos,
            context_size=manifest.context_length,
            training_architecture=config.architecture,
        )
        self.cfg = SimpleNamespace(
            architecture=config.architecture, d_in=self.W_enc.shape[0], d_sae=config.F, dtype="float32", device="cpu",
            metadata=metadata,
        )  # fmt: skip
        self.cfg.to_dict = lambda: {**vars(self.cfg), "to_dict": None, "metadata": vars(metadata)}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def encode(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """The latents of raw activations."""
        return self._through(self._sae.encode, x)

    def decode(self, latents: Float[Tensor, "*B F"]) -> Float[Tensor, "*B D"]:
        """The raw reconstruction of latents."""
        return self._through(self._sae.decode, latents)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The raw reconstruction of raw activations."""
        return self.decode(self.encode(x))

    @staticmethod
    def _through(function: Any, values: Tensor) -> Tensor:
        rows = values.detach().to("cpu", torch.float32).reshape(-1, values.shape[-1])
        found = torch.tensor(np.asarray(function(rows.numpy())))
        return found.reshape(*values.shape[:-1], found.shape[-1])
