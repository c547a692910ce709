"""Where the results of one profile lie, which runs have finished, what identifies a result. No torch, no jax.

O is `OUT/<profile>`. The extraction writes O/store, the training O/runs (`hafs_jax.runs`), the evaluations O/eval and
O/cache, the report O/report. O/imported holds SAEs of other libraries.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hafs_jax.base.checksums.checked import sha256_once
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of, write_record
from hafs_jax.base.options import did_you_mean
from hafs_jax.base.process.locks import locked
from hafs_jax.runs import Run, all_runs, profile_folder
from hafs_jax.store.reader import Store

LOG = logging.getLogger(__name__)


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
        with self.locked("seconds", "an evaluation", wait=True):
            known = read_intact(self.seconds, "it begins anew")
            write_record(self.seconds, {**known, what: round(seconds, 3)})

    @contextmanager
    def locked(self, name: str, work: str, wait: bool = False) -> Iterator[None]:
        """Locks eval/<name>, the results of a run or what all runs share; `UserError` where another process has it.

        With `wait` it waits for that.
        """
        with locked(self.lock(f"eval-{name}"), work, self.eval / name, wait=wait):
            yield

    def lock(self, name: str) -> Path:
        """The file that locks what `name` stands for."""
        return self.folder / ".locks" / name


@dataclass(frozen=True)
class FinishedRun:
    """A finished training run, or an imported SAE."""

    name: str
    folder: Path
    is_exported: bool = False  # of an imported SAE: <folder>/sae is there, and there is no checkpoint


@dataclass(frozen=True)
class Exported:
    """A finished run's SAE and the hashes that name it: of a SAELens folder's weights and cfg.json.

    Of a run that has no such form (`is_own`) the folder is the run's, and the hashes are of its run.json and
    config.json.
    """

    name: str
    folder: Path
    weights_sha256: str
    cfg_sha256: str
    is_own: bool = False

    @property
    def unique_name(self) -> str:
        """SAE-Bench's name for it. Of the run's name alone it would return old scores for new weights."""
        return f"{self.name}-{fingerprint([self.weights_sha256, self.cfg_sha256])}"


def open_workspace(out: Path, profile: str) -> Workspace:
    """The workspace of `profile` under `out`, see `hafs_jax.runs.profile_folder`."""
    return Workspace(profile_folder(out, profile))


def finished_runs(workspace: Workspace, names: Sequence[str] = ()) -> list[FinishedRun]:
    """The runs named, or all that have finished, by name; `UserError` where a name is unknown or none has finished."""
    names = run_names(workspace, names)
    runs = {run.name: run for run in all_runs(workspace.runs)}
    for name in names:
        if name not in runs:
            raise UserError(f"no run {name!r} in {workspace.runs}{did_you_mean(name, runs)}")
        if not runs[name].finished():
            raise UserError(f"run {name}: expected {runs[name].result_path}, found none; finish it with `make train`")
        if runs[name].is_transcoder:
            raise UserError(f"run {name}: expected an SAE, found a transcoder, which the evaluations do not cover")
    finished = [name for name, run in runs.items() if run.finished() and not run.is_transcoder]
    if not finished:
        unfinished = f" ({', '.join(runs)} not finished)" if runs else ""
        raise UserError(f"expected a finished run in {workspace.runs}, found none{unfinished}; run `make train`")
    return [FinishedRun(name, runs[name].folder) for name in (dict.fromkeys(names) or finished)]


def run_names(workspace: Workspace, runs: Sequence[str]) -> list[str]:
    """The names of runs that are given by name or folder; `UserError` where a folder is another profile's."""
    names = []
    for run in runs:
        folder = Path(run)
        if folder.name != run and folder.resolve().parent != workspace.runs.resolve():
            raise UserError(f"--runs {run}: expected a run in {workspace.runs}; name another --profile or --out")
        names.append(run if folder.name == run else folder.resolve().name)
    return names


def export(run: FinishedRun) -> Exported:
    """The SAE of a run as evaluations load it: its SAELens folder, written from the last checkpoint.

    An architecture without a SAELens form is evaluated by the run itself.
    """
    if run.is_exported:
        return hashed_export(run.name, run.folder / "sae")
    own = Run(run.folder)
    try:
        if own.is_exported():
            return hashed_export(run.name, own.sae)
    except UserError as error:
        LOG.warning(str(error))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX must not claim a GPU that torch needs
    from hafs_jax.saelens import NoSAELensForm, export_saelens

    try:
        return hashed_export(run.name, export_saelens(run.folder))
    except NoSAELensForm:
        LOG.info(f"{run.name}: SAELens has no form for this architecture; its own JAX functions are measured")
        return Exported(run.name, run.folder, sha256_of(own.result_path), sha256_of(own.config_path), is_own=True)


def hashed_export(name: str, folder: Path) -> Exported:
    """The SAELens folder of run `name`, hashed; `UserError` where a file of it is missing."""
    weights, cfg = folder / "sae_weights.safetensors", folder / "cfg.json"
    for path in (weights, cfg):
        if not path.exists():
            raise UserError(f"run {name}: expected an exported SAE's {path}, found none; export it again")
    return Exported(name, folder, sha256_once(weights), sha256_once(cfg))


def fingerprint(values: Any) -> str:
    """16 hexadecimal digits that change when any of the JSON `values` does."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_intact(path: Path, otherwise: str) -> dict[str, Any]:
    """What lies at `path`; empty where nothing does, and where it is damaged, which a line says with `otherwise`."""
    try:
        return read_result(path)
    except UserError as error:
        LOG.warning(f"{error}; {otherwise}")
        return {}


def read_result(path: Path) -> dict[str, Any]:
    """An earlier result, to see whether it still holds; empty where there is none."""
    return read_json(path, "an earlier result") if path.exists() else {}
