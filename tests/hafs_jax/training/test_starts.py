"""What comes before a run's first step: refusals leave its folder free, one training at a time, paths that last."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hafs_jax.api import load
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of
from hafs_jax.cli import main
from hafs_jax.config import TrainConfig
from hafs_jax.fast.adam import check_optimizer
from hafs_jax.fast.mesh import mesh_for
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run, all_runs
from hafs_jax.saelens import export_saelens
from hafs_jax.store.arrays import write_array_store
from hafs_jax.store.holding import replacing
from hafs_jax.training import checkpoint
from hafs_jax.training.state import seed_key
from hafs_jax.training.sweeps import sweep
from hafs_jax.training.train import open_stores, train
from tests.support.stores import planted, write_store

D = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "tiny"
    return write_store(out / "store" / "train", planted(400, D, 8, 2)[0], shard_rows=200)


def small(**fields: Any) -> TrainConfig:
    """Eight steps, in one dispatch."""
    config = with_fields(preset(), {"tokens": 320, "batch_size": 40, "sae": {"k": 2, "n_latents": 8}})
    return with_fields(config, fields)


def test_every_bit_of_a_seed_is_used(store: Path, tmp_path: Path) -> None:
    seeds = (0, 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1)
    runs = [train(small(seed=seed, data_seed=0, tokens=40), store, tmp_path) for seed in seeds]
    assert len({sha256_of(next(export_saelens(run.folder).glob("*.safetensors"))) for run in runs}) == len(seeds)
    assert jax.random.key_data(seed_key(2**32 - 1)).tolist() == jax.random.key_data(jax.random.key(2**32 - 1)).tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 500, "tokens": 500}, "holds 400 rows, fewer than batch_size=500"),
        ({"evaluate_every_steps": 4}, "expected a held-out store beside"),
        ({"init_from": "nowhere"}, "expected a SAELens folder's cfg.json at nowhere/cfg.json"),
        ({"mesh": "latent=3"}, "mesh='latent=3': expected a divisor of the 1 devices, found 3"),
        ({"mesh": "data=2,latent=2"}, "mesh='data=2,latent=2': expected 1 devices, as there are, found 2 x 2"),
        ({"mesh": "rows=2"}, "mesh='rows=2': expected sizes of its axes such as data=2,latent=4, found 'rows=2'"),
        ({"optimizer": {"name": "lbfgs"}}, "optimizer.name=lbfgs: expected an optimizer of optax that updates from"),
        ({"optimizer": {"name": "adafactor"}}, r"keeps an array of shape \(1,\), which is no parameter's"),
        ({"optimizer": {"name": "adan_"}}, "that takes a learning rate; did you mean 'adan'"),
        ({"wandb": "p"}, "wandb='p' needs the package wandb"),
    ],
)
def test_a_refused_start_leaves_the_folder_free(
    fields: dict[str, Any], message: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hafs_jax.training.runlog.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        train(small(**fields), store, tmp_path)
    assert not list(tmp_path.glob("[!.]*"))
    assert train(small(), store, tmp_path).finished()


def test_a_start_that_fails_later_leaves_the_folder_free(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where logging in to Weights & Biases fails: nothing was trained, so the corrected command may have it."""

    def broken(*_: object) -> None:
        raise UserError("not yet")

    with monkeypatch.context() as context:
        context.setattr("hafs_jax.training.loop.RunLog", broken)
        with pytest.raises(UserError, match="not yet"):
            train(small(), store, tmp_path)
    assert (tmp_path / "baseline-s0" / "config.json").exists()
    assert train(small(sae={"k": 3}), store, tmp_path).summary().k == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sae": {"n_latents": 42}}, "sae.n_latents=42: expected a multiple of 4, .*; set sae.n_latents=44"),
        ({"batch_size": 42}, "batch_size=42: expected a multiple of 4, by which mesh='data=4' divides the batch"),
        ({"mesh": "data=2", "batch_size": 41}, "batch_size=41: expected a multiple of 2"),
        ({"mesh": "data=3,latent=1"}, "mesh='data=3,latent=1': expected 4 devices, as there are, found 3 x 1"),
        ({"mesh": "latent=3"}, "expected a divisor of the 4 devices, found 3"),
        ({"mesh": "latent=4", "penalty": {"kind": "hinge", "sharing": "cofiring"}}, "reads all latents of a row; set"),
    ],
)
def test_a_mesh_must_divide_devices_batch_and_latents(fields: dict[str, Any], message: str) -> None:
    config = with_fields(preset(), {"batch_size": 40, "sae": {"n_latents": 44}})
    with pytest.raises(UserError, match=message):
        mesh_for(with_fields(config, fields), [None] * 4)


def test_several_devices_need_an_optimizer_that_takes_each_latent_alone() -> None:
    config = with_fields(preset(), {"optimizer": {"name": "lamb"}})
    check_optimizer(config, devices=1)
    check_optimizer(with_fields(config, {"optimizer": {"name": "adamw"}}), devices=4)
    with pytest.raises(UserError, match=r"optimizer.name=lamb: .* depends on others, which 4 devices"):
        check_optimizer(config, devices=4)


def test_an_architecture_says_whether_its_latents_may_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "relu", dataclasses.replace(ARCHITECTURES["relu"], splits=False))
    config = with_fields(preset("baseline", "relu"), {"batch_size": 40, "sae": {"n_latents": 44}})
    assert mesh_for(with_fields(config, {"mesh": "data=4"}), [None] * 4).shape["data"] == 4
    with pytest.raises(UserError, match="architecture relu is not declared to work on a part of the latents"):
        mesh_for(with_fields(config, {"mesh": "latent=2"}), [None] * 4)


@pytest.mark.parametrize("sign", ["[x]", "a*", "a?", "\\"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(sign: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a path without \* \? \[ \\, found '.{1,2}'; .* another folder"):
        train(small(), store, tmp_path / sign / "runs")
    with pytest.raises(UserError, match="expected a path without"):
        sweep([small(), small(seed=1)], open_stores(store), tmp_path / sign / "runs", "map")
    assert not list(tmp_path.glob("*/runs/*-s0"))


def test_a_checkpoint_that_cannot_be_read_back_is_noticed_when_it_is_saved(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hafs_jax.training.train.check_path", lambda folder: None)
    with pytest.raises(UserError, match=r"checkpoint 8 in .* was written and cannot be read \(format: expected"):
        train(small(), store, tmp_path / "[x]")
    assert not Run(tmp_path / "[x]" / "baseline-s0").finished()


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']", "No space left on device"),
        ("PERMISSION_DENIED: Failed to open: \"/a\" ['{\"open\":true}'] [os_error_code='30']", "Read-only file system"),
        ("UNKNOWN: Error writing [OS error 5: EIO Input/output error]", "Input/output error"),
    ],
)
def test_a_disk_that_refuses_is_one_line(
    raised: str, said: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ValueError(raised)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=rf"checkpoints: {said} \(checkpoint 8\); free space or"):
        train(small(), store, tmp_path)


def test_two_trainings_of_one_run_are_refused(store: Path, tmp_path: Path) -> None:
    where = tmp_path / "baseline-s0"
    with Run(where).locked():
        with pytest.raises(UserError, match=f"{where}: a training is at work on it .*; wait for it"):
            train(small(), store, tmp_path)
        with pytest.raises(UserError, match=f"{where}: a training is at work on it .*; wait for it"):
            sweep([small(seed=1), small()], open_stores(store), tmp_path, "map")
        assert train(small(seed=2), store, tmp_path).finished()
    run = train(small(), store, tmp_path)
    with run.locked():  # a finished run is left as it is, and may be so by many
        assert train(small(), store, tmp_path) == run
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["baseline-s0", "baseline-s2"]


def test_a_run_that_is_evaluated_is_not_replaced(store: Path, tmp_path: Path) -> None:
    run = train(small(), store, tmp_path)
    refused = pytest.raises(UserError, match=f"{run.folder}: an evaluation is at work on it .*; an evaluation is")
    with run.held("an evaluation"), run.held("an evaluation"), refused:
        train(small(), store, tmp_path, force=True)
    assert run.finished()


def test_a_store_is_not_replaced_while_it_is_trained_on(store: Path, tmp_path: Path) -> None:
    """Nor trained on while it is replaced; one that was replaced after it was opened is not trained on."""
    acts = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    made = write_array_store(tmp_path / "p", acts)
    found: list[str] = []

    def replace(step: int, _: object) -> None:
        if not found:
            with pytest.raises(UserError) as caught:
                write_array_store(tmp_path / "p", acts + 1, force=True)
            found.append(str(caught.value))

    assert train(small(), made["train"], tmp_path / "runs", on_metrics=replace).finished()
    assert "a training is at work on it" in found[0]
    opened = open_stores(made["train"])
    write_array_store(tmp_path / "p", acts + 1, force=True)
    with pytest.raises(UserError, match="was replaced since it was opened"):
        sweep([small(seed=1)], opened, tmp_path / "runs", "map")
    with replacing([made["train"].parent], "an import"), pytest.raises(UserError, match="an import is at work on it"):
        train(small(seed=1), made["train"], tmp_path / "runs")


def test_a_second_command_is_one_line_and_exit_code_2(store: Path, capsys: pytest.CaptureFixture) -> None:
    out = store.parents[2]
    with Run(out / "tiny" / "runs" / "baseline-s0").locked():
        arguments = ["train", "--out", str(out), "--profile", "tiny", "--tokens", "320", "--batch-size", "40"]
        with pytest.raises(SystemExit) as exited:
            main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exited.value.code == 2 and ": a training is at work on it (pid " in error


def test_a_removal_that_was_killed_leaves_no_half_of_a_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(small(), store, tmp_path)
    with monkeypatch.context() as context:

        def killed(path: Path, *_: object) -> None:
            (Path(path) / "run.json").unlink()
            raise KeyboardInterrupt

        context.setattr("hafs_jax.runs.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train(small(sae={"k": 3}), store, tmp_path, force=True)
    assert not run.folder.exists() and all_runs(tmp_path) == []
    assert train(small(sae={"k": 3}), store, tmp_path).summary().k == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "baseline-s0"]


def test_force_on_a_link_leaves_what_it_points_to(store: Path, tmp_path: Path) -> None:
    run = train(small(), store, tmp_path / "real")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "baseline-s0").symlink_to(run.folder)
    again = train(small(sae={"k": 3}), store, tmp_path / "runs", force=True)
    assert again.summary().k == 3 and run.summary().k == 2


@pytest.mark.parametrize("moved", ["linked", "copied", "without its store"])
def test_a_finished_run_loads_and_exports_wherever_it_is(moved: str, tmp_path: Path) -> None:
    acts = planted(400, D, 8, 2)[0]
    store = write_store(tmp_path / "out" / "store" / "train", acts, shard_rows=200, hook_point="blocks.7.x")
    runs = tmp_path / "out" / "runs"
    if moved == "linked":
        (tmp_path / "disk").mkdir()
        runs.symlink_to(tmp_path / "disk")
    run = train(small(), store, runs)
    assert (run.folder / run.store_record()["folder"]).samefile(store)
    expected = np.asarray(load(run.folder)(acts))
    folder = run.folder
    if moved == "copied":
        folder = tmp_path / "elsewhere" / "far" / "run"
        shutil.copytree(run.folder, folder)
    if moved != "linked":
        shutil.rmtree(tmp_path / "out" / "store")
    np.testing.assert_array_equal(np.asarray(load(folder)(acts)), expected)
    cfg = (export_saelens(folder) / "cfg.json").read_text()
    assert '"hook_name": "blocks.7.x"' in cfg and '"model_name": "tiny"' in cfg and '"d_in": 6' in cfg


def test_a_run_of_an_earlier_version_asks_its_store(store: Path, tmp_path: Path) -> None:
    """Its config.json has no manifest; where `runs` is a link, the store's place was written from the link's place."""
    from hafs_jax.base.files import read_json, write_json

    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "store").symlink_to(store.parent)
    (tmp_path / "out" / "runs").symlink_to(tmp_path / "disk" / "deep")
    run = train(small(), store, tmp_path / "out" / "runs")
    record = read_json(run.config_path, "a config")
    record["store"] = {"folder": "../../store/train", "fingerprint": record["store"]["fingerprint"]}
    write_json(run.config_path, record)
    assert export_saelens(run.folder) == run.sae
    (tmp_path / "out" / "store").unlink()
    assert load(run.folder).d_model == D  # run.json has the widths
    with pytest.raises(UserError, match=r"expected an activation store's manifest .* at .*out/store/train"):
        export_saelens(run.folder)


def test_a_name_that_is_too_long_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run name baseline-s0-xxx.*: expected at most 240 bytes, found 3012; choose"):
        train(small(tag="x" * 3000), store, tmp_path)


def test_one_latent_trains_to_the_end_and_says_what_is_not_finite(store: Path, tmp_path: Path) -> None:
    run = train(small(sae={"k": 1, "n_latents": 1}), store, tmp_path)
    final = run.summary().final
    assert final["coherence_mean"] is None and final["fvu"] > 0
    assert run.metrics()[-1]["coherence_max"] is None


def test_a_platform_without_a_device_is_one_line(store: Path, tmp_path: Path) -> None:
    arguments = ["train", "--store", str(store), "--out", str(tmp_path), "--tokens", "1024"]
    done = subprocess.run(
        [sys.executable, "-m", "hafs_jax", *arguments],
        env=dict(os.environ) | {"JAX_PLATFORMS": "rocm"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: JAX_PLATFORMS=rocm: expected a")
    assert "Traceback" not in done.stderr


def test_a_start_from_a_folder_reads_it_before_the_run_is_claimed(store: Path, tmp_path: Path) -> None:
    first = train(small(), store, tmp_path / "a")
    start = small(init_from=str(export_saelens(first.folder)), sae={"n_latents": 9})
    with pytest.raises(UserError, match="d_sae=8, this run needs 9"):
        train(start, store, tmp_path / "b")
    assert train(dataclasses.replace(start, sae=first.config().sae), store, tmp_path / "b").finished()


def test_a_store_smaller_than_a_batch_is_named_by_its_own_size(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 400 rows, and passes=1\.4 over it are fewer than batch_size=1024;"):
        train(preset(), store, tmp_path)
    with pytest.raises(UserError, match=r"expected fewer than 2\^31 steps, found 4,294,967,"):
        train(small(tokens=2**32 * 40), store, tmp_path)
