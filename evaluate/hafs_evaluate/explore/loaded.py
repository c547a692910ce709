"""A run in the explorer's memory: its SAE, and what the evaluation found of its latents. Imports torch, not jax."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hafs_evaluate.core.loading import load_sae
from hafs_evaluate.latents.neighbours import rounded
from hafs_evaluate.results.readings import LATENTS, OTHERS
from hafs_evaluate.results.result_shapes import check_latents
from hafs_evaluate.workspace import FinishedRun, Workspace, export
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json
from hafs_jax.runs import Run
from hafs_jax.store.manifest import Manifest


@dataclass
class LoadedRun:
    """A run whose SAE is in memory, with what the evaluation found of its latents."""

    sae: Any
    values: dict[str, Any]  # what latents.json holds
    density_F: Float[Tensor, "F"]
    max_F: Float[Tensor, "F"]  # highest activation on the rows that the evaluation scanned
    unit_FD: Float[Tensor, "F D"]  # dictionary vectors of norm 1
    seconds: float
    dashboards: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def megabytes(self) -> float:
        tensors = [*self.sae.parameters(), *self.sae.buffers(), self.unit_FD]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6

    def label(self, latent: int) -> str | None:
        """The commonest token of the rows on which the latent is highest."""
        tokens = self.values.get("token") or []
        return tokens[latent] if latent < len(tokens) else None

    def figures(self, latent: int) -> dict[str, Any]:
        """What the evaluation found of any latent."""
        density, maximum = rounded(float(self.density_F[latent])), rounded(float(self.max_F[latent]))
        return {"index": latent, "label": self.label(latent), "density": density, "max_activation": maximum}

    def nearest(self, vector_D: Float[Tensor, "D"], most: int, leave_out: int = -1) -> list[dict[str, Any]]:
        """The latents whose dictionary vectors have the highest cosines with `vector_D`, which has norm 1."""
        best = (self.unit_FD @ vector_D).topk(min(most, len(self.unit_FD)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found = [(index, cosine) for index, cosine in pairs if index != leave_out]
        return [{"index": index, "cosine": rounded(cosine), "label": self.label(index)} for index, cosine in found]


def load_run(workspace: Workspace, run: FinishedRun, manifest: Manifest, device: str) -> LoadedRun:
    """The SAE and the evaluated latents of `run`; `UserError` where they do not belong together, or to the store."""
    started = time.monotonic()
    path = workspace.result(run.name, LATENTS)
    values = check_latents(read_json(path, "the evaluated latents"), path)
    sae = load_sae(export(run), manifest, device)
    hook_point = sae.cfg.metadata.hook_name
    if hook_point != manifest.hook_point:
        raise UserError(f"run {run.name} was trained at {hook_point}, the store is of {manifest.hook_point}")
    n_latents = len(sae.W_dec)
    for key in ("density", "max_activation"):
        if len(found := values.get(key) or []) != n_latents or None in found:
            raise UserError(f"{path}: expected {key} of {n_latents} latents; run `make eval` again")
    if not values.get("rows_scanned"):
        raise UserError(f"{path}: expected rows_scanned, the number of rows that were read; run `make eval` again")
    unit_FD = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=1)
    density_F, max_F = (torch.tensor(values[key], dtype=torch.float32) for key in ("density", "max_activation"))
    others = path.with_name(OTHERS)  # an evaluation of an earlier version has none
    entries = [
        *values.pop("latents", []),
        *(check_latents(read_json(others, "the other latents"), others)["latents"] if others.exists() else []),
    ]
    dashboards = {entry["index"]: entry for entry in entries}
    return LoadedRun(sae, values, density_F, max_F, unit_FD, time.monotonic() - started, dashboards)


def summary_of(run: FinishedRun) -> dict[str, Any]:
    """What the page says of a run before its SAE is loaded."""
    found = Run(run.folder).summary()
    return {"variant": found.variant, "architecture": found.architecture, "k": found.k, "latents": found.n_latents}
