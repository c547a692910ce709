"""From a checkpoint to a SAELens folder: the one module of `evaluate` that imports JAX (through `hafs_jax`)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from extract.format.errors import UserError
from extract.format.files import write_atomic, write_json
from extract.format.store import Manifest, read_manifest

# What JAX computes here is small; it must not claim a GPU that the evaluation's torch needs.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_SAELENS_VERSION = "6.54.12"  # the version whose on-disk format this is; SAELens drops metadata of versions below 6
_NAMES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu"}


def export_run(run_folder: Path) -> Path:
    """Writes `<run>/sae/` from the run's last checkpoint and returns that folder; a second call writes the same bytes.

    The folder holds `cfg.json` and `sae_weights.safetensors` as `sae_lens.SAE.load_from_disk` reads them: float32 W_enc
    [D, F], b_enc [F], W_dec [F, D] of unit rows, b_dec [D] and, for batchtopk (written as `jumprelu`), threshold [F].
    The input's centring and scale are folded in, so the SAE takes raw activations. cfg.json is written last.
    Raises `UserError` where the run has not finished or its store is gone.
    """
    from hafs_jax.checkpoint import load_checkpoint
    from hafs_jax.runs import Run
    from hafs_jax.sae import folded

    run = Run(run_folder)
    result, config = run.result(), run.config()
    if config.sae.architecture not in _NAMES:
        raise UserError(
            f"{run_folder}: no SAELens form for architecture {config.sae.architecture!r}; "
            f"expected one of {', '.join(_NAMES)}"
        )
    store = run_folder / run.store_record()["folder"]
    manifest = read_manifest(store)
    state, scale = load_checkpoint(run.checkpoints, config, manifest.d_model)
    params, threshold = folded(state.params, scale, state.threshold(config.sparsity.threshold_decay))
    tensors = {name: np.asarray(value, np.float32) for name, value in params.items()}
    if _NAMES[config.sae.architecture] == "jumprelu":
        tensors["threshold"] = np.full(config.sae.F, np.float32(threshold))
    folder = run_folder / "sae"
    metadata = {
        "variant": config.variant,
        "seed": config.seed,
        "training_tokens": result["tokens"],
        "k": config.sae.k,
        "l0": result["final"]["l0"],
        "num_dead_features": round(result["final"]["dead_fraction"] * config.sae.F),
    }
    weights = safetensors.numpy.save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})
    write_atomic(folder / "sae_weights.safetensors", lambda file: file.write(weights) and None)
    cfg = saelens_config(config.sae.architecture, manifest, config.sae.F, metadata)
    if cfg["architecture"] == "topk":
        cfg |= {"k": config.sae.k, "rescale_acts_by_decoder_norm": False}
    write_json(folder / "cfg.json", cfg)
    return folder


def saelens_config(architecture: str, manifest: Manifest, n_latents: int, metadata: dict[str, Any]) -> dict[str, Any]:
    """The cfg.json of an SAE of ours: SAELens's keys, and in `metadata` where its activations came from."""
    return {
        "architecture": _NAMES[architecture],
        "d_in": manifest.d_model,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _SAELENS_VERSION,
            "sae_lens_training_version": None,
            "trained_with": "hafs-jax",
            "training_architecture": architecture,
            "model_name": manifest.model.name,
            "model_revision": manifest.model.revision,
            "hook_name": manifest.hook_point,
            "hook_head_index": None,
            "context_size": manifest.context_length,
            "prepend_bos": manifest.tokenizer.prepend_bos,
            "dataset_path": json.dumps([source.path for source in manifest.sources]),
            **metadata,
        },
    }
