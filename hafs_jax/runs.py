"""A run's folder: what lies in it, how it is named, and how a finished run is read. Owns the run format.

config.json      the resolved config, the store it trains on and its fingerprint; written first
metrics.jsonl    one object per logged step
checkpoints/     Orbax, the last two
best/            the checkpoint of the best held-out FVU, where that is measured
run.json         written last, when training has finished
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, read_jsonl, write_json
from hafs_jax.base.options import from_dict, to_dict
from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset
from hafs_jax.store.manifest import MANIFEST


@dataclass(frozen=True)
class Run:
    """The paths of one run."""

    folder: Path

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        return self.folder / "best"

    @property
    def result_path(self) -> Path:
        return self.folder / "run.json"

    def finished(self) -> bool:
        return self.result_path.exists()

    def result(self) -> dict[str, Any]:
        """run.json; `UserError` where the run has not finished."""
        return read_json(self.result_path, "a finished run's run.json")

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps so far."""
        return read_jsonl(self.metrics_path)

    def config(self) -> TrainConfig:
        """The resolved config that the run was started with."""
        return from_dict(TrainConfig, self._record()["config"], str(self.config_path))

    def store_record(self) -> dict[str, Any]:
        """{"folder", "fingerprint"} of the store that the run trains on, and of a transcoder's "target" likewise.

        Folders are relative to the run's.
        """
        return self._record()["store"]

    def write_config(self, config: TrainConfig, store: dict[str, Any]) -> None:
        flat = to_dict(config)
        names = {"variant": config.variant, "architecture": config.sae.architecture, "seed": config.seed}
        write_json(self.config_path, {**names, "config": flat, "store": store})

    def check_same(self, config: TrainConfig, store: dict[str, Any]) -> None:
        """Raises `UserError` naming the first difference where the folder's run has another config or store."""
        old, new = to_dict(self.config()), to_dict(config)
        if (difference := _first_difference(old, new)) is not None:
            path, before, after = difference
            raise UserError(
                f"{self.folder} holds a run with {path}={before}, this one has {after}; "
                "pass --tag NAME to keep both, --force to replace it, or choose another SEED or OUT"
            )
        found, expected = self.store_record(), store
        if "target" in expected and found["fingerprint"] == expected["fingerprint"]:
            found, expected = found.get("target", found), expected["target"]
        if found["fingerprint"] != expected["fingerprint"]:
            raise UserError(
                f"{self.folder} was trained on another store ({found['fingerprint']}, now "
                f"{expected['fingerprint']}); pass --force to replace it, or choose another OUT"
            )

    def _record(self) -> dict[str, Any]:
        record = read_json(self.config_path, "a run's config.json")
        if not isinstance(record, dict) or not {"config", "store"} <= set(record):
            raise UserError(f"{self.config_path}: expected the keys config and store, found {sorted(record)}")
        return record


def profile_folder(out: Path, profile: str) -> Path:
    """`<out>/<profile>`; `auto` stands for the profile that `extract` decided on and noted in `<out>/auto.json`."""
    if profile == "auto":
        noted = out / "auto.json"
        if not noted.exists():
            raise UserError(f"expected {noted}, found no such file; run `make extract` first, or name a PROFILE")
        profile = read_json(noted, "the profile that extract decided on")["profile"]
    folder = out / profile
    if not (folder / "store" / "train" / MANIFEST).exists():
        raise UserError(f"expected an activation store at {folder / 'store' / 'train'}, found none; run `make extract`")
    return folder


def baseline_tau(runs: Path, config: TrainConfig, fingerprint: str) -> tuple[float, str]:
    """tau = tau_factor x the final FVU of the seed-0 baseline of the same SAE on the same store, and that run's name.

    The baseline has the same tag, or what is left of it without axes that a baseline does not have. Raises `UserError`
    where that run is missing, unfinished, of another SAE or on another store.
    """
    baseline = replace(preset("baseline", config.sae.architecture), seed=0)
    axes = config.tag.split(",") if config.tag else []
    tags = [",".join(some) for n in range(len(axes), -1, -1) for some in itertools.combinations(axes, n)]
    found = [Run(runs / replace(baseline, tag=tag).run_name) for tag in tags]
    run = next((run for run in found if run.finished()), found[-1])
    remedy = (
        f"{config.variant} needs tau, a predefined FVU threshold: train the baseline first "
        f"(make train VARIANT=baseline SEED=0) or give --penalty.tau"
    )
    if not run.finished():
        raise UserError(f"{remedy}; found no finished run at {run.folder}")
    if (difference := _first_difference(to_dict(run.config().sae), to_dict(config.sae), "sae.")) is not None:
        raise UserError(f"{remedy}; {run.folder} has {difference[0]}={difference[1]}, this run {difference[2]}")
    if run.store_record()["fingerprint"] != fingerprint:
        raise UserError(f"{remedy}; {run.folder} was trained on another store")
    return config.penalty.tau_factor * run.result()["final"]["fvu_ema"], run.folder.name


def _first_difference(old: Any, new: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            if (inner := _first_difference(before, after, f"{prefix}{key}.")) is not None:
                return inner
        elif before != after:
            return prefix + key, before, after
    return None
