"""What an evaluation depends on: one frozen config, saved with every result. Standard library only."""

from dataclasses import dataclass

from extract.format.config import check_choices, option
from extract.format.errors import UserError

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


@dataclass(frozen=True)
class EvalConfig:
    """Everything that decides the figures of an evaluation."""

    heldout_rows: int | None = option(None, "held-out rows of the core metrics; none takes all [rows]")
    contexts: int = option(64, "held-out contexts on which the SAE is spliced into the model [contexts]")
    seed: int = option(0, "seed of the draw of those contexts")
    suite: str = option(
        "auto",
        "probing: sae_probes is its wheel's tasks, standard SAE-Bench's eight hub datasets; auto by the store's profile",
        choices=("auto", "sae_probes", "standard"),
    )
    tasks: tuple[str, ...] = option(OFFLINE_TASKS, "tasks of sae_probes, or datasets of the standard suite")
    ks: tuple[int, ...] = option((1, 2, 5, 10, 20, 50), "latents a sparse probe may use [latents]")
    penalty: str = option("l1", "regularisation of sae_probes' sparse probes", choices=("l1", "l2"))
    probe_seed: int = option(42, "seed of the probes' train and test splits")
    device: str = option("auto", "torch device; auto takes CUDA where there is one")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.heldout_rows is not None and self.heldout_rows < 2:
            raise UserError(f"heldout_rows={self.heldout_rows}: expected at least 2")
        if self.contexts < 1:
            raise UserError(f"contexts={self.contexts}: expected at least 1")
        for name in ("seed", "probe_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(f"{name}={getattr(self, name)}: expected 0 to 2^32 - 1")
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise UserError(f"ks={self.ks}: expected different numbers of at least 1")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"tasks={self.tasks}: expected different names, at least one")
