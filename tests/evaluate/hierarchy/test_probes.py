"""Sparse probes of label trees: contrasts, folds, rankings, and that nothing leaks from the held-out fold."""

import numpy as np
import pytest

from hafs_evaluate.hierarchy.label_trees import LabelledText, LabelledTexts
from hafs_evaluate.hierarchy.logistic import standardised
from hafs_evaluate.hierarchy.probes import (
    FULL_GRID,
    GRID,
    principal_components,
    rankings,
    sparse_scores,
    tree_data,
)
from hafs_jax.base.errors import UserError

LEAVES = ("a/x", "a/y", "b/z", "b/w", "")
RANDOM = np.random.default_rng(0)


def labelled(texts_a_leaf=30, texts_a_group=3, leaves=LEAVES):
    items = [
        LabelledText(f"{leaf} {n}", leaf, f"{leaf} {n // texts_a_group}")
        for leaf in leaves
        for n in range(texts_a_leaf)
    ]
    return LabelledTexts("planted", tuple(items))


DATA = tree_data(labelled(), 5, 0)
N = len(DATA.paths)


def planted(noise=0.3):
    """Latent 3 says a, 5 says a/x, 7 is the parent b without its child w."""
    values = np.abs(RANDOM.normal(size=(N, 11))) * noise
    values[:, 3] += DATA.nodes["a"]
    values[:, 5] += DATA.nodes["a/x"]
    values[:, 7] += DATA.nodes["b/z"]
    return values.astype(np.float32)


def test_nodes_contrasts_and_parents():
    assert list(DATA.nodes) == ["a", "b", "a/x", "a/y", "b/w", "b/z"]
    assert DATA.nodes["a"].sum() == 60
    assert DATA.children("b") == ["b/w", "b/z"]
    kinds = {(contrast.node, contrast.kind): contrast for contrast in DATA.contrasts}
    assert len(kinds) == 2 + 4 * 2
    assert kinds["a/x", "siblings"].is_in_N.sum() == 60
    assert kinds["a/x", "rest"].is_in_N.sum() == N
    only = tree_data(labelled(leaves=("p/q", "r")), 5, 0)
    assert {(contrast.node, contrast.kind) for contrast in only.contrasts} == {
        ("p", "rest"),
        ("p/q", "rest"),
        ("r", "rest"),
    }


def test_folds_keep_documents_whole_and_leaves_in_their_shares():
    groups = [item.group for item in labelled().items]
    for part_N, parts in ((DATA.fold_N, 5), (DATA.half_N, 2)):
        assert set(part_N) == set(range(parts))
        for group in set(groups):
            assert len({part for part, own in zip(part_N, groups, strict=True) if own == group}) == 1
        for leaf in LEAVES:
            counts = np.bincount(part_N[[path == leaf for path in DATA.paths]], minlength=parts)
            assert counts.max() - counts.min() <= 3


def test_a_leaf_of_one_document_is_an_error():
    items = [LabelledText(f"{leaf} {n}", leaf, leaf) for leaf in ("a", "b") for n in range(30)]
    with pytest.raises(UserError, match="leaf 'a': expected texts of at least 5 documents, found 1"):
        tree_data(LabelledTexts("planted", tuple(items)), 5, 0)


def test_planted_latents_are_found_and_one_silent_on_a_child_costs_the_parent():
    scores = sparse_scores(planted(), DATA, (1, 2))
    assert scores["a", "rest"]["top_1"].balanced_accuracy.mean() > 0.9
    assert scores["a/x", "siblings"]["top_1"].auroc.mean() > 0.9
    assert scores["b", "rest"]["top_1"].balanced_accuracy.mean() < 0.85  # silent on b/w, half of b
    assert set(scores["b", "rest"]) == {"top_1", "top_2"}
    assert sparse_scores(RANDOM.normal(size=(N, 30)), DATA, (1,))["a", "rest"]["top_1"].auroc.mean() < 0.65


def test_rankings_are_the_formula():
    values, is_train_N = planted(), DATA.fold_N != 0
    (found,) = rankings(values, [DATA.contrasts[0]], is_train_N, 11)
    a, own = DATA.nodes["a"][is_train_N], values[is_train_N]
    by_hand = np.abs(own[a].mean(0) - own[~a].mean(0)) / own.std(0)
    assert found.tolist() == np.argsort(-by_hand).tolist()
    assert found[0] == 3


def test_nothing_of_the_test_fold_reaches_ranking_or_probe():
    values = RANDOM.normal(size=(N, 40)).astype(np.float32)
    held = DATA.fold_N == 2
    changed = values.copy()
    changed[held, 17] = 50.0 * DATA.nodes["a"][held]  # perfect, on the held-out texts alone
    contrast = DATA.contrasts[:1]
    assert (rankings(changed, contrast, ~held, 5) == rankings(values, contrast, ~held, 5)).all()
    before, after = (
        sparse_scores(each, DATA, (1,), contrasts=contrast)["a", "rest"]["top_1"] for each in (values, changed)
    )
    if 17 not in rankings(values, contrast, ~held, 1):
        assert after.balanced_accuracy[2] == before.balanced_accuracy[2]
    train = np.arange(10) < 6
    column = RANDOM.normal(size=(10, 1))
    moved = np.where(train[:, None], column, column + 100)
    np.testing.assert_array_equal(standardised(column, train)[train], standardised(moved, train)[train])
    acts = RANDOM.normal(size=(10, 3))
    moved = np.where(train[:, None], acts, acts * 50)
    np.testing.assert_allclose(
        principal_components(acts, 2, train)[train], principal_components(moved, 2, train)[train], atol=1e-9
    )


def test_principal_components_are_the_largest_of_the_training_texts():
    acts = RANDOM.normal(size=(50, 4)) * [0.1, 5, 1, 0.2]
    found = principal_components(acts, 2, np.ones(50, bool))
    assert abs(np.corrcoef(found[:, 0], acts[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(found[:, 1], acts[:, 2])[0, 1]) > 0.9


# --- the stage


def test_the_values_of_c_ascend_so_that_the_first_of_equals_is_the_most_regularised():
    assert list(GRID) == sorted(GRID)
    assert list(FULL_GRID) == sorted(FULL_GRID)
