"""Folders of finished runs, made up: what training leaves of a run but for its checkpoints."""

from pathlib import Path
from typing import Any

from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run, RunSummary

COUNTS = {"tokens": 640, "seconds": 1.5, "tokens_per_second": 400.0, "dead_fraction": 0.0, "bad_batches": 0}
"""What each logged step has beside its number."""

FINAL = {"step": 10, "l0": 3.0, "dead_fraction": 0.0, "fvu_ema": 0.25}
STORE = {"folder": "../../store/train", "fingerprint": "0123456789abcdef"}


def finished_run(
    folder: Path,
    config: TrainConfig | None = None,
    store: dict[str, Any] = STORE,
    widths: tuple[int, int] = (5, 5),
    **summary: Any,
) -> Run:
    """The run `folder` with its config.json and run.json; `summary` are entries of run.json beside the config's."""
    config = config_of() if config is None else config
    run = Run(folder)
    run.write_config(config, store)
    known: dict[str, Any] = {
        "name": run.name,
        "variant": config.variant,
        "architecture": config.sae.architecture,
        "seed": config.seed,
        "k": config.sae.k,
        "tag": config.tag,
        "arm": config.arm_name,
        "n_latents": config.sae.F,
        "d_model": widths[0],
        "d_out": widths[1],
        "steps": 10,
        "tokens": 640,
        "seconds": 1.5,
        "stopped_early": False,
        "trained_together": 1,
        "tau": config.penalty.tau,
        "tau_reached": None,
        "best": None,
        "final": FINAL,
        "store_fingerprint": store["fingerprint"],
    }
    run.write_result(RunSummary(**known | summary))
    return run


def config_of(variant: str = "baseline", architecture: str = "batchtopk", **fields: Any) -> TrainConfig:
    """A resolved config; `fields` as `with_fields` takes them, over those of a very small SAE."""
    small = {"tokens": 640, "batch_size": 64, "sae": {"k": 3, "n_latents": 13}}
    return with_fields(with_fields(preset(variant, architecture), small), fields)
