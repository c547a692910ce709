"""Dictionaries across seeds and latents' matches in other runs: planted permutations, noise, a plain matching."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from hafs_evaluate.latents import stability as module
from hafs_evaluate.latents.stability import arm_of, compare, evaluated_runs, matched, stability, write_matches
from hafs_evaluate.workspace import Workspace, sha256_of
from hafs_jax.base.files import write_json
from hafs_jax.runs import Run
from tests.support.runs import config_of, finished_run
from tests.support.torch_saes import saved_sae

D, F = 12, 9


def unit(rows: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1).float()


def test_a_permuted_dictionary_is_the_same_and_a_part_is_shared_in_part(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_FLOATS", 20)
    vectors = unit(F)
    same = compare(vectors, vectors[torch.randperm(F, generator=torch.Generator().manual_seed(1))])
    assert same["shared_fraction"] == 1
    assert same["a_to_b"] == pytest.approx(1, abs=1e-6)
    part = compare(vectors, vectors[:3])
    assert part["b_to_a"] == pytest.approx(1, abs=1e-6)
    assert part["a_to_b"] == pytest.approx(float((vectors @ vectors[:3].T).amax(1).mean()), abs=1e-6)
    assert part["shared_fraction"] == pytest.approx(2 * 3 / (F + 3))
    assert part["mean_max_cosine"] == pytest.approx((part["a_to_b"] + part["b_to_a"]) / 2)


def test_one_vector_is_matched_once():
    vectors = unit(2)
    copies = torch.cat([vectors[:1]] * 4)
    found = compare(vectors, copies)
    assert found["b_to_a"] == pytest.approx(1, abs=1e-6)
    assert found["shared_fraction"] == pytest.approx(2 * 1 / 6)


def test_matching_by_components_is_the_hungarian_of_the_thresholded_whole():
    random = np.random.default_rng(0)
    for threshold in (0.3, 0.7, 0.9, 0.99):
        weight = random.random((30, 25))
        weight[weight < threshold] = 0
        row, column = linear_sum_assignment(weight, maximize=True)
        assert matched(sparse.coo_array(weight)) == (weight[row, column] > 0).sum()
    assert matched(sparse.coo_array((4, 5))) == 0


@pytest.fixture
def workspace(tmp_path):
    """Three seeds of one arm, of which s1 is s0 permuted; one run of another k; an imported SAE."""
    workspace = Workspace(tmp_path / "offline")
    for seed, (name, k) in enumerate([("a-s0", 8), ("a-s1", 8), ("a-s2", 8), ("b-s0", 16)]):
        folder = workspace.runs / name
        saved_sae(folder / "sae", D, F, seed=seed)
        own = int(name[-1])
        fields = {"seed": own, "data_seed": own, "sae": {"k": k, "n_latents": 32}, "penalty": {"tau": 0.1 * (seed + 1)}}
        finished_run(folder, config_of("baseline", "topk", **fields))
    weights = workspace.runs / "a-s0" / "sae" / "sae_weights.safetensors"
    state = load_file(weights)
    state["W_dec"] = state["W_dec"].flip(0).contiguous()
    save_file(state, workspace.runs / "a-s1" / "sae" / "sae_weights.safetensors")
    saved_sae(workspace.folder / "imported" / "public" / "sae", D, F + 1, seed=9)
    for name in ("a-s0", "a-s1", "a-s2", "b-s0", "public"):
        density = np.ones(F + 1 if name == "public" else F)
        sae = workspace.folder / ("imported" if name == "public" else "runs") / name / "sae"
        write_json(workspace.result(name, "core.json"), {"sae_sha256": sha256_of(sae / "sae_weights.safetensors")})
        np.savez(workspace.result(name, "core_latents.npz"), density=density)
        latents = {"latents": [{"index": index} for index in (2, 5)]}
        workspace.result(name, "latents.json").write_text(json.dumps(latents))
    return workspace


def test_seeds_of_an_arm_are_paired_and_no_others(workspace):
    values = stability(evaluated_runs(workspace), {})
    assert json.loads(json.dumps(values)) == values
    assert [(pair["a"], pair["b"]) for pair in values["pairs"]] == [
        ("a-s0", "a-s1"),
        ("a-s0", "a-s2"),
        ("a-s1", "a-s2"),
    ]
    first, second, third = (pair["mean_max_cosine"] for pair in values["pairs"])
    assert first == pytest.approx(1, abs=1e-6)
    assert second < 0.9
    (arm,) = values["arms"]
    assert (arm["runs"], arm["pairs"]) == (["a-s0", "a-s1", "a-s2"], 3)
    assert (arm["architecture"], arm["variant"], arm["k"]) == ("topk", "baseline", 8)
    assert arm["mean_max_cosine"] == pytest.approx((first + second + third) / 3)
    assert values["runs"]["a-s2"]["mean_max_cosine"] == pytest.approx((second + third) / 2)
    assert set(values["runs"]) == {"a-s0", "a-s1", "a-s2"}


def test_a_run_from_before_arms_had_names_is_paired_with_later_ones(workspace):
    run = Run(workspace.runs / "a-s0")
    record = run.record()
    arms = [arm_of(run.summary(), {**record["config"], "arm": name}) for name in ("", "baseline k=8")]
    del record["config"]["arm"]
    assert {*arms, arm_of(run.summary(), record["config"])} == {arms[0]}
    assert arm_of(run.summary(), {**record["config"], "tokens": 1}) != arms[0]


def test_dead_latents_do_not_count_and_a_dead_run_has_no_figure(workspace):
    live = np.zeros(F)
    live[:2] = 1
    np.savez(workspace.result("a-s0", "core_latents.npz"), density=live)
    values = stability(evaluated_runs(workspace), {})
    assert values["pairs"][0]["live"] == [2, F]
    assert values["pairs"][0]["shared_fraction"] == pytest.approx(2 * 2 / (2 + F))
    np.savez(workspace.result("a-s0", "core_latents.npz"), density=np.zeros(F))
    values = stability(evaluated_runs(workspace), {})
    assert values["pairs"][0]["mean_max_cosine"] is None
    assert values["arms"][0]["pairs"] == 1


def test_known_pairs_are_not_compared_again(workspace, monkeypatch):
    first = stability(evaluated_runs(workspace), {})
    compared = []
    monkeypatch.setattr(module, "compare", lambda a, b: (compared.append(1), compare(a, b))[1])
    assert stability(evaluated_runs(workspace), first) == first
    assert not compared
    saved_sae(workspace.runs / "a-s2" / "sae", D, F, seed=77)
    assert "a-s2" not in [run.name for run in evaluated_runs(workspace)]  # its core metrics are of the old weights
    sha = sha256_of(workspace.runs / "a-s2" / "sae" / "sae_weights.safetensors")
    write_json(workspace.result("a-s2", "core.json"), {"sae_sha256": sha})
    stability(evaluated_runs(workspace), first)
    assert len(compared) == 2


def test_a_run_without_a_second_seed_is_in_no_arm(workspace):
    values = stability([run for run in evaluated_runs(workspace) if run.name in ("a-s0", "b-s0", "public")], {})
    assert values["arms"] == values["pairs"] == []
    assert values["runs"] == {}


def test_a_latents_match_is_the_nearest_vector_of_every_other_run(workspace):
    runs = evaluated_runs(workspace)
    write_json(workspace.result("a-s0", "latents_others.json"), {"latents": [{"index": 1}, {"index": 3}]})
    assert write_matches(workspace, runs) == 5
    found = json.loads(workspace.result("a-s0", "latents.json").read_text())["latents"]
    assert set(found[0]["matches"]) == {"a-s1", "a-s2", "b-s0", "public"}
    assert [latent["matches"]["a-s1"]["index"] for latent in found] == [F - 1 - 2, F - 1 - 5]
    assert found[0]["matches"]["a-s1"]["cosine"] == pytest.approx(1)
    mine, other = (
        load_file(path / "sae_weights.safetensors")["W_dec"]
        for path in (workspace.runs / "a-s0" / "sae", workspace.folder / "imported" / "public" / "sae")
    )
    cosine = torch.nn.functional.cosine_similarity(mine[5][None], other)
    assert found[1]["matches"]["public"] == {
        "index": int(cosine.argmax()),
        "cosine": pytest.approx(float(cosine.max()), rel=1e-4),  # written to five digits
    }
    others = json.loads(workspace.result("a-s0", "latents_others.json").read_text())["latents"]
    assert {tuple(latent["matches"]) for latent in others} == {("b-s0",)}  # of the same seed alone
    mine, b = (
        load_file(workspace.runs / name / "sae" / "sae_weights.safetensors")["W_dec"] for name in ("a-s0", "b-s0")
    )
    nearest = torch.nn.functional.cosine_similarity(mine[[1, 3]][:, None], b[None], dim=2).argmax(1).tolist()
    assert [latent["matches"]["b-s0"]["index"] for latent in others] == nearest
    assert write_matches(workspace, runs) == 0
    assert write_matches(workspace, runs[:-1]) == 4
    assert "public" not in json.loads(workspace.result("a-s0", "latents.json").read_text())["latents"][0]["matches"]
