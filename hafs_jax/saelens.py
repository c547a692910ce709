"""Exporting runs to SAELens, and the functions of its format that other packages use.

    from hafs_jax.saelens import export_saelens, read_saelens
    folder = export_saelens(run.folder)
    weights, cfg = read_saelens(folder)

The format itself lies in `hafs_jax.saelens_format`.
"""

from pathlib import Path

from hafs_jax.api import load
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.method.budgets import budget_counts
from hafs_jax.method.matryoshka import fixed_ends
from hafs_jax.runs import Run
from hafs_jax.saelens_files import AT_RUN_TIME, CFG, WEIGHTS, read_cfg, read_safetensors, read_tensors, write_saelens
from hafs_jax.saelens_format import (
    SAELENS_VERSION,
    NoSAELensForm,
    fold,
    read_saelens,
    saelens_config,
    saelens_name,
    saelens_tensors,
)

__all__ = [
    "AT_RUN_TIME",
    "CFG",
    "SAELENS_VERSION",
    "WEIGHTS",
    "NoSAELensForm",
    "export_saelens",
    "fold",
    "read_cfg",
    "read_saelens",
    "read_safetensors",
    "read_tensors",
    "saelens_name",
    "write_saelens",
]


def export_saelens(run_folder: Path | str, k: int | None = None) -> Path:
    """Writes `<run>/sae/` from the run's last checkpoint and returns that folder; a second call writes the same bytes.

    With `k`, as `hafs_jax.load` takes it, the folder is `<run>/sae-k<k>/`, and its metadata have no measured L0.

    The folder holds `cfg.json` and `sae_weights.safetensors` as `sae_lens.SAE.load_from_disk` reads them. The input's
    centring and scale are folded in, so that the SAE takes raw activations. The tensors are float32:

    - W_enc [D, F], b_enc [F], b_dec [D], and W_dec [F, D] of unit rows;
    - of a transcoder W_dec [F, D_out], whose rows are of one other norm;
    - of a jumprelu threshold [F]: batchtopk and matryoshka repeat their one threshold;
    - of a gated b_gate, b_mag and r_mag [F], and no b_enc.

    cfg.json is written last. Raises `UserError` where the run has not finished, and its subclass
    `NoSAELensForm` where SAELens has no form for it, as for a topk or gated transcoder.
    """
    run = Run(Path(run_folder))
    summary, config = run.summary(), run.config()
    kind = saelens_name(config.sae.architecture, config.sae.transcode, str(run.folder))
    manifest, target = run.manifests()
    sae = load(run.folder, k=k)
    dead = summary.final.get("dead_fraction")
    metadata = {
        "variant": config.variant,
        "seed": config.seed,
        "training_tokens": summary.tokens,
        "k": sae.config.sae.k,
        "l0": summary.final.get("l0") if k is None else None,
        "num_dead_features": None if dead is None else round(dead * config.sae.F),
    }
    if ARCHITECTURES[config.sae.architecture].nested:
        ends = [config.sae.F] if config.sae.sampled_prefixes else sorted(set(fixed_ends(config.sae)))
        metadata["prefixes"] = list(ends)
    if ARCHITECTURES[config.sae.architecture].budgets:
        metadata["budgets"] = sorted({int(count) for count in budget_counts(config.sae, config.sae.k)})
    tensors = saelens_tensors(sae.params, config.sae, sae.scale, sae.scaled_threshold)
    folder = run.sae if k is None else run.folder / f"{run.sae.name}-k{k}"
    write_saelens(folder, tensors, saelens_config(sae.config.sae, kind, manifest, target, metadata), of=run.state())
    return folder
