"""A run whose architecture has no SAELens form: it is evaluated by its own functions, and export says so in a line."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from hafs_evaluate.core.loading import load_sae
from hafs_evaluate.report.report import write_report
from hafs_evaluate.workspace import export, finished_runs, open_workspace
from hafs_jax import cli, load, preset, presets, with_fields
from hafs_jax.method.architectures import ARCHITECTURES, Architecture, l1
from hafs_jax.registry import register_architecture
from hafs_jax.store.arrays import write_array_store
from hafs_jax.training.train import train
from tests.support.stores import planted

D, F = 8, 32


def swish(pre_BF, params, config, at):
    return jax.nn.relu(pre_BF) * jax.nn.sigmoid(4.0 * pre_BF)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """OUT with a profile `tiny`: stores of an array and one finished run of an architecture of somebody else's."""
    out = tmp_path_factory.mktemp("own")
    store = write_array_store(out / "tiny", planted(2000, D, 24, 3, seed=4)[0], heldout_fraction=0.25)["train"]
    register_architecture("swish", Architecture(swish, cost=l1, starts_dense=True))
    try:
        fields = {"tokens": 200 * 64, "batch_size": 64, "sae": {"n_latents": F, "k": 3}}
        train(with_fields(preset("baseline", "swish"), fields), store, out / "tiny" / "runs", progress=False)
        yield out
    finally:
        del ARCHITECTURES["swish"], presets.ARCHITECTURES["swish"]


def test_it_computes_what_the_run_does(out: Path) -> None:
    workspace = open_workspace(out, "tiny")
    (run,) = finished_runs(workspace)
    exported = export(run)
    assert exported.is_own and exported.folder == run.folder
    sae, ours = load_sae(exported, workspace.heldout.manifest), load(run.folder)
    acts = workspace.heldout.read(0)[:60]
    latents = sae.encode(torch.tensor(acts.reshape(3, 20, D)))
    assert latents.shape == (3, 20, F) and latents.dtype == torch.float32
    np.testing.assert_array_equal(latents.reshape(60, F).numpy(), ours.encode(acts))
    np.testing.assert_allclose(sae(torch.tensor(acts)).numpy(), ours(acts), rtol=1e-6)
    recon = latents.reshape(60, F) @ sae.W_dec + sae.b_dec  # in the model's units, as SAELens has them
    np.testing.assert_allclose(recon.numpy(), ours(acts), atol=1e-4 * float(np.abs(acts).max()))
    np.testing.assert_allclose(sae.W_dec.norm(dim=1).numpy(), 1.0, rtol=1e-5)
    assert sae.cfg.to_dict()["metadata"]["hook_name"] == workspace.heldout.manifest.hook_point


def test_it_is_evaluated_once_and_reported(out: Path, capfd: pytest.CaptureFixture) -> None:
    command = ["evaluate", "--out", str(out), "--profile", "tiny"]
    assert cli.main(command) == 0
    assert "SAELens has no form for this architecture" in capfd.readouterr().err
    path = out / "tiny" / "eval" / "baseline-swish-s0" / "core.json"
    core = json.loads(path.read_text())
    workspace = open_workspace(out, "tiny")
    acts = np.concatenate([workspace.heldout.read(i) for i in range(len(workspace.heldout.shard_sizes))])
    sae = load(out / "tiny" / "runs" / "baseline-swish-s0")
    residual = acts - np.asarray(sae(acts))
    fvu = float((residual**2).sum() / ((acts - acts.mean(0)) ** 2).sum())
    assert core["reconstruction"]["fvu"] == pytest.approx(fvu, rel=1e-4) and 0.1 < fvu < 0.95
    written = path.stat().st_mtime_ns
    assert cli.main(command) == 0 and path.stat().st_mtime_ns == written
    write_report(out / "tiny")
    results = json.loads((out / "tiny" / "report" / "results.json").read_text())
    assert results["variants"]["baseline-swish"]["fvu"] == pytest.approx(fvu, rel=1e-4)


def test_export_says_that_there_is_no_form(out: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(out / "tiny" / "runs" / "baseline-swish-s0")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "no SAELens form for architecture 'swish'" in line
