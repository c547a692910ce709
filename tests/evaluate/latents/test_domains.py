"""Latents as detectors of a text source: planted detectors, and every figure against a plain computation."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from hafs_evaluate.core import encode
from hafs_evaluate.latents.domains import (
    Detections,
    DomainsConfig,
    best_threshold,
    detections,
    domain_metrics,
    grow_union,
)
from hafs_jax.base.errors import UserError
from tests.support.shuffled_store import D, F, everything, shuffled_store
from tests.support.torch_saes import random_sae

N = 200


def planted() -> Detections:
    """Source 1 is a quarter of the documents. Latent 0 fires on all of it and on nothing else, 1 to 3 on a third of it
    each, 4 everywhere but stronger on it, 5 on the other source, 6 nowhere."""
    random = np.random.default_rng(0)
    source = (np.arange(N) % 4 == 0).astype(np.int64)
    of = source == 1
    maximum = np.zeros((7, N), np.float32)
    maximum[0] = of * random.uniform(1, 2, N)
    for third in range(3):
        maximum[1 + third] = of * (np.arange(N) // 4 % 3 == third)
    maximum[4] = np.where(of, 5, 1) + random.uniform(0, 1, N)
    maximum[5] = ~of
    fired = np.array([[0, 90], [0, 30], [0, 30], [0, 30], [600, 100], [200, 0], [0, 0]])
    return Detections(np.array([600, 200]), fired, maximum, source)


def test_planted_detectors_are_found():
    of = planted().source_N == 1
    found = domain_metrics(planted(), ["text", "bio"], DomainsConfig())["bio"]
    assert (found["documents"], found["documents_outside"], found["rows"], found["rows_outside"]) == (50, 150, 200, 600)
    assert found["prevalence"] == 0.25
    assert found["always_f1"] == pytest.approx(f1_score(of, np.ones(N)))
    assert found["detectors"] == 4
    assert found["best_auroc"] == {"latent": 0, "auroc": 1.0}
    assert found["best_1"] == {"f1": 1.0, "by_half": [1.0, 1.0], "latents": [[0], [0]]}
    best = found["latents"][0]
    assert (best["index"], best["precision"], best["recall"], best["auroc"]) == (0, 1, 1, 1)
    assert (best["row_precision"], best["row_recall"]) == (1, 0.45)
    by_index = {entry["index"]: entry for entry in found["latents"]}
    assert by_index[4]["precision"] == 0.25
    assert by_index[4]["row_precision"] == pytest.approx(100 / 700, rel=1e-4)
    assert by_index[6]["precision"] == by_index[6]["f1"] == by_index[6]["row_f1"] == 0
    assert "latents" in domain_metrics(planted(), ["text", "bio"], DomainsConfig())["text"]


def test_a_union_covers_what_no_latent_covers_alone():
    whole = planted()
    thirds = dataclasses.replace(whole, maximum_FN=whole.maximum_FN[1:4], fired_FS=whole.fired_FS[1:4])
    found = domain_metrics(thirds, ["text", "bio"], DomainsConfig())["bio"]
    assert found["best_5"]["f1"] == 1
    assert all(sorted(latents) == [0, 1, 2] for latents in found["best_5"]["latents"])  # and stops at three
    assert found["best_1"]["f1"] < 0.6


def test_a_latent_that_fires_everywhere_is_a_detector_over_a_threshold():
    whole = planted()
    dense = dataclasses.replace(whole, maximum_FN=whole.maximum_FN[4:5], fired_FS=whole.fired_FS[4:5])
    found = domain_metrics(dense, ["text", "bio"], DomainsConfig())["bio"]
    assert found["best_1_threshold"]["f1"] == 1
    assert all(2 < threshold <= 6 for threshold in found["best_1_threshold"]["thresholds"])
    assert found["best_1"]["f1"] == pytest.approx(0.4)


def test_figures_equal_sklearns_on_noise_and_choice_does_not_leak():
    random = np.random.default_rng(1)
    of = random.random(N) < 0.3
    maximum = (random.random((400, N)) * (random.random((400, N)) < 0.3)).astype(np.float32)
    noise = Detections(np.array([1, 1]), np.ones((400, 2), int), maximum, of.astype(np.int64))
    found = domain_metrics(noise, ["text", "bio"], DomainsConfig(shown=400))["bio"]
    for entry in found["latents"]:
        fires, row = maximum[entry["index"]] > 0, maximum[entry["index"]]
        assert entry["precision"] == pytest.approx(precision_score(of, fires), rel=1e-4)
        assert entry["recall"] == pytest.approx(recall_score(of, fires), rel=1e-4)
        assert entry["f1"] == pytest.approx(f1_score(of, fires), rel=1e-4)
        assert entry["auroc"] == pytest.approx(roc_auc_score(of, row), rel=1e-4)
    assert found["latents"][0]["f1"] > 0.42  # the best of 400 on all documents
    assert found["best_1"]["f1"] < 0.4  # measured where it was not chosen


def test_greedy_union_and_threshold_equal_a_plain_search():
    random = np.random.default_rng(2)
    of, maximum = random.random(60) < 0.4, random.integers(0, 4, (12, 60)).astype(np.float32)
    fired = maximum > 1
    chosen: list[int] = []
    for _ in range(3):
        scored = [f1_score(of, fired[[*chosen, latent]].any(0)) for latent in range(12)]
        if chosen and max(scored) <= f1_score(of, fired[chosen].any(0)):
            break
        chosen.append(int(np.argmax(scored)))
    assert grow_union(fired, of, 3) == chosen
    latent, threshold, f1 = best_threshold(maximum, of)
    every = {(n, t): f1_score(of, maximum[n] >= t) for n in range(12) for t in (0.5, 1.5, 2.5)}
    assert f1 == pytest.approx(max(every.values()))
    assert every[latent, threshold] == pytest.approx(f1)


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_detections_equal_a_naive_computation(tmp_path, monkeypatch, batch_rows):
    store, sae = shuffled_store(tmp_path / "store"), random_sae(D, F, "jumprelu", seed=3)
    values, rows = everything(store, sae)
    monkeypatch.setattr(encode, "BATCH_FLOATS", batch_rows * (D + 2 * F))
    found = detections(sae, store, DomainsConfig())
    for document in range(9):
        np.testing.assert_allclose(found.maximum_FN[:, document], values[rows["document"] == document].max(0).clip(0))
    assert found.source_N.tolist() == [n % 2 for n in range(9)]
    for source in (0, 1):
        assert found.rows_S[source] == (rows["source"] == source).sum()
        np.testing.assert_array_equal(found.fired_FS[:, source], (values[rows["source"] == source] > 0).sum(0))


def test_only_the_drawn_documents_are_looked_at(tmp_path):
    store, sae = shuffled_store(tmp_path / "store"), random_sae(D, F, "jumprelu", seed=3)
    found = detections(sae, store, DomainsConfig(documents=4))
    assert found.maximum_FN.shape == (F, 4)
    assert found.rows_S.sum() < len(store)
    drawn = [detections(sae, store, DomainsConfig(documents=4, seed=seed)).rows_S.tolist() for seed in range(6)]
    assert len({tuple(rows) for rows in drawn}) > 1


def test_a_source_of_few_documents_is_left_out_and_bad_options_are_refused():
    few = planted()
    few.source_N[:] = 0
    few.source_N[:3] = 1
    assert domain_metrics(few, ["text", "bio"], DomainsConfig()) == {}
    with pytest.raises(UserError, match="union=0: expected at least 1"):
        DomainsConfig(union=0)
    with pytest.raises(UserError, match=r"precision=1.5: expected 0 to 1"):
        DomainsConfig(precision=1.5)


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"precision": 0.2}, lambda found: found["detectors"]),
        ({"recall": 0.5}, lambda found: found["detectors"]),
        ({"union": 2}, lambda found: sorted(found)),
        ({"shown": 1}, lambda found: len(found["latents"])),
    ],
)
def test_every_option_changes_the_result(change, measure):
    first = domain_metrics(planted(), ["text", "bio"], DomainsConfig())["bio"]
    assert measure(domain_metrics(planted(), ["text", "bio"], DomainsConfig(**change))["bio"]) != measure(first)


def test_detections_keep_an_sae_on_its_device_and_dtype(tmp_path):
    store = shuffled_store(tmp_path / "store")
    seen = []
    half = SimpleNamespace(W_dec=torch.eye(D), device="cpu", dtype=torch.float64)
    half.encode = lambda acts: (seen.append(acts.dtype), acts)[1]
    detections(half, store, DomainsConfig())
    assert set(seen) == {torch.float64}
