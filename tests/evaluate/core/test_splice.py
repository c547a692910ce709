"""The SAE spliced into a tiny GPT-NeoX, against plain computations from its logits."""

import dataclasses

import numpy as np
import pytest
import torch

from hafs_evaluate.core.splice import ce_score, choose_contexts, kl_score, splice_metrics
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import read_manifest, write_manifest
from hafs_jax.store.reader import Store
from tests.support.stores import resealed, write_store
from tests.support.torch_saes import HOOK, identity_sae, random_sae, tiny_model

D, LENGTH = 20, 9


def make_store(folder, rows=37, **changes):
    acts = np.random.default_rng(0).normal(size=(rows, D)).astype(np.float32)
    write_store(folder, acts, length=LENGTH)
    manifest = read_manifest(folder)
    tokens = np.load(folder / "tokens.npy") * 7
    tokens[np.load(folder / "contexts.npy")["start"]] = 0
    np.save(folder / "tokens.npy", tokens)
    write_manifest(folder, dataclasses.replace(manifest, hook_point=HOOK, **changes))
    return Store(resealed(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "heldout")


def with_max_norm(store, max_norm):
    norms = dataclasses.replace(store.manifest.norm_filter, multiple=3.0, max_norm=max_norm)
    write_manifest(store.folder, dataclasses.replace(store.manifest, norm_filter=norms))
    return Store(store.folder)


def naive(model, store, replace):
    """Mean CE and KL over the positions after BOS, context by context, replacing activations by `replace(acts, x)`."""
    ce, kl = [], []
    contexts = store.contexts()
    for index in range(len(contexts)):
        tokens = torch.tensor(contexts[index][None].astype(np.int64))
        if tokens.shape[1] < 3:
            continue
        clean = model.logits(tokens)[0].double().log_softmax(-1)
        other = model.logits(tokens, replace, HOOK)[0].double().log_softmax(-1)
        for position in range(1, tokens.shape[1]):
            kl.append(float((clean[position].exp() * (clean[position] - other[position])).sum()))
            if position + 1 < tokens.shape[1]:
                ce.append(-float(other[position, tokens[0, position + 1]]))
    return np.mean(ce), np.mean(kl)


def test_an_identity_sae_loses_nothing(model, store):
    found = splice_metrics(model, store, {"same": identity_sae(D, bound=100.0)}, contexts=100)["same"]
    assert found["ce_score"] == pytest.approx(1, abs=1e-4)
    assert found["kl_score"] == pytest.approx(1, abs=1e-4)
    assert found["kl_spliced"] == pytest.approx(0, abs=1e-6)
    assert found["ce_spliced"] == pytest.approx(found["ce_clean"], abs=1e-5)


def test_zero_stands_for_the_ablation(model, store):
    found = splice_metrics(model, store, {"random": random_sae(D, 17)}, contexts=100)["random"]
    ce, kl = naive(model, store, torch.zeros_like)
    assert found["ce_ablated"] == pytest.approx(ce, rel=1e-5)
    assert found["kl_ablated"] == pytest.approx(kl, rel=1e-4)
    assert found["ce_clean"] == pytest.approx(naive(model, store, lambda acts: acts)[0], rel=1e-5)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_losses_equal_a_naive_loop_and_bos_is_left_alone(model, store, architecture):
    sae = random_sae(D, 17, architecture)

    def replace(acts):
        out = sae.decode(sae.encode(acts))
        out[:, 0] = acts[:, 0]
        return out

    found = splice_metrics(model, store, {"random": sae}, contexts=100, batch_contexts=4)["random"]
    ce, kl = naive(model, store, replace)
    assert found["ce_spliced"] == pytest.approx(ce, rel=1e-5)
    assert found["kl_spliced"] == pytest.approx(kl, rel=1e-4)
    assert found["ce_score"] == pytest.approx(ce_score(found["ce_clean"], ce, found["ce_ablated"]), rel=1e-3)
    assert found["kl_score"] == pytest.approx(kl_score(kl, found["kl_ablated"]), rel=1e-3)
    assert found["tokens"] == len(store.contexts().tokens)
    assert found["tokens_bos"] == found["contexts"] == len(store.contexts())
    assert found["tokens_untouched"] == found["tokens_bos"]


def test_rows_over_the_norm_limit_are_left_alone_and_counted(model, store):
    contexts = store.contexts()
    tokens = [torch.tensor(contexts[index][None].astype(np.int64)) for index in range(len(contexts))]
    norms = torch.cat([model.activations(each, HOOK)[0, 1:].norm(dim=-1) for each in tokens])
    middle = norms.sort().values[len(norms) // 2 - 1 :]
    limit = float(middle[0] + middle[1]) / 2  # between two norms: batches of other shapes round otherwise
    store, sae = with_max_norm(store, limit), random_sae(D, 17)

    def replace(acts):
        out = sae.decode(sae.encode(acts))
        is_kept = acts.norm(dim=-1) > limit
        is_kept[:, 0] = True
        return torch.where(is_kept[..., None], acts, out)

    found = splice_metrics(model, store, {"random": sae}, contexts=100, batch_contexts=3)["random"]
    assert found["tokens_over_norm"] == int((norms > limit).sum()) > 0
    assert found["tokens_untouched"] == found["tokens_bos"] + found["tokens_over_norm"]
    assert found["ce_spliced"] == pytest.approx(naive(model, store, replace)[0], rel=1e-5)


def test_several_saes_share_the_clean_pass_and_no_batch_size_matters(model, store, monkeypatch):
    saes = {"a": random_sae(D, 17), "b": random_sae(D, 17, seed=1)}
    together = splice_metrics(model, store, saes, contexts=100, batch_contexts=2)
    alone = splice_metrics(model, store, {"b": saes["b"]}, contexts=100, batch_contexts=5)
    assert together["a"] != together["b"]
    assert together["b"] == pytest.approx(alone["b"], rel=1e-5)
    calls = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda *args: calls.append(args) or logits(*args))
    splice_metrics(model, store, saes, contexts=100, batch_contexts=100)
    assert len(calls) == 4


def test_without_bos_every_position_is_spliced(model, tmp_path):
    tokenizer = dataclasses.replace(make_store(tmp_path / "a").manifest.tokenizer, prepend_bos=False)
    store = make_store(tmp_path / "b", tokenizer=tokenizer)
    found = splice_metrics(model, store, {"random": random_sae(D, 17)}, contexts=100)["random"]
    assert found["tokens_untouched"] == 0


def test_contexts_are_drawn_by_the_seed_and_have_something_to_predict(store, tmp_path):
    some = choose_contexts(store, 3, seed=0)
    assert len(set(some.tolist())) == 3
    assert some.tolist() == choose_contexts(store, 3, seed=0).tolist()
    assert any(some.tolist() != choose_contexts(store, 3, seed=seed).tolist() for seed in range(1, 6))
    short = make_store(tmp_path / "short", rows=33)  # its last context is BOS and one token
    assert len(short.contexts()) == 5
    assert sorted(choose_contexts(short, 100, seed=0).tolist()) == [0, 1, 2, 3]


def test_a_store_of_single_tokens_is_refused(tmp_path):
    write_store(tmp_path / "tiny", np.ones((3, D), np.float32), length=2)
    with pytest.raises(UserError, match="expected contexts of at least 3 tokens, found none"):
        choose_contexts(Store(tmp_path / "tiny"), 4, seed=0)


def test_scores_without_a_scale_are_none():
    assert ce_score(2.0, 2.0, 2.0) is None
    assert kl_score(0.0, 0.0) is None
    assert ce_score(1.0, 2.0, 3.0) == 0.5
    assert kl_score(1.0, 4.0) == 0.75
