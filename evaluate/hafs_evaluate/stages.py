"""The stages of an evaluation, in the order in which they run: one record each. `register_evaluation` adds one.

A stage's own work is imported when it is done, since torch takes seconds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.results.measures import (
    CORE,
    DOMAINS,
    FIRST_LETTER,
    HIERARCHY,
    PROBING,
    STABILITY,
    TOKENS,
    register_measure,
)
from hafs_evaluate.results.readings import LATENTS, OTHERS
from hafs_evaluate.saebench.datasets import dataset_shas
from hafs_evaluate.saebench.suites import check_space, find_suite
from hafs_evaluate.stage import LANGUAGE_MODEL, Evaluation, Job, OfLanguageModel, Stage, Values
from hafs_evaluate.workspace import FinishedRun, Workspace, read_result
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_atomic
from hafs_jax.base.foreign import read_npz
from hafs_jax.base.options import to_dict

LATENT_ARRAYS, ANSWERS = "core_latents.npz", "hierarchy_answers.npz"


def evaluate(
    workspace: Workspace,
    config: EvalConfig,
    runs: Sequence[FinishedRun],
    skip: Sequence[str] = (),
    modes: Mapping[str, str] | None = None,
) -> None:
    """Measures `runs`, stage by stage, and writes their results under O/eval.

    `skip` names stages to leave out. `modes` is {stage: mode} of the stages that run only where they are asked for.
    """
    modes = modes or {}
    chosen = [stage for stage in STAGES.values() if stage.name not in skip and (not stage.modes or stage.name in modes)]
    Evaluation(workspace, config, modes).run(chosen, runs)


def register_evaluation(stage: Stage) -> Stage:
    """Adds `stage` to those that `hafs evaluate` runs, after the ones before it, and its measures to all tables.

    `UserError` where another stage or measure has the name.
    """
    if stage.name == LANGUAGE_MODEL or STAGES.get(stage.name, stage) != stage:
        raise UserError(f"stage {stage.name!r}: expected a name that no other stage has; choose another name")
    for measure in stage.measures:
        register_measure(measure)
    STAGES[stage.name] = stage
    return stage


def _shown(score: float | None) -> str:
    """A score in a line of the log."""
    return "none" if score is None else f"{score:.4f}"


def _core(job: Job) -> Values:
    from hafs_evaluate.core.reconstruction import core_metrics

    result = core_metrics(job.sae(), job.heldout, job.evaluation.moments, job.config.heldout_rows)
    arrays = job.path.with_name(LATENT_ARRAYS)
    write_atomic(arrays, lambda file: np.savez(file, allow_pickle=False, **result.latents))
    return {**result.values, "model": {}}


def _splice(evaluation: Evaluation, jobs: list[Job]) -> dict[str, Values]:
    from hafs_evaluate.core.splice import splice_metrics

    model, config = evaluation.model("float32"), evaluation.config
    saes = {job.run.name: job.sae(model.device) for job in jobs}
    found = splice_metrics(model, evaluation.workspace.heldout, saes, config.contexts, config.seed)
    cores = {job.run.name: read_result(job.path) for job in jobs}
    return {name: {**core, "config": to_dict(config), "model": found[name]} for name, core in cores.items()}


def _probing_settings(evaluation: Evaluation) -> list[Any]:
    config, manifest = evaluation.config, evaluation.manifest
    settings = [config.suite, list(config.tasks), list(config.ks), config.penalty, config.probe_seed]
    sizes = [config.probe_train_texts, config.probe_test_texts]
    if sizes != [EvalConfig.probe_train_texts, EvalConfig.probe_test_texts]:
        settings += sizes
    settings += [to_dict(manifest.model), to_dict(manifest.tokenizer), manifest.hook_point]
    return [*settings, *find_suite(config.suite).inputs, *dataset_shas(config.tasks)]


def _probing_suite(evaluation: Evaluation, jobs: list[Job]) -> Any:
    suite = find_suite(evaluation.config.suite)
    prepared = suite.prepare(evaluation)
    check_space(evaluation.workspace.folder, suite, suite.bytes_needed(prepared), evaluation.say)
    return suite, prepared


def _probing(job: Job) -> Values:
    suite, prepared = job.shared
    return suite.probe(prepared, job)


def _probing_of_language_model(evaluation: Evaluation, shared: Any) -> Values:
    suite, prepared = shared
    if suite.language_model is None:
        return {}
    of_a_run = read_result(evaluation.workspace.result(evaluation.runs[-1].name, PROBING))
    return suite.language_model(evaluation, prepared, of_a_run)


def _trees(evaluation: Evaluation) -> Any:
    from hafs_evaluate.hierarchy.tree_results import TreeProbing

    cache = evaluation.workspace.cache / "labelled"
    return TreeProbing(evaluation.config, evaluation.workspace.train, cache, evaluation.model, evaluation.say)


def _trees_of_language_model(evaluation: Evaluation, trees: Any) -> Values:
    values, answers = trees.language_model()
    path = evaluation.workspace.result(LANGUAGE_MODEL, ANSWERS)
    write_atomic(path, lambda file: np.savez_compressed(file, allow_pickle=False, **answers))
    return values


def _hierarchy(job: Job) -> Values:
    answers = read_npz(job.evaluation.workspace.result(LANGUAGE_MODEL, ANSWERS), "the language model's answers")
    return job.shared.sae(job.sae(), answers)


def _tokens(evaluation: Evaluation) -> Any:
    from hafs_evaluate.tokens.token_results import TokenMeasures

    workspace = evaluation.workspace

    def tokenizer() -> Any:
        return evaluation.model().tokenizer

    return TokenMeasures(evaluation.config, workspace.train, workspace.heldout, tokenizer, evaluation.say)


def _token_inputs(evaluation: Evaluation) -> list[Any] | None:
    documents = sum(source.documents for source in evaluation.manifest.sources)
    return [_tokens(evaluation).settings] if documents > 1 else None


def _token_transfer(job: Job) -> Values:
    of_model = read_result(job.evaluation.workspace.result(LANGUAGE_MODEL, TOKENS))
    return job.shared.sae(job.sae(), of_model)


def _latents_config() -> Any:
    from hafs_evaluate.latents.settings import LatentsConfig

    return LatentsConfig()


def _latent_samples(evaluation: Evaluation, jobs: list[Job]) -> Any:
    from hafs_evaluate.latents.sample import shared_samples

    return shared_samples(evaluation.workspace, [job.run.name for job in jobs], _latents_config().latents)


def _latents(job: Job) -> None:
    from hafs_evaluate.latents.dashboards import show_latents, write_latents

    model = job.evaluation.model()
    sample = job.shared.get(job.run.name)
    found = show_latents(job.sae(model.device), job.train, model, _latents_config(), sample)
    write_latents(job.path.with_name(OTHERS), {"run": job.run.name, "latents": found.pop("others")})
    write_latents(job.path, {"run": job.run.name, "marks": {job.stage.name: job.mark}, **found})


def _domains_config() -> Any:
    from hafs_evaluate.latents.settings import DomainsConfig

    return DomainsConfig()


def _domains(job: Job) -> Values:
    from hafs_evaluate.latents.domains import detections, domain_metrics

    config, sources = _domains_config(), [source.name for source in job.heldout.manifest.sources]
    found = domain_metrics(detections(job.sae(), job.heldout, config), sources, config)
    return {"config": to_dict(config), "sources": found}


def _domain_inputs(evaluation: Evaluation) -> list[Any] | None:
    heldout = evaluation.workspace.heldout.manifest
    return [heldout.fingerprint, to_dict(_domains_config())] if len(heldout.sources) > 1 else None


def _spelling_model(evaluation: Evaluation, jobs: list[Job]) -> Any:
    from hafs_evaluate.saebench.first_letter import check_validity, parameters

    model = evaluation.model("float32")
    for job in jobs:  # all of them before the first hour is spent
        check_validity(job.run.name, parameters(model), job.sae().W_dec.shape[0], evaluation.modes["first_letter"])
    return model


def _first_letter(job: Job) -> Values:
    from hafs_evaluate.saebench.first_letter import first_letter

    model, root = job.shared, job.evaluation.workspace.cache / "first_letter"
    return first_letter(job.run.unique_name, job.sae(model.device), model, job.evaluation.manifest, root)


def _compared(evaluation: Evaluation) -> list[Path]:
    workspace = evaluation.workspace
    names = (CORE, LATENT_ARRAYS, LATENTS, OTHERS)
    files = [workspace.result(run.parent.name, name) for run in workspace.eval.glob(f"*/{CORE}") for name in names]
    runs = [folder for place in (workspace.runs, workspace.folder / "imported") for folder in place.glob("*")]
    of_runs = ("config.json", "run.json", "sae/sae_weights.safetensors")
    return sorted([*files, *(run / name for run in runs for name in of_runs), workspace.eval / STABILITY])


def _across(evaluation: Evaluation) -> Values | None:
    from hafs_evaluate.latents.stability import evaluated_runs, stability, write_matches

    workspace = evaluation.workspace
    runs, earlier = evaluated_runs(workspace), read_result(workspace.eval / STABILITY)
    found = stability(runs, earlier)
    for arm in found["arms"]:
        evaluation.say(f"stability of {', '.join(arm['runs'])}: mean max cosine {_shown(arm['mean_max_cosine'])}")
    write_matches(workspace, runs)
    return found if found["arms"] or earlier else None


STAGES: dict[str, Stage] = {}
"""Every stage by name, in the order in which they run."""

for _stage in (
    Stage(
        "core",
        "FVU, L0, coherence and the rest, on the held-out store",
        CORE,
        compute=_core,
        inputs=lambda evaluation: [evaluation.workspace.heldout.manifest.fingerprint, evaluation.config.heldout_rows],
        line=lambda found: f"FVU {found['reconstruction']['fvu']:.4f}, L0 {found['sparsity']['l0']:.1f}",
        needs_tokens=False,
        can_be_skipped=False,  # it takes seconds, and others read it
        replaces=("splice",),
        other_files=(LATENT_ARRAYS,),
    ),
    Stage(
        "splice",
        "cross-entropy and KL divergence of the language model with the SAE in place",
        CORE,
        compute_together=_splice,
        inputs=lambda evaluation: [
            evaluation.workspace.heldout.manifest.fingerprint,
            evaluation.config.contexts,
            evaluation.config.seed,
        ],
        line=lambda found: (
            f"CE score {_shown(found['model']['ce_score'])}, KL score {_shown(found['model']['kl_score'])}"
        ),
    ),
    Stage(
        "probing",
        "SAE-Bench's sparse probing, of each SAE and of the language model",
        PROBING,
        compute=_probing,
        inputs=lambda evaluation: [_probing_settings(evaluation)],
        prepare=_probing_suite,
        language_model=OfLanguageModel(
            _probing_of_language_model, lambda evaluation: [1, "pca", _probing_settings(evaluation)]
        ),
        line=lambda found: f"probed on {len(found['eval_result_details'])} tasks",
        needs_hub=lambda config: find_suite(config.suite).needs_hub,
        identity_key="eval_result_unstructured",
    ),
    Stage(
        "hierarchy",
        "label trees: probes of parents and children, absorption, holes",
        HIERARCHY,
        compute=_hierarchy,
        inputs=lambda evaluation: [_trees(evaluation).settings],
        prepare=lambda evaluation, jobs: _trees(evaluation),
        language_model=OfLanguageModel(
            _trees_of_language_model,
            lambda evaluation: _trees(evaluation).settings,
            comes_first=True,  # an SAE is compared with what the language model's probe says
            other_files=(ANSWERS,),
        ),
        line=lambda found: (
            f"parents top-1 {_shown(found['macro']['parents_top_1'])}, hole {_shown(found['macro']['hole'])}"
        ),
    ),
    Stage(
        "tokens",
        "properties that a token's id decides: do latents chosen on some tokens find the others",
        TOKENS,
        compute=_token_transfer,
        inputs=_token_inputs,
        prepare=lambda evaluation, jobs: _tokens(evaluation),
        language_model=OfLanguageModel(
            lambda evaluation, tokens: tokens.language_model(),
            lambda evaluation: _tokens(evaluation).settings,
            comes_first=True,  # an SAE is compared with the model's own probes
        ),
        line=lambda found: (
            f"unseen tokens top-1 {_shown(found['mean']['transfer_top_1'])} of {len(found['properties'])} properties"
        ),
    ),
    Stage(
        "latents",
        "single latents: densities, contexts, promoted tokens, what fires with it",
        LATENTS,
        compute=_latents,
        prepare=_latent_samples,
        inputs=lambda evaluation: [evaluation.workspace.train.manifest.fingerprint, to_dict(_latents_config())],
        replaces=("matches",),
        other_files=("eval/<run>/latents_others.json", "eval/latent_sample.json"),
    ),
    Stage(
        "domains",
        "latents as detectors of one source of text against the others",
        DOMAINS,
        compute=_domains,
        inputs=_domain_inputs,
        line=lambda found: (
            ", ".join(f"AUROC {one['best_auroc']['auroc']:.3f} of {source}" for source, one in found["sources"].items())
            or "no source has enough documents"
        ),
    ),
    Stage(
        "first_letter",
        "SAE-Bench's first-letter absorption, which takes hours a run; refused where the model or the dictionary is too"
        " small for it to be valid, unless the mode is force",
        FIRST_LETTER,
        compute=_first_letter,
        inputs=lambda evaluation: [to_dict(evaluation.manifest.model), evaluation.manifest.hook_point],
        prepare=_spelling_model,
        line=lambda found: f"first-letter absorption {'' if found['valid'] else 'not '}valid: {found['reason']}",
        modes=("on", "force"),
    ),
    Stage(
        "across",
        "how alike the dictionaries of several seeds are; each latent's match in the other runs",
        STABILITY,
        compute_all=_across,
        reads=_compared,
        needs_tokens=False,
        other_files=("eval/<run>/latents.json", "eval/<run>/latents_others.json"),
    ),
):
    register_evaluation(_stage)
