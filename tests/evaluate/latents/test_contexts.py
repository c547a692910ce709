"""The tokens around rows and a latent's activations on them, against the whole store encoded at once."""

import numpy as np
import pytest

from hafs_evaluate.core import encode
from hafs_evaluate.core.fired import FiredRows
from hafs_evaluate.latents.contexts import read_contexts
from hafs_evaluate.latents.firing import scan
from tests.support.shuffled_store import LENGTH, D, F, everything, shuffled_store
from tests.support.torch_saes import random_sae


@pytest.fixture
def store(tmp_path):
    return shuffled_store(tmp_path / "store")


@pytest.fixture
def sae():
    return random_sae(D, F, "jumprelu", seed=3)


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "topk"])
def test_contexts_encode_only_the_rows_that_they_show(store, monkeypatch, architecture):
    sae = random_sae(D, F, architecture, seed=3)
    encoded, original = [], sae.process_sae_in
    monkeypatch.setattr(sae, "process_sae_in", lambda acts: (encoded.append(len(acts)), original(acts))[1])
    contexts = read_contexts(sae, store, np.array([2]), np.array([[0]]), 1, 1)
    assert 1 <= sum(encoded) <= len(contexts[0][0].values) == 3


def test_max_rows_caps_the_scan_and_not_the_contexts(store, sae):
    values_NF, rows = everything(store, sae)
    found = scan(FiredRows(sae, store, 43), examples=2)  # into the second shard
    assert found.rows == 43
    np.testing.assert_allclose(found.density_F, (values_NF[:43] > 0).mean(0))
    chosen = np.flatnonzero(found.density_F > 0)
    contexts = read_contexts(sae, store, chosen, found.top_rows_FN[chosen], 6, 6)
    past = {(int(row["context"]), int(row["position"])): n for n, row in enumerate(rows) if n >= 43}
    checked = 0
    for latent, some in zip(chosen, contexts, strict=True):
        for context in some:
            for position in range(1, LENGTH):
                number = past.get((context.context, position))
                if number is not None and values_NF[number, latent] > 0:
                    assert context.values[position] == pytest.approx(values_NF[number, latent], rel=1e-5)
                    checked += 1
    assert checked > 5


@pytest.mark.parametrize(("before", "after"), [(6, 6), (2, 1), (0, 0)])
@pytest.mark.parametrize("batch_rows", [3, 1000])
def test_contexts_hold_the_latents_value_on_every_token(store, sae, monkeypatch, before, after, batch_rows):
    values_NF, rows = everything(store, sae)
    at = {(int(row["context"]), int(row["position"])): number for number, row in enumerate(rows)}
    found = scan(FiredRows(sae, store, 10**9), examples=3)
    monkeypatch.setattr(encode, "BATCH_FLOATS", batch_rows * (D + 2 * F))
    chosen = np.array([10, 2, 7])
    contexts = read_contexts(sae, store, chosen, found.top_rows_FN[chosen], before, after)
    absent = 0
    for latent, some, numbers in zip(chosen, contexts, found.top_rows_FN[chosen], strict=True):
        assert len(some) == (numbers >= 0).sum()
        for context, number in zip(some, numbers, strict=False):
            index, position = int(rows["context"][number]), int(rows["position"][number])
            places = range(max(0, position - before), min(LENGTH, position + after + 1))
            assert (context.context, context.document) == (index, rows["document"][number])
            assert context.token_ids.tolist() == store.contexts()[index][places.start : places.stop].tolist()
            assert places[context.peak] == position
            for place, value in zip(places, context.values, strict=True):
                row = at.get((index, place))
                absent += row is None
                assert value == pytest.approx(0 if row is None else values_NF[row, latent], rel=1e-5, abs=1e-7)
    assert absent > 0 or before == after == 0  # BOS and dropped rows were among them


def test_two_latents_share_a_context_without_mixing(store, sae):
    values_NF, _ = everything(store, sae)
    number = int(np.flatnonzero((values_NF[:, 2] > 0) & (values_NF[:, 7] > 0))[0])
    contexts = read_contexts(sae, store, np.array([2, 7]), np.array([[number], [number]]), 0, 0)
    assert [some[0].values[0] for some in contexts] == pytest.approx(values_NF[number, [2, 7]].tolist(), rel=1e-5)
