"""Labelled texts from outside: how they are balanced and divided, and what is refused."""

import pytest

from hafs_evaluate.saebench.datasets import ProbingDataset, dataset_shas, register_probing_dataset
from hafs_jax.base.errors import UserError


def dataset(counts, name="mine"):
    rows = [(f"{label} {n}", label) for label, count in counts.items() for n in range(count)]
    return ProbingDataset(name, "made up", lambda: rows)


def test_the_commoner_label_is_cut_to_the_rarer_ones_size():
    kept = dataset({"yes": 130, "no": 100}).balanced()
    assert [label for _, label in kept].count("yes") == [label for _, label in kept].count("no") == 100
    assert kept[0] == ("yes 0", "yes")


def test_texts_are_divided_by_label_and_none_is_in_both_parts():
    train, test = dataset({"a": 50, "b": 10, "c": 40}).split(20, 8, seed=3)
    assert {label: len(texts) for label, texts in train.items()} == {"a": 10, "b": 8, "c": 10}
    assert {label: len(texts) for label, texts in test.items()} == {"a": 4, "b": 2, "c": 4}
    for label in train:
        assert not set(train[label]) & set(test[label])
        assert all(text.startswith(label) for text in train[label] + test[label])
    assert dataset({"a": 50, "b": 10, "c": 40}).split(20, 8, seed=3) == (train, test)
    assert dataset({"a": 50, "b": 10, "c": 40}).split(20, 8, seed=4) != (train, test)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 400, "b": 99}, "needs two labels with at least 100 texts each, found 400 of a, 99 of b; take --suite"),
        ({"a": 100, "b": 100, "c": 100}, "needs two labels"),
        ({"a": 100}, "dataset mine: expected texts of at least two labels, found 100 of one"),
    ],
)
def test_what_sae_probes_cannot_probe_is_refused(counts, message):
    with pytest.raises(UserError, match=message):
        dataset(counts).balanced()


def test_a_row_without_a_text_is_refused():
    with pytest.raises(UserError, match="dataset mine: expected a text and a label in row 1, found ''"):
        _ = ProbingDataset("mine", "made up", lambda: [("x", "a"), ("", "b")]).rows


def test_a_name_is_its_own_and_a_hash_is_the_texts(monkeypatch):
    monkeypatch.setattr("hafs_evaluate.saebench.datasets.PROBING_DATASETS", {})
    one = register_probing_dataset(dataset({"a": 1, "b": 1}))
    assert register_probing_dataset(one) is one
    with pytest.raises(UserError, match="dataset 'mine': expected a name that no other dataset has"):
        register_probing_dataset(dataset({"a": 1, "b": 1}))
    assert dataset_shas(["mine", "another"]) == [["mine", one.sha]]
    assert dataset({"a": 1, "b": 2}).sha != one.sha
