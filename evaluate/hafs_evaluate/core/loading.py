"""Loading the SAEs that are evaluated: SAELens folders, and runs that have no such form. Torch; JAX when needed."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hafs_evaluate.core.encode import to_numpy
from hafs_evaluate.workspace import Exported
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import Manifest

_TRIED = 4  # random rows on which a loaded SAE is run once


def load_sae(exported: Exported, manifest: Manifest, device: str = "cpu") -> Any:
    """The SAE, without gradients: a `sae_lens.SAE` on `device`, or an `OwnSAE`. `manifest` is its store's.

    One in half precision computes in float32 here, with the same weights: numpy has no bfloat16, and a difference of
    two SAEs should not be one of rounding.
    """
    if exported.is_own:
        return OwnSAE(exported.folder, manifest).requires_grad_(False)
    sae = load_saelens(exported.folder, device)
    return sae.to(torch.float32) if sae.dtype in (torch.float16, torch.bfloat16) else sae


def load_saelens(folder: Path, device: str = "cpu") -> Any:
    """The `sae_lens.SAE` in `folder`, in its own dtype and without gradients, after it has reconstructed random rows.

    Raises `UserError` of one line where a file is missing or damaged, a value of cfg.json contradicts the tensors, a
    weight or the reconstruction is not finite, or SAELens refuses it or would load another function.
    """
    from hafs_jax.saelens import AT_RUN_TIME, CFG, WEIGHTS, read_cfg, read_tensors

    cfg = read_cfg(folder)
    read_tensors(folder)
    normalisation = cfg["normalize_activations"]
    if normalisation != "none" and normalisation not in AT_RUN_TIME:
        raise UserError(
            f"{folder / CFG}: normalize_activations={normalisation!r}, expected 'none' or one of "
            f"{', '.join(AT_RUN_TIME)}: SAELens leaves another factor out when it loads a folder; fold it in first "
            "(fold_activation_norm_scaling_factor)"
        )
    from sae_lens import SAE

    try:
        sae = SAE.load_from_disk(folder, device=device).requires_grad_(False)
        sae.turn_off_forward_pass_hook_z_reshaping()  # rows of a store are flat
        latents, recon, forward = _tried(sae, cfg["d_in"])
    except Exception as error:
        # Whatever the library raises, it is the file that is wrong.
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: SAELens does not load or run it ({type(error).__name__}: {reason})") from error
    if (loaded := sae.cfg.architecture()) != cfg["architecture"]:
        raise UserError(f"{folder / CFG}: architecture {cfg['architecture']!r}, but SAELens would load a {loaded!r}")
    expected = [(_TRIED, cfg["d_sae"]), (_TRIED, cfg.get("d_out", cfg["d_in"]))]
    if [latents.shape, recon.shape] != expected:
        found = f"{list(latents.shape)} and {list(recon.shape)}"
        raise UserError(f"{folder}: {_TRIED} rows have latents and a reconstruction of shapes {found}; see {CFG}")
    of_weights = [bool(value.isfinite().all()) for value in sae.state_dict().values()]  # a threshold may be too large
    if not (all(of_weights) and np.isfinite(latents).all() and np.isfinite(recon).all()):
        raise UserError(
            f"{folder / WEIGHTS}: the reconstruction of random rows is not finite; the weights are too large for dtype "
            f"{cfg.get('dtype')!r}"
        )
    if not np.allclose(recon, forward, rtol=1e-2, atol=1e-2 * np.abs(forward).max()):
        raise UserError(f"{folder}: a {loaded} reconstructs from more than its latents, which no evaluation measures")
    return sae


@torch.no_grad()
def _tried(sae: Any, d_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The latents of a few random rows, their reconstruction, and what a call of the SAE returns."""
    rows = torch.randn(_TRIED, d_in, generator=torch.Generator().manual_seed(0)).to(sae.device, sae.dtype)
    latents = sae.encode(rows)
    return to_numpy(latents), to_numpy(sae.decode(latents)), to_numpy(sae(rows))


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
            model_name=manifest.model.hub_name or manifest.model.name,
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
