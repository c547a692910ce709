"""What a stage of an evaluation is, and how one is run. Torch comes with the first SAE that is loaded.

A result file holds, in `marks`, a fingerprint of what each stage that wrote it computed it from, and in `files_sha256`
the checksums of the files that belong to it. A stage whose fingerprint still matches is left as it is, unless one of
its files is damaged. Results of earlier versions have their marks in `eval/<run>/done.json`.
"""

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hafs_evaluate.config import EvalConfig, resolved
from hafs_evaluate.results.measures import Measure
from hafs_evaluate.workspace import (
    Exported,
    FinishedRun,
    Workspace,
    export,
    fingerprint,
    read_intact,
    read_result,
)
from hafs_extract.hub.presence import go_offline, hub_problem, model_file
from hafs_jax.base.checksums.checked import check_file, sha256_once
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of, write_figures, write_record
from hafs_jax.base.options import to_dict
from hafs_jax.runs import Run
from hafs_jax.store.holding import reading
from hafs_jax.store.manifest import Manifest
from hafs_jax.store.reader import Store

LOG = logging.getLogger(__name__)

FORMAT = 1  # raise it when results of the same inputs would differ
DONE = "done.json"
LANGUAGE_MODEL = "llm"  # its folder in eval/

Values = dict[str, Any]  # what a result file holds: plain JSON values, no NaN


@dataclass(frozen=True)
class Stage:
    """One evaluation. It has one of three functions that measure:

    - `compute` measures one run; `compute_together` measures several, {run: its result}, where they share the work.
      A result is written as eval/<run>/<file>, with the run, its sae_sha256 and the config, and is computed once for
      each SAE and each value of `inputs`.
    - `compute_all` compares all runs of the workspace that were ever evaluated. Its result lies in eval/<file>. It is
      called every time, so it must be cheap, or keep what it has done.
    """

    name: str
    help: str  # one line for --help: what is measured
    file: str
    compute: Callable[["Job"], Values | None] | None = None  # None: it has written job.path itself
    compute_together: Callable[["Evaluation", list["Job"]], dict[str, Values]] | None = None
    compute_all: Callable[["Evaluation"], Values | None] | None = None
    inputs: Callable[["Evaluation"], list[Any] | None] = lambda evaluation: []
    """What the result depends on beside the SAE, as JSON values; None where the workspace has nothing to measure."""
    prepare: Callable[["Evaluation", list["Job"]], Any] | None = None
    """Called once before the first of the runs that are not done; `job.shared` is what it returns."""
    language_model: "OfLanguageModel | None" = None
    line: Callable[[Values], str] | None = None  # what is said of a run's result
    reads: Callable[["Evaluation"], list[Path]] | None = None
    """The files that `compute_all` reads and writes: while they are as it left them, it is not called again."""
    needs_tokens: bool = True  # left out on a store without tokens: an imported array, a synthetic world
    needs_hub: Callable[[EvalConfig], bool] = lambda config: False
    can_be_skipped: bool = True
    modes: tuple[str, ...] = ()
    """Where there are any, the stage runs only where it is asked for: `--<name> [MODE]`, the first one by default."""
    replaces: tuple[str, ...] = ()  # stages that have written into the same file, and must do so again
    identity_key: str = ""  # the object that the run, sae_sha256 and config are put into; none: the file's own
    other_files: tuple[str, ...] = ()  # that it writes too, for the help
    measures: tuple[Measure, ...] = ()  # its figures in the report's and the experiment's tables

    def __post_init__(self) -> None:
        if sum(function is not None for function in (self.compute, self.compute_together, self.compute_all)) != 1:
            raise UserError(f"stage {self.name!r}: expected one of compute, compute_together and compute_all")

    @property
    def own_files(self) -> tuple[str, ...]:
        """The files that lie beside its result file and belong to it."""
        return tuple(name for name in self.other_files if "/" not in name)

    @property
    def place(self) -> str:
        """Where its results lie."""
        own = f"eval/{self.file}" if self.compute_all else f"eval/<run>/{self.file}"
        llm = ("eval/llm/",) if self.language_model else ()
        return ", ".join([own, *self.other_files, *llm])


@dataclass(frozen=True)
class OfLanguageModel:
    """The part of a stage that measures the language model itself, once for all runs: eval/llm/<file>."""

    compute: Callable[["Evaluation", Any], Values | None]  # of what `prepare` returned; None: it has written the file
    inputs: Callable[["Evaluation"], list[Any]]  # all that the result depends on
    comes_first: bool = False  # before the runs rather than after them
    other_files: tuple[str, ...] = ()  # in eval/llm/, without which it is not done


@dataclass(frozen=True)
class Job:
    """One run to be measured in one stage."""

    evaluation: "Evaluation"
    stage: Stage
    run: Exported
    mark: str
    shared: Any = None

    @property
    def path(self) -> Path:
        """The result file."""
        return self.evaluation.workspace.result(self.run.name, self.stage.file)

    @property
    def config(self) -> EvalConfig:
        return self.evaluation.config

    @property
    def train(self) -> Store:
        return self.evaluation.workspace.train

    @property
    def heldout(self) -> Store:
        return self.evaluation.workspace.heldout

    def sae(self, device: Any = None) -> Any:
        """The run's torch SAE, without gradients; `UserError` where it is of another hook point than the store."""
        return self.evaluation.sae(self.run, device)


class Evaluation:
    """What the stages of one call share: the workspace, the config, and a language model that is loaded once."""

    def __init__(self, workspace: Workspace, config: EvalConfig, modes: Mapping[str, str] | None = None) -> None:
        """`modes`: {stage: mode} of the stages that run only where they are asked for.

        `UserError` where the workspace has no held-out store.
        """
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # sae-probes opens caches as pickles, which run code
        self.workspace = workspace
        self.manifest: Manifest = workspace.heldout.manifest
        self.config = resolved(config, self.manifest.profile)
        self.modes = dict(modes or {})
        self.runs: list[Exported] = []
        self._loaded: tuple[str, Any] | None = None

    def run(self, stages: Sequence[Stage], runs: Sequence[FinishedRun]) -> None:
        """Measures `runs`, one stage after the other, and writes their results under O/eval.

        `UserError` where another process evaluates or trains one of them, or replaces the store.
        """
        with ExitStack() as locks:
            self._hold(runs, locks)
            self._measure(stages, runs)

    def _hold(self, runs: Sequence[FinishedRun], locks: ExitStack) -> None:
        """Locks the runs and the store against changes, and the runs' results against another evaluation."""
        locks.enter_context(reading([self.workspace.heldout], "an evaluation"))
        for run in runs:
            locks.enter_context(self.workspace.locked(run.name, "an evaluation"))
            if not run.is_exported:
                locks.enter_context(Run(run.folder).held("an evaluation"))

    def _measure(self, stages: Sequence[Stage], runs: Sequence[FinishedRun]) -> None:
        if not self.manifest.has_tokens and any(stage.needs_tokens for stage in stages):
            stages = [stage for stage in stages if not stage.needs_tokens]
            names = ", ".join(stage.name for stage in stages)
            self.say(f"the store holds no tokens (an imported array or a synthetic world), so only: {names}")
        self._reach_hub(stages)
        self.runs = [self._export(run) for run in runs]
        for stage in stages:
            if stage.compute_all is not None:
                self._compute_all(stage, stage.compute_all)
            else:
                self._compute_each(stage)

    def sae(self, run: Exported, device: Any = None) -> Any:
        """The torch SAE of `run`, without gradients; `UserError` where it is of another hook point."""
        from hafs_evaluate.core.loading import load_sae
        from hafs_extract.models import pick_device

        sae = load_sae(run, self.manifest, str(device or pick_device(self.config.device)))
        hook_point = sae.cfg.metadata.hook_name
        if hook_point != self.manifest.hook_point:
            raise UserError(
                f"run {run.name} was trained at {hook_point}, the held-out store in {self.workspace.folder} is of"
                f" {self.manifest.hook_point}; evaluate the run in the workspace it was trained in"
            )
        return sae

    def model(self, dtype: str | None = None) -> Any:
        """The store's language model in `dtype` (none: the one it was extracted with); one is kept at a time."""
        from hafs_extract.models import load_for_manifest

        dtype = dtype or self.manifest.model.dtype
        if self._loaded is None or self._loaded[0] != dtype:
            self._loaded = None
            gc.collect()
            self._loaded = dtype, load_for_manifest(self.manifest, dtype, self.config.device)
        return self._loaded[1]

    @cached_property
    def moments(self) -> Any:
        """The moments of the held-out rows, which FVU divides by."""
        from hafs_evaluate.core.reconstruction import store_moments

        return store_moments(self.workspace.heldout, self.config.heldout_rows)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Records what the block takes in eval/seconds.json."""
        started = time.monotonic()
        yield
        self.workspace.add_seconds(what, time.monotonic() - started)

    def say(self, text: str) -> None:
        """Tells the user what was found."""
        LOG.info(text)

    def _reach_hub(self, stages: Sequence[Stage]) -> None:
        """Turns the hub libraries offline where the hub is not needed or does not answer: retries take minutes."""
        model = self.manifest.model
        needed = model.origin == "hub" or any(stage.needs_hub(self.config) for stage in stages)
        problem = (
            hub_problem(model_file(model.name, model.revision) if model.origin == "hub" else "") if needed else None
        )
        if problem:
            self.say(f"{problem}: only what its cache holds will be used")
        if problem or not needed:
            go_offline()

    def _export(self, run: FinishedRun) -> Exported:
        if run.is_exported:
            return export(run)
        with self.timed(f"export/{run.name}"):
            return export(run)

    def _compute_all(self, stage: Stage, compute: Callable[["Evaluation"], Values | None]) -> None:
        path = self.workspace.eval / stage.file
        done = self.workspace.eval / DONE
        if stage.reads and read_intact(done, f"{stage.name} is measured again").get(stage.name) == _left(stage, self):
            return
        with self.timed(stage.name), self.workspace.locked(stage.name, "an evaluation", wait=True):
            values = compute(self)
            if values is not None and values != read_intact(path, "it is written again"):
                write_figures(path, values)
            if stage.reads:
                write_record(done, {**read_intact(done, "it is written again"), stage.name: _left(stage, self)})
        if stage.line and values:
            self.say(f"{stage.name}: {stage.line(values)}")

    def _compute_each(self, stage: Stage) -> None:
        inputs = stage.inputs(self)
        if inputs is None:
            return
        jobs = [Job(self, stage, run, _mark(run, inputs)) for run in self.runs]
        jobs = [job for job in jobs if not self._is_done(job.run.name, stage, job.mark)]
        llm = stage.language_model
        llm_mark = fingerprint(llm.inputs(self)) if llm else ""
        if llm is not None and self._is_done(LANGUAGE_MODEL, stage, llm_mark, llm.other_files):
            llm = None
        if not jobs and llm is None:
            return
        shared = None
        if stage.prepare is not None:
            with self._alone(), self.timed(stage.name):
                shared = stage.prepare(self, jobs)
        if llm is not None and llm.comes_first:
            self._of_language_model(stage, llm, llm_mark, shared)
        if jobs and stage.compute_together is not None:
            with self.timed(stage.name):
                results = stage.compute_together(self, jobs)
            for job in jobs:
                self._keep(job, results[job.run.name])
        elif stage.compute is not None:
            for job in (replace(job, shared=shared) for job in jobs):
                with self.timed(f"{stage.name}/{job.run.name}"):
                    values = stage.compute(job)
                self._keep(job, values)
        if llm is not None and not llm.comes_first:
            self._of_language_model(stage, llm, llm_mark, shared)

    def _keep(self, job: Job, values: Values | None) -> None:
        """Writes a run's result, marks its stage as done, and says its line."""
        stage = job.stage
        if values is not None:
            values = _identified(values, job)
            write_figures(job.path, _marked(values, stage.name, job.mark, job.path, stage.own_files))
        elif not read_result(job.path).get("marks"):  # it has written its file itself
            self._done(job.run.name, {stage.name: job.mark, **dict.fromkeys(stage.replaces)})
        said = stage.line(values) if stage.line and values else f"{stage.name} done"
        self.say(f"{job.run.name}: {said}")

    def _of_language_model(self, stage: Stage, llm: OfLanguageModel, mark: str, shared: Any) -> None:
        with self._alone():
            if self._is_done(LANGUAGE_MODEL, stage, mark, llm.other_files):
                return  # by an evaluation of other runs, meanwhile
            with self.timed(f"{stage.name}/{LANGUAGE_MODEL}"):
                values = llm.compute(self, shared)
                if values is not None:
                    path = self.workspace.result(LANGUAGE_MODEL, stage.file)
                    write_figures(path, _marked(values, stage.name, mark, path, llm.other_files))
            if values is None:
                self._done(LANGUAGE_MODEL, {stage.name: mark})

    def _alone(self) -> AbstractContextManager[None]:
        """Waits for other evaluations of this workspace: what all runs share is made once."""
        return self.workspace.locked(LANGUAGE_MODEL, "an evaluation", wait=True)

    def _is_done(self, owner: str, stage: Stage, mark: str, other_files: Sequence[str] = ()) -> bool:
        files = [self.workspace.result(owner, name) for name in (stage.file, *other_files)]
        if not all(path.exists() for path in files):
            return False
        again = f"{stage.name} is measured again"
        found = read_intact(files[0], again)
        if not found or (found.get("marks") or self._marks(owner)).get(stage.name) != mark:
            return False
        for name, sha256 in (found.get("files_sha256") or {}).items():
            try:
                check_file(files[0].with_name(name), sha256, "a result's file", again)
            except UserError as error:
                LOG.warning(str(error))
                return False
        return True

    def _marks(self, owner: str) -> Values:
        return read_intact(self.workspace.result(owner, DONE), "what it says is measured again")

    def _done(self, owner: str, marks: dict[str, str | None]) -> None:
        write_record(self.workspace.result(owner, DONE), {**self._marks(owner), **marks})


def _marked(values: Values, stage: str, mark: str, path: Path, own_files: Sequence[str]) -> Values:
    """`values` with the stage's mark, and the checksums of the files beside `path` that belong to them."""
    files = {name: sha256_of(path.with_name(name)) for name in own_files if path.with_name(name).exists()}
    marked = {**values, "marks": {**(values.get("marks") or {}), stage: mark}}
    return {**marked, "files_sha256": {**(values.get("files_sha256") or {}), **files}} if files else marked


def _mark(run: Exported, inputs: list[Any]) -> str:
    return fingerprint([FORMAT, run.weights_sha256, run.cfg_sha256, *inputs])


def _left(stage: Stage, evaluation: Evaluation) -> str:
    """A fingerprint of the files that a stage of all runs reads and writes, wherever the profile's folder lies."""
    assert stage.reads is not None
    read = [path for path in stage.reads(evaluation) if path.exists()]
    return fingerprint(
        [FORMAT, [[os.path.relpath(path, evaluation.workspace.folder), sha256_once(path)] for path in read]]
    )


def _identified(values: Values, job: Job) -> Values:
    """`values` with the run, the SAE's hash and the config, in the stage's place for them; its own config stays."""
    identity = {"run": job.run.name, "sae_sha256": job.run.weights_sha256, "config": to_dict(job.config)}
    key = job.stage.identity_key
    return {**values, key: {**(values.get(key) or {}), **identity}} if key else {**identity, **values}
