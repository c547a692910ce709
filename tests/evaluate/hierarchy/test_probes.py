"""Hierarchical probing: contrasts, folds, the solver against scikit-learn, leaks, the stage and its cache."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from hafs_evaluate.hierarchy import probes as hierarchy
from hafs_evaluate.hierarchy.label_trees import Labelled, LabelledTexts
from hafs_evaluate.hierarchy.logistic import auroc, balanced_accuracy, balanced_weights, fit_logistic, standardised
from hafs_evaluate.hierarchy.probes import (
    macro,
    mean_over_trees,
    principal_components,
    rankings,
    sparse_scores,
    tree_data,
)
from hafs_evaluate.hierarchy.text_activations import fill
from hafs_jax.base.errors import UserError
from tests.support.workspaces import CONFIG, D, run

LEAVES = ("a/x", "a/y", "b/z", "b/w", "")
RANDOM = np.random.default_rng(0)
SKIP = ("splice", "probing", "latents")


def labelled(texts_a_leaf=30, texts_a_group=3, leaves=LEAVES):
    items = [
        Labelled(f"{leaf} {n}", leaf, f"{leaf} {n // texts_a_group}") for leaf in leaves for n in range(texts_a_leaf)
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
    items = [Labelled(f"{leaf} {n}", leaf, leaf) for leaf in ("a", "b") for n in range(30)]
    with pytest.raises(UserError, match="leaf 'a': expected texts of at least 5 documents, found 1"):
        tree_data(LabelledTexts("planted", tuple(items)), 5, 0)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("C", [0.001, 1.0])
def test_the_solver_is_scikit_learns_balanced_logistic_regression(k, C):
    inputs = RANDOM.normal(size=(120, k))
    is_positive = inputs[:, 0] + RANDOM.normal(size=120) > 0.8
    masks = np.array([np.ones(120, bool), np.arange(120) >= 40])
    weights = np.stack([balanced_weights(is_positive, mask) for mask in masks])
    found = fit_logistic(inputs, is_positive, weights, np.array([C, C]))
    for mask, own in zip(masks, found, strict=True):
        probe = LogisticRegression(C=C, class_weight="balanced", tol=1e-10, max_iter=1000)
        probe.fit(inputs[mask], is_positive[mask])
        np.testing.assert_allclose(own, [*probe.coef_[0], *probe.intercept_], atol=1e-4)


def test_the_solver_stays_finite_where_a_column_separates():
    is_positive = np.arange(60) < 20
    found = fit_logistic(is_positive[:, None] * 9.0, is_positive, np.ones((1, 60)), np.array([1e6]))
    assert np.isfinite(found).all()
    assert balanced_accuracy(is_positive * 9.0 * found[0, 0] + found[0, 1], is_positive) == 1


def test_figures_equal_scikit_learns():
    scores, is_positive = RANDOM.integers(-3, 4, 50).astype(float), RANDOM.random(50) < 0.3
    assert balanced_accuracy(scores, is_positive) == pytest.approx(balanced_accuracy_score(is_positive, scores > 0))
    assert auroc(scores, is_positive) == pytest.approx(roc_auc_score(is_positive, scores))
    assert np.isnan(auroc(scores, np.ones(50, bool)))


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


def test_macro_averages_nodes_and_trees():
    def scores(value):
        return {"top_1": {"balanced_accuracy": value, "auroc": value}}

    def node(level, parent, rest, siblings=None, hole=None):
        contrasts = {"rest": scores(rest), "siblings": siblings and scores(siblings)}
        return {"level": level, "parent": parent, "contrasts": contrasts, "hole": hole, "absorption": None}

    found = macro({"a": node(1, None, 0.9, hole=0.2), "b": node(1, None, 0.7), "a/x": node(2, "a", 0.6, 0.5)})
    assert found["level_1"]["top_1"]["balanced_accuracy"] == pytest.approx(0.8)
    assert found["parents_top_1"] == pytest.approx(0.9)
    assert (found["hole"], found["absorption_full"]) == (0.2, None)
    assert found["siblings_2"]["top_1"]["auroc"] == 0.5
    both = mean_over_trees([found, {"hole": 0.4, "level_1": scores(0.6)}])
    assert both["hole"] == pytest.approx(0.3)
    assert both["level_1"]["top_1"]["auroc"] == pytest.approx(0.7)


# --- the stage


def read(workspace, name):
    return json.loads((workspace.eval / name / "hierarchy.json").read_text())


def test_the_stage_writes_the_schema_and_is_not_done_twice(workspace, monkeypatch):
    run(workspace, skip=SKIP)
    found, llm = read(workspace, "baseline-s0"), read(workspace, "llm")
    assert found["run"] == "baseline-s0" and len(found["sae_sha256"]) == 64
    tree = found["trees"]["words"]
    assert (tree["texts"], tree["levels"], tree["dropped"]) == (80, 2, {})
    assert list(tree["nodes"]) == ["dry", "wet", "dry/iron", "dry/salt", "wet/river", "wet/sea"]
    child, parent = tree["nodes"]["wet/sea"], tree["nodes"]["wet"]
    assert (child["level"], child["parent"], child["label"], child["texts"]) == (2, "wet", "sea", 20)
    names = [f"top_{k}" for k in CONFIG.hierarchy_ks]
    assert list(child["contrasts"]["rest"]) == list(child["contrasts"]["siblings"]) == names
    keys = {"balanced_accuracy", "balanced_accuracy_se", "auroc", "auroc_se"}
    assert set(child["contrasts"]["rest"]["top_1"]) == keys
    assert parent["contrasts"]["siblings"] is None and child["absorption"] is None and child["hole"] is None
    assert set(parent["absorption"]) == {"fraction", "full", "mains", "dead_fraction", "texts"}
    assert isinstance(parent["hole"], float)
    assert set(found["macro"]) == set(tree["macro"])
    full = llm["trees"]["words"]["nodes"]["wet"]["contrasts"]["rest"]
    assert set(full) == {"full", *names, *(name.replace("top", "pca") for name in names)}
    assert full["full"]["balanced_accuracy"] > 0.9  # the words themselves say it

    before = {path: path.stat().st_mtime_ns for path in workspace.eval.rglob("hierarchy*")}
    monkeypatch.setattr("hafs_evaluate.hierarchy.tree_results.HierarchyStage.sae", None)
    run(workspace, skip=SKIP)
    assert {path: path.stat().st_mtime_ns for path in workspace.eval.rglob("hierarchy*")} == before


def test_a_changed_tree_is_measured_again_with_the_old_activations(workspace, tmp_path, monkeypatch):
    run(workspace, skip=SKIP, names=["strict-s0"])
    path = tmp_path / "trees" / "words.json"
    path.write_text(path.read_text().replace("wet", "wet").replace("{", '{"seed": 3, ', 1))
    monkeypatch.setattr("hafs_evaluate.hierarchy.text_activations._compute", None)  # nothing is left to compute
    written = (workspace.eval / "strict-s0" / "hierarchy.json").stat().st_mtime_ns
    run(workspace, skip=SKIP, names=["strict-s0"])
    assert (workspace.eval / "strict-s0" / "hierarchy.json").stat().st_mtime_ns != written


def test_an_interrupted_pass_goes_on_and_means_are_of_the_kept_tokens(workspace, model_folder, monkeypatch):
    from tests.support.torch_saes import tiny_model

    monkeypatch.setattr("hafs_evaluate.hierarchy.text_activations.PART_TEXTS", 3)
    model, manifest, root = tiny_model(model_folder), workspace.train.manifest, workspace.cache / "labelled"
    texts = [f"the cell of glass {'and iron ' * n}{n}" for n in range(8)]
    calls = []

    class Failing:
        tokenize = staticmethod(model.tokenize)

        def activations(self, tokens_BL, hook_point):
            calls.append(len(tokens_BL))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return model.activations(tokens_BL, hook_point)

    with pytest.raises(KeyboardInterrupt):
        fill(texts, manifest, root, Failing, max_tokens=16)
    assert sum(calls[:2]) == 6
    calls.append(0)  # past the failure
    acts = fill(texts, manifest, root, Failing, max_tokens=16)
    assert sum(calls[4:]) == 2  # only the last part
    assert fill(texts, manifest, root, lambda: pytest.fail("all is there"), max_tokens=16).where == acts.where
    pooled = acts.pooled(texts)
    limit = manifest.norm_filter.max_norm or np.inf
    for text, mean in zip(texts, pooled, strict=True):
        (ids,) = model.tokenize([text])
        tokens = torch.tensor([[model.bos_token_id, *ids[:15]]])
        rows = model.activations(tokens, manifest.hook_point)[0, 1:].numpy()
        rows = rows[np.linalg.norm(rows, axis=1) <= limit]
        np.testing.assert_allclose(mean, rows.mean(0), atol=1e-4)
    doubling = SimpleNamespace(W_dec=torch.eye(2 * D, D), device="cpu", dtype=torch.float32)
    doubling.encode = lambda acts_BD: acts_BD.repeat(1, 2)
    doubled = acts.pooled(texts, doubling)
    np.testing.assert_allclose(doubled, np.tile(pooled, 2), rtol=1e-6)


def test_a_tree_with_nothing_left_is_skipped_and_said(workspace, tmp_path, caplog):
    import hashlib

    caplog.set_level("INFO", "hafs_evaluate")
    texts = [json.loads(line)["text"] for line in (tmp_path / "trees" / "words.jsonl").read_text().splitlines()]
    lines = [json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()}) for text in texts[:75]]
    (workspace.train.folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        UserError, match="no label tree has two leaves outside the training documents; --skip hierarchy"
    ):
        run(workspace, skip=SKIP)
    assert "tree words: skipped, under two leaves are left" in caplog.text
    assert tuple(sorted(hierarchy.GRID)) == hierarchy.GRID  # so that the first of equals is the most regularised
