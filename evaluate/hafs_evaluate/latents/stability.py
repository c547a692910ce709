"""Dictionaries of different runs compared: how stable they are over seeds, and each latent's match. Torch; no jax.

`write_stability` compares runs that differ in nothing but the seed. `write_matches` finds, for each latent that is
shown, the nearest dictionary vector of every other run. Both read weights alone, not activations, and both always take
all runs that have been evaluated, so that a result does not depend on which runs were named or in which order they
were evaluated.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components

from hafs_evaluate.latents.neighbours import rounded
from hafs_evaluate.workspace import Workspace, fingerprint, hashed_export, read_result
from hafs_jax.base.files import read_json, write_json, write_text
from hafs_jax.runs import Run, RunSummary

THRESHOLD = 0.7  # the cosine over which two dictionary vectors of different runs are the same (arXiv 2501.16615)
CHUNK_FLOATS = 1 << 24
STABILITY, LATENTS, DONE = "stability.json", "latents.json", "done.json"
PAIR_FORMAT = 1  # raise it when a pair's figures of the same dictionaries would differ
MATCH_FORMAT = 1  # raise it when matches of the same dictionaries would differ


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
    """Writes eval/stability.json, where it would change, and returns it; see `stability`."""
    dictionaries, trained = [], dict[str, RunSummary]()
    for run in runs:
        if run.run_folder is None:
            continue
        trained[run.name] = (own := Run(run.run_folder)).summary()
        density = workspace.result(run.name, "core_latents.npz")
        arm = arm_of(trained[run.name], own.record()["config"])
        dictionaries.append(Dictionary(run.name, arm, run.sae, run.weights_sha256, density))
    path = workspace.eval / STABILITY
    values = stability(dictionaries, path)
    for arm in values["arms"]:
        first = trained[arm["runs"][0]]
        arm.update(architecture=first.architecture, variant=first.variant, k=first.k)
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
    marks = {run.name: fingerprint([MATCH_FORMAT, run.name, names]) for run in shown}
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


@dataclass(frozen=True)
class Dictionary:
    """A run's dictionary on disk and which of its latents fire on the held-out rows."""

    run: str
    arm: str  # equal for runs that differ in the seed alone
    sae: Path  # SAELens folder
    weights_sha256: str
    density: Path  # core_latents.npz

    def live_vectors(self) -> Float[torch.Tensor, "F D"]:
        """The unit dictionary vectors of the latents that fire."""
        W_dec = decoder(self.sae)
        with np.load(self.density, allow_pickle=False) as arrays:
            live = np.flatnonzero(arrays["density"] > 0)
        return torch.nn.functional.normalize(W_dec[live], dim=1)


def decoder(folder: Path) -> Float[torch.Tensor, "F D"]:
    """W_dec of a SAELens folder in float32, without the rest of it."""
    with safe_open(folder / "sae_weights.safetensors", "pt") as file:
        return file.get_tensor("W_dec").float()


def arm_of(run: RunSummary, config: dict[str, Any]) -> str:
    """A hash that runs share where only seeds differ.

    tau is left out: it is measured on a baseline, and may be that of the same seed. So is the arm's own name, which
    says nothing more, and which runs of earlier versions lack.
    """
    trained = {key: value for key, value in config.items() if key not in ("seed", "data_seed", "arm")}
    trained["penalty"] = {key: value for key, value in trained.get("penalty", {}).items() if key != "tau"}
    names = [run.architecture, run.variant, run.k, run.n_latents, run.d_model]
    return fingerprint([*names, trained, run.store_fingerprint])


@torch.no_grad()
def compare(
    a_AD: Float[torch.Tensor, "A D"], b_BD: Float[torch.Tensor, "B D"], threshold: float = THRESHOLD
) -> dict[str, float]:
    """How alike two sets of unit vectors are; both must have some.

    a_to_b: mean over a's vectors of their highest cosine with one of b's; b_to_a the other way; mean_max_cosine the
    mean of the two. shared_fraction: 2 m / (A + B), m the number of pairs matched one to one by the Hungarian
    method, which maximises the sum of cosines over pairs whose cosine exceeds `threshold`.
    """
    best_A, best_B = [], torch.full((len(b_BD),), -2.0)
    rows, columns, cosines = [], [], []
    chunk = max(1, CHUNK_FLOATS // len(b_BD))
    for start in range(0, len(a_AD), chunk):
        cosine_CB = (a_AD[start : start + chunk] @ b_BD.T).clamp(-1, 1)
        best_A.append(cosine_CB.amax(1))
        best_B = torch.maximum(best_B, cosine_CB.amax(0))
        row, column = torch.nonzero(cosine_CB > threshold, as_tuple=True)
        rows.append((row + start).numpy())
        columns.append(column.numpy())
        cosines.append(cosine_CB[row, column].double().numpy())
    edges = sparse.coo_array(
        (np.concatenate(cosines), (np.concatenate(rows), np.concatenate(columns))), (len(a_AD), len(b_BD))
    )
    a_to_b, b_to_a = float(torch.cat(best_A).double().mean()), float(best_B.double().mean())
    return {
        "a_to_b": a_to_b,
        "b_to_a": b_to_a,
        "mean_max_cosine": (a_to_b + b_to_a) / 2,
        "shared_fraction": 2 * matched(edges) / (len(a_AD) + len(b_BD)),
    }


def matched(edges: sparse.coo_array) -> int:
    """The number of pairs of the one-to-one matching of greatest total weight on a bipartite graph of positive edges.

    Vectors with no path between them never compete, so that each connected component is solved by itself.
    """
    n_rows, n_columns = edges.shape
    row, column = edges.coords
    graph = sparse.coo_array((edges.data, (row, column + n_rows)), (n_rows + n_columns,) * 2)
    component = connected_components(graph, directed=False)[1]
    order = np.argsort(component[row], kind="stable")
    of_edge = component[row][order]
    pairs = 0
    for part in np.split(order, np.flatnonzero(np.diff(of_edge)) + 1) if len(order) else []:
        i, at_i = np.unique(row[part], return_inverse=True)
        j, at_j = np.unique(column[part], return_inverse=True)
        weight = np.zeros((len(i), len(j)))
        weight[at_i, at_j] = edges.data[part]
        pairs += int((weight[linear_sum_assignment(weight, maximize=True)] > 0).sum())
    return pairs


def stability(dictionaries: Sequence[Dictionary], path: Path) -> dict[str, Any]:
    """What stability.json holds of `dictionaries`; pairs that the present file at `path` has are not done again.

    {"threshold", "pairs": [{"a", "b", "arm", "live": [A, B], and `compare`'s figures, "fingerprint"}], "arms": [{"arm",
    "runs", "pairs", "mean_max_cosine", "shared_fraction"}], "runs": {run: the means over its pairs}}. A pair without a
    live vector on either side has null figures and enters no mean.
    """
    present = read_json(path, "the stability of dictionaries") if path.exists() else {}
    known = {pair["fingerprint"]: pair for pair in present.get("pairs", [])}
    by_arm: dict[str, list[Dictionary]] = {}
    for each in sorted(dictionaries, key=lambda each: each.run):
        by_arm.setdefault(each.arm, []).append(each)
    pairs: list[dict[str, Any]] = []
    for arm, members in by_arm.items():
        vectors: dict[str, torch.Tensor] = {}
        for a, b in combinations(members, 2):
            mark = fingerprint([PAIR_FORMAT, THRESHOLD, a.run, b.run, arm, *(_state(each) for each in (a, b))])
            if mark not in known:
                for each in (a, b):
                    if each.run not in vectors:
                        vectors[each.run] = each.live_vectors()
                known[mark] = _pair(a, b, vectors[a.run], vectors[b.run]) | {"fingerprint": mark}
            pairs.append(known[mark])
    arms = [
        {"arm": arm, "runs": [each.run for each in members], **_mean([p for p in pairs if p["arm"] == arm])}
        for arm, members in by_arm.items()
        if len(members) > 1
    ]
    runs = {
        each.run: _mean([pair for pair in pairs if each.run in (pair["a"], pair["b"])])
        for members in by_arm.values()
        if len(members) > 1
        for each in members
    }
    return {"threshold": THRESHOLD, "arms": arms, "runs": runs, "pairs": pairs}


def _state(each: Dictionary) -> list[Any]:
    with np.load(each.density, allow_pickle=False) as arrays:
        return [each.weights_sha256, np.packbits(arrays["density"] > 0).tobytes().hex()]


def _pair(a: Dictionary, b: Dictionary, a_AD: torch.Tensor, b_BD: torch.Tensor) -> dict[str, Any]:
    names = ("a_to_b", "b_to_a", "mean_max_cosine", "shared_fraction")
    found: dict[str, Any] = dict(compare(a_AD, b_BD)) if len(a_AD) and len(b_BD) else dict.fromkeys(names)
    return {"a": a.run, "b": b.run, "arm": a.arm, "live": [len(a_AD), len(b_BD)], **found}


def _mean(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = [pair for pair in pairs if pair["mean_max_cosine"] is not None]
    means = {
        name: float(np.mean([pair[name] for pair in found])) if found else None
        for name in ("mean_max_cosine", "shared_fraction")
    }
    return {"pairs": len(found), **means}
