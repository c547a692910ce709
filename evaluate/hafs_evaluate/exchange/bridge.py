"""From a checkpoint to a SAELens folder: the one module of `evaluate` that imports JAX (through `hafs_jax`)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_atomic, write_json
from hafs_jax.store.manifest import Manifest, read_manifest

# What JAX computes here is small; it must not claim a GPU that the evaluation's torch needs.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

SAELENS_VERSION = "6.54.12"  # the version whose on-disk format this is; SAELens drops metadata of versions below 6


def export_run(run_folder: Path) -> Path:
    """Writes `<run>/sae/` from the run's last checkpoint and returns that folder; a second call writes the same bytes.

    The folder holds `cfg.json` and `sae_weights.safetensors` as `sae_lens.SAE.load_from_disk` reads them: float32 W_enc
    [D, F], b_enc [F], W_dec [F, D] of unit rows (a transcoder's, [F, D_out], are of one other norm), b_dec [D]; of a
    `jumprelu` (jumprelu; batchtopk and matryoshka, whose one threshold is repeated) threshold [F]; of a `gated` b_gate,
    b_mag and r_mag [F], and no b_enc. The input's centring and scale are folded in, so the SAE takes raw activations.
    cfg.json is written last. Raises `UserError` where the run has not finished, its store is gone, or SAELens has no
    form for it (a topk or gated transcoder).
    """
    from hafs_jax.method.architectures import ARCHITECTURES
    from hafs_jax.method.matryoshka import fixed_ends
    from hafs_jax.method.sae import folded
    from hafs_jax.runs import Run
    from hafs_jax.training.checkpoint import load_checkpoint

    run = Run(run_folder)
    result, config = run.result(), run.config()
    kind = saelens_name(config.sae.architecture, config.sae.transcode, str(run_folder))
    form = ARCHITECTURES[config.sae.architecture]
    assert form.saelens is not None
    stores = run.store_record()
    manifest = read_manifest(run_folder / stores["folder"])
    target = read_manifest(run_folder / stores["target"]["folder"]) if config.sae.transcode else None
    d_out = None if target is None else target.d_model
    state, scale = load_checkpoint(run.checkpoints, config, manifest.d_model, d_out)
    params, threshold = folded(state.weights(), scale, state.threshold(config.sparsity.threshold_decay))
    tensors = {form.saelens.renamed.get(name, name): np.asarray(value, np.float32) for name, value in params.items()}
    if form.saelens.repeats_threshold or "threshold" in form.params:
        tensors["threshold"] = np.broadcast_to(np.float32(threshold), config.sae.F)
    metadata = {
        "variant": config.variant,
        "seed": config.seed,
        "training_tokens": result["tokens"],
        "k": config.sae.k,
        "l0": result["final"]["l0"],
        "num_dead_features": round(result["final"]["dead_fraction"] * config.sae.F),
    }
    if form.nested:
        ends = [config.sae.F] if config.sae.sampled_prefixes else sorted(set(fixed_ends(config.sae)))
        metadata["prefixes"] = list(ends)
    cfg = saelens_config(config.sae.architecture, kind, manifest, config.sae.F, metadata)
    if target is not None:
        cfg |= {"apply_b_dec_to_input": False, "d_out": target.d_model}
        cfg["metadata"]["hook_name_out"] = target.hook_point
    if kind == "topk":
        cfg |= {"k": config.sae.k, "rescale_acts_by_decoder_norm": False}
    folder = run_folder / "sae"
    write_saelens(folder, tensors, cfg)
    return folder


def saelens_name(architecture: str, transcode: bool, where: str) -> str:
    """SAELens's name of an architecture of ours; `UserError`, naming `where`, where it has none."""
    from hafs_jax.method.architectures import ARCHITECTURES

    forms = {name: entry.saelens for name, entry in ARCHITECTURES.items() if entry.saelens is not None}
    known = {name: form.transcoder if transcode else form.sae for name, form in forms.items()}
    if (found := known.get(architecture)) is None:
        form = "transcoder of architecture" if transcode else "architecture"
        having = ", ".join(name for name, kind in known.items() if kind is not None)
        raise UserError(f"{where}: no SAELens form for {form} {architecture!r}; expected one of {having}")
    return found


def write_saelens(folder: Path, tensors: dict[str, np.ndarray], cfg: dict[str, Any]) -> None:
    """Writes a SAELens folder, cfg.json last; equal tensors give equal bytes."""
    weights = safetensors.numpy.save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})
    write_atomic(folder / "sae_weights.safetensors", lambda file: file.write(weights) and None)
    write_json(folder / "cfg.json", cfg)


def read_saelens(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`hafs_jax.saelens.read_saelens`, for the modules of this room that must not import JAX."""
    from hafs_jax.saelens import read_saelens

    return read_saelens(folder)


def saelens_config(
    architecture: str, kind: str, manifest: Manifest, n_latents: int, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The cfg.json of an SAE of ours: SAELens's keys, and in `metadata` where its activations came from."""
    return {
        "architecture": kind,
        "d_in": manifest.d_model,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
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
