"""SAE-Bench's first-letter absorption, which says whether it is valid. Imports torch, not jax.

A word's first letter is the concept, and a spelling prompt asks the language model for it. Small models do not spell,
and small dictionaries hold too few latents for each letter: below LEAST_PARAMETERS or LEAST_LATENTS the figure means
nothing, and is refused unless forced.

The code that scores is SAE-Bench 0.6.0's `absorption.run_eval`. Three things are replaced while it runs, in this
process alone:

- its model, by the one that made the store;
- its three folders of results, which otherwise lie in site-packages;
- the working directory, into which it writes more files.
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

LEAST_PARAMETERS = 1_000_000_000  # of the language model
LEAST_LATENTS = 16_000  # of the dictionary
KEPT_LATENTS = 16_384  # of a dictionary whose latents are kept for all words (3.3 GB), not encoded again 310 times


def validity(parameters: int, latents: int) -> tuple[bool, str]:
    """(whether first-letter absorption is valid for such a language model and dictionary, the reason)."""
    found = f"{parameters / 1e6:,.0f} million parameters and {latents:,} latents"
    if parameters < LEAST_PARAMETERS or latents < LEAST_LATENTS:
        least = f"{LEAST_PARAMETERS / 1e6:,.0f} million parameters and {LEAST_LATENTS:,} latents"
        return False, f"first-letter absorption is valid from {least}, found {found}"
    return True, found


def check_validity(run: str, parameters: int, latents: int, mode: str) -> None:
    """Raises `UserError` where the figure would not be valid, unless `mode` is "force"."""
    valid, reason = validity(parameters, latents)
    if not valid and mode != "force":
        raise UserError(f"run {run}: {reason}; leave --first-letter out, or take --first-letter force to see it anyway")


def first_letter(
    unique_name: str, sae: Any, model: Any, manifest: Manifest, root: Path, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """{"valid", "reason", "result": SAE-Bench's own JSON, or None where the model spells too few letters}.

    `changes` replaces fields of SAE-Bench's config. SAE-Bench's files are kept under `root`, and an interrupted run
    goes on from them. That is safe, since `unique_name`, which names the folder, carries a hash of the SAE's weights.
    """
    check_hook_point(manifest.hook_point)
    valid, reason = validity(parameters(model), sae.W_dec.shape[0])
    folder = (root / unique_name).resolve()
    with logged(root / "saebench.log"), _redirected(model, folder):
        from sae_bench.evals.absorption import main
        from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

        keep = sae.W_dec.shape[0] <= KEPT_LATENTS
        own = {"model_name": manifest.model.name, "llm_dtype": "float32", "precalc_k_sparse_probe_sae_acts": keep}
        config = AbsorptionEvalConfig(**(own | (changes or {})))
        main.run_eval(config, [(unique_name, sae)], str(model.device), str(folder / "output"), force_rerun=False)
        found = list((folder / "output").glob(f"{unique_name}_*_eval_results.json"))
        result = read_output(folder / "output", unique_name) if found else None
    if result is None:
        reason = f"the model spells fewer than {config.min_feats_for_eval} letters: SAE-Bench gives no figure; {reason}"
        valid = False
    return json.loads(json.dumps({"valid": valid, "reason": reason, "result": result}))


def parameters(model: Any) -> int:
    """The number of the language model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.hf.parameters())


@contextlib.contextmanager
def _redirected(model: Any, folder: Path) -> Iterator[None]:
    """Within it, SAE-Bench's absorption uses `model`, and all its folders lie under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    gradients = torch.is_grad_enabled()
    with without_type_checks():
        from sae_bench.evals.absorption import main

        kept = main.HookedTransformer, main.run_k_sparse_probing_experiment, main.run_feature_absortion_experiment
        probes = folder.parent / "probes"  # these are of the model alone, so all SAEs share them
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
            torch.set_grad_enabled(gradients)  # SAE-Bench turns them on for good
