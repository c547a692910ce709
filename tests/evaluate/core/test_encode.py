"""Every way to encode gives what the SAE itself gives, whatever the batches, the dtype and the rows asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hafs_evaluate.core import encode
from hafs_evaluate.core.encode import PairEncoder, batch_rows, encode_rows, encode_store
from hafs_jax.base.errors import UserError
from hafs_jax.store.reader import Store
from tests.support.stores import write_store
from tests.support.torch_saes import random_sae

N, D, F = 90, 6, 11


@pytest.fixture(params=["float32", "bfloat16"])
def store(tmp_path, request):
    acts = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    return Store(write_store(tmp_path / "store", acts, dtype=request.param, shard_rows=40))


@pytest.fixture
def sae():
    return random_sae(D, F, "jumprelu")


def whole(store):
    """(activations, rows) of the whole store."""
    shards = range(len(store.shard_sizes))
    return tuple(np.concatenate([read(shard) for shard in shards]) for read in (store.read, store.rows))


@pytest.mark.parametrize("max_rows", [None, 55])
@pytest.mark.parametrize("rows", [7, 1000])
def test_a_store_is_encoded_in_order_and_every_row_once(store, sae, monkeypatch, rows, max_rows):
    monkeypatch.setattr(encode, "BATCH_FLOATS", rows * (D + 2 * F))
    acts_ND, rows_N = whole(store)
    batches = list(encode_store(sae, store, max_rows))
    assert max(len(batch.acts_BD) for batch in batches) == min(rows, 40)
    numbers, acts, table, latents = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    n = max_rows or N
    assert numbers.tolist() == list(range(n))
    np.testing.assert_array_equal(acts, acts_ND[:n])
    np.testing.assert_array_equal(table, rows_N[:n])
    np.testing.assert_allclose(latents, sae.encode(torch.from_numpy(acts_ND[:n])), rtol=1e-5, atol=1e-6)


def test_only_the_rows_to_keep_are_encoded(store, sae, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_FLOATS", 3 * (D + 2 * F))
    encoded, original = [], sae.encode
    monkeypatch.setattr(sae, "encode", lambda acts: (encoded.append(len(acts)), original(acts))[1])
    acts_ND, rows_N = whole(store)
    batches = list(encode_store(sae, store, keep=lambda rows: np.flatnonzero(rows["document"] % 3 == 1)))
    wanted = np.flatnonzero(rows_N["document"] % 3 == 1)
    assert np.concatenate([batch.numbers_B for batch in batches]).tolist() == wanted.tolist()
    np.testing.assert_array_equal(np.concatenate([batch.acts_BD for batch in batches]), acts_ND[wanted])
    assert (sum(encoded), max(encoded)) == (len(wanted), 3)


def test_rows_of_an_array_are_encoded_batch_by_batch(sae, monkeypatch):
    acts_ND = np.random.default_rng(1).normal(size=(20, D)).astype(np.float32)
    expected = sae.encode(torch.from_numpy(acts_ND)).numpy()
    monkeypatch.setattr(encode, "BATCH_FLOATS", 7 * (D + 2 * F))
    np.testing.assert_allclose(encode_rows(sae, acts_ND), expected, rtol=1e-5, atol=1e-6)
    assert encode_rows(sae, acts_ND[:0]).shape == (0, F)
    assert encode_rows(sae, acts_ND).dtype == np.float32


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "topk"])
def test_pairs_have_the_activations_that_the_whole_rows_give(monkeypatch, architecture):
    sae, random = random_sae(D, F, architecture), np.random.default_rng(1)
    acts_ND = random.normal(size=(20, D)).astype(np.float32)
    expected = sae.encode(torch.from_numpy(acts_ND)).numpy()
    monkeypatch.setattr(encode, "PAIRS", 7)
    row, latent = np.divmod(random.permutation(20 * F), F)
    found = PairEncoder(sae)(acts_ND, row, latent)
    assert 20 < (found > 0).sum() < 20 * F
    np.testing.assert_allclose(found, expected[row, latent], rtol=1e-5, atol=1e-6)
    assert PairEncoder(sae)(acts_ND, row[:0], latent[:0]).shape == (0,)


def test_an_sae_computes_in_its_own_dtype_and_keeps_no_gradient(store):
    seen = []
    half = SimpleNamespace(W_dec=torch.eye(D, requires_grad=True), device="cpu", dtype=torch.float64)
    half.encode = lambda acts: (seen.append(acts.dtype), acts @ half.W_dec.double())[1]
    assert not any(batch.latents_BF.requires_grad for batch in encode_store(half, store))
    assert encode_rows(half, np.ones((2, D), np.float32)).dtype == np.float32
    assert set(seen) == {torch.float64}


def test_a_batch_has_at_least_one_row_and_the_widths_must_agree(store):
    assert batch_rows(10**9, 10**9) == 1
    assert batch_rows(100, 50) == encode.BATCH_FLOATS // 200
    with pytest.raises(UserError, match=r"store: expected activations of the SAE's width 5, found d_model=6"):
        next(encode_store(random_sae(5, F), store))
