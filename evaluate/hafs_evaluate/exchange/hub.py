"""A run on the model hub: the folder that is uploaded, and its upload.

The folder holds the run's SAELens folder, its training config and a model card.
"""

import json
import os
import re
import tempfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from hafs_evaluate.exchange.plain_files import copy_file, plain_file
from hafs_evaluate.report.markdown import code, escape, table
from hafs_evaluate.results.measures import find_measure, sentence_name
from hafs_evaluate.results.readings import read_results, run_figures, weights_of
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of, write_json, write_text
from hafs_jax.runs import Run, RunSummary

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_CARD = """\
---
{front_matter}
---

# {title}

A sparse autoencoder on the activations of {model} at {hook}: {d_sae:,} latents over {d_in} dimensions, architecture
{architecture}, variant {variant}, seed {seed}, trained with {project} on {tokens:,} activations.
{origin}

## Load it

    from sae_lens import SAE
    sae = SAE.from_pretrained("{repo_id}", "{run}")

It takes raw activations: their centring and scale are folded into the weights.

## Metrics

{metrics}

## Training

The whole resolved config is in `{run}/training_config.json`.

{training}
"""

_TRAINING = ("batch_size", "sae.architecture", "sae.k", "penalty.kind", "penalty.lam_max", "penalty.tau",
             "sparsity.coefficient", "optimizer.learning_rate")  # fmt: skip


def upload(
    run_folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    licence: str | None = None,
    dry_run: Path | None = None,
) -> str:
    """Uploads a finished run's SAELens folder and model card to the hub in one commit, and returns the page's address.

    A repository that does not exist is created. One that exists keeps its visibility. With `dry_run` nothing is sent:
    the folder that would be uploaded is written there, and its path returned. Raises `UserError` for a bad repo_id,
    without a token, where the hub cannot be reached, and for whatever it refuses.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise UserError(f"--repo-id {repo_id!r}: expected USER/NAME of letters, digits, '-', '_' and '.'")
    if dry_run is not None:
        return str(write_upload(run_folder, dry_run, repo_id, licence))

    from huggingface_hub import HfApi, get_token

    from hafs_extract.hub.presence import hub_problem, model_file
    from hafs_jax.base.hub import LOG_IN, connect, hub_errors

    if get_token() is None:
        raise UserError(f"expected a hub token, found none; {LOG_IN} (or give --dry-run DIR)")
    if problem := hub_problem(model_file(repo_id)):
        raise UserError(f"cannot upload: {problem}; try again with the hub in reach, or give --dry-run DIR")
    connect()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_upload(run_folder, Path(temporary), repo_id, licence)
        with hub_errors("model", repo_id, "is not taken by the hub"):
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
            message = f"Add {run_folder.resolve().name}"
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return f"{api.endpoint}/{repo_id}"


def write_upload(run_folder: Path, target: Path, repo_id: str, licence: str | None = None) -> Path:
    """Writes what `upload` uploads into `target` and returns it: README.md, and <run>/ with the SAE and its config."""
    from hafs_jax.saelens import export_saelens, read_safetensors

    sae, run = export_saelens(run_folder), run_folder.resolve().name
    if os.path.lexists(sae / "sparsity.safetensors"):
        sparsity = plain_file(sae, "sparsity.safetensors")
        read_safetensors(sparsity, f"SAELens's log densities at {sparsity}")
    for name in ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json"):
        if os.path.lexists(sae / name):
            copy_file(sae, name, target / run)
    write_json(target / run / "training_config.json", Run(run_folder).record()["config"])
    write_text(target / "README.md", model_card(run_folder, sae, repo_id, licence))
    return target


def model_card(run_folder: Path, sae: Path, repo_id: str, licence: str | None = None) -> str:
    """README.md of the run: YAML for the hub, how to load the SAE, and what was measured on exactly these weights."""
    cfg = read_json(sae / "cfg.json", "a SAELens folder's cfg.json")
    summary, config = Run(run_folder).summary(), Run(run_folder).record()["config"]
    known, run = cfg["metadata"], summary.name
    front = ["library_name: saelens", "tags:", "- sparse-autoencoder", "- mechanistic-interpretability", "- saelens"]
    front += ["- hafs-jax"] + ([f"license: {json.dumps(licence)}"] if licence else [])
    is_of_hub, wheel = str(known.get("model_source")) == "hub", _wheel(known.get("model_source"))
    if is_of_hub or wheel:
        front.append(f"base_model: {json.dumps(known['model_name'])}")
    found = metrics(run_folder, sae, summary)
    settings = [[name, str(_at(config, name))] for name in _TRAINING if _at(config, name) is not None]
    return _CARD.format(
        front_matter="\n".join(front),
        title=escape(f"{repo_id.split('/')[1]}: {run}"),
        model=escape(str(known.get("model_name"))),
        hook=code(known.get("hook_name")),
        d_sae=cfg["d_sae"],
        d_in=cfg["d_in"],
        architecture=code(known.get("training_architecture")),
        variant=code(known.get("variant")),
        seed=escape(str(known.get("seed"))),
        project=_project(),
        origin=_origin(wheel, known.get("dataset_paths") or []),
        tokens=summary.tokens,
        repo_id=repo_id,
        run=run,
        metrics=table(["metric", "value", "of"], [[name, f"{value:.4g}", of] for name, value, of in found]),
        training=table(["setting", "value"], settings),
    )


def metrics(run_folder: Path, sae: Path, summary: RunSummary) -> list[tuple[str, float, str]]:
    """(label, value, what it was measured on): of the last training step, and of eval/<run>/ the card's measures.

    Results of other weights than those in `sae` are left out.
    """
    trained = {"fvu_ema": "fvu", "l0": "l0", "dead_fraction": "dead_fraction"}
    final = [(sentence_name(measure), summary.final.get(name)) for name, measure in trained.items()]
    found = [(label, float(value), "training, last step") for label, value in final if value is not None]
    weights_sha256 = sha256_of(sae / "sae_weights.safetensors")
    results = read_results(run_folder.resolve().parents[1] / "eval" / summary.name)
    of_these = {file: result for file, result in results.items() if weights_of(result) == weights_sha256}
    for name, value in run_figures({summary.name: of_these})[summary.name].items():
        measure = find_measure(name)
        if measure is not None and measure.is_on_card:
            found.append((measure.sentence_name, value, measure.over))
    return found


def _wheel(source: Any) -> str:
    """The wheel `name==version` that a packaged model came in; empty for any other."""
    kind, _, wheel = str(source).partition(":")
    return wheel if kind == "wheel" else ""


def _origin(wheel: str, datasets: list[str]) -> str:
    """What the activations are of: a paragraph, empty where nothing is known."""
    said = [f"The activations are those of a quantised copy of the model, in the wheel {code(wheel)}."] if wheel else []
    said += [f"Texts: {', '.join(map(code, datasets))}."] if datasets else []
    return f"\n{' '.join(said)}\n" if said else ""


def _project() -> str:
    """The library's name, as a link where the installed package says where the project is."""
    try:
        urls = metadata("hafs-jax").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    return f"[hafs-jax]({urls[0].partition(',')[2].strip()})" if urls else "hafs-jax"


def _at(values: dict[str, Any], path: str) -> Any:
    """The value at a dotted path, None where a part of it is absent."""
    found: Any = values
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
