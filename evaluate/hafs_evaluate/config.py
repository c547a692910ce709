"""What an evaluation depends on: one frozen config, saved with every result. Standard library only."""

from dataclasses import dataclass, replace
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.options import check, option

STAGES = ("splice", "probing", "hierarchy", "latents", "domains", "across")  # core always runs: it takes seconds

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
"""Professions, sentiment, news, headlines, spam, places: 0.75 million tokens."""

DATASETS = (
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


@dataclass(frozen=True)
class EvalConfig:
    """Everything that decides the figures of an evaluation."""

    heldout_rows: int | None = option(None, "held-out rows of the core metrics; none takes all", least=2)
    contexts: int = option(64, "held-out contexts on which the SAE is spliced into the model", least=1)
    seed: int = option(0, "seed of the draw of those contexts", least=0, most=2**32 - 1)
    suite: str = option(
        "auto",
        "sae_probes: the tasks of its wheel; standard: SAE-Bench's eight hub datasets; auto: by the store's profile",
        choices=("auto", "sae_probes", "standard"),
    )
    tasks: tuple[str, ...] = option((), "tasks of sae_probes or datasets of standard; none named: those below")
    ks: tuple[int, ...] = option((1, 2, 5, 10, 20, 50), "latents a sparse probe may use", least=1)
    # SAE-Bench's own default is l1: four times the seconds (saga), accuracies .005 apart on average
    penalty: str = option("l2", "regularisation of sae_probes' sparse probes", choices=("l1", "l2"))
    probe_seed: int = option(42, "seed of the probes' train and test splits", least=0, most=2**32 - 1)
    trees: tuple[str, ...] = option((), "label trees, by name or path of a .json file; none named: all bundled ones")
    hierarchy_ks: tuple[int, ...] = option((1, 2, 5, 10, 20, 50), "latents a probe of a tree's node may use", least=1)
    hierarchy_folds: int = option(
        5, "folds of the trees' cross-validation, documents kept whole; C is chosen inside", least=3
    )
    hierarchy_tokens: int = option(64, "tokens of a labelled text that are read, BOS included", least=2)
    hierarchy_seed: int = option(0, "seed of the trees' folds", least=0, most=2**32 - 1)
    device: str = option("auto", "torch device; auto takes CUDA where there is one")

    def __post_init__(self) -> None:
        check(self)
        for name in ("ks", "hierarchy_ks"):
            ks = getattr(self, name)
            if not ks or len(set(ks)) < len(ks):
                raise UserError(f"{name}={ks}: expected at least one number, each once")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"tasks={self.tasks}: expected different names")


def resolved(config: EvalConfig, profile: dict[str, Any]) -> EvalConfig:
    """`config` with the suite and the tasks that `auto` and none stand for; `profile` is the store's, of its manifest.

    The suite is the one that the profile names. Stores of before a profile named one, and stores of no profile, have
    none: "sae_probes" then if the profile is called offline, else "standard".
    """
    suite = config.suite
    if suite == "auto":
        suite = profile.get("suite") or ("sae_probes" if profile["resolved"] == "offline" else "standard")
    return replace(config, suite=suite, tasks=config.tasks or (OFFLINE_TASKS if suite == "sae_probes" else DATASETS))
