"""A run's latents in SAEDashboard's and Neuronpedia's file formats, from its latents.json. Standard library; no torch.

    DIR/sae_dashboard/batch-0.json                  SAEDashboard 0.8.0's NeuronpediaDashboardBatch
    DIR/<model>/<layer>-<set>/release.jsonl.gz      Neuronpedia's export bundle: one row each of its tables
                              model.jsonl.gz        SourceRelease, Model, SourceSet and Source, and of Feature and
                              sourceset.jsonl.gz    Activation a row each latent and context; as its converter of
                              source.jsonl.gz       SAEDashboard's output writes it, from which Neuronpedia imports
                              features/batch-0.jsonl.gz
                              activations/batch-0.jsonl.gz

Neuronpedia's operators fill in what only they know, so creatorId is left empty. What was not measured is an empty list:
neuron alignments, histograms and decoder weight distributions.
"""

import gzip
import json
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from hafs_evaluate.results.result_shapes import check_latents
from hafs_evaluate.workspace import Workspace
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_atomic, write_text
from hafs_jax.runs import is_inside
from hafs_jax.store.manifest import Manifest

_NEEDED = ("promoted_logits", "suppressed_logits", "random_contexts", "partners")
EMPTY = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_l1",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)
"""The lists of both formats that are left empty."""


def write_neuronpedia(
    run_folder: Path, out: Path, *, set_name: str | None = None, creator: str = "", created: datetime | None = None
) -> Path:
    """Writes both formats of the run at OUT/<profile>/runs/<run> to `out` and returns the bundle's folder.

    `UserError` where the run has no latents.json yet. `set_name` is the source set's [the run's name].
    """
    run_folder = run_folder.resolve()
    workspace = Workspace(run_folder.parent.parent)
    path = workspace.result(run_folder.name, "latents.json")
    if not path.exists():
        raise UserError(f"run {run_folder.name}: expected {path}, found none; run `make eval` without --skip latents")
    values, manifest = check_latents(read_json(path, "an SAE's latents"), path), workspace.train.manifest
    if any(latent.get(name) is None for latent in values["latents"] for name in _NEEDED) or _lacks(values):
        raise UserError(f"run {run_folder.name}: {path} is of an earlier version; run `make eval` again")
    batch = dashboard_batch(values, manifest, set_name or run_folder.name)
    name = f"{batch['layer']}-{batch['sae_set']}"
    if Path(name).name != name or not is_inside(batch["model_id"]):
        raise UserError(
            f"expected a set and a model whose names are folders' below {out}, found set {batch['sae_set']!r} and "
            f"model {batch['model_id']!r}; give another --set"
        )
    write_text(out / "sae_dashboard" / "batch-0.json", _line(batch))
    tables = bundle(batch, manifest, creator, (created or datetime.now(UTC)).isoformat())
    folder = out / batch["model_id"] / name
    for name, rows in tables.items():
        data = gzip.compress("".join(map(_line, rows)).encode(), compresslevel=6, mtime=0)
        write_atomic(folder / f"{name}.jsonl.gz", partial(_write, data))
    return folder


def _lacks(values: dict[str, Any]) -> bool:
    """Whether there is no number of rows, or a partner without its phi."""
    partners = (partner for latent in values["latents"] for partner in latent["partners"])
    return values.get("rows_scanned") is None or any(partner.get("phi") is None for partner in partners)


def dashboard_batch(values: dict[str, Any], manifest: Manifest, set_name: str) -> dict[str, Any]:
    """SAEDashboard's batch of the latents in a latents.json.

    A latent's partners become its correlated features. Their phi is the Pearson correlation of whether the two latents
    are active, not of their activations.

    The activations are in bins. Those of top contexts have the bin (-1, maximum), by which SAEDashboard marks them.
    Each random context stands for an equal share of the rows on which the latent is active, and the limits of its bin
    lie half-way to the next context's value.
    """
    parts = manifest.hook_point.split(".")
    return {
        "model_id": manifest.model.name.rstrip("/").split("/")[-1].lower(),
        "layer": int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else 0,
        "sae_set": set_name,
        "sae_id_suffix": None,
        "features": [_feature(latent, values["rows_scanned"], manifest) for latent in values["latents"]],
    }


def _feature(latent: dict[str, Any], rows: int, manifest: Manifest) -> dict[str, Any]:
    top, random = latent["contexts"], latent["random_contexts"]
    peaks = [context["values"][context["peak"]] for context in random]
    limits = [latent["max_activation"], *((a + b) / 2 for a, b in pairwise(peaks)), 0.0]
    bins = [(-1.0, latent["max_activation"], -1.0)] * len(top)
    bins += [(limits[i + 1], limits[i], 1 / len(random)) for i in range(len(random))]
    return {
        **{name: [] for name in EMPTY},
        "feature_index": latent["index"],
        "correlated_features_indices": [partner["index"] for partner in latent["partners"]],
        "correlated_features_pearson": [partner["phi"] for partner in latent["partners"]],
        "neg_str": latent["suppressed"],
        "neg_values": latent["suppressed_logits"],
        "pos_str": latent["promoted"],
        "pos_values": latent["promoted_logits"],
        "frac_nonzero": latent["density"],
        "n_prompts_total": rows // max(manifest.context_length, 1),
        "n_tokens_in_prompt": manifest.context_length,
        "dataset": _dataset(manifest),
        "activations": [
            {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": share,
                "tokens": context["tokens"],
                "values": context["values"],
                "qualifying_token_index": context["peak"],
            }
            for context, (low, high, share) in zip([*top, *random], bins, strict=True)
        ],
        "vector": [],
    }


def bundle(batch: dict[str, Any], manifest: Manifest, creator: str, created: str) -> dict[str, list[dict[str, Any]]]:
    """{file name without .jsonl.gz: rows} of Neuronpedia's export."""
    model, name = batch["model_id"], batch["sae_set"]
    source = f"{batch['layer']}-{name}"
    common = {"creatorId": "", "createdAt": created}
    model_row = {
        "id": model,
        "instruct": "instruct" in model or model.endswith("-it"),
        "displayName": manifest.model.hub_name or manifest.model.name,
        "displayNameShort": model,
        "defaultSourceSetName": name,
        "dimension": manifest.d_model,
        "layers": manifest.model.n_layers,
        "updatedAt": created,
        **common,
    }
    release = {
        "name": name,
        "description": name,
        "descriptionShort": name,
        "urls": [],
        "creatorName": creator,
        "creatorNameShort": creator,
        "defaultSourceSetName": name,
        **common,
    }
    source_set = {
        "modelId": model,
        "name": name,
        "description": f"{manifest.hook_point}, {len(batch['features'])} latents shown",
        "creatorName": creator,
        "releaseName": name,
        "visibility": "PUBLIC",
        **common,
    }
    source_row = {
        "id": source,
        "modelId": model,
        "setName": name,
        "visibility": "PUBLIC",
        "dataset": _dataset(manifest),
        "num_prompts": max((feature["n_prompts_total"] for feature in batch["features"]), default=0),
        "num_tokens_in_prompt": manifest.context_length,
        **common,
    }
    return {
        "release": [release],
        "model": [model_row],
        "sourceset": [source_set],
        "source": [source_row],
        "features/batch-0": [_feature_row(each, model, source, manifest, common) for each in batch["features"]],
        "activations/batch-0": [
            _activation_row(each, f"{source}-{feature['feature_index']}-{number}", feature, model, source, common)
            for feature in batch["features"]
            for number, each in enumerate(feature["activations"])
        ],
    }


def _feature_row(
    feature: dict[str, Any], model: str, source: str, manifest: Manifest, common: dict[str, Any]
) -> dict[str, Any]:
    kept = [*EMPTY, "correlated_features_indices", "correlated_features_pearson", "frac_nonzero"]
    kept += ["neg_str", "neg_values", "pos_str", "pos_values"]
    return {
        "modelId": model,
        "layer": source,
        "index": str(feature["feature_index"]),
        "maxActApprox": max((max(each["values"]) for each in feature["activations"]), default=0),
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "hookName": manifest.hook_point,
        "topkCosSimIndices": [],
        "topkCosSimValues": [],
        **{name: feature[name] for name in kept},
        **common,
    }


def _activation_row(
    activation: dict[str, Any], name: str, feature: dict[str, Any], model: str, source: str, common: dict[str, Any]
) -> dict[str, Any]:
    values = activation["values"]
    return {
        "id": name,
        "modelId": model,
        "layer": source,
        "index": str(feature["feature_index"]),
        "tokens": activation["tokens"],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "binMin": activation["bin_min"],
        "binMax": activation["bin_max"],
        "binContains": activation["bin_contains"],
        "qualifyingTokenIndex": activation["qualifying_token_index"],
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
        "dataIndex": None,
        "dataSource": None,
        **common,
    }


def _dataset(manifest: Manifest) -> str:
    return ", ".join(source.path for source in manifest.sources)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _write(data: bytes, file: Any) -> None:
    file.write(data)
