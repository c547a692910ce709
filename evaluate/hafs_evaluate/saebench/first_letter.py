"""SAE-Bench's first-letter absorption, which says whether it is valid. Imports torch, not jax.

A word's first letter is the concept, and a spelling prompt asks the language model for it. Small models do not spell,
and small dictionaries hold too few latents for each letter: below LEAST_PARAMETERS or LEAST_LATENTS the figure means
nothing, and is refused unless forced.

The code that scores is SAE-Bench 0.6.0's `absorption.run_eval`. These are replaced while it runs, in this process
alone:

- its model, by the one that made the store, which stops at the store's hook point. SAE-Bench runs all layers, and
  reads `hook_resid_post` whatever the SAE was trained on;
- its three folders of results, which otherwise lie in site-packages;
- the writing of its probe, which is then whole or absent after a kill;
- its random numbers, which it does not seed, and the order of its vocabulary, which differs from process to process:
  with both fixed two runs give one figure;
- the working directory, into which it writes more files.
"""

import contextlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

from hafs_evaluate.saebench.harness import (
    check_hook_point,
    logged,
    model_short_name,
    read_output,
    without_type_checks,
)
from hafs_evaluate.workspace import fingerprint
from hafs_jax.base.errors import UserError
from hafs_jax.base.log import bar_options
from hafs_jax.store.manifest import Manifest

LOG = logging.getLogger(__name__)

LEAST_PARAMETERS = 1_000_000_000  # of the language model
LEAST_LATENTS = 16_000  # of the dictionary
SEED = 0
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
    layer = check_hook_point(manifest.hook_point)
    valid, reason = validity(parameters(model), sae.W_dec.shape[0])
    folder = (root / unique_name).resolve()
    source = [asdict(manifest.model), asdict(manifest.tokenizer), manifest.hook_point]
    probes = root.resolve() / "probes" / fingerprint(source)  # these are of the model alone, so all SAEs share them
    bar = tqdm(desc="spelling prompts", unit="prompt", **bar_options(LOG))  # on the stderr that `logged` replaces
    reading = Reading(model.bridge, model_short_name(manifest), manifest.hook_point, layer, bar.update)
    with bar, logged(root / "saebench.log"), _redirected(reading, folder, probes):
        from sae_bench.evals.absorption import common, main
        from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig

        keep = sae.W_dec.shape[0] <= KEPT_LATENTS
        own = {"model_name": manifest.model.name, "llm_dtype": "float32", "precalc_k_sparse_probe_sae_acts": keep}
        config = AbsorptionEvalConfig(**(own | (changes or {})))
        if not probes.exists():
            bar.total = len(common.get_alpha_tokens(model.tokenizer))  # a prompt for each word trains the model's probe
        output = folder / "output"
        output.mkdir(exist_ok=True)
        main.run_eval(config, [(unique_name, sae)], str(model.device), str(output), force_rerun=False)
        result = read_output(output, unique_name) if list(output.iterdir()) else None
    if result is None:
        reason = f"the model spells fewer than {config.min_feats_for_eval} letters: SAE-Bench gives no figure; {reason}"
        valid = False
    return json.loads(json.dumps({"valid": valid, "reason": reason, "result": result}))


def parameters(model: Any) -> int:
    """The number of the language model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.hf.parameters())


class Reading:
    """A TransformerBridge as SAE-Bench uses it. Whatever point it asks for, it gets what lies at `hook_point`.

    `name` stands in the names of SAE-Bench's folders, where the path of a model's folder would lead out of them.
    `progress` is called with the number of prompts that have run.
    """

    def __init__(
        self,
        bridge: Any,
        name: str,
        hook_point: str,
        layer: int,
        progress: Callable[[int], Any] = lambda prompts: None,
    ):
        self._bridge, self._hook_point, self._layer, self._progress = bridge, hook_point, layer, progress
        self.cfg = copy(bridge.cfg)
        self.cfg.model_name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bridge, name)

    def run_with_cache(self, prompts: Sequence[str], names_filter: Sequence[str]) -> tuple[None, dict[str, Any]]:
        """(None, the activations of `prompts` [B, L, D] under the one name of `names_filter`).

        The layers after the hook point do not run.
        """
        (asked,) = names_filter
        _, cache = self._bridge.run_with_cache(
            list(prompts), names_filter=[self._hook_point], stop_at_layer=self._layer + 1
        )
        self._progress(len(prompts))
        return None, {asked: cache[self._hook_point].flatten(2)}


@contextlib.contextmanager
def _redirected(reading: Reading, folder: Path, probes: Path) -> Iterator[None]:
    """Within it, SAE-Bench's absorption reads `reading`. Its files lie under `folder`, its probe in `probes`."""
    folder.mkdir(parents=True, exist_ok=True)
    _drop_torn(folder)
    gradients = torch.is_grad_enabled()
    with without_type_checks():
        from sae_bench.evals.absorption import common, feature_absorption, main

        sparse = folder / "k_sparse_probing"
        absorption = {"experiment_dir": folder / "feature_absorption", "sparse_probing_experiment_dir": sparse}
        first = _seeded(main.run_k_sparse_probing_experiment, experiment_dir=sparse, probes_dir=probes)
        second = _seeded(main.run_feature_absortion_experiment, probes_dir=probes, **absorption)
        train_and_save = partial(_save_whole, _seeded(common.train_and_save_probes))
        words = partial(_ordered, common.get_alpha_tokens)
        replaced = [
            (main, "HookedTransformer", SimpleNamespace(from_pretrained_no_processing=lambda *args, **kwargs: reading)),
            (main, "run_k_sparse_probing_experiment", first),
            (main, "run_feature_absortion_experiment", second),
            (common, "train_and_save_probes", train_and_save),
            (common, "get_alpha_tokens", words),
            (feature_absorption, "get_alpha_tokens", words),
        ]
        kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
        try:
            for module, name, value in replaced:
                setattr(module, name, value)
            with contextlib.chdir(folder), torch.serialization.safe_globals(_classes_of_a_probe(common)):
                yield
        finally:
            for module, name, value in kept:
                setattr(module, name, value)
            torch.set_grad_enabled(gradients)  # SAE-Bench turns them on for good


def _seeded(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` with `options`, and with the seed SEED, so that a run that goes on draws what a whole one does."""

    def seeded(*args: Any, **more: Any) -> Any:
        before = random.getstate()
        random.seed(SEED)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                return function(*args, **(options | more))
        finally:
            random.setstate(before)

    return seeded


def _ordered(words_of: Callable[[Any], list[str]], tokenizer: Any) -> list[str]:
    return sorted(words_of(tokenizer))


def _save_whole(train_and_save: Callable[..., None], model: Any, *, probes_dir: Path, **options: Any) -> None:
    """SAE-Bench's `train_and_save_probes`, whose files come into `probes_dir` together, once all are written."""
    unfinished = probes_dir.with_name(f"{probes_dir.name}.unfinished")
    for folder in (unfinished, probes_dir):  # what a killed process left
        shutil.rmtree(folder, ignore_errors=True)
    train_and_save(model, probes_dir=unfinished, **options)
    os.replace(unfinished, probes_dir)


def _classes_of_a_probe(common: Any) -> list[Any]:
    """What a probe's file, which SAE-Bench writes as a whole module, may hold beside tensors and plain containers."""
    return [common.LinearProbe, torch.nn.Linear]


def _drop_torn(folder: Path) -> None:
    """Removes the tables and results in `folder` that a killed process left half written. They are computed again."""
    from pyarrow import ArrowInvalid, parquet

    for path in (*folder.rglob("*.parquet"), *folder.glob("output/*.json")):
        try:
            parquet.read_metadata(path) if path.suffix == ".parquet" else json.loads(path.read_bytes())
        except (ArrowInvalid, OSError, ValueError):
            path.unlink()
