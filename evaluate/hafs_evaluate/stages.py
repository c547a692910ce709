"""The stages of an evaluation over all finished runs, each resumable; `config.STAGES` names them. Torch.

`eval/<run>/done.json` holds, for each stage, a fingerprint of what its result was computed from; a stage whose
fingerprint still matches is left as it is. It is written after the result.
"""

import gc
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hafs_evaluate.config import STAGES, EvalConfig, resolved
from hafs_evaluate.workspace import Exported, FinishedRun, Workspace, fingerprint, hashed_export, read_result
from hafs_extract.hub import go_offline, hub_problem
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_atomic, write_json
from hafs_jax.base.options import to_dict
from hafs_jax.store.manifest import Manifest

LOG = logging.getLogger(__name__)

NEED_TEXT = frozenset(STAGES) - {"across"}
FORMAT = 1  # raise it when results of the same inputs would differ

CORE, PROBING, HIERARCHY, DONE = "core.json", "probing.json", "hierarchy.json", "done.json"
LATENTS, DOMAINS = "latents.json", "domains.json"
FIRST_LETTER = "first_letter.json"


class Evaluation:
    """One pass over the runs of a workspace."""

    def __init__(
        self, workspace: Workspace, config: EvalConfig, skip: Sequence[str] = (), first_letter: str | None = None
    ) -> None:
        """`skip`: names of STAGES to leave out. `UserError` where the workspace has no held-out store.

        `first_letter`: "on" for SAE-Bench's first-letter absorption of every run, "force" even where it is not valid.
        """
        self.workspace = workspace
        self.manifest: Manifest = workspace.heldout.manifest
        self.config = resolved(config, self.manifest.profile)
        self.skip = frozenset(skip)
        self.first_letter = first_letter
        self._loaded: tuple[str, Any] | None = None

    def run(self, runs: Sequence[FinishedRun]) -> None:
        """Evaluates `runs`, one stage after the other, and writes their results under O/eval."""
        if not self.manifest.has_tokens and not self.skip >= NEED_TEXT:
            LOG.info("the store holds no tokens (an imported array or a synthetic world): only core is measured")
            self.skip |= NEED_TEXT
        self._reach_hub()
        exported = [self._export(run) for run in runs]
        for run in exported:
            self._core(run)
        if "splice" not in self.skip:
            self._splice(exported)
        if "probing" not in self.skip:
            self._probing(exported)
        if "hierarchy" not in self.skip:
            self._hierarchy(exported)
        if "latents" not in self.skip:
            for run in exported:
                self._latents(run)
        if "domains" not in self.skip:
            for run in exported:
                self._domains(run)
        if self.first_letter:
            self._first_letter(exported, self.first_letter)
        if "across" not in self.skip:
            self._across()

    def _reach_hub(self) -> None:
        """Turns the hub libraries offline where the hub is not needed or does not answer: retries take minutes."""
        needed = self.manifest.model.origin == "hub" or (self.config.suite == "standard" and "probing" not in self.skip)
        problem = hub_problem() if needed else None
        if problem:
            LOG.info(f"{problem}: only what its cache holds will be used")
        if problem or not needed:
            go_offline()

    def _export(self, run: FinishedRun) -> Exported:
        if run.is_exported:
            return hashed_export(run.name, run.folder / "sae")
        from hafs_evaluate.exchange.bridge import export_run  # JAX

        with self._timed(f"export/{run.name}"):
            return hashed_export(run.name, export_run(run.folder))

    def _core(self, run: Exported) -> None:
        from hafs_evaluate.core.reconstruction import core_metrics

        config, path = self.config, self.workspace.result(run.name, CORE)
        mark = self._mark(run, self.workspace.heldout.manifest.fingerprint, config.heldout_rows)
        if self._is_done(run.name, "core", mark, path):
            return
        with self._timed(f"core/{run.name}"):
            result = core_metrics(self._sae(run), self.workspace.heldout, self._moments, config.heldout_rows)
            arrays = path.with_name("core_latents.npz")
            write_atomic(arrays, lambda file: np.savez(file, allow_pickle=False, **result.latents))
            identity = {"run": run.name, "sae_sha256": run.weights_sha256, "config": to_dict(config)}
            write_json(path, {**identity, **result.values, "model": {}})
        self._done(run.name, {"core": mark, "splice": None})
        found = result.values
        LOG.info(f"{run.name}: FVU {found['reconstruction']['fvu']:.4f}, L0 {found['sparsity']['l0']:.1f}")

    def _splice(self, runs: Sequence[Exported]) -> None:
        from hafs_evaluate.core.splice import splice_metrics

        config, marks = self.config, {}
        for run in runs:
            mark = self._mark(run, self.workspace.heldout.manifest.fingerprint, config.contexts, config.seed)
            if not self._is_done(run.name, "splice", mark, self.workspace.result(run.name, CORE)):
                marks[run] = mark
        if not marks:
            return
        with self._timed("splice"):
            model = self._model("float32")
            saes = {run.name: self._sae(run, model.device) for run in marks}
            found = splice_metrics(model, self.workspace.heldout, saes, config.contexts, config.seed)
        for run, mark in marks.items():
            path, values = self.workspace.result(run.name, CORE), found[run.name]
            write_json(path, {**read_result(path), "config": to_dict(config), "model": values})
            self._done(run.name, {"splice": mark})
            LOG.info(f"{run.name}: CE score {_shown(values['ce_score'])}, KL score {_shown(values['kl_score'])}")

    def _probing(self, runs: Sequence[Exported]) -> None:
        config, path = self.config, self.workspace.llm_probing
        settings = [config.suite, list(config.tasks), list(config.ks), config.penalty, config.probe_seed]
        settings += [to_dict(self.manifest.model), to_dict(self.manifest.tokenizer), self.manifest.hook_point]
        marks = {run: self._mark(run, settings) for run in runs}
        marks = {
            run: mark
            for run, mark in marks.items()
            if not self._is_done(run.name, "probing", mark, self.workspace.result(run.name, PROBING))
        }
        llm_mark = fingerprint([FORMAT, "pca", settings])
        if marks or not self._is_done("llm", "probing", llm_mark, path):
            probe, language_model = self._suite()
            values: dict[str, Any] = {}
            for run, mark in marks.items():
                with self._timed(f"probing/{run.name}"):
                    values = probe(run)
                note = {"run": run.name, "sae_sha256": run.weights_sha256, "config": to_dict(config)}
                result = {**values, "eval_result_unstructured": {**(values["eval_result_unstructured"] or {}), **note}}
                write_json(self.workspace.result(run.name, PROBING), result)
                self._done(run.name, {"probing": mark})
                LOG.info(f"{run.name}: probed on {len(config.tasks)} tasks")
            with self._timed("probing/llm"):
                write_json(path, language_model(values or read_result(self.workspace.result(runs[0].name, PROBING))))
            self._done("llm", {"probing": llm_mark})

    def _suite(self) -> tuple[Callable[[Exported], dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]:
        """What probes one run, and what gives the language model's probes from the last run's result."""
        config, manifest = self.config, self.manifest
        if config.suite == "sae_probes":
            from hafs_evaluate.saebench.sae_probes import ProbeSettings, probe_language_model, probe_sae
            from hafs_evaluate.saebench.task_activations import fill_cache

            root = self.workspace.cache / "sae_probes"
            with self._timed("probing/activations"):
                cache = fill_cache(config.tasks, manifest, root / "activations", lambda: self._model(None))
            settings = ProbeSettings(config.tasks, config.ks, config.penalty, config.probe_seed)
            return (
                lambda run: probe_sae(run.unique_name, self._sae(run), manifest.hook_point, cache, settings, root),
                lambda values: probe_language_model(manifest, cache, settings, root),
            )
        from hafs_evaluate.saebench.standard import StandardProbing

        suite = StandardProbing(
            manifest, self._model(None), config.tasks, config.ks, config.probe_seed, self.workspace.cache / "saebench"
        )
        _check_space(self.workspace.folder, suite.bytes_needed())
        return lambda run: suite.score(run.unique_name, self._sae(run)), suite.language_model

    def _hierarchy(self, runs: Sequence[Exported]) -> None:
        from hafs_evaluate.hierarchy.tree_results import HierarchyStage

        root = self.workspace.cache / "labelled"
        stage = HierarchyStage(self.config, self.workspace.train, root, lambda: self._model(None), LOG.info)
        path, answers = (self.workspace.result("llm", name) for name in (HIERARCHY, "hierarchy_answers.npz"))
        llm_mark = fingerprint(stage.settings)
        if not (answers.exists() and self._is_done("llm", "hierarchy", llm_mark, path)):
            with self._timed("hierarchy/llm"):
                stage.language_model(path, answers)
            self._done("llm", {"hierarchy": llm_mark})
        for run in runs:
            mark, path = self._mark(run, stage.settings), self.workspace.result(run.name, HIERARCHY)
            if self._is_done(run.name, "hierarchy", mark, path):
                continue
            with self._timed(f"hierarchy/{run.name}"):
                found = stage.sae(self._sae(run), answers)
            identity = {"run": run.name, "sae_sha256": run.weights_sha256, "config": to_dict(self.config)}
            write_json(path, {**identity, **found})
            self._done(run.name, {"hierarchy": mark})
            means = found["macro"]
            LOG.info(f"{run.name}: parents top-1 {_shown(means['parents_top_1'])}, hole {_shown(means['hole'])}")

    def _latents(self, run: Exported) -> None:
        from hafs_evaluate.latents.dashboards import LatentsConfig, write_latents

        latents, path = LatentsConfig(), self.workspace.result(run.name, LATENTS)
        mark = self._mark(run, self.workspace.train.manifest.fingerprint, to_dict(latents))
        if not self._is_done(run.name, "latents", mark, path):
            with self._timed(f"latents/{run.name}"):
                model = self._loaded[1] if self._loaded else self._model(None)
                sae = self._sae(run, model.device)
                write_latents(sae, self.workspace.train, model, path, run=run.name, config=latents)
            self._done(run.name, {"latents": mark, "matches": None})
            LOG.info(f"{run.name}: latents shown")

    def _domains(self, run: Exported) -> None:
        from hafs_evaluate.latents.domains import DomainsConfig, detections, domain_metrics

        store, domains, path = self.workspace.heldout, DomainsConfig(), self.workspace.result(run.name, DOMAINS)
        mark = self._mark(run, store.manifest.fingerprint, to_dict(domains))
        sources = [source.name for source in store.manifest.sources]
        if len(sources) < 2 or self._is_done(run.name, "domains", mark, path):
            return
        with self._timed(f"domains/{run.name}"):
            values = domain_metrics(detections(self._sae(run), store, domains), sources, domains)
            identity = {"run": run.name, "sae_sha256": run.weights_sha256, "config": to_dict(domains)}
            write_json(path, {**identity, "sources": values})
        self._done(run.name, {"domains": mark})

    def _first_letter(self, runs: Sequence[Exported], mode: str) -> None:
        from hafs_evaluate.saebench.first_letter import check_validity, first_letter, parameters

        left = {}
        for run in runs:
            mark = self._mark(run, to_dict(self.manifest.model), self.manifest.hook_point)
            if not self._is_done(run.name, "first_letter", mark, self.workspace.result(run.name, FIRST_LETTER)):
                left[run] = mark
        if not left:
            return
        model = self._model("float32")
        for run in left:  # all of them before the first hour is spent
            check_validity(run.name, parameters(model), self._sae(run).W_dec.shape[0], mode)
        for run, mark in left.items():
            with self._timed(f"first_letter/{run.name}"):
                root, sae = self.workspace.cache / "first_letter", self._sae(run, model.device)
                values = first_letter(run.unique_name, sae, model, self.manifest, root)
                identity = {"run": run.name, "sae_sha256": run.weights_sha256}
                write_json(self.workspace.result(run.name, FIRST_LETTER), {**identity, **values})
            self._done(run.name, {"first_letter": mark})
            LOG.info(
                f"{run.name}: first-letter absorption {'' if values['valid'] else 'not '}valid: {values['reason']}"
            )

    def _across(self) -> None:
        from hafs_evaluate.latents.stability import evaluated_runs, write_matches, write_stability

        with self._timed("across"):
            runs = evaluated_runs(self.workspace)
            for arm in write_stability(self.workspace, runs)["arms"]:
                LOG.info(f"stability of {', '.join(arm['runs'])}: mean max cosine {_shown(arm['mean_max_cosine'])}")
            write_matches(self.workspace, runs)

    @cached_property
    def _moments(self) -> Any:
        from hafs_evaluate.core.reconstruction import store_moments

        return store_moments(self.workspace.heldout, self.config.heldout_rows)

    def _sae(self, run: Exported, device: Any = None) -> Any:
        from sae_lens import SAE

        from hafs_extract.models import pick_device

        sae = SAE.load_from_disk(run.folder, device=str(device or pick_device(self.config.device)))
        hook_point = sae.cfg.metadata.hook_name
        if hook_point != self.manifest.hook_point:
            raise UserError(
                f"run {run.name} was trained at {hook_point}, the held-out store in {self.workspace.folder} is of"
                f" {self.manifest.hook_point}; evaluate the run in the workspace it was trained in"
            )
        return sae.requires_grad_(False)

    def _model(self, dtype: str | None) -> Any:
        """The store's language model in `dtype` (none: the one it was extracted with); one is kept at a time."""
        from hafs_extract.models import load_for_manifest

        dtype = dtype or self.manifest.model.dtype
        if self._loaded is None or self._loaded[0] != dtype:
            self._loaded = None
            gc.collect()
            self._loaded = dtype, load_for_manifest(self.manifest, dtype, self.config.device)
        return self._loaded[1]

    def _mark(self, run: Exported, *inputs: Any) -> str:
        return fingerprint([FORMAT, run.weights_sha256, run.cfg_sha256, *inputs])

    def _is_done(self, run: str, stage: str, mark: str, path: Path) -> bool:
        return path.exists() and read_result(self.workspace.result(run, DONE)).get(stage) == mark

    def _done(self, run: str, marks: dict[str, str | None]) -> None:
        path = self.workspace.result(run, DONE)
        write_json(path, {**read_result(path), **marks})

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.workspace.add_seconds(what, time.monotonic() - started)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed:
        LOG.info(f"SAE-Bench's standard suite will keep {needed / 1e9:.1f} GB of activations in {folder}")
    if free < needed:
        raise UserError(
            f"{folder}: SAE-Bench's standard suite needs {needed / 1e9:.1f} GB, found {free / 1e9:.1f} GB free;"
            " free some, choose another OUT, name fewer --tasks, or take --suite sae_probes"
        )


def _shown(score: float | None) -> str:
    return "none" if score is None else f"{score:.4f}"
