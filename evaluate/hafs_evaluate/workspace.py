"""Where the results of one profile lie, which runs have finished, what identifies a result. No torch, no jax.

O is `OUT/<profile>`: O/store is the extraction's, O/runs the training's (but for each run's sae/, which is the
bridge's), O/eval and O/cache this room's, O/report the report's.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of, write_json
from hafs_jax.base.options import did_you_mean
from hafs_jax.store.reader import Store

AUTO = "auto.json"
RUN = "run.json"


@dataclass(frozen=True)
class Workspace:
    """The folder O of one profile and the paths under it."""

    folder: Path

    @property
    def profile(self) -> str:
        return self.folder.name

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def eval(self) -> Path:
        return self.folder / "eval"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def llm_probing(self) -> Path:
        """The language model's own probes."""
        return self.eval / "llm" / "probing.json"

    @property
    def seconds(self) -> Path:
        return self.eval / "seconds.json"

    def result(self, run: str, name: str) -> Path:
        """`O/eval/<run>/<name>`."""
        return self.eval / run / name

    @cached_property
    def train(self) -> Store:
        """The store that the runs were trained on."""
        return Store(self.folder / "store" / "train")

    @cached_property
    def heldout(self) -> Store:
        """The store of the held-out documents."""
        return Store(self.folder / "store" / "heldout")

    def add_seconds(self, what: str, seconds: float) -> None:
        """Records in `eval/seconds.json` what a stage took. A stage that was skipped keeps its earlier figure."""
        known = read_json(self.seconds, "the evaluation's timing") if self.seconds.exists() else {}
        write_json(self.seconds, {**known, what: round(seconds, 3)})


@dataclass(frozen=True)
class FinishedRun:
    """A training run that wrote its run.json, or an imported SAE."""

    name: str
    folder: Path
    is_exported: bool = False  # <folder>/sae is there already, and no checkpoint to write it from


@dataclass(frozen=True)
class Exported:
    """A finished run's SAELens folder and the hashes that name its contents."""

    name: str
    folder: Path
    weights_sha256: str
    cfg_sha256: str

    @property
    def unique_name(self) -> str:
        """The name under which SAE-Bench keeps results: equal names with other weights would get old scores back."""
        return f"{self.name}-{fingerprint([self.weights_sha256, self.cfg_sha256])}"


def open_workspace(out: Path, profile: str) -> Workspace:
    """The workspace of `profile` under `out`; `auto` is what the last `make extract` resolved it to.

    Raises `UserError` where nothing was extracted or the profile has no folder. Nothing is guessed.
    """
    if profile == "auto":
        path = out / AUTO
        if not path.exists():
            raise UserError(f"profile auto: expected {path}, found none; run `make extract` or name the --profile")
        profile = read_json(path, "the resolved profile").get("profile", "")
    folder = out / profile
    if not profile or not folder.is_dir():
        known = sorted(path.parent.name for path in out.glob("*/store"))
        found = f"found {', '.join(known)}{did_you_mean(profile, known)}" if known else "found no profile's folder"
        raise UserError(f"profile {profile!r}: expected a folder {folder}, {found}; run `make extract PROFILE=...`")
    return Workspace(folder)


def finished_runs(workspace: Workspace, names: Sequence[str] = ()) -> list[FinishedRun]:
    """The runs named, or all that have finished, by name; `UserError` where a name is unknown or none has finished."""
    folders = {path.name: path for path in sorted(workspace.runs.glob("*")) if path.is_dir()}
    for name in names:
        if name not in folders:
            raise UserError(f"no run {name!r} in {workspace.runs}{did_you_mean(name, folders)}")
        if not (folders[name] / RUN).exists():
            raise UserError(f"run {name}: expected {folders[name] / RUN}, found none; finish it with `make train`")
        if _is_transcoder(folders[name]):
            raise UserError(f"run {name}: expected an SAE, found a transcoder, which the evaluations do not cover")
    finished = {name: path for name, path in folders.items() if (path / RUN).exists() and not _is_transcoder(path)}
    if not finished:
        unfinished = f" ({', '.join(folders)} not finished)" if folders else ""
        raise UserError(f"expected a finished run in {workspace.runs}, found none{unfinished}; run `make train`")
    return [FinishedRun(name, finished[name]) for name in (dict.fromkeys(names) or finished)]


def _is_transcoder(run: Path) -> bool:
    """Whether the run reconstructs another store's rows."""
    config = run / "config.json"
    return config.exists() and "target" in read_json(config, "a run's config.json").get("store", {})


def hashed_export(name: str, folder: Path) -> Exported:
    """The SAELens folder of run `name`, hashed; `UserError` where a file of it is missing."""
    weights, cfg = folder / "sae_weights.safetensors", folder / "cfg.json"
    for path in (weights, cfg):
        if not path.exists():
            raise UserError(f"run {name}: expected an exported SAE's {path}, found none; export it again")
    return Exported(name, folder, sha256_of(weights), sha256_of(cfg))


def fingerprint(values: Any) -> str:
    """16 hexadecimal digits that change when any of the JSON `values` does."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_result(path: Path) -> dict[str, Any]:
    """An earlier result, to see whether it still holds; empty where there is none. It was written atomically."""
    return read_json(path, "an earlier result") if path.exists() else {}
