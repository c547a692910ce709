"""Worlds of known features, their stores and truth, the scores against it, and `python -m evaluate synth`."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_helpers import random_sae, saved_sae
from sae_lens import synthetic as sae_lens_synthetic
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data
from scipy.sparse import csr_array

import evaluate.ground_truth as ground_truth
import evaluate.synthetic_stage as stage
from evaluate.__main__ import main as evaluate_main
from evaluate.ground_truth import Truth, load_truth, score, score_sae
from evaluate.workspace import open_workspace
from extract.format.errors import UserError
from extract.format.store import Store
from extract.format.verify import verify
from extract.synthetic import HOOK_POINT, SyntheticConfig, blocks, generate, is_made, main
from extract.worlds import WORLDS, World, build, forest, model_config

TINY = SyntheticConfig("tiny", samples=3_000, heldout_samples=700, shard_rows=512)
D, N_FEATURES = 16, 28


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return generate(TINY, out)


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "timing.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows_of(folder: Path, split: str) -> np.ndarray:
    store = Store(folder / "store" / split)
    return np.concatenate([store.read(shard) for shard in range(len(store.shard_sizes))])


# --- worlds


@pytest.mark.parametrize("name", ["toy-0", "toy-1", "toy-2"])
def test_toy_worlds_leave_room_for_absorption(name):
    world = WORLDS[name]
    model = build(world)
    parents_N, levels_N = forest(model)
    assert (world.d_model, 150 <= world.n <= 170) == (64, True)
    _, values_BN = next(blocks(SyntheticConfig(name), model, "train", 15_000))
    fires_BN = values_BN > 0
    rate_N, roots_N = fires_BN.mean(0), parents_N < 0
    assert 5 <= rate_N.sum() <= 8
    assert rate_N[roots_N].min() > 0.05
    assert rate_N[roots_N].max() < 0.42
    children = np.flatnonzero(~roots_N)
    assert not (fires_BN[:, children] & ~fires_BN[:, parents_N[children]]).any()
    for parent in np.unique(parents_N[children]):
        family = np.flatnonzero(parents_N == parent)
        assert len(family) == world.branching
        assert fires_BN[:, family].sum(1).max() == 1  # siblings exclude each other, and some fire
        assert (levels_N[family] == levels_N[parent] + 1).all()
    for level in range(1, world.depth + 1):
        of_level = levels_N == level
        given_parent = rate_N[of_level].mean() / rate_N[parents_N[of_level]].mean()
        assert 0.2 < given_parent < 0.6
    assert values_BN[fires_BN].std() > 0.1
    cosines = model.feature_dict.feature_vectors.numpy()
    cosines = cosines @ cosines.T - np.eye(world.n)
    assert np.sqrt(np.square(cosines).mean()) < 0.111  # random directions have .125, the best of all .107


def test_toy_worlds_differ_in_shape_and_in_directions():
    toys = [WORLDS[name] for name in ("toy-0", "toy-1", "toy-2")]
    assert len({(world.branching, world.exponent, world.roots) for world in toys}) == 3
    assert len({world.seed for world in toys}) == 3
    first = [build(dataclasses.replace(world, orthogonal_steps=0)).feature_dict.feature_vectors[0] for world in toys]
    assert max(abs(float(a @ b)) for a, b in ((first[0], first[1]), (first[0], first[2]), (first[1], first[2]))) < 0.7


def test_the_benchmark_is_saelens_own():
    lens = sae_lens_synthetic
    expected = lens.SyntheticModelConfig(
        num_features=16_384,
        hidden_dim=768,
        firing_probability=lens.ZipfianFiringProbabilityConfig(max_prob=0.4, min_prob=5e-4, exponent=0.5),
        hierarchy=lens.HierarchyConfig(
            total_root_nodes=128,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        mean_firing_magnitudes=lens.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=lens.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        correlation=lens.LowRankCorrelationConfig(correlation_scale=0.1, rank=25),
        orthogonalization=lens.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        bias=0.5,
        seed=42,
    )
    assert model_config(WORLDS["synthsaebench-16k"]).to_dict() == expected.to_dict()


def test_a_world_without_child_max_fires_by_one_law_and_may_have_features_outside_the_trees():
    world = World(d_model=5, roots=2, branching=2, depth=1, n_features=9, child_max=None, orthogonal_steps=0)
    model = build(world)
    parents_N, levels_N = forest(model)
    assert parents_N.tolist() == [-1, -1, 0, 0, 1, 1, -1, -1, -1]
    assert levels_N.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
    firing_N = model.activation_generator.firing_probabilities
    assert firing_N[0] == pytest.approx(world.firing_max)
    assert firing_N[8] == pytest.approx(world.firing_min)
    assert (firing_N.diff() < 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n_features": 155}, "n_features=155: expected at least the 156"), ({"compensate": True}, "child_max: expected")],
)
def test_a_world_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        World(**changes)


# --- stores and truth


def test_stores_pass_verification_and_the_truth_makes_their_rows(tiny):
    assert verify(tiny / "store" / "train") == []
    assert verify(tiny / "store" / "heldout") == []
    store, truth = Store(tiny / "store" / "heldout"), load_truth(tiny)
    assert (store.manifest.profile["resolved"], store.manifest.dtype, len(store)) == ("synth-tiny", "float32", 700)
    assert not store.manifest.has_tokens
    assert Store(tiny / "store" / "train").shard_sizes == [512] * 5 + [440]
    assert truth.directions_ND.shape == (N_FEATURES, D)
    assert truth.directions_ND.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(truth.directions_ND, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(truth.acts(100, 700), rows_of(tiny, "heldout")[100:], atol=1e-5)
    assert truth.coefficients.data.min() > 0
    record = json.loads((tiny / "truth.json").read_text())
    assert record["true_l0"]["heldout"] == pytest.approx(truth.coefficients.nnz / 700)
    assert record["config"]["world"]["roots"] == 4
    with np.load(tiny / "truth.npz") as arrays:
        assert arrays["parents_N"].dtype == arrays["levels_N"].dtype == np.int32
        fires = [values > 0 for _, values in blocks(TINY, build(WORLDS["tiny"]), "train", 3_000)]
        np.testing.assert_allclose(arrays["firing_N"], np.concatenate(fires).mean(0))
    assert np.bincount(truth.levels_N).tolist() == record["features_by_level"] == [4, 8, 16]


def test_the_same_config_gives_the_same_bytes_and_leaves_torchs_generator_alone(tiny, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = generate(TINY, tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert files(again) == files(tiny)


def test_splits_and_seeds_are_streams_apart_and_fewer_samples_are_a_part_of_more(tiny, tmp_path, monkeypatch):
    train, heldout = rows_of(tiny, "train"), rows_of(tiny, "heldout")
    bias_D = load_truth(tiny).bias_D  # alone in the rows in which nothing fires
    assert not {row.tobytes() for row in heldout if (row != bias_D).any()} & {row.tobytes() for row in train}
    other = generate(dataclasses.replace(TINY, seed=1), tmp_path / "other")
    assert not np.array_equal(rows_of(other, "train"), train)
    np.testing.assert_array_equal(load_truth(other).directions_ND, load_truth(tiny).directions_ND)
    fewer = generate(dataclasses.replace(TINY, samples=1_000, heldout_samples=90), tmp_path / "fewer")
    np.testing.assert_array_equal(rows_of(fewer, "train"), train[:1_000])
    np.testing.assert_array_equal(rows_of(fewer, "heldout"), heldout[:90])
    monkeypatch.setattr("extract.synthetic._BLOCK_FLOATS", N_FEATURES * 400)
    sizes = [len(acts) for acts, _ in blocks(TINY, build(WORLDS["tiny"]), "train", 1_000)]
    assert sizes == [400, 400, 200]
    both = list(blocks(TINY, build(WORLDS["tiny"]), "train", 800))
    assert not np.array_equal(both[0][0], both[1][0])


def test_the_command_line_makes_a_world_once_and_replaces_it_only_by_force(tmp_path, capsys):
    arguments = ["--world", "tiny", "--samples", "200", "--heldout-samples", "50", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "200 training and 50 held-out rows of 16; 28 features by level 4 + 8 + 16" in capsys.readouterr().out
    assert json.loads((tmp_path / "auto.json").read_text())["profile"] == "synth-tiny"
    folder = tmp_path / "synth-tiny"
    before, stamp = files(folder), (folder / "truth.npz").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "are there already, from this very config" in capsys.readouterr().err
    assert (folder / "truth.npz").stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--seed", "4"])
    assert stopped.value.code == 2
    assert "was made with seed=0, not 4; pass --force to replace it" in capsys.readouterr().err
    assert files(folder) == before
    (folder / "truth.json").unlink()  # as a kill leaves it
    assert not is_made(dataclasses.replace(TINY, samples=200, heldout_samples=50, shard_rows=65_536), tmp_path)
    assert main(arguments) == 0
    assert files(folder) == before
    assert main([*arguments, "--seed", "4", "--force"]) == 0
    assert files(folder)["store/train/shard-00000.npy"] != before["store/train/shard-00000.npy"]
    assert {path.name for path in (folder / "store").iterdir()} == {"train", "heldout"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "toy-9"], "invalid choice: 'toy-9'"),
        (["--samples", "0"], "samples=0: expected at least 1"),
        (["--sample", "9"], "did you mean '--samples'"),
        (["--world", "tiny", "--out", "FILE"], "Not a directory"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "file") if each == "FILE" else each for each in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert len(captured.strip().splitlines()) == 1


# --- scores

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


def test_the_perfect_sae_scores_one():
    truth = hand_made_truth()
    order = np.array([3, 0, 6, 2, 1, 5, 4])
    latents = np.concatenate([dense(truth)[:, order], np.zeros((ROWS, 2))], 1)
    extra = np.linalg.qr(truth.directions_ND.T.astype(np.float64), mode="complete")[0][:, FEATURES:].T[:2]
    W_dec = np.concatenate([-3 * truth.directions_ND[order], extra])
    found = score(torch.from_numpy(latents), torch.from_numpy(W_dec), truth.acts(0, ROWS), truth)
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


def test_counts_agree_with_a_plain_loop_whatever_the_blocks(monkeypatch):
    truth, random = hand_made_truth(2), np.random.default_rng(3)
    F = 9
    W_dec = np.concatenate([truth.directions_ND, truth.directions_ND[:2]]) + 0.3 * random.normal(size=(F, WIDTH))
    latents = (dense(truth)[:, [0, 1, 2, 3, 4, 5, 6, 0, 1]] + 0.4) * (random.random((ROWS, F)) < 0.6)
    recon = truth.acts(0, ROWS) + 0.1 * random.normal(size=(ROWS, WIDTH))
    found = score(latents, W_dec, recon, truth)
    monkeypatch.setattr(ground_truth, "_BLOCK_FLOATS", 7 * (F + WIDTH))
    blocked = score(latents, W_dec, recon, truth)
    assert blocked["by_level"] == found["by_level"]
    assert {k: v for k, v in blocked.items() if k != "by_level"} == pytest.approx(
        {k: v for k, v in found.items() if k != "by_level"}
    )

    cosines = np.abs(W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True) @ truth.directions_ND.T)
    best = cosines.argmax(1)
    match, _ = ground_truth.matching(cosines)
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
    latents_N, cosine_N = ground_truth.matching(cosines)
    assert latents_N.tolist() == [1, 0]
    assert ground_truth.mcc(latents_N, cosine_N) == pytest.approx((0.85 + 0.8) / 2)


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
    with pytest.raises(UserError, match="expected the truth's 700 rows, found 699 latents"):
        score(np.ones((699, 3)), np.ones((3, D)), np.ones((699, D)), truth)
    with pytest.raises(UserError, match=r"expected a synthetic world's truth .* at .*truth.json, found no such file"):
        load_truth(tmp_path)
    record = (tiny / "truth.json").read_text()
    (tmp_path / "truth.json").write_text(record)
    with pytest.raises(UserError, match=r"truth.npz: expected sha256 .*, found no file; sample the world again"):
        load_truth(tmp_path)
    (tmp_path / "truth.npz").write_bytes((tiny / "truth.npz").read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"truth.npz: expected sha256"):
        load_truth(tmp_path)
    (tmp_path / "truth.json").write_text(record.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="expected format_version 1, found 9"):
        load_truth(tmp_path)


# --- the stage

LAM = {"baseline-s0": 0.0, "strict-s1": 3.0}


@pytest.fixture
def workspace(tiny, tmp_path, monkeypatch):
    """A copy of the tiny world with two finished runs and an unfinished one; exporting takes what is there."""
    for name, data in files(tiny).items():
        (tmp_path / "synth-tiny" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "synth-tiny" / name).write_bytes(data)
    for seed, (name, lam) in enumerate(LAM.items()):
        folder = tmp_path / "synth-tiny" / "runs" / name
        saved_sae(folder / "sae", D, 23, seed=seed, hook=HOOK_POINT)
        config = {"seed": seed, "sae": {"k": 4, "n_latents": 23}, "penalty": {"lam_max": lam, "kind": "hinge"}}
        record = {"variant": name[:-3], "architecture": "batchtopk", "seed": seed, "config": config, "store": {}}
        (folder / "config.json").write_text(json.dumps(record))
        (folder / "run.json").write_text("{}")
    (tmp_path / "synth-tiny" / "runs" / "adaptive-s0").mkdir()
    return open_workspace(tmp_path, "synth-tiny")


class Export:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, folder: Path) -> Path:
        self.calls.append(folder.name)
        return folder / "sae"


def test_runs_are_scored_once(workspace, monkeypatch):
    export = Export()
    results = stage.evaluate_synthetic(workspace, device="cpu", export=export)
    assert export.calls == [result["run"] for result in results] == list(LAM)
    truth = load_truth(workspace.folder)
    for result in results:
        path = workspace.result(result["run"], "synthetic.json")
        assert json.loads(path.read_text()) == result
        sae_folder = workspace.runs / result["run"] / "sae"
        assert result["metrics"] == stage.score_folder(sae_folder, workspace.heldout, truth)
        assert result["truth_sha256"] == truth.sha256
        assert result["settings"]["min_edge_rows"] == 20
    assert (results[1]["variant"], results[1]["architecture"], results[1]["seed"], results[1]["k"]) == (
        "strict",
        "batchtopk",
        1,
        4,
    )
    with open(workspace.eval / "synthetic.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == list(LAM)
    assert [float(row["penalty.lam_max"]) for row in rows] == list(LAM.values())
    assert "penalty.kind" not in rows[0]  # the same in both
    assert float(rows[1]["mcc"]) == results[1]["metrics"]["mcc"]
    assert float(rows[1]["f1_level2"]) == results[1]["metrics"]["by_level"][2]["f1"]
    assert rows[1]["absorption_level2"] == ""

    before = {path: path.stat().st_mtime_ns for path in workspace.eval.rglob("*.json")}

    def called(*args: object) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr(stage, "score_folder", called)
    assert stage.evaluate_synthetic(workspace, device="cpu", export=called) == results
    assert {path: path.stat().st_mtime_ns for path in workspace.eval.rglob("*.json")} == before
    (workspace.runs / "strict-s1" / "run.json").write_text('{"trained": "again, to the same weights"}')
    again = stage.evaluate_synthetic(workspace, device="cpu", export=export)
    assert export.calls[2:] == ["strict-s1"]
    assert again[1]["metrics"] == results[1]["metrics"]
    saved_sae(workspace.runs / "strict-s1" / "sae", D, 23, seed=9, hook=HOOK_POINT)
    with pytest.raises(AssertionError, match="done already"):
        stage.evaluate_synthetic(workspace, device="cpu", export=export)


@pytest.mark.parametrize("change", ["sae", "truth", "settings"])
def test_another_sae_truth_or_setting_is_scored_anew(workspace, change, monkeypatch):
    first = stage.evaluate_synthetic(workspace, device="cpu", export=Export())
    if change == "sae":
        saved_sae(workspace.runs / "strict-s1" / "sae", D, 23, seed=9, hook=HOOK_POINT)
    elif change == "truth":
        generate(dataclasses.replace(TINY, seed=5), workspace.folder.parent, force=True)
        workspace = open_workspace(workspace.folder.parent, "synth-tiny")
    else:
        monkeypatch.setattr(stage, "SETTINGS", {"version": 99})
    scored = []
    original = stage.score_folder
    monkeypatch.setattr(stage, "score_folder", lambda *args: scored.append(args[0].parent.name) or original(*args))
    second = stage.evaluate_synthetic(workspace, device="cpu", export=Export())
    assert scored == (["strict-s1"] if change == "sae" else list(LAM))
    assert (second[1]["metrics"] != first[1]["metrics"]) == (change != "settings")


def test_the_command_line_scores_the_named_runs_and_keeps_the_others_rows(workspace, capsys, monkeypatch):
    monkeypatch.setattr("evaluate.bridge.export_run", Export())
    place = ["synth", "--out", str(workspace.folder.parent), "--profile", "synth-tiny", "--device", "cpu"]
    assert evaluate_main([*place, "--runs", "strict-s1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "k", "l0", "fvu"]
    assert [line.split()[0] for line in lines[1:-1]] == ["strict-s1"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1] == str(workspace.eval / "synthetic.csv")
    assert not workspace.result("baseline-s0", "synthetic.json").exists()
    assert evaluate_main([*place, "--runs", "baseline-s0"]) == 0
    assert [line.split(",")[0] for line in (workspace.eval / "synthetic.csv").read_text().splitlines()] == ["run", *LAM]
    capsys.readouterr()
    for path in (workspace.folder / "truth.json", workspace.folder / "truth.npz"):
        path.unlink()
    with pytest.raises(SystemExit) as stopped:
        evaluate_main(place)
    assert stopped.value.code == 2
    assert "expected a synthetic world's truth" in capsys.readouterr().err
