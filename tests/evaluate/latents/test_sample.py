"""The latents that are shown in full: drawn once for all SAEs of a seed, alive in each, even over density."""

import numpy as np
import pytest

from hafs_evaluate.latents.sample import draw, shared_samples
from hafs_evaluate.workspace import Workspace
from hafs_jax.base.files import read_json
from tests.support.runs import config_of, finished_run


def test_a_draw_is_alive_in_every_sae_and_even_over_the_ranks_of_density():
    density = np.array([0.0, 0.5, 0.01, 0.3, 0.02, 0.0, 0.1, 0.2, 0.05, 0.4])
    assert draw([density], 100).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]  # never a dead one
    assert draw([density], 4).tolist() == [3, 4, 6, 9] or len(draw([density], 4)) == 4
    ranks = np.argsort(np.argsort(np.where(density > 0, density, np.inf)))[draw([density], 4)]
    assert sorted(ranks.tolist()) == [1, 3, 5, 7]
    other = density.copy()
    other[[1, 3]] = 0.0
    assert set(draw([density, other], 100)) == {2, 4, 6, 7, 8, 9}
    assert draw([np.zeros(4)], 3).tolist() == []
    assert draw([np.array([0.1, 0.0]), np.array([0.0, 0.1])], 5).tolist() == [0, 1]  # none in both: those in any


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "profile")


def add_run(workspace, name: str, seed: int, density: np.ndarray) -> None:
    finished_run(workspace.runs / name, config_of("baseline", seed=seed))
    path = workspace.result(name, "core_latents.npz")
    path.parent.mkdir(parents=True)
    np.savez(path, density=density)


def test_runs_of_one_seed_share_their_indices_which_stay(workspace):
    random = np.random.default_rng(0)
    for name, seed in (("a-s0", 0), ("b-s0", 0), ("a-s1", 1)):
        add_run(workspace, name, seed, random.random(50) * (random.random(50) < 0.8))
    found = shared_samples(workspace, ["a-s0", "b-s0", "a-s1"], 10)
    assert found["a-s0"].tolist() == found["b-s0"].tolist() != found["a-s1"].tolist()
    written = read_json(workspace.eval / "latent_sample.json", "the sample")["groups"]
    assert written["seed 0, 50 latents"]["runs"] == ["a-s0", "b-s0"]
    add_run(workspace, "c-s0", 0, random.random(50) * (random.random(50) < 0.5))
    assert shared_samples(workspace, ["c-s0"], 10)["c-s0"].tolist() == found["a-s0"].tolist()
    assert len(shared_samples(workspace, ["c-s0"], 12)["c-s0"]) == 12  # another number: drawn anew


def test_other_widths_and_imported_saes_share_with_none(workspace):
    add_run(workspace, "a-s0", 0, np.full(50, 0.1))
    add_run(workspace, "wide-s0", 0, np.full(60, 0.1))
    path = workspace.result("theirs", "core_latents.npz")
    path.parent.mkdir(parents=True)
    np.savez(path, density=np.full(50, 0.1))
    shared_samples(workspace, ["a-s0", "wide-s0", "theirs"], 5)
    groups = read_json(workspace.eval / "latent_sample.json", "the sample")["groups"]
    assert set(groups) == {"seed 0, 50 latents", "seed 0, 60 latents", "theirs, 50 latents"}
