"""Loading the SAEs that are evaluated: SAELens folders, and runs that have no such form. Torch; JAX when needed."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hafs_evaluate.workspace import Exported
from hafs_jax.store.manifest import Manifest


def load_sae(exported: Exported, manifest: Manifest, device: str = "cpu") -> Any:
    """The SAE, without gradients: a `sae_lens.SAE` on `device`, or an `OwnSAE`. `manifest` is its store's."""
    if exported.is_own:
        return OwnSAE(exported.folder, manifest).requires_grad_(False)
    from sae_lens import SAE

    return SAE.load_from_disk(exported.folder, device=device).requires_grad_(False)


@dataclass(frozen=True)
class _Config:
    """What SAE-Bench asks a SAE's cfg for."""

    architecture: str
    d_in: int
    d_sae: int
    metadata: SimpleNamespace
    dtype: str = "float32"
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "metadata": vars(self.metadata)}


class OwnSAE(torch.nn.Module):
    """The SAE of a run whose architecture has no SAELens form: raw activations in, everything in the model's units.

    It computes with the run's own JAX functions, on the CPU, and hands torch tensors in and out.
    """

    def __init__(self, run_folder: Path, manifest: Manifest) -> None:
        """Raises `UserError` where the run has no checkpoint or it is damaged."""
        from hafs_jax.api import load

        super().__init__()
        self._sae = load(run_folder)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            self.register_buffer(name, torch.tensor(np.asarray(getattr(self._sae, name))))
        config = self._sae.config.sae
        metadata = SimpleNamespace(
            model_name=manifest.model.name,
            hook_name=manifest.hook_point,
            prepend_bos=manifest.tokenizer.prepend_bos,
            context_size=manifest.context_length,
            training_architecture=config.architecture,
        )
        d_in = self._sae.d_model
        self.cfg = _Config(config.architecture, d_in, config.F, metadata)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def encode(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """The latents of raw activations."""
        return torch.tensor(np.asarray(self._sae.encode(x)))

    def decode(self, latents: Float[Tensor, "*B F"]) -> Float[Tensor, "*B D"]:
        """The raw reconstruction of latents."""
        return torch.tensor(np.asarray(self._sae.decode(latents)))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The raw reconstruction of raw activations."""
        return self.decode(self.encode(x))
