"""How latents fire together, what shares a direction, what tells documents apart: against planted data."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from hafs_evaluate.latents import firing
from hafs_evaluate.latents.dashboards import LatentsConfig, write_latents
from hafs_evaluate.latents.firing import documents_of, observe, spread_rows
from hafs_evaluate.latents.neighbours import partners, sharing
from hafs_evaluate.latents.selectivity import auroc, document_groups, selectivity
from hafs_jax.store.reader import Store
from tests.evaluate.latents.test_dashboards import D, F, everything, make_store, tiny_tokenizer
from tests.support.stores import write_store
from tests.support.torch_saes import random_sae


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_observe_equals_a_naive_computation(store, monkeypatch, batch_rows):
    monkeypatch.setattr(firing, "BATCH_FLOATS", batch_rows * (D + 2 * F))
    sae = random_sae(D, F, "jumprelu", seed=3)
    values_NF, rows = everything(store, sae)
    values_NF, rows = values_NF[:70], rows[:70]
    chosen = np.array([9, 0, 4])
    found = observe(sae, store, chosen, 70, random_rows=3, seed=0)
    fires_NF = values_NF > 0
    assert found.rows == 70
    np.testing.assert_array_equal(found.count_F, fires_NF.sum(0))
    np.testing.assert_array_equal(found.together_CF, fires_NF[:, chosen].T.astype(int) @ fires_NF.astype(int))
    np.testing.assert_array_equal(found.documents_N, np.unique(rows["document"]))
    for place, document in enumerate(found.documents_N):
        of_document = values_NF[rows["document"] == document][:, chosen]
        assert found.rows_N[place] == len(of_document)
        np.testing.assert_allclose(found.maximum_CN[:, place], of_document.max(0).clip(0), rtol=1e-6)
        np.testing.assert_allclose(found.mass_CN[:, place], of_document.clip(0).sum(0), rtol=1e-5)
    for slot, latent in enumerate(chosen):
        drawn = [row for row in found.random_rows_CR[slot] if row >= 0]
        assert len(drawn) == min(3, len(set(rows["document"][fires_NF[:, latent]].tolist())))
        assert fires_NF[drawn, latent].all()
        assert len(set(rows["document"][drawn].tolist())) == len(drawn)
        assert (np.diff(values_NF[drawn, latent]) <= 0).all()


def test_documents_of_the_first_rows_alone(store):
    rows = np.concatenate([store.rows(shard)["document"] for shard in range(len(store.shard_sizes))])
    for n in (3, 45, None):
        np.testing.assert_array_equal(documents_of(store, n), np.unique(rows[:n]))


def test_random_rows_are_spread_over_the_quantiles_and_drawn_from_all_that_fire(tmp_path):
    rows_CS = np.array([[5, 1, 8, 3, 9, 2, -1, -1], [4, -1, -1, -1, -1, -1, -1, -1]])
    values_CS = np.array([[0.1, 0.6, 0.3, 0.5, 0.2, 0.4, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    assert spread_rows(rows_CS, values_CS, 3).tolist() == [[3, 8, 5], [4, -1, -1]]  # ranks 1, 3, 5 of 0..5

    # one row a document, activations 1..600: the 4 shown of 32 drawn lie near the quantiles 7/8, 5/8, 3/8, 1/8
    acts = np.arange(1, 601, dtype=np.float32)[np.random.default_rng(0).permutation(600)]
    write_store(tmp_path / "many", np.stack([acts, acts], 1), length=2)
    copy = SimpleNamespace(W_dec=torch.eye(2), device="cpu", dtype=torch.float32, encode=lambda acts: acts)
    drawn, mean = set(), np.zeros(4)
    for seed in range(20):
        shown = acts[observe(copy, Store(tmp_path / "many"), np.array([1]), 600, 4, seed).random_rows_CR[0]]
        drawn |= set(shown.tolist())
        mean += shown / 20
    assert len(drawn) > 60  # other seeds draw others
    np.testing.assert_allclose(mean / 600, [7 / 8, 5 / 8, 3 / 8, 1 / 8], atol=0.06)


def test_partners_are_ranked_by_phi_which_is_the_correlation_of_firings():
    random = np.random.default_rng(0)
    fires = random.random((500, 4)) < 0.2
    fires[:, 1] = fires[:, 0] & (random.random(500) < 0.9)  # nearly always with 0
    fires[:, 3] = False
    fires[[3, 4], 3] = fires[[3, 4], 0] = True  # with 0 on two rows only: the highest pmi of all
    count = fires.sum(0)
    together = fires.T.astype(int) @ fires.astype(int)
    both = np.corrcoef(fires.T)[0]
    (found,) = partners(np.array([0]), together[:1], count, 500, least=3, most=5)
    assert found[0]["index"] == 1
    assert {entry["index"] for entry in found} <= {1, 2}
    assert found[0]["phi"] == pytest.approx(both[1], rel=1e-4)
    assert found[0]["pmi"] == pytest.approx(np.log2(500 * together[0, 1] / count[0] / count[1]), rel=1e-4)
    assert found[0]["rows"] == together[0, 1]
    (rare,) = partners(np.array([0]), together[:1], count, 500, least=2, most=5)
    assert 3 in {entry["index"] for entry in rare}
    assert partners(np.array([3]), together[3:], count, 500, least=3, most=5) == [[]]
    assert len(partners(np.array([0]), together[:1], count, 500, least=2, most=1)[0]) == 1


def test_sharing_names_parent_child_and_peer_by_coverage():
    parent = torch.tensor([1.0, 0, 0, 0])
    child = torch.tensor([0.8, 0.6, 0, 0])
    peer = torch.tensor([0.7, 0, 0.7, 0])
    other = torch.tensor([0, 0, 0, 1.0])
    W_dec = torch.stack([parent, 2 * child, peer, other])
    count = np.array([100, 20, 50, 40])
    together = np.array([[100, 18, 5, 0], [18, 20, 2, 0], [5, 2, 50, 0], [0, 0, 0, 40]])
    of_parent, of_child, of_other = sharing(W_dec, np.array([0, 1, 3]), together[[0, 1, 3]], count, 0.2, 5)
    assert [(entry["index"], entry["kind"]) for entry in of_parent] == [(1, "child"), (2, "peer")]
    assert [(entry["index"], entry["kind"]) for entry in of_child] == [(0, "parent"), (2, "peer")]
    assert of_parent[0] == {"index": 1, "cosine": 0.8, "covered": 0.18, "covers": 0.9, "kind": "child"}
    assert of_other == []
    assert sharing(W_dec, np.array([0]), together[:1], count, 0.75, 5)[0] == of_parent[:1]
    assert sharing(W_dec, np.array([0]), together[:1], count, 0.2, 1)[0] == of_parent[:1]


def test_auroc_is_sklearns(monkeypatch):
    monkeypatch.setattr("hafs_evaluate.latents.selectivity.CHUNK_FLOATS", 60)
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
    found = selectivity(maximum, maximum * rows, rows, texts)
    assert (found[0]["label"], found[0]["value"], found[0]["auroc"], found[0]["share"]) == ("topic", "Physics", 1, 1)
    has = np.array(["topic" in text["labels"] for text in texts])
    assert found[0]["base"] == pytest.approx(rows[is_physics].sum() / rows[has].sum(), rel=1e-4)
    assert (found[1]["label"], found[1]["value"], found[1]["auroc"]) == ("source", "b", 1)
    assert found[2] is None
    assert found[3]["auroc"] < 0.65
    assert selectivity(maximum, maximum, rows, [{"source": "a"}] * n) == [None] * 4


def test_the_file_has_random_contexts_partners_and_a_name_for_every_latent(store, tmp_path):
    sae, config = random_sae(D, F, "jumprelu", seed=3), LatentsConfig(examples=3, random_examples=2, partner_rows=2)
    values = write_latents(sae, store, tiny_tokenizer(), tmp_path / "a.json", run="r", config=config)
    assert len(values["token"]) == F
    for latent in values["latents"]:
        assert values["token"][latent["index"]] == latent["top_tokens"][0][0]
        assert 1 <= len(latent["random_contexts"]) <= 2
        for context in latent["random_contexts"]:
            assert 0 < context["values"][context["peak"]] <= latent["max_activation"] * 1.01
    assert any(latent["partners"] for latent in values["latents"])
    assert any(latent["shares_with"] for latent in values["latents"])


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"random_examples": 1}, lambda values: [len(latent["random_contexts"]) for latent in values["latents"]]),
        ({"seed": 1}, lambda values: [latent["random_contexts"] for latent in values["latents"]]),
        ({"partners": 1}, lambda values: [len(latent["partners"]) for latent in values["latents"]]),
        ({"partner_rows": 9}, lambda values: [latent["partners"] for latent in values["latents"]]),
        ({"shares": 1}, lambda values: [len(latent["shares_with"]) for latent in values["latents"]]),
        ({"shared_cosine": 0.7}, lambda values: [latent["shares_with"] for latent in values["latents"]]),
    ],
)
def test_every_new_option_changes_the_file(store, tmp_path, change, measure):
    sae, base = random_sae(D, F, "jumprelu", seed=3), {"random_examples": 3, "partner_rows": 2}
    first = write_latents(sae, store, tiny_tokenizer(), tmp_path / "a.json", run="r", config=LatentsConfig(**base))
    other = LatentsConfig(**(base | change))
    assert measure(write_latents(sae, store, tiny_tokenizer(), tmp_path / "b.json", run="r", config=other)) != measure(
        first
    )
