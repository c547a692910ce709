"""Labelled texts from outside, for the probing suites; `register_probing_dataset` adds some. Numpy alone.

Both built-in suites probe a registered dataset where `--tasks` names it, beside the tasks that they carry themselves.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hafs_evaluate.workspace import fingerprint
from hafs_jax.base.errors import UserError

LEAST_TEXTS = 200  # of sae_probes, which keeps 100 for testing
TRAIN_SHARE = 0.8  # of a class's texts, where standard would like more than there are

Split = dict[str, list[str]]  # {label: its texts}


@dataclass(frozen=True)
class ProbingDataset:
    """Labelled texts: a probe is to tell the labels apart.

    sae_probes probes one with two labels, on as many texts of each; standard probes each label against the others.
    """

    name: str  # for --tasks, and in tables
    help: str  # one line: what is labelled
    read: Callable[[], Iterable[tuple[str, str]]]  # (text, label), always in the same order

    @cached_property
    def rows(self) -> list[tuple[str, str]]:
        """The texts and labels; `UserError` where one is no text or there are not two labels."""
        rows = [(text, label) for text, label in self.read()]
        for number, (text, label) in enumerate(rows):
            if not isinstance(text, str) or not text or not isinstance(label, str):
                raise UserError(f"dataset {self.name}: expected a text and a label in row {number}, found {text!r}")
        if len({label for _, label in rows}) < 2:
            raise UserError(f"dataset {self.name}: expected texts of at least two labels, found {len(rows)} of one")
        return rows

    @cached_property
    def labels(self) -> list[str]:
        return sorted({label for _, label in self.rows})

    @cached_property
    def sha(self) -> str:
        """A hash of the texts and labels: results of others are not theirs."""
        return fingerprint([list(row) for row in self.rows])

    def balanced(self) -> list[tuple[str, str]]:
        """As many texts of each of two labels as there are of the rarer one, in their order."""
        labels = self.labels
        counts = [sum(label == one for _, label in self.rows) for one in labels]
        if len(labels) != 2 or 2 * min(counts) < LEAST_TEXTS:
            found = ", ".join(f"{count} of {label}" for label, count in zip(labels, counts, strict=True))
            raise UserError(
                f"dataset {self.name}: the suite sae_probes needs two labels with at least {LEAST_TEXTS // 2} texts"
                f" each, found {found}; take --suite standard, or add texts"
            )
        seen = dict.fromkeys(labels, 0)
        kept = []
        for text, label in self.rows:
            seen[label] += 1
            if seen[label] <= min(counts):
                kept.append((text, label))
        return kept

    def split(self, train_size: int, test_size: int, seed: int) -> tuple[Split, Split]:
        """(training texts, test texts): of each label half of each size, or 80% and 20% where it has fewer."""
        random = np.random.default_rng(seed)
        train: Split = {}
        test: Split = {}
        for label in self.labels:
            texts = [text for text, own in self.rows if own == label]
            texts = [texts[index] for index in random.permutation(len(texts))]
            n_train = min(train_size // 2, int(TRAIN_SHARE * len(texts)))
            train[label], test[label] = texts[:n_train], texts[n_train : n_train + test_size // 2]
        return train, test


PROBING_DATASETS: dict[str, ProbingDataset] = {}
"""Every registered dataset by name."""


def register_probing_dataset(dataset: ProbingDataset) -> ProbingDataset:
    """Adds `dataset` to what `--tasks` may name; `UserError` where its name is taken by another one."""
    if PROBING_DATASETS.get(dataset.name, dataset) != dataset:
        raise UserError(f"dataset {dataset.name!r}: expected a name that no other dataset has; choose another name")
    PROBING_DATASETS[dataset.name] = dataset
    return dataset


def registered_classes() -> dict[str, list[str]]:
    """{dataset: its labels} of every registered dataset."""
    return {name: dataset.labels for name, dataset in PROBING_DATASETS.items()}


def dataset_shas(names: Iterable[str]) -> list[list[str]]:
    """[name, hash] of those of `names` that are registered: what results depend on beside the suite's own tasks."""
    return [[name, PROBING_DATASETS[name].sha] for name in names if name in PROBING_DATASETS]
