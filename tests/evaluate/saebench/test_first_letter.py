"""SAE-Bench's first-letter absorption: refused where not valid, of the store's hook point, resumable."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hafs_evaluate.saebench import first_letter as room
from hafs_evaluate.saebench.first_letter import Reading, check_validity, first_letter, validity
from hafs_extract.models import load_model
from hafs_jax.base.errors import UserError
from tests.support.shuffled_store import F, shuffled_store
from tests.support.tiny_models import D, save_model
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


HOOK = "blocks.1.hook_mlp_out"
LENIENT = {"min_feats_for_eval": 1, "min_GT_probe_f1": -1.0, "max_k_value": 2, "k_sparse_probe_num_epochs": 2}


def score(model, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The figures of SAE-Bench's own code for a random SAE of the tiny model's MLP."""
    manifest = replace(shuffled_store(folder / "store").manifest, hook_point=HOOK)
    with torch.no_grad():
        found = first_letter("run-ab", random_sae(D, F, hook=HOOK), model, manifest, folder / "cache", changes)
        assert not torch.is_grad_enabled()
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model") / "model")), "float32")


def test_saebench_scores_a_tiny_model_and_goes_on_from_what_a_kill_left(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # as commands set it
    models_files = sorted(Path(model.info.name).rglob("*"))
    found = score(model, tmp_path, LENIENT)
    figures = found["result"]["eval_result_metrics"]["mean"]
    assert found["result"]["eval_result_details"]  # of letters
    assert 0 <= figures["mean_full_absorption_score"] <= 1
    assert (found["valid"], "found 0 million parameters and 11 latents" in found["reason"]) == (False, True)
    assert found["result"]["sae_bench_commit_hash"].startswith("sae-bench==")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "store"] and Path.cwd() == tmp_path
    assert sorted(Path(model.info.name).rglob("*")) == models_files  # where SAE-Bench would write by itself

    cache = tmp_path / "cache"
    (probes,) = (cache / "probes").iterdir()
    kept = next(probes.rglob("probe.pth"))
    made = kept.stat().st_mtime_ns
    for torn in (*(cache / "run-ab").rglob("*.parquet"), next((cache / "run-ab" / "output").iterdir())):
        torn.write_bytes(torn.read_bytes()[:40])
    assert measures(score(model, tmp_path, LENIENT)) == measures(found)
    assert kept.stat().st_mtime_ns == made

    shutil.rmtree(cache / "run-ab")
    probes.rename(probes.with_name(f"{probes.name}.unfinished"))  # a kill amid the probe
    assert measures(score(model, tmp_path, LENIENT)) == measures(found)
    assert [path.name for path in (cache / "probes").iterdir()] == [probes.name]


def measures(found: dict[str, Any]) -> list[Any]:
    return [found["result"][key] for key in ("eval_result_metrics", "eval_result_details")]


def test_a_model_that_does_not_spell_has_no_figure(model, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "LEAST_PARAMETERS", 10)
    monkeypatch.setattr(room, "LEAST_LATENTS", F)
    found = score(model, tmp_path, LENIENT | {"min_feats_for_eval": 27})
    assert (found["valid"], found["result"]) == (False, None)
    assert "spells fewer than 27 letters" in found["reason"]


@pytest.mark.parametrize("hook_point", [HOOK, "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"])
def test_the_model_stops_at_the_hook_point(model, hook_point):
    prompts = ["the cell of a membrane", "under glass while rivers carried salt"]
    _, whole = model.bridge.run_with_cache(prompts, names_filter=[hook_point])
    ran = []
    handle = model.hf.gpt_neox.layers[2].mlp.register_forward_hook(lambda *_: ran.append(2))
    _, found = Reading(model.bridge, "tiny", hook_point, 1).run_with_cache(prompts, ["blocks.1.hook_resid_post"])
    handle.remove()
    assert not ran
    torch.testing.assert_close(found["blocks.1.hook_resid_post"], whole[hook_point].flatten(2), rtol=0, atol=0)
