"""Worlds of known features, their stores and truth, and the command that makes them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import synthetic as sae_lens_synthetic

from hafs_evaluate.truth.ground_truth import load_truth
from hafs_extract.synthetic.samples import SyntheticConfig, blocks, generate, is_made, main
from hafs_extract.synthetic.worlds import WORLDS, World, build, forest, model_config
from hafs_jax.base.errors import UserError
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify
from tests.support.worlds import N_FEATURES, TINY, D, files


def rows_of(folder: Path, split: str) -> np.ndarray:
    store = Store(folder / "store" / split)
    return np.concatenate([store.read(shard) for shard in range(len(store.shard_sizes))])


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
    left = again / "store" / ".sampling" / "old-train"  # by a kill in the last moment
    left.mkdir(parents=True)
    assert files(generate(TINY, tmp_path)) == files(tiny)
    assert not left.parent.exists()


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
    monkeypatch.setattr("hafs_extract.synthetic.samples._BLOCK_FLOATS", N_FEATURES * 400)
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
    assert {path.name for path in (folder / "store").iterdir()} - {".lock"} == {"train", "heldout"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "toy-9"], "invalid choice: 'toy-9'"),
        (["--samples", "0"], "--samples 0: expected 1 to 2^40"),
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
