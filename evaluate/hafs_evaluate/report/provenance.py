"""Where a report's figures came from: models, texts and licences, versions, configs. Must not import torch or jax."""

import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from hafs_extract import packaged
from hafs_jax.runs import Run
from hafs_jax.store.manifest import Manifest

# Of what the hub serves; packaged models and texts say theirs themselves.
HUB_LICENCES = {
    "EleutherAI/pythia-70m-deduped": "Apache-2.0",
    "Salesforce/wikitext": "CC BY-SA 3.0 and GFDL",
    "cais/wmdp": "MIT",
}
DISTRIBUTIONS = (
    "hafs-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers", "transformer-lens",
    "sae-lens", "sae-bench", "sae-probes", "scikit-learn", "safetensors", "matplotlib",
)  # fmt: skip


def measured_on(folder: Path, runs: list[str]) -> str:
    """The day of the newest result: "30 November 2026"; empty where nothing has finished."""
    paths = [Run(folder / "runs" / run).result_path for run in runs] + [folder / "eval" / "seconds.json"]
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return f"{datetime.fromtimestamp(max(times), UTC):%-d %B %Y}" if times else ""


def command(folder: Path) -> str:
    """The command that writes this report again."""
    return f"hafs report --profile {folder.name}"


def sources(manifest: Manifest) -> list[dict[str, str]]:
    """The rows of a table of the language model and the sources of text: origin, licence, documents, training rows."""
    model = manifest.model
    revision = f", revision {model.revision[:12]}" if model.revision else ""
    packaged_model = packaged.MODELS.get(model.name)
    licence = packaged_model.wheel.licence if packaged_model else HUB_LICENCES.get(model.name, "see its own page")
    origin = f"{model.name} ({model.origin}{revision}), computed in {model.dtype}"
    rows = [{"what": "language model", "origin": origin, "licence": licence, "documents": "", "rows": ""}]
    for source in manifest.sources:
        text = packaged.TEXTS.get(source.path)
        rows.append(
            {
                "what": source.name,
                "origin": f"{source.path}{f' ({text.wheel.requirement})' if text else ''}, weight {source.weight:g}",
                "licence": text.wheel.licence if text else HUB_LICENCES.get(source.path, "see its own page"),
                "documents": f"{source.documents:,}",
                "rows": f"{source.rows:,}",
            }
        )
    return rows


def store_note(manifest: Manifest) -> str:
    """Sentences that say how the store's rows were made, and how many were left out."""
    kept = manifest.norm_filter
    note = (
        f"Contexts of {manifest.context_length} tokens{', BOS first' if manifest.tokenizer.prepend_bos else ''}; "
        f"stored as {manifest.dtype}; seed {manifest.seed}; store {manifest.fingerprint}. "
    )
    if kept.multiple is None:
        return note + "No rows were left out for their norm."
    return note + (
        f"{kept.dropped_rows:,} training rows with a norm over {kept.multiple:g} times the median "
        f"({kept.median_norm:.4g}) were left out."
    )


def versions() -> str:
    """The installed versions of what the figures may depend on, in a sentence."""
    found = [f"Python {platform.python_version()}"]
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found) + "."


def configs(folder: Path, runs: dict[str, str], manifest: Manifest) -> dict[str, str]:
    """The resolved configs as JSON texts: the extraction's, and each variant's (`runs`: {variant: run})."""
    found = {"extract": json.dumps(manifest.config, indent=2, ensure_ascii=False)}
    for name, run in runs.items():
        found[name] = json.dumps(Run(folder / "runs" / run).record(), indent=2, ensure_ascii=False)
    return found
