"""Latents that tell documents apart, against planted data and scikit-learn."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from hafs_evaluate.latents.selectivity import auroc, document_groups, selectivity


def test_auroc_is_sklearns():
    random = np.random.default_rng(0)
    score = random.integers(0, 4, (5, 40)).astype(np.float32)  # ties
    groups = random.random((3, 40)) < 0.3
    groups[2] = False
    found = auroc(score, groups)
    assert np.isnan(found[:, 2]).all()
    for latent in range(5):
        for group in range(2):
            assert found[latent, group] == pytest.approx(roc_auc_score(groups[group], score[latent]))


def documents(n):
    """Two sources, three topics (one of few documents), a title each; every tenth without a topic."""
    topics = ["Arts", "Physics", "Arts", "Physics"]
    found = []
    for i in range(n):
        labels = {"title": f"T{i}"} | ({} if i % 10 == 9 else {"topic": "Rare" if i < 5 else topics[i % 4]})
        found.append({"source": "ab"[i % 3 == 0], "labels": labels})
    return found


def test_selectivity_finds_the_planted_topic_and_says_its_share():
    n, random = 200, np.random.default_rng(0)
    texts = documents(n)
    keys = [(label, value) for label, value, _, _ in document_groups(texts, np.ones(n, bool))]
    assert keys == [("source", "a"), ("source", "b"), ("topic", "Arts"), ("topic", "Physics")]  # no title, no Rare
    is_physics = np.array([text["labels"].get("topic") == "Physics" for text in texts])
    is_b = np.array([text["source"] == "b" for text in texts])
    maximum = np.stack([is_physics * 3.0, is_b * random.random(n), np.zeros(n), random.random(n)]).astype(np.float32)
    rows = random.integers(1, 5, n)
    found = selectivity(csr_array(maximum), csr_array(maximum * rows), rows, texts)
    assert (found[0]["label"], found[0]["value"], found[0]["auroc"], found[0]["share"]) == ("topic", "Physics", 1, 1)
    has = np.array(["topic" in text["labels"] for text in texts])
    assert found[0]["base"] == pytest.approx(rows[is_physics].sum() / rows[has].sum(), rel=1e-4)
    assert (found[1]["label"], found[1]["value"], found[1]["auroc"]) == ("source", "b", 1)
    assert found[2] is None
    assert found[3]["auroc"] < 0.65
    assert selectivity(csr_array(maximum), csr_array(maximum), rows, [{"source": "a"}] * n) == [None] * 4
