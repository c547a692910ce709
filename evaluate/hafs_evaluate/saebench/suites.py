"""The suites of sparse-probing tasks, as records; `register_suite` adds one. Torch comes when a suite is used.

A suite probes an SAE on labelled texts. Its result is SAE-Bench's: `eval_result_details` is a list of {"dataset_name",
"sae_metrics_by_k": {k: {"test_accuracy", "test_auc"}}}, an entry for each task.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean

if TYPE_CHECKING:
    from hafs_evaluate.stage import Evaluation, Job

OFFLINE_TASKS = (
    "60_wikidata_occupation_isathlete",
    "62_wikidata_occupation_ispolitician",
    "64_wikidata_occupation_isresearcher",
    "92_glue_sst2",
    "139_news_class_Politics",
    "21_headline_istrump",
    "22_headline_isobama",
    "96_spam_is",
    "105_click_bait",
    "95_toxic_is",
    "123_world_country_United_Kingdom",
)
"""Professions, sentiment, news, headlines, spam and places: 0.75 million tokens."""

STANDARD_DATASETS = (
    "LabHC/bias_in_bios_class_set1",
    "LabHC/bias_in_bios_class_set2",
    "LabHC/bias_in_bios_class_set3",
    "canrager/amazon_reviews_mcauley_1and5",
    "canrager/amazon_reviews_mcauley_1and5_sentiment",
    "codeparrot/github-code",
    "fancyzhx/ag_news",
    "Helsinki-NLP/europarl",
)
"""SAE-Bench's eight."""

Values = dict[str, Any]


@dataclass(frozen=True)
class ProbingSuite:
    """A set of labelled texts, and what probes an SAE and the language model on them."""

    name: str
    help: str  # one line: what its tasks are
    tasks: tuple[str, ...]  # those that are probed where the config names none
    prepare: Callable[["Evaluation"], Any]
    """What all SAEs share, such as the language model's activations on the texts."""
    probe: Callable[[Any, "Job"], Values]
    """The result of one SAE, of what `prepare` returned."""
    language_model: Callable[["Evaluation", Any, Values], Values] | None = None
    """The language model's own probes, {"tasks": {task: {"full", "top_<k>": {"test_accuracy"}}}}; it is given an SAE's
    result."""
    bytes_needed: Callable[[Any], int] = lambda prepared: 0  # of disk space, before the first SAE is probed
    needs_hub: bool = False
    inputs: tuple[Any, ...] = ()  # what else results depend on, such as the version of its texts


SUITES: dict[str, ProbingSuite] = {}
"""Every suite by name."""


def register_suite(suite: ProbingSuite) -> ProbingSuite:
    """Adds `suite` to those that `--suite` takes; `UserError` where its name is taken by another one."""
    if suite.name == "auto" or SUITES.get(suite.name, suite) != suite:
        raise UserError(f"suite {suite.name!r}: expected a name that no other suite has; choose another name")
    SUITES[suite.name] = suite
    return suite


def find_suite(name: str) -> ProbingSuite:
    """The suite called `name`; `UserError` where there is none."""
    if name not in SUITES:
        raise UserError(f"suite={name!r}: expected one of auto, {', '.join(SUITES)}{did_you_mean(name, SUITES)}")
    return SUITES[name]


def suite_of(profile: dict[str, Any]) -> str:
    """The suite that `auto` stands for on a store of `profile`, which is the manifest's: the one that it names.

    Stores from before there was such a name have sae_probes where the profile is the offline one, standard where it is
    pythia70m. Of any other profile it is the first suite that needs no hub.
    """
    by_profile = {"offline": "sae_probes", "pythia70m": "standard"}
    named = profile.get("suite") or by_profile.get(str(profile.get("resolved")))
    return named or next(suite.name for suite in SUITES.values() if not suite.needs_hub)


def check_space(folder: Path, suite: ProbingSuite, needed: int, say: Callable[[str], None]) -> None:
    """Raises `UserError` where the disk that holds `folder` has not the `needed` bytes."""
    if not needed:
        return
    free = shutil.disk_usage(folder).free
    say(f"the probing suite {suite.name} will keep {needed / 1e9:.1f} GB of activations in {folder}")
    if free < needed:
        raise UserError(
            f"{folder}: the probing suite {suite.name} needs {needed / 1e9:.1f} GB, found {free / 1e9:.1f} GB free;"
            " free some, choose another OUT, name fewer --tasks, lower standard's --probe-train-texts, or take another"
            " --suite"
        )


def _sae_probes(evaluation: "Evaluation") -> Any:
    from hafs_evaluate.saebench.sae_probes import ProbeSettings
    from hafs_evaluate.saebench.task_activations import fill_cache

    config, root = evaluation.config, evaluation.workspace.cache / "sae_probes"
    cache = fill_cache(config.tasks, evaluation.manifest, root / "activations", evaluation.model)
    return cache, ProbeSettings(config.tasks, config.ks, config.penalty, config.probe_seed), root


def _probe_sae_probes(prepared: Any, job: "Job") -> Values:
    from hafs_evaluate.saebench.sae_probes import probe_sae

    cache, settings, root = prepared
    return probe_sae(job.run.unique_name, job.sae(), job.evaluation.manifest.hook_point, cache, settings, root)


def _sae_probes_language_model(evaluation: "Evaluation", prepared: Any, values: Values) -> Values:
    from hafs_evaluate.saebench.sae_probes import probe_language_model

    return probe_language_model(evaluation.manifest, *prepared)


def _standard(evaluation: "Evaluation") -> Any:
    from hafs_evaluate.saebench.standard import StandardProbing

    config, root = evaluation.config, evaluation.workspace.cache / "saebench"
    probing = StandardProbing(
        evaluation.manifest,
        evaluation.model(),
        config.tasks,
        config.ks,
        config.probe_seed,
        root,
        config.probe_train_texts,
        config.probe_test_texts,
    )
    if downloads := probing.downloads():
        evaluation.say(downloads)
    return probing


register_suite(
    ProbingSuite(
        "sae_probes",
        "binary tasks of the sae-probes wheel; needs no hub",
        OFFLINE_TASKS,
        prepare=_sae_probes,
        probe=_probe_sae_probes,
        language_model=_sae_probes_language_model,
    )
)
register_suite(
    ProbingSuite(
        "standard",
        "SAE-Bench's eight datasets, from the hub",
        STANDARD_DATASETS,
        prepare=_standard,
        probe=lambda suite, job: suite.score(job.run.unique_name, job.sae()),
        language_model=lambda evaluation, suite, values: suite.language_model(values),
        bytes_needed=lambda suite: suite.bytes_needed(),
        needs_hub=True,
    )
)
