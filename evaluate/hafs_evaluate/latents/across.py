"""What is measured between the evaluated runs of a workspace: stability over seeds, matching latents. Torch; no jax.

Both are cheap, need no activations, and are done over all runs that have been evaluated, named or not: what a run is
compared with must not depend on the order in which runs were evaluated.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hafs_evaluate.latents.neighbours import rounded
from hafs_evaluate.latents.stability import Dictionary, arm_of, decoder, stability
from hafs_evaluate.workspace import Workspace, fingerprint, hashed_export, read_result
from hafs_jax.base.files import read_json, write_json, write_text

STABILITY, LATENTS, DONE = "stability.json", "latents.json", "done.json"
FORMAT = 1  # raise it when matches of the same dictionaries would differ


@dataclass(frozen=True)
class Evaluated:
    """A run with core metrics, and its SAELens folder: a trained run's or an imported SAE's."""

    name: str
    sae: Path
    weights_sha256: str
    run_folder: Path | None  # of a trained run


def evaluated_runs(workspace: Workspace) -> list[Evaluated]:
    """All runs whose core metrics are of the SAE that lies there now, by name."""
    found = []
    for core in sorted(workspace.eval.glob("*/core.json")):
        name = core.parent.name
        folder = next((f for f in (workspace.runs / name, workspace.folder / "imported" / name) if f.is_dir()), None)
        if folder is None or not (folder / "sae" / "sae_weights.safetensors").exists():
            continue
        exported = hashed_export(name, folder / "sae")
        if exported.weights_sha256 == read_json(core, "core metrics").get("sae_sha256"):
            is_trained = folder.parent == workspace.runs
            found.append(Evaluated(name, exported.folder, exported.weights_sha256, folder if is_trained else None))
    return found


def write_stability(workspace: Workspace, runs: list[Evaluated]) -> dict[str, Any]:
    """Writes eval/stability.json, where it would change, and returns it; see `stability.stability`."""
    dictionaries = []
    for run in runs:
        own = read_result(run.run_folder / "run.json") if run.run_folder else {}
        if run.run_folder is None or own.get("seed") is None:
            continue
        arm = arm_of(own, read_result(run.run_folder / "config.json"))
        density = workspace.result(run.name, "core_latents.npz")
        dictionaries.append(Dictionary(run.name, arm, run.sae, run.weights_sha256, density))
    path = workspace.eval / STABILITY
    values = stability(dictionaries, path)
    for arm in values["arms"]:
        first = next(run.run_folder for run in runs if run.name == arm["runs"][0])
        own = read_result(first / "run.json") if first else {}
        arm.update(architecture=own.get("architecture"), variant=own.get("variant"), k=own.get("k_or_target_l0"))
    if read_result(path) != values and (values["arms"] or path.exists()):
        write_json(path, values)
    return values


@torch.no_grad()
def write_matches(workspace: Workspace, runs: list[Evaluated]) -> int:
    """Adds `matches` to the latents of every latents.json that lacks them or has old ones; the number of files written.

    A latent's matches: {run: {"index", "cosine"}}, of each other evaluated run with latents of its own and the same
    width the dictionary vector of the highest cosine. One file and one dictionary are held at a time.
    """
    shown = [run for run in runs if workspace.result(run.name, LATENTS).exists()]
    names = sorted((run.name, run.weights_sha256) for run in shown)
    marks = {run.name: fingerprint([FORMAT, run.name, names]) for run in shown}
    old = [run for run in shown if read_result(workspace.result(run.name, DONE)).get("matches") != marks[run.name]]
    vectors, best = {}, {}
    for run in old:
        latents = read_json(workspace.result(run.name, LATENTS), "an SAE's latents")["latents"]
        index = [latent["index"] for latent in latents]
        vectors[run.name] = torch.nn.functional.normalize(decoder(run.sae)[index], dim=1)
    for other in shown if old else ():
        unit_FD = torch.nn.functional.normalize(decoder(other.sae), dim=1)
        for name, vectors_CD in vectors.items():
            if name != other.name and vectors_CD.shape[1] == unit_FD.shape[1]:
                best[name, other.name] = (vectors_CD @ unit_FD.T).max(1)
    for run in old:
        path = workspace.result(run.name, LATENTS)
        values = read_json(path, "an SAE's latents")
        for slot, latent in enumerate(values["latents"]):
            latent["matches"] = {
                other.name: {"index": int(found.indices[slot]), "cosine": rounded(float(found.values[slot]))}
                for other in shown
                if (found := best.get((run.name, other.name))) is not None
            }
        text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        write_text(path, text + "\n")
        done = workspace.result(run.name, DONE)
        write_json(done, {**read_result(done), "matches": marks[run.name]})
    return len(old)
