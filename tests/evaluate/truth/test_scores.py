"""Scores of an SAE against a synthetic world's truth."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sae_lens import synthetic as sae_lens_synthetic
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data
from scipy.sparse import csr_array

from hafs_evaluate.truth import scores
from hafs_evaluate.truth.ground_truth import Truth, load_truth
from hafs_evaluate.truth.scores import Scorer, score_sae
from hafs_extract.synthetic.samples import HOOK_POINT
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of
from hafs_jax.store.reader import Store
from tests.support.torch_saes import random_sae
from tests.support.worlds import N_FEATURES, D

PARENTS = np.array([-1, -1, 0, 0, 1, 1, 2], np.int32)
LEVELS = np.array([0, 0, 1, 1, 1, 1, 2], np.int32)
ROWS, WIDTH, FEATURES = 600, 11, 7


def hand_made_truth(seed: int = 0) -> Truth:
    """Two trees: 0 with children 2 and 3, 1 with 4 and 5, 2 with 6; orthonormal directions; independent siblings."""
    random = np.random.default_rng(seed)
    directions_ND = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0][:FEATURES].astype(np.float32)
    fires_RN = random.random((ROWS, FEATURES)) < 0.5
    for child in range(2, FEATURES):
        fires_RN[:, child] &= fires_RN[:, PARENTS[child]]
    values_RN = fires_RN * random.uniform(0.5, 2, (ROWS, FEATURES))
    bias_D = random.normal(size=WIDTH).astype(np.float32)
    return Truth(directions_ND, bias_D, PARENTS, LEVELS, csr_array(values_RN.astype(np.float32)))


def dense(truth: Truth) -> np.ndarray:
    return truth.coefficients.toarray()


def score(latents_NF, W_dec_FD, recon_ND, truth: Truth, block: int = ROWS) -> dict:
    """The scores of latents and reconstructions of all of the truth's rows, counted `block` rows at a time."""
    scorer = Scorer(np.asarray(W_dec_FD), truth)
    for start in range(0, truth.rows, block):
        part = slice(start, start + block)
        scorer.add(start, np.asarray(latents_NF)[part], truth.acts(start, start + block), np.asarray(recon_ND)[part])
    return scorer.result()


def test_the_perfect_sae_scores_one():
    truth = hand_made_truth()
    order = np.array([3, 0, 6, 2, 1, 5, 4])
    latents = np.concatenate([dense(truth)[:, order], np.zeros((ROWS, 2))], 1)
    extra = np.linalg.qr(truth.directions_ND.T.astype(np.float64), mode="complete")[0][:, FEATURES:].T[:2]
    W_dec = np.concatenate([-3 * truth.directions_ND[order], extra])
    found = score(latents, W_dec, truth.acts(0, ROWS), truth)
    for name in ("mcc", "parents_recovered", "shrinkage"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert found["absorption"] == 0
    assert found["edges"] == 5
    assert found["fvu"] == pytest.approx(0, abs=1e-12)
    assert found["l0"] == found["true_l0"] == pytest.approx(truth.coefficients.nnz / ROWS)
    assert found["dead_fraction"] == 2 / 9
    assert found["f1"] == found["precision"] == found["recall"] == pytest.approx(7 / 9)  # the two dead ones score 0
    assert [level["f1"] for level in found["by_level"]] == [1, 1, 1]
    assert [level["features"] for level in found["by_level"]] == [2, 4, 1]
    assert [level["absorption"] for level in found["by_level"]] == [0, 0, None]


def absorbing(truth: Truth, parent: int) -> tuple[np.ndarray, np.ndarray]:
    """(latents, W_dec) in which the children of `parent` have its direction too and it is silent when one fires."""
    latents, W_dec = dense(truth), truth.directions_ND.astype(np.float64)
    children = np.flatnonzero(truth.parents_N == parent)
    W_dec[children] += W_dec[parent]
    latents[(latents[:, children] > 0).any(1), parent] = 0
    return latents, W_dec


def test_an_absorbing_sae_is_found_at_its_level_and_edges():
    truth = hand_made_truth()
    found = score(*absorbing(truth, 0), truth.acts(0, ROWS), truth)
    assert [(level["absorption"], level["edges"]) for level in found["by_level"]] == [(0.5, 4), (0, 1), (None, 0)]
    assert found["absorption"] == pytest.approx(2 / 5)
    assert found["parents_recovered"] == pytest.approx(2 / 3)  # feature 2 is a parent, and its latent is askew
    assert found["mcc"] == pytest.approx((5 + 2 * 0.5**0.5) / 7)
    assert found["by_level"][1]["mcc"] == pytest.approx((2 + 2 * 0.5**0.5) / 4)
    found = score(*absorbing(truth, 2), truth.acts(0, ROWS), truth)
    assert [(level["absorption"], level["edges"]) for level in found["by_level"]] == [(0, 4), (1, 1), (None, 0)]


def test_a_silent_parent_is_not_absorbed_where_the_childs_latent_is_silent_too():
    truth = hand_made_truth()
    latents, W_dec = dense(truth), truth.directions_ND
    latents[:, 0] = 0
    latents[: ROWS // 2, 2] = 0  # no longer fires in the first half
    found = score(latents, W_dec, truth.acts(0, ROWS), truth)
    both = (dense(truth)[:, [0, 2]] > 0).all(1)
    expected = both[ROWS // 2 :].sum() / both.sum()
    assert found["by_level"][0]["absorption"] == pytest.approx((expected + 1) / 4)


def test_rare_edges_are_left_out_and_edges_weigh_the_same():
    truth = hand_made_truth()
    values = dense(truth)
    values[np.flatnonzero(values[:, 3])[19:], 3] = 0  # 19 rows are left
    latents = values.copy()
    latents[:, 0] = 0
    found = score(
        latents, truth.directions_ND, truth.acts(0, ROWS), dataclasses.replace(truth, coefficients=csr_array(values))
    )
    assert (found["by_level"][0]["absorption"], found["by_level"][0]["edges"]) == (pytest.approx(1 / 3), 3)
    values = dense(truth)
    values[np.flatnonzero(values[:, 3])[20:], 3] = 0
    latents[:, 3] = values[:, 3]
    found = score(
        latents, truth.directions_ND, truth.acts(0, ROWS), dataclasses.replace(truth, coefficients=csr_array(values))
    )
    assert (found["by_level"][0]["absorption"], found["by_level"][0]["edges"]) == (pytest.approx(2 / 4), 4)


def test_fewer_latents_than_features_leave_features_and_their_edges_without_a_match():
    truth = hand_made_truth()
    kept = [0, 2, 4]
    found = score(dense(truth)[:, kept], truth.directions_ND[kept], truth.acts(0, ROWS), truth)
    assert (found["mcc"], found["f1"], found["edges"]) == (pytest.approx(1), 1, 1)  # only 0 -> 2 has both ends
    assert [level["mcc"] for level in found["by_level"]] == pytest.approx([0.5, 0.5, 0])
    assert [level["f1"] for level in found["by_level"]] == pytest.approx([0.5, 0.5, 0])
    assert found["parents_recovered"] == pytest.approx(2 / 3)


def test_a_random_sae_scores_low():
    truth = hand_made_truth()
    random = np.random.default_rng(1)
    latents = (random.random((ROWS, 9)) < 0.1).astype(np.float32)
    found = score(latents, random.normal(size=(9, WIDTH)), truth.acts(0, ROWS) * 0.5, truth)
    assert found["mcc"] < 0.75
    assert found["f1"] < 0.3
    assert found["parents_recovered"] == 0
    assert found["shrinkage"] == pytest.approx(0.5)
    assert found["fvu"] > 0.2


def test_counts_agree_with_a_plain_loop_whatever_the_blocks():
    truth, random = hand_made_truth(2), np.random.default_rng(3)
    F = 9
    W_dec = np.concatenate([truth.directions_ND, truth.directions_ND[:2]]) + 0.3 * random.normal(size=(F, WIDTH))
    latents = (dense(truth)[:, [0, 1, 2, 3, 4, 5, 6, 0, 1]] + 0.4) * (random.random((ROWS, F)) < 0.6)
    recon = truth.acts(0, ROWS) + 0.1 * random.normal(size=(ROWS, WIDTH))
    found = score(latents, W_dec, recon, truth)
    blocked = score(latents, W_dec, recon, truth, block=7)
    assert blocked["by_level"] == found["by_level"]
    assert {k: v for k, v in blocked.items() if k != "by_level"} == pytest.approx(
        {k: v for k, v in found.items() if k != "by_level"}
    )

    cosines = np.abs(W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True) @ truth.directions_ND.T)
    best = cosines.argmax(1)
    match, _ = scores.matching(cosines)
    true, fired = dense(truth) > 0, latents != 0
    f1, precision = [], []
    for i in range(F):
        both = (true[:, best[i]] & fired[:, i]).sum()
        f1.append(2 * both / (true[:, best[i]].sum() + fired[:, i].sum()))
        precision.append(both / fired[:, i].sum())
    assert found["f1"] == pytest.approx(np.mean(f1))
    assert found["precision"] == pytest.approx(np.mean(precision))
    shares = []
    for child in range(2, FEATURES):
        parent = PARENTS[child]
        rows = true[:, parent] & true[:, child]
        shares.append((~fired[rows, match[parent]] & fired[rows, match[child]]).mean())
    assert found["absorption"] == pytest.approx(np.mean(shares))
    assert found["by_level"][0]["absorption"] == pytest.approx(np.mean(shares[:4]))
    assert found["by_level"][2]["f1"] == pytest.approx(
        2 * (true[:, 6] & fired[:, match[6]]).sum() / (true[:, 6].sum() + fired[:, match[6]].sum())
    )


def test_the_matching_is_the_best_and_not_the_greedy_one():
    cosines = np.array([[0.9, 0.8], [0.85, 0.1], [0.0, 0.2]])
    latents_N, cosine_N = scores.matching(cosines)
    assert latents_N.tolist() == [1, 0]
    assert scores.mcc(latents_N, cosine_N) == pytest.approx((0.85 + 0.8) / 2)


class Replayed:
    """The truth's coefficients in order, as sae_lens's evaluation draws them."""

    def __init__(self, truth: Truth) -> None:
        self.values, self.start = torch.from_numpy(truth.coefficients.toarray()), 0

    def sample(self, count: int) -> torch.Tensor:
        self.start += count
        return self.values[self.start - count : self.start]


@pytest.mark.parametrize("n_latents", [19, 37])
def test_figures_equal_saelens_own_on_the_same_rows(tiny, n_latents):
    truth = load_truth(tiny)
    sae = random_sae(D, n_latents, "jumprelu", seed=1, hook=HOOK_POINT)
    random = torch.Generator().manual_seed(2)
    mixed = torch.from_numpy(truth.directions_ND)[torch.arange(n_latents) % N_FEATURES]
    mixed = torch.nn.functional.normalize(mixed + 0.15 * torch.randn(mixed.shape, generator=random), dim=1)
    state = {**sae.state_dict(), "W_dec": mixed, "W_enc": mixed.T.clone(), "b_dec": torch.from_numpy(truth.bias_D)}
    state |= {"threshold": torch.full((n_latents,), 0.5), "b_enc": torch.zeros(n_latents)}
    state["b_enc"][3] = -1e3  # a dead one
    sae.load_state_dict(state)
    features = sae_lens_synthetic.FeatureDictionary(N_FEATURES, D, bias=True, initializer=None)
    features.load_state_dict(
        {"feature_vectors": torch.from_numpy(truth.directions_ND), "bias": torch.from_numpy(truth.bias_D)}
    )
    theirs = eval_sae_on_synthetic_data(sae, features, Replayed(truth), num_samples=truth.rows, batch_size=300)
    ours = score_sae(sae, Store(tiny / "store" / "heldout"), truth)
    assert 0 < theirs.sae_l0 < n_latents
    assert theirs.dead_latents >= 1
    assert ours["dead_fraction"] == theirs.dead_latents / n_latents
    assert ours["true_l0"] == pytest.approx(theirs.true_l0)
    assert ours["l0"] == pytest.approx(theirs.sae_l0, abs=2 / truth.rows)  # a pre-activation at the threshold
    assert ours["mcc"] == pytest.approx(theirs.mcc, abs=1e-6)
    assert ours["uniqueness"] == theirs.uniqueness
    assert ours["shrinkage"] == pytest.approx(theirs.shrinkage, rel=1e-5)
    assert ours["fvu"] == pytest.approx(1 - theirs.explained_variance, rel=1e-5)
    for mine, name in (("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")):
        assert ours[mine] == pytest.approx(getattr(theirs.classification, name), abs=1e-4), name
        assert 0.05 < ours[mine] < 0.95


def test_what_does_not_belong_together_is_refused(tiny, tmp_path):
    truth, store = load_truth(tiny), Store(tiny / "store" / "heldout")
    with pytest.raises(UserError, match=r"the SAE has d_in=5, the world d_model=16"):
        score_sae(random_sae(5, 7), store, truth)
    with pytest.raises(UserError, match=r"is not the truth's held-out store: expected 700 rows of .*, found 3000"):
        score_sae(random_sae(D, 7), Store(tiny / "store" / "train"), truth)
    with pytest.raises(UserError, match="is not the truth's held-out store"):
        score_sae(random_sae(D, 7), store, dataclasses.replace(truth, heldout_fingerprint="0"))
    with pytest.raises(UserError, match=r"expected a synthetic world's truth .* at .*truth.json, found no such file"):
        load_truth(tmp_path)
    record = (tiny / "truth.json").read_text()
    (tmp_path / "truth.json").write_text(record)
    with pytest.raises(UserError, match=r"truth.npz: expected sha256 .*, found no file; sample the world again"):
        load_truth(tmp_path)
    (tmp_path / "truth.npz").write_bytes((tiny / "truth.npz").read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"truth.npz: expected sha256"):
        load_truth(tmp_path)
    values = read_json(tiny / "truth.json", "a truth")
    (tmp_path / "truth.json").write_text(json.dumps({**values, "format_version": 9}))
    with pytest.raises(UserError, match="expected format_version 1, found 9"):
        load_truth(tmp_path)
    (tmp_path / "truth.npz").write_bytes(b"PK no archive")
    digest = sha256_of(tmp_path / "truth.npz")
    for content, message in (
        (
            {**values, "arrays_sha256": digest},
            r"expected a synthetic world's truth at .*npz, found a file that",
        ),
        ({"format_version": 1}, "expected arrays_sha256 and stores in a world's truth"),
    ):
        (tmp_path / "truth.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load_truth(tmp_path)
