"""What latents fire on: scans and chosen latents against naive computations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hafs_evaluate.core import encode, fired
from hafs_evaluate.core.fired import FiredRows
from hafs_evaluate.latents.firing import BINS, documents_of, observe, scan, spread_rows
from hafs_jax.store.reader import Store
from tests.support.shuffled_store import D, F, everything, shuffled_store
from tests.support.stores import write_store
from tests.support.torch_saes import random_sae


@pytest.fixture
def store(tmp_path):
    return shuffled_store(tmp_path / "store")


@pytest.fixture
def sae():
    return random_sae(D, F, "jumprelu", seed=3)


def naive_top(column: np.ndarray, documents: np.ndarray, n: int) -> list[int]:
    """Row numbers of the n best documents' best rows, one latent at a time and one row at a time."""
    found: list[int] = []
    for row in sorted(range(len(column)), key=lambda row: (-column[row], row)):
        if column[row] > 0 and documents[row] not in documents[found] and len(found) < n:
            found.append(row)
    return found


@pytest.fixture(params=["one block", "many blocks", "encoded twice"], autouse=True)
def blocks(request, monkeypatch):
    """Everything here holds in whatever blocks the rows come, and where they do not fit in memory."""
    if request.param != "one block":
        monkeypatch.setattr(fired, "BLOCK", 40)
    if request.param == "encoded twice":
        monkeypatch.setattr(fired, "KEPT", 60)


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_scan_equals_a_naive_computation(store, sae, monkeypatch, batch_rows):
    monkeypatch.setattr(encode, "BATCH_FLOATS", batch_rows * (D + 2 * F))
    values_NF, rows = everything(store, sae)
    found = scan(FiredRows(sae, store, 10**9), examples=4)
    assert found.rows == len(store)
    np.testing.assert_allclose(found.density_F, (values_NF > 0).mean(0))
    np.testing.assert_allclose(found.max_activation_F, values_NF.max(0), rtol=1e-6)
    for latent in range(F):
        expected = naive_top(values_NF[:, latent], rows["document"], 4)
        assert [row for row in found.top_rows_FN[latent] if row >= 0] == expected


def test_scan_shows_no_silent_row_and_no_document_twice(store, sae):
    values_NF, rows = everything(store, sae)
    found = scan(FiredRows(sae, store, 10**9), examples=20)
    for latent in range(F):
        shown = [row for row in found.top_rows_FN[latent] if row >= 0]
        assert shown == naive_top(values_NF[:, latent], rows["document"], 20)
        assert len(set(rows["document"][shown].tolist())) == len(shown) <= 9


def test_the_sae_is_run_once_where_its_firings_fit_in_memory(store, sae, monkeypatch, request):
    encoded, original = [], sae.encode
    monkeypatch.setattr(sae, "encode", lambda acts: (encoded.append(len(acts)), original(acts))[1])
    rows = FiredRows(sae, store, 70)
    firings = [sum(block.latents.nnz for block in rows) for _ in range(3)]
    assert firings == [firings[0]] * 3
    assert firings[0] > 60
    assert sum(encoded) == 70 * (3 if "encoded twice" in request.node.name else 1)


def test_of_equal_activations_the_earlier_row_wins(store, monkeypatch):
    same = SimpleNamespace(W_dec=torch.eye(F, D), device="cpu", dtype=torch.float32)
    same.encode = lambda acts: (acts[:, :1] > 0).float().expand(-1, F)  # 1 or 0: every active row ties
    monkeypatch.setattr(encode, "BATCH_FLOATS", 7 * (D + 2 * F))
    values_NF, rows = everything(store, same)
    found = scan(FiredRows(same, store, 10**9), examples=3)
    assert found.top_rows_FN[2].tolist() == naive_top(values_NF[:, 2], rows["document"], 3)


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_observe_equals_a_naive_computation(store, monkeypatch, batch_rows):
    monkeypatch.setattr(encode, "BATCH_FLOATS", batch_rows * (D + 2 * F))
    sae = random_sae(D, F, "jumprelu", seed=3)
    values_NF, rows = everything(store, sae)
    values_NF, rows = values_NF[:70], rows[:70]
    chosen = np.array([9, 0, 4])
    found = observe(FiredRows(sae, store, 70), chosen, values_NF[:, chosen].max(0), random_rows=3, seed=0)
    fires_NF = values_NF > 0
    assert found.rows == 70
    np.testing.assert_array_equal(found.count_F, fires_NF.sum(0))
    np.testing.assert_array_equal(found.together_CF, fires_NF[:, chosen].T.astype(int) @ fires_NF.astype(int))
    np.testing.assert_array_equal(found.documents_N, np.unique(rows["document"]))
    maximum_CN, mass_CN = found.maximum_CN.toarray(), found.mass_CN.toarray()
    for place, document in enumerate(found.documents_N):
        of_document = values_NF[rows["document"] == document][:, chosen]
        assert found.rows_N[place] == len(of_document)
        np.testing.assert_allclose(maximum_CN[:, place], of_document.max(0).clip(0), rtol=1e-6)
        np.testing.assert_allclose(mass_CN[:, place], of_document.clip(0).sum(0), rtol=1e-5)
    for slot, latent in enumerate(chosen):
        drawn = [row for row in found.random_rows_CR[slot] if row >= 0]
        assert len(drawn) == min(3, len(set(rows["document"][fires_NF[:, latent]].tolist())))
        assert fires_NF[drawn, latent].all()
        assert len(set(rows["document"][drawn].tolist())) == len(drawn)
        assert (np.diff(values_NF[drawn, latent]) <= 0).all()
        own = values_NF[fires_NF[:, latent], latent]
        expected = np.histogram(own, BINS, (0, own.max()))[0]
        np.testing.assert_array_equal(found.histogram_CH[slot], expected)


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
    rows = FiredRows(copy, Store(tmp_path / "many"), 600)
    drawn, mean = set(), np.zeros(4)
    for seed in range(20):
        shown = acts[observe(rows, np.array([1]), np.array([600.0]), 4, seed).random_rows_CR[0]]
        drawn |= set(shown.tolist())
        mean += shown / 20
    assert len(drawn) > 60  # other seeds draw others
    np.testing.assert_allclose(mean / 600, [7 / 8, 5 / 8, 3 / 8, 1 / 8], atol=0.06)
