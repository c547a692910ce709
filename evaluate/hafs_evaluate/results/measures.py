"""The measures of an SAE, as one table: tables, verdicts, definitions and model cards read it. Standard library only.

Each measure says in which result file of a run its figure lies and how the figure is to be read. `results.readings`
reads them; `register_measure` adds one from outside of the repository.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from hafs_jax.base.errors import UserError

K = "<k>"
"""In a name, label or path it stands for a number of latents: one measure for each k that was probed."""


@dataclass(frozen=True)
class Measure:
    """One figure of an SAE.

    A path names the keys that lead to the figure, joined by dots; `*` stands for every key of an object, and the keys
    that it stood for are the dataset's name, joined by a colon.
    """

    name: str  # in results.json and in the experiment's table
    file: str  # in eval/<run>/
    label: str  # the head of its column
    definition: str  # a sentence or two, with the unit
    path: str = ""  # to the run's figure; none: the mean over the datasets that all runs have
    per_dataset: str = ""  # to the figure of each dataset (a task, a label, a source of text)
    better: Literal["lower", "higher", ""] = ""
    digits: int = 3
    title: str = ""  # in a sentence and on a model card [the label]
    over: str = ""  # what it was measured on, or is a mean over
    is_of_all_runs: bool = False  # the file lies in eval/ itself and holds {"runs": {run: the run's figures}}
    is_column: bool = True  # of the table of arms; that has room for about 15
    is_optional: bool = True  # its column is left out where no arm has a figure
    column_ks: tuple[int, ...] = (1,)  # of a measure of several k: those that have a column
    is_on_card: bool = False  # on the model card

    def __post_init__(self) -> None:
        if not (self.path or self.per_dataset):
            raise UserError(f"measure {self.name!r}: expected a path or a per_dataset path into {self.file}")

    @property
    def has_ks(self) -> bool:
        """Whether there is one measure for each k."""
        return K in self.name

    @property
    def sentence_name(self) -> str:
        """What a sentence calls it."""
        return self.title or self.label

    def at(self, k: int) -> "Measure":
        """The measure of this k; itself where it has none."""
        if not self.has_ks:
            return self
        name, label, title = (text.replace(K, str(k)) for text in (self.name, self.label, self.title))
        return replace(self, name=name, label=label, title=title)

    def columns(self) -> list["Measure"]:
        """The measures that have a column in the table of arms."""
        if not self.is_column:
            return []
        return [self.at(k) for k in self.column_ks] if self.has_ks else [self]


MEASURES: dict[str, Measure] = {}
"""Every measure by name, in the order of the tables."""


def register_measure(measure: Measure) -> Measure:
    """Adds `measure` to those that all tables show; `UserError` where its name is taken by another one."""
    known = MEASURES.get(measure.name)
    if known is not None and known != measure:
        raise UserError(f"measure {measure.name!r}: expected a name that no other measure has; choose another name")
    MEASURES[measure.name] = measure
    return measure


def find_measure(name: str) -> Measure | None:
    """The measure called `name`, such as "fvu" or "top_5"; None where there is none."""
    if name in MEASURES:
        return MEASURES[name]
    for measure in MEASURES.values():
        if measure.has_ks and (match := re.fullmatch(re.escape(measure.name).replace(re.escape(K), r"(\d+)"), name)):
            return measure.at(int(match[1]))
    return None


def sentence_name(name: str) -> str:
    """What a sentence calls the measure `name`."""
    measure = find_measure(name)
    return measure.sentence_name if measure else name


def column_measures() -> list[Measure]:
    """The measures of the table of arms, in the order of its columns."""
    return [column for measure in MEASURES.values() for column in measure.columns()]


HELDOUT, CONTEXTS, TASKS, PARENTS = "held-out rows", "held-out contexts", "mean over tasks", "mean over parents"
PROPERTIES = "mean over properties"
CORE, PROBING, HIERARCHY = "core.json", "probing.json", "hierarchy.json"
DOMAINS, FIRST_LETTER, STABILITY = "domains.json", "first_letter.json", "stability.json"
TOKENS = "tokens.json"
_NODES, _CHILDREN, _PARENTS = "nodes.*.*", "children.*.*", "parents.*.*"  # `readings` sorts a tree's nodes so

for _measure in (
    Measure(
        "fvu", CORE, "FVU",
        "Fraction of variance unexplained: the sum of |x - x̂|² over the held-out rows, divided by the sum of"
        " |x - mean|². 0 is a perfect reconstruction; 1 is what predicting the mean gives.",
        path="reconstruction.fvu", better="lower", over=HELDOUT, is_optional=False, is_on_card=True,
    ),
    Measure(
        "l0", CORE, "L0", "Mean number of latents that are active on a row.",
        path="sparsity.l0", digits=1, over=HELDOUT, is_optional=False, is_on_card=True,
    ),
    Measure(
        "dead_fraction", CORE, "dead", "Fraction of the latents that are active on no held-out row.",
        path="sparsity.dead_fraction", better="lower", title="dead latents, fraction", over=HELDOUT,
        is_optional=False, is_on_card=True,
    ),
    Measure(
        "dense_fraction", CORE, "dense", "Fraction of the latents that are active on more than 10% of the rows.",
        path="sparsity.dense_fraction", title="dense latents, fraction", over=HELDOUT, is_column=False,
    ),
    Measure(
        "ce_score", CORE, "CE score",
        "How much of the language model's cross-entropy survives when the SAE's reconstruction stands in for the"
        " activations: (CE ablated - CE with the SAE) / (CE ablated - CE clean), where ablated sets them to 0. 1 loses"
        " nothing; 0 is as bad as ablation.",
        path="model.ce_score", better="higher", title="cross-entropy recovered", over=CONTEXTS, is_optional=False,
        is_on_card=True,
    ),
    Measure(
        "kl_score", CORE, "KL score",
        "1 - KL(clean ‖ with the SAE) / KL(clean ‖ ablated), of the language model's next token. 1 loses nothing.",
        path="model.kl_score", better="higher", title="KL divergence recovered", over=CONTEXTS, is_optional=False,
        is_on_card=True,
    ),
    Measure(
        "mean_coherence", CORE, "mean coherence",
        "Mean over the latents of the cosine between a dictionary vector and the nearest other one.",
        path="geometry.mean_coherence", better="lower", over="dictionary", is_optional=False, is_on_card=True,
    ),
    Measure(
        "max_coherence", CORE, "max coherence", "The largest cosine between any two dictionary vectors.",
        path="geometry.max_coherence", better="lower", over="dictionary", is_optional=False, is_on_card=True,
    ),
    Measure(
        f"top_{K}", PROBING, f"top-{K} probing",
        "Test accuracy of a logistic probe on the k latents that tell a task's two classes apart best, mean over"
        " tasks. The language model's own top-k probe uses k dimensions of its activations, its full probe all.",
        per_dataset=f"*.top_{K}.test_accuracy", better="higher", title=f"sparse probing, top-{K} accuracy", over=TASKS,
        is_optional=False, column_ks=(1, 5), is_on_card=True,
    ),
    Measure(
        f"top_{K}_auroc", PROBING, f"top-{K} AUROC", "Test AUROC of the same probes, mean over the tasks.",
        per_dataset=f"*.top_{K}.test_auc", better="higher", title=f"sparse probing, top-{K} AUROC", over=TASKS,
        is_column=False,
    ),
    Measure(
        "hierarchy_parent_top_1", HIERARCHY, "parent probing",
        "Balanced accuracy of a probe on one latent that tells a parent class of a label tree from all other texts:"
        " 5-fold cross-validation, mean over parents and trees. A class that repeats another one's texts is left out.",
        path="macro.parents_top_1", per_dataset=f"{_PARENTS}.contrasts.rest.top_1.balanced_accuracy", better="higher",
        title="top-1 probing of parents (balanced accuracy)", over=PARENTS,
    ),
    Measure(
        f"hierarchy_parent_top_{K}", HIERARCHY, f"parent probing, top-{K}",
        "Balanced accuracy of a probe on k latents that tells a parent class from all other texts.",
        per_dataset=f"{_PARENTS}.contrasts.rest.top_{K}.balanced_accuracy", better="higher", over=PARENTS,
        is_column=False,
    ),
    Measure(
        f"hierarchy_child_top_{K}", HIERARCHY, f"child probing, top-{K}",
        "The same of a class that has no children.",
        per_dataset=f"{_CHILDREN}.contrasts.rest.top_{K}.balanced_accuracy", better="higher", over="mean over leaves",
        is_column=False,
    ),
    Measure(
        f"hierarchy_sibling_top_{K}", HIERARCHY, f"sibling probing, top-{K}",
        "Balanced accuracy of a probe on k latents that tells a class from its siblings, given the parent.",
        per_dataset=f"{_NODES}.contrasts.siblings.top_{K}.balanced_accuracy", better="higher", over="mean over classes",
        is_column=False,
    ),
    Measure(
        "hole", HIERARCHY, "hole",
        "Recall of a parent's main latents on its texts that belong to no child, minus their lowest recall on any"
        " child's texts. 0 is no hole. Mean over parents and trees.",
        path="macro.hole", per_dataset=f"{_NODES}.hole", better="lower", title="worst-child hole", over=PARENTS,
    ),
    Measure(
        "absorption_fraction", HIERARCHY, "absorption",
        "Share of a concept's projection that is carried by other latents than its main ones, counted where that share"
        " is at least 0.4.",
        path="macro.absorption_fraction", per_dataset=f"{_PARENTS}.absorption.fraction", better="lower", over=PARENTS,
    ),
    Measure(
        "absorption_full", HIERARCHY, "absorption, full",
        "Share of a concept's texts on which it is absorbed in this way while all of its main latents are silent.",
        path="macro.absorption_full", per_dataset=f"{_PARENTS}.absorption.full", better="lower", over=PARENTS,
    ),
    Measure(
        f"transfer_top_{K}", TOKENS, f"unseen tokens, top-{K}",
        "Transfer to unseen tokens: balanced accuracy of k latents as detectors of a property that a token's id decides"
        " (a case, a suffix, a list of words). The latents, and the probe of several, are chosen on half of the"
        " property's words in half of the documents and measured on the other words in the other documents; mean over"
        " splits and over the properties that the model's own probe finds. 0.5 is chance. No direction enters.",
        path=f"mean.transfer_top_{K}", per_dataset=f"properties.*.top_{K}.balanced_accuracy", better="higher",
        title=f"transfer to unseen tokens, top-{K} (balanced accuracy)", over=PROPERTIES,
    ),
    Measure(
        f"transfer_f1_{K}", TOKENS, f"unseen tokens, F1 of top-{K}",
        "F1 of the same detectors on the same rows. Balanced accuracy hardly charges a detector of a rare property for"
        " what it fires on besides; F1 does.",
        path=f"mean.f1_top_{K}", per_dataset=f"properties.*.top_{K}.f1", better="higher", over=PROPERTIES,
        is_column=False,
    ),
    Measure(
        "transfer_recall", TOKENS, "unseen tokens, recall",
        "Recall of the one latent on the rows of the words that it was not chosen on.",
        path="mean.recall", per_dataset="properties.*.top_1.recall", better="higher",
        title="recall of unseen tokens, top-1", over=PROPERTIES,
    ),
    Measure(
        "transfer_child_recall", TOKENS, "unseen tokens, recall by word",
        "Mean over a property's words of the same latent's recall on each, each word with the same weight.",
        path="mean.child_recall", per_dataset="properties.*.child_recall", better="higher", over=PROPERTIES,
        is_column=False,
    ),
    Measure(
        "transfer_child_spread", TOKENS, "unseen tokens, spread over words",
        "Standard deviation of that recall over a property's words.",
        path="mean.child_spread", per_dataset="properties.*.child_spread", better="lower", over=PROPERTIES,
        is_column=False,
    ),
    Measure(
        "transfer_enough", TOKENS, "10 latents are enough",
        "Share of the properties of which at most 10 latents have, on unseen words, 0.9 of the F1 of the model's own"
        " probe.",
        path="mean.enough_share", better="higher", over="properties", is_column=False,
    ),
    Measure(
        "token_absorbed", TOKENS, "token absorption",
        "Share of a property's rows, as the model's own probe finds them, on which its best latent is silent while up"
        " to three others, of a cosine of at least 0.1 with the class direction, carry at least 0.4 of the projection"
        " on it. It depends on directions.",
        path="mean.absorbed", per_dataset="properties.*.absorbed", better="lower", over=PROPERTIES, is_column=False,
    ),
    Measure(
        f"domain_f1_{K}", DOMAINS, f"top-{K} domain F1",
        "F1 of k latents as a detector of one source of text against the others, mean over sources. A document counts"
        " as detected where any of them is active. They are chosen on one half of the documents and measured on the"
        " other.",
        per_dataset=f"sources.*.best_{K}.f1", better="higher", title=f"F1 of {K} latents as detectors of a source",
        over="mean over sources", is_column=False,
    ),
    Measure(
        "domain_auroc", DOMAINS, "domain AUROC",
        "AUROC of the best single latent as a detector of one source of text, by its highest activation on a document;"
        " chosen and measured on the same documents; mean over sources.",
        per_dataset="sources.*.best_auroc.auroc", better="higher", over="mean over sources", is_column=False,
    ),
    Measure(
        "first_letter_absorption", FIRST_LETTER, "first-letter absorption",
        "SAE-Bench's absorption fraction on the first letters of words, mean over letters, where it is valid: for"
        " language models of at least 1,000 million parameters and dictionaries of at least 16,000 latents.",
        path="result.eval_result_metrics.mean.mean_absorption_fraction_score",
        per_dataset="letters.*.mean_absorption_fraction", better="lower", over="mean over letters", is_column=False,
    ),
    Measure(
        "first_letter_absorption_full", FIRST_LETTER, "first-letter absorption, full",
        "SAE-Bench's full absorption rate on the first letters of words, likewise.",
        path="result.eval_result_metrics.mean.mean_full_absorption_score",
        per_dataset="letters.*.full_absorption_rate", better="lower", over="mean over letters", is_column=False,
    ),
    Measure(
        "stability", STABILITY, "stability",
        "How alike the dictionaries of two seeds are: the mean over latents of the largest cosine with a dictionary"
        " vector of the other seed, mean over pairs of seeds.",
        path="mean_max_cosine", better="higher", over="pairs of seeds", is_of_all_runs=True,
    ),
    Measure(
        "stability_shared", STABILITY, "shared latents",
        "Fraction of the latents that can be matched one to one with those of another seed, each pair with a cosine"
        " above 0.7; mean over pairs of seeds.",
        path="shared_fraction", better="higher", over="pairs of seeds", is_of_all_runs=True, is_column=False,
    ),
):  # fmt: skip
    register_measure(_measure)
