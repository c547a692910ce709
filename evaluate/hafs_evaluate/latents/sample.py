"""Which latents are shown in full: the same indices in all SAEs that began with the same weights.

Runs of one seed and one number of latents begin with the same dictionary, so that latent i of one is often latent i of
the other. Their sample is drawn once and kept in eval/latent_sample.json. No torch, no jax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from hafs_evaluate.workspace import Workspace, read_result
from hafs_jax.base.files import write_record
from hafs_jax.base.foreign import read_npz
from hafs_jax.runs import Run

SAMPLE, ARRAYS = "latent_sample.json", "core_latents.npz"


@dataclass(frozen=True)
class Member:
    """A run that takes part in a draw: the group whose indices it shares, and how often each latent fires."""

    name: str
    group: str
    density_F: Float[np.ndarray, "F"]


def shared_samples(workspace: Workspace, names: Sequence[str], latents: int) -> dict[str, Int[np.ndarray, "C"]]:
    """{run: the indices to show in full}, ascending; draws those of a group that has none yet, and keeps them.

    A group's draw is `draw` of the densities on held-out rows of those of its runs that are measured at that time.
    """
    path = workspace.eval / SAMPLE
    kept: dict[str, Any] = read_result(path).get("groups") or {}
    wanted = {member.name: member for member in _members(workspace) if member.name in names}
    missing = {member.group for member in wanted.values() if kept.get(member.group, {}).get("latents") != latents}
    for group in sorted(missing):
        own = [member for member in _members(workspace) if member.group == group]
        indices = draw([member.density_F for member in own], latents)
        kept[group] = {"latents": latents, "runs": [member.name for member in own], "indices": indices.tolist()}
    if missing:
        write_record(path, {"groups": kept})
    return {name: np.array(kept[member.group]["indices"], np.int64) for name, member in wanted.items()}


def draw(densities: Sequence[Float[np.ndarray, "F"]], latents: int) -> Int[np.ndarray, "C"]:
    """At most `latents` indices, ascending, at evenly spaced ranks of density, among those that fire in every SAE.

    The density of an index is its geometric mean over the SAEs. Where none fires in all, those that fire in any count.
    """
    density_RF = np.stack(densities)
    live = np.flatnonzero((density_RF > 0).all(0))
    if not len(live):
        live = np.flatnonzero((density_RF > 0).any(0))
    mean_F = np.log(np.maximum(density_RF, 1e-12)).mean(0)
    ranked = live[np.argsort(mean_F[live], kind="stable")]
    wanted = min(latents, len(ranked))
    middles = ((np.arange(wanted) + 0.5) * len(ranked) / max(wanted, 1)).astype(np.int64)
    return np.sort(ranked[middles])


def _members(workspace: Workspace) -> list[Member]:
    found = []
    for path in sorted(workspace.eval.glob(f"*/{ARRAYS}")):
        density_F = read_npz(path, "an SAE's densities", ("density",))["density"]
        found.append(Member(path.parent.name, _group(workspace.runs / path.parent.name, len(density_F)), density_F))
    return found


def _group(folder: Path, n_latents: int) -> str:
    """What an SAE shares its sample with; an imported one shares it with none."""
    if not (folder / "run.json").exists():
        return f"{folder.name}, {n_latents} latents"
    return f"seed {Run(folder).summary().seed}, {n_latents} latents"
