"""Dictionaries of different runs compared: how stable they are over seeds, and each latent's match.

`stability` compares runs that differ in nothing but the seed. `write_matches` finds, for each latent that has a
dashboard, the nearest dictionary vector of every other run. Both read weights, not activations. Both take all runs that
have been evaluated, so that a result depends neither on which runs were named nor on the order of their evaluation.

An arm is what is trained several times with other seeds, here told by a hash of all else that decides a run.

Imports torch, not jax.
"""

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

from hafs_evaluate.latents.dashboards import write_latents
from hafs_evaluate.latents.neighbours import rounded
from hafs_evaluate.results.readings import OTHERS
from hafs_evaluate.workspace import Workspace, fingerprint, hashed_export, read_result
from hafs_jax.base.files import read_json
from hafs_jax.base.foreign import read_npz
from hafs_jax.runs import Run, RunSummary

THRESHOLD = 0.7  # the cosine above which two dictionary vectors of different runs are the same (arXiv 2501.16615)
CHUNK_FLOATS = 1 << 24  # cosines computed at once: 64 MiB
LATENTS, DONE = "latents.json", "done.json"
PAIR_FORMAT = 1  # raise it when a pair's figures of the same dictionaries would differ
MATCH_FORMAT = 2  # raise it when matches of the same dictionaries would differ


@dataclass(frozen=True)
class EvaluatedRun:
    """A run with core metrics: a trained run, or an SAE that was imported."""

    name: str
    sae: Path  # SAELens folder
    weights_sha256: str
    densities: Path  # core_latents.npz
    trained: Run | None

    def dictionary(self) -> Float[torch.Tensor, "F D"]:
        """W_dec in float32, read without the other weights."""
        with safe_open(self.sae / "sae_weights.safetensors", "pt") as file:
            return file.get_tensor("W_dec").float()

    def fires(self) -> np.ndarray:
        """Which latents fire on the held-out rows, [F]."""
        return read_npz(self.densities, "an SAE's densities", ("density",))["density"] > 0

    def live_vectors(self) -> Float[torch.Tensor, "live D"]:
        """The dictionary vectors of the latents that fire, normalised."""
        return torch.nn.functional.normalize(self.dictionary()[np.flatnonzero(self.fires())], dim=1)


def evaluated_runs(workspace: Workspace) -> list[EvaluatedRun]:
    """All runs whose core metrics are of the SAE that lies there now, by name."""
    found = []
    for core in sorted(workspace.eval.glob("*/core.json")):
        name = core.parent.name
        folder = next((f for f in (workspace.runs / name, workspace.folder / "imported" / name) if f.is_dir()), None)
        if folder is None or not (folder / "sae" / "sae_weights.safetensors").exists():
            continue
        exported = hashed_export(name, folder / "sae")
        if exported.weights_sha256 == read_json(core, "core metrics").get("sae_sha256"):
            trained = Run(folder) if folder.parent == workspace.runs else None
            densities = core.with_name("core_latents.npz")
            found.append(EvaluatedRun(name, exported.folder, exported.weights_sha256, densities, trained))
    return found


def stability(runs: Sequence[EvaluatedRun], earlier: dict[str, Any]) -> dict[str, Any]:
    """What stability.json holds of the trained runs. Pairs that the `earlier` one has are not compared again.

    - threshold: THRESHOLD;
    - pairs: [{"a", "b", "arm", "live": [A, B], the figures of `compare`, "fingerprint"}], of all pairs of an arm;
    - arms: [{"arm", "architecture", "variant", "k", "runs", and the means over its pairs}];
    - runs: {run: the means over its pairs}.

    A pair of which one run has no live vector has figures of None and enters no mean.
    """
    known = {pair["fingerprint"]: pair for pair in earlier.get("pairs", [])}
    by_arm: dict[str, list[EvaluatedRun]] = {}
    for run in sorted(runs, key=lambda run: run.name):
        if run.trained is not None:
            by_arm.setdefault(arm_of(run.trained.summary(), run.trained.record()["config"]), []).append(run)
    arms: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    by_run: dict[str, dict[str, Any]] = {}
    for arm, members in by_arm.items():
        if len(members) < 2:
            continue
        own = _pairs(arm, members, known)
        pairs += own
        arms.append({"arm": arm, "runs": [run.name for run in members], **_mean(own), **_facts(members[0])})
        by_run |= {run.name: _mean([pair for pair in own if run.name in (pair["a"], pair["b"])]) for run in members}
    return {"threshold": THRESHOLD, "arms": arms, "runs": by_run, "pairs": pairs}


def arm_of(run: RunSummary, config: dict[str, Any]) -> str:
    """A hash of all that decides a run, except for its seeds; `config` is that of its config.json.

    tau is left out, since it is measured on a baseline, which may have the same seed. So is the arm's own name, which
    adds nothing and which runs of earlier versions lack.
    """
    trained = {key: value for key, value in config.items() if key not in ("seed", "data_seed", "arm")}
    trained["penalty"] = {key: value for key, value in trained.get("penalty", {}).items() if key != "tau"}
    names = [run.architecture, run.variant, run.k, run.n_latents, run.d_model]
    return fingerprint([*names, trained, run.store_fingerprint])


@torch.no_grad()
def compare(
    a_AD: Float[torch.Tensor, "A D"], b_BD: Float[torch.Tensor, "B D"], threshold: float = THRESHOLD
) -> dict[str, float]:
    """How alike two sets of unit vectors are; neither may be empty.

    - a_to_b: mean over the vectors of a of their highest cosine with a vector of b; b_to_a: the other way round;
    - mean_max_cosine: the mean of the two;
    - shared_fraction: 2 m / (A + B), where m pairs are matched one to one. The matching maximises the sum of cosines
      over pairs whose cosine exceeds `threshold` (the Hungarian method).

    Memory is bounded by CHUNK_FLOATS; only the cosines above the threshold are kept.
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
    """The number of pairs in the one-to-one matching of greatest total weight; all weights are positive.

    `edges` [A, B] holds the weights of a bipartite graph. Vectors with no path between them never compete, so each
    connected component is solved by itself.
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


@torch.no_grad()
def write_matches(workspace: Workspace, runs: Sequence[EvaluatedRun]) -> int:
    """Adds `matches` to the latents of each latents.json that lacks them or has old ones; returns how many it wrote.

    A latent's matches are {run: {"index", "cosine"}}: the dictionary vector of the highest cosine in each other run
    that has a latents.json and the same width. Those of latents_others.json have the runs of the same seed alone, among
    which the report's page leads from one to the other. One file and one dictionary are held at a time.
    """
    shown = [run for run in runs if workspace.result(run.name, LATENTS).exists()]
    names = sorted((run.name, run.weights_sha256) for run in shown)
    marks = {run.name: fingerprint([MATCH_FORMAT, run.name, names]) for run in shown}
    old = [run for run in shown if _matched_with(workspace.result(run.name, LATENTS)) != marks[run.name]]
    files = [
        _Matched(run, path)
        for run in old
        for path in (workspace.result(run.name, LATENTS), workspace.result(run.name, OTHERS))
        if path.exists()
    ]
    for other in shown if old else ():
        unit_FD = torch.nn.functional.normalize(other.dictionary(), dim=1)
        for file in files:
            if file.run.name != other.name and (file.path.name == LATENTS or _same_seed(file.run, other)):
                file.match(other.name, unit_FD)
    for file in reversed(files):  # latents.json, which holds the mark, after the others
        file.write(marks[file.run.name])
    return len(old)


def _marks(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The marks of a latents.json; of one of an earlier version those in done.json."""
    return values.get("marks") or read_result(path.with_name(DONE))


def _matched_with(path: Path) -> str | None:
    return _marks(path, read_result(path)).get("matches")


class _Matched:
    """The latents of one file, and the best match of each in other runs."""

    def __init__(self, run: EvaluatedRun, path: Path) -> None:
        self.run, self.path = run, path
        latents = read_json(path, "an SAE's latents")["latents"]
        index = [latent["index"] for latent in latents]
        self.unit_CD = torch.nn.functional.normalize(run.dictionary()[index], dim=1)
        self.found: dict[str, list[dict[str, Any]]] = {}

    def match(self, name: str, unit_FD: Float[torch.Tensor, "F D"]) -> None:
        if self.unit_CD.shape[1] != unit_FD.shape[1]:
            return
        own: list[dict[str, Any]] = []
        for unit_cD in self.unit_CD.split(max(1, CHUNK_FLOATS // len(unit_FD))):
            best = (unit_cD @ unit_FD.T).max(1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            own += [{"index": index, "cosine": rounded(cosine)} for index, cosine in pairs]
        self.found[name] = own

    def write(self, mark: str) -> None:
        values = read_json(self.path, "an SAE's latents")
        for place, latent in enumerate(values["latents"]):
            latent["matches"] = {name: own[place] for name, own in self.found.items()}
        if self.path.name == LATENTS:
            values = {"marks": {}, **values}
            values["marks"] = {**_marks(self.path, values), "matches": mark}
        write_latents(self.path, values)


def _same_seed(a: EvaluatedRun, b: EvaluatedRun) -> bool:
    return a.trained is not None and b.trained is not None and a.trained.summary().seed == b.trained.summary().seed


def _pairs(arm: str, members: Sequence[EvaluatedRun], known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of all pairs of an arm's runs; of `known`, by fingerprint, where the pair is there."""
    vectors: dict[str, torch.Tensor] = {}
    pairs = []
    for a, b in combinations(members, 2):
        mark = fingerprint([PAIR_FORMAT, THRESHOLD, a.name, b.name, arm, *(_state(run) for run in (a, b))])
        if mark not in known:
            vectors |= {run.name: run.live_vectors() for run in (a, b) if run.name not in vectors}
            known[mark] = _pair(arm, a, b, vectors[a.name], vectors[b.name]) | {"fingerprint": mark}
        pairs.append(known[mark])
    return pairs


def _pair(arm: str, a: EvaluatedRun, b: EvaluatedRun, a_AD: torch.Tensor, b_BD: torch.Tensor) -> dict[str, Any]:
    names = ("a_to_b", "b_to_a", "mean_max_cosine", "shared_fraction")
    found: dict[str, Any] = dict(compare(a_AD, b_BD)) if len(a_AD) and len(b_BD) else dict.fromkeys(names)
    return {"a": a.name, "b": b.name, "arm": arm, "live": [len(a_AD), len(b_BD)], **found}


def _state(run: EvaluatedRun) -> list[Any]:
    """What a pair's figures depend on in one of its runs."""
    return [run.weights_sha256, np.packbits(run.fires()).tobytes().hex()]


def _facts(run: EvaluatedRun) -> dict[str, Any]:
    summary = run.trained.summary() if run.trained else None
    return {name: getattr(summary, name, None) for name in ("architecture", "variant", "k")}


def _mean(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The number of pairs that have figures, and the means of those figures."""
    found = [pair for pair in pairs if pair["mean_max_cosine"] is not None]
    means = {
        name: float(np.mean([pair[name] for pair in found])) if found else None
        for name in ("mean_max_cosine", "shared_fraction")
    }
    return {"pairs": len(found), **means}
