"""SAE-Bench's probing: the seconds for a second variant against those for the first, whose cache is empty.

The model is the packaged one, the tasks are from sae-probes. The first variant computes the activations of the model
and the probe on all of their dimensions. The second one finds both in the cache. The SAEs have random weights, since
the time does not depend on what they learned.
"""

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row
from hafs_evaluate.config import EvalConfig
from hafs_evaluate.saebench.sae_probes import ProbeSettings, probe_sae
from hafs_evaluate.saebench.task_activations import fill_cache
from hafs_extract.hub.presence import prepare_hub
from hafs_extract.models import load_for_manifest
from hafs_extract.profiles import OFFLINE, Resolved
from hafs_extract.run import extract
from hafs_jax.store.manifest import Manifest
from hafs_jax.store.reader import Store

TASKS = ("117_us_state_FL", "21_headline_istrump", "105_click_bait", "96_spam_is")
N_LATENTS = 2_304
MAX_TOKENS = 128  # per text; evaluations read 1,024, with which the first variant would take longer
TARGET = 0.2


def measure(quick: bool) -> Iterator[Row]:
    """The row of the suite."""
    tasks = TASKS[:1] if quick else TASKS
    with tempfile.TemporaryDirectory(prefix="hafs-evaluation-") as temporary:
        manifest = _manifest(Path(temporary))
        defaults = EvalConfig()
        settings = ProbeSettings(tasks, defaults.ks, defaults.penalty, defaults.probe_seed)
        saes = [_random_sae(manifest, seed) for seed in range(3)]
        one_task = dataclasses.replace(settings, tasks=tasks[:1])
        _probing_seconds("warm-up", saes[2], manifest, one_task, Path(temporary) / "warm-up")  # imports, threads
        first, tokens = _probing_seconds("first", saes[0], manifest, settings, Path(temporary) / "cache")
        second, _ = _probing_seconds("second", saes[1], manifest, settings, Path(temporary) / "cache")
    sizes = {"tasks": len(tasks), "tokens": tokens, "max_tokens": MAX_TOKENS, "F": N_LATENTS, "ks": list(settings.ks)}
    note = "the first computes the activations of all texts and the probe on all dimensions, once for all variants"
    yield Row(
        "probing a second variant", "the first", second, first, "s", second / first, TARGET, "<=", sizes, None, note
    )


def _probing_seconds(name: str, sae: Any, manifest: Manifest, settings: ProbeSettings, root: Path) -> tuple[float, int]:
    """The seconds of probing a variant with an activation cache in `root`, and the number of tokens in the cache."""
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        cache = fill_cache(
            settings.tasks, manifest, root / "acts", lambda: load_for_manifest(manifest), max_tokens=MAX_TOKENS
        )
        probe_sae(name, sae, manifest.hook_point, cache, settings, root / "probes")
    return time.perf_counter() - started, cache.tokens


def _manifest(folder: Path) -> Manifest:
    """The manifest of a small store of the packaged model, from which evaluations read what the model is."""
    prepare_hub(OFFLINE)
    config = dataclasses.replace(OFFLINE, max_rows=4_000)
    with contextlib.redirect_stderr(io.StringIO()):
        (folders,) = extract(config, Resolved("offline", "offline", "a benchmark"), folder / "out").values()
    return Store(folders["train"]).manifest


def _random_sae(manifest: Manifest, seed: int) -> Any:
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    metadata = SAEMetadata(model_name=manifest.model.name, hook_name=manifest.hook_point, prepend_bos=True)
    torch.manual_seed(seed)
    config = StandardSAEConfig(d_in=manifest.d_model, d_sae=N_LATENTS, device="cpu", metadata=metadata)
    return StandardSAE(config).requires_grad_(False)
