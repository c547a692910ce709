"""SAE-Bench's first-letter absorption: refused where not valid, redirected, resumable. Its run_eval is a stub here."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hafs_evaluate.saebench import first_letter as room
from hafs_evaluate.saebench.first_letter import check_validity, first_letter, parameters, validity
from hafs_jax.base.errors import UserError
from tests.support.shuffled_store import D, F, shuffled_store
from tests.support.torch_saes import random_sae


def test_small_models_and_dictionaries_are_refused_unless_forced():
    assert validity(1_000_000_000, 16_000)[0]
    assert not validity(999_999_999, 16_000)[0]
    assert not validity(1_000_000_000, 15_999)[0]
    check_validity("run", 2 * 10**9, 16_384, "on")
    check_validity("run", 10**8, 10, "force")
    with pytest.raises(
        UserError,
        match=r"run x: first-letter absorption is valid from 1,000 million parameters and 16,000 latents, found 135 "
        r"million parameters and 2,304 latents; .* --first-letter force",
    ) as refused:
        check_validity("x", 135_000_000, 2_304, "on")
    assert "\n" not in str(refused.value)


@pytest.fixture
def saebench(monkeypatch):
    """A stub of run_eval that does what SAE-Bench does with folders; `calls` is what it saw."""
    from sae_bench.evals.absorption import main

    calls = []

    def sparse(*, experiment_dir="site-packages", probes_dir="site-packages"):
        return {"sparse": experiment_dir, "probes": probes_dir}

    def absorption(*, experiment_dir="site-packages", sparse_probing_experiment_dir="site-packages", probes_dir="s"):
        return {"absorption": experiment_dir, "sparse_again": sparse_probing_experiment_dir, "probes_again": probes_dir}

    def run_eval(config, selected_saes, device, output_path, force_rerun):
        torch.set_grad_enabled(True)
        os.makedirs(os.path.join("artifacts", "absorption"), exist_ok=True)
        model = main.HookedTransformer.from_pretrained_no_processing(config.model_name, device=device, dtype=None)
        seen = {"model": model, "config": config, "cwd": os.getcwd(), "output": output_path}
        calls.append(seen | main.run_k_sparse_probing_experiment() | main.run_feature_absortion_experiment())
        if len(calls) > 1:
            return  # too few letters: no result
        Path(output_path).mkdir(parents=True)
        path = Path(output_path) / f"{selected_saes[0][0]}_custom_sae_eval_results.json"
        path.write_text(json.dumps({"eval_result_metrics": {"mean": {"mean_full_absorption_score": 0.25}}}))

    monkeypatch.setattr(main, "run_k_sparse_probing_experiment", sparse)
    monkeypatch.setattr(main, "run_feature_absortion_experiment", absorption)
    monkeypatch.setattr(main, "run_eval", run_eval)
    return SimpleNamespace(calls=calls, main=main)


def test_the_result_is_saebenchs_with_its_validity_and_nothing_lies_outside(saebench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = shuffled_store(tmp_path / "store").manifest
    model = SimpleNamespace(hf=torch.nn.Linear(3, 4), bridge=object(), device="cpu")
    originals = saebench.main.HookedTransformer, saebench.main.run_k_sparse_probing_experiment
    assert parameters(model) == 16
    root, sae = Path("cache"), random_sae(D, F)
    with torch.no_grad():
        found = first_letter("run-ab", sae, model, manifest, root, {"max_k_value": 3})
        assert not torch.is_grad_enabled()
    assert found["valid"] is False
    assert "found 0 million parameters and 11 latents" in found["reason"]
    assert found["result"]["eval_result_metrics"]["mean"]["mean_full_absorption_score"] == 0.25
    (seen,) = saebench.calls
    assert seen["model"] is model.bridge
    assert (seen["config"].model_name, seen["config"].max_k_value, seen["config"].llm_dtype) == ("tiny", 3, "float32")
    inside = (tmp_path / "cache").resolve()
    for key in ("cwd", "output", "sparse", "probes", "absorption", "sparse_again", "probes_again"):
        assert Path(seen[key]).is_relative_to(inside) and Path(seen[key]).is_absolute(), key
    assert seen["sparse"] == seen["sparse_again"]
    assert seen["probes"] == seen["probes_again"]
    assert Path.cwd() == tmp_path and not (tmp_path / "artifacts").exists()
    assert (saebench.main.HookedTransformer, saebench.main.run_k_sparse_probing_experiment) == originals

    monkeypatch.setattr(room, "LEAST_PARAMETERS", 10)
    monkeypatch.setattr(room, "LEAST_LATENTS", F)
    empty = first_letter("other-cd", sae, model, manifest, root)
    assert (empty["valid"], empty["result"]) == (False, None)
    assert "spells fewer than 20 letters" in empty["reason"]
    assert first_letter("run-ab", sae, model, manifest, root)["valid"] is True  # its files are there
