"""SAE-Bench's first-letter absorption, with its validity said beside it. Torch; no jax.

The code that scores is SAE-Bench 0.6.0's `absorption.run_eval`. Replaced while it runs, in this process alone: the
model (the one that made the store), its three result folders (which lie in site-packages otherwise) and the working
directory (into which it writes artifacts). Small models do not spell, and small dictionaries hold too few
latents a letter: below LEAST_PARAMETERS or LEAST_LATENTS the figure means nothing and is refused unless forced.
"""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hafs_evaluate.saebench.harness import check_hook_point, logged, read_output, without_type_checks
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import Manifest

LEAST_PARAMETERS = 1_000_000_000
LEAST_LATENTS = 16_000
MODES = ("on", "force")


def validity(parameters: int, latents: int) -> tuple[bool, str]:
    """Whether first-letter absorption means anything for such a model and dictionary, and why (not)."""
    found = f"{parameters / 1e6:,.0f} million parameters and {latents:,} latents"
    if parameters < LEAST_PARAMETERS or latents < LEAST_LATENTS:
        least = f"{LEAST_PARAMETERS / 1e6:,.0f} million parameters and {LEAST_LATENTS:,} latents"
        return False, f"first-letter absorption is valid from {least}, found {found}"
    return True, found


def check_validity(run: str, parameters: int, latents: int, mode: str) -> None:
    """Raises `UserError` where the figure would not be valid and `mode` does not force it."""
    valid, reason = validity(parameters, latents)
    if not valid and mode != "force":
        raise UserError(f"run {run}: {reason}; leave --first-letter out, or take --first-letter force to see it anyway")


def first_letter(
    unique_name: str, sae: Any, model: Any, manifest: Manifest, root: Path, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """{"valid", "reason", "result": SAE-Bench's own JSON, or None where it found too few letters}.

    `changes`: fields of SAE-Bench's config to replace. Its files are kept under `root`; an interrupted run goes on from
    them, which is safe as the folder is named by a hash of the SAE's weights.
    """
    check_hook_point(manifest.hook_point)
    valid, reason = validity(parameters(model), sae.W_dec.shape[0])
    folder = (root / unique_name).resolve()
    with logged(root / "saebench.log"), _redirected(model, folder):
        from sae_bench.evals.absorption import main
        from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

        config = AbsorptionEvalConfig(**({"model_name": manifest.model.name, "llm_dtype": "float32"} | (changes or {})))
        main.run_eval(config, [(unique_name, sae)], str(model.device), str(folder / "output"), force_rerun=False)
        found = list((folder / "output").glob(f"{unique_name}_*_eval_results.json"))
        result = read_output(folder / "output", unique_name) if found else None
    if result is None:
        reason = f"the model spells fewer than {config.min_feats_for_eval} letters: SAE-Bench gives no figure; {reason}"
        valid = False
    return json.loads(json.dumps({"valid": valid, "reason": reason, "result": result}))


def parameters(model: Any) -> int:
    """The number of the language model's parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.hf.parameters())


@contextlib.contextmanager
def _redirected(model: Any, folder: Path) -> Iterator[None]:
    """SAE-Bench's absorption with `model` and with all its folders under `folder`; undone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    gradients = torch.is_grad_enabled()
    with without_type_checks():
        from sae_bench.evals.absorption import main

        kept = main.HookedTransformer, main.run_k_sparse_probing_experiment, main.run_feature_absortion_experiment
        probes = folder.parent / "probes"  # of the model alone: shared by all SAEs
        sparse = folder / "k_sparse_probing"
        main.HookedTransformer = SimpleNamespace(from_pretrained_no_processing=lambda *args, **kwargs: model.bridge)
        main.run_k_sparse_probing_experiment = partial(kept[1], experiment_dir=sparse, probes_dir=probes)
        main.run_feature_absortion_experiment = partial(
            kept[2],
            experiment_dir=folder / "feature_absorption",
            sparse_probing_experiment_dir=sparse,
            probes_dir=probes,
        )
        try:
            with contextlib.chdir(folder):
                yield
        finally:
            main.HookedTransformer, main.run_k_sparse_probing_experiment, main.run_feature_absortion_experiment = kept
            torch.set_grad_enabled(gradients)  # it turns them on for good
