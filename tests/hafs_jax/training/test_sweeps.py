"""Grids; many SAEs in one program leave what solo runs leave; resume; failures; the table; the command line."""

import csv
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_json, write_record
from hafs_jax.base.process import children
from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run
from hafs_jax.training import loop
from hafs_jax.training.checkpoint import load_checkpoint
from hafs_jax.training.sweeps import arguments_of, parse_grid, sweep, write_table
from hafs_jax.training.train import open_stores, train
from tests.support.stores import planted, write_store

D = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("sweeps") / "tiny" / "store" / "train", planted(3000, D, 20, 3)[0])


def small(variant: str = "baseline", architecture: str = "batchtopk", **changes: Any) -> TrainConfig:
    sae, penalty = {"n_latents": 24, "k": 3}, {"chunk_size": 8}
    settings = {"tokens": 80 * 40, "batch_size": 40, "sae": sae, "penalty": penalty, "checkpoint_every_steps": 16}
    return with_fields(preset(variant, architecture), {**settings, **changes})


def params_of(run: Run) -> dict[str, np.ndarray]:
    return load_checkpoint(run.checkpoints, run.config(), D)[0].params


def test_a_grid_is_every_combination_the_last_axis_fastest() -> None:
    points = parse_grid("variant=strict,adaptive seed=0..2")
    assert len(points) == 6 and points[1] == {"variant": "strict", "seed": "1"}
    assert parse_grid("l1=0.5") == [{"l1": "0.5"}]
    assert parse_grid("k=1,2; variant=strict k=3") == [{"k": "1"}, {"k": "2"}, {"variant": "strict", "k": "3"}]
    for text in ("seed", "seed=", "=3", "seed=1 seed=2"):
        with pytest.raises(UserError, match=r"expected NAME=VALUE,VALUE or NAME=FIRST\.\.LAST"):
            parse_grid(text)
    for text in (
        *("seed=0..1000000000000", "seed=" + "9" * 5000 + ".." + "9" * 5000, "seed=0..99 k=1..99 lam=1,2; tau=1"),
        "; ".join(["seed=0..5999"] * 2),
    ):
        with pytest.raises(UserError, match=r"expected at most 10,000") as raised:
            parse_grid(text)
        assert len(str(raised.value)) < 300
    assert len(parse_grid("seed=1000000..1009999")) == 10_000
    assert arguments_of({"arch": "relu", "l1": "0.5", "sae.k": "4", "penalty.ramp": "true"}) == [
        "--arch", "relu", "--sparsity.coefficient", "0.5", "--sae.k", "4", "--penalty.ramp",
        "--arm", "baseline l1=0.5 penalty.ramp=true", "--tag", "l1=0.5,k=4,ramp=true",
    ]  # fmt: skip
    assert arguments_of({"seed": "1", "k": "4"}, "mine", "strict") == [
        "--seed", "1", "--sae.k", "4", "--arm", "strict mine", "--tag", "mine,k=4",
    ]  # fmt: skip
    assert arguments_of({"variant": "adaptive"}) == ["--variant", "adaptive", "--arm", "adaptive"]


@pytest.mark.parametrize("together", ["vmap", "map"])
def test_members_equal_their_solo_runs_and_share_programs(
    folder: Path, tmp_path: Path, together: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four seeds and strengths in two programs, each compiled once; weights to float tolerance, a solo run's files."""
    groups: list[int] = []
    fit = loop.fit
    monkeypatch.setattr(
        "hafs_jax.training.sweeps.fit", lambda members, *rest: groups.append(len(members)) or fit(members, *rest)
    )
    configs = [
        with_fields(small("strict"), {"seed": seed, "tag": f"lam={lam}", "penalty": {"lam_max": lam}})
        for seed in (0, 1)
        for lam in (0.3, 3.0)
    ] + [small("baseline", "relu", seed=seed) for seed in (0, 1)]
    with jax.log_compiles():
        runs, failures = sweep(configs, open_stores(folder), tmp_path, together)
    assert sum("Finished XLA compilation of jit(train_steps)" in message for message in caplog.messages) == 2
    assert groups == [4, 2] and not failures and [run.folder.name for run in runs] == [c.run_name for c in configs]
    assert not list(tmp_path.glob(".together-*"))
    for config, run in list(zip(configs, runs, strict=True))[1::3]:
        alone = train(dataclasses.replace(config, data_seed=0), folder, tmp_path / "alone")
        assert alone.config() == run.config()
        theirs = params_of(run)
        for name, value in params_of(alone).items():
            np.testing.assert_allclose(theirs[name], value, atol=2e-4, err_msg=f"{run.folder.name} {name}")
        assert [record["step"] for record in alone.metrics()] == [record["step"] for record in run.metrics()]
        assert set(alone.result()) == set(run.result())
        assert run.result()["final"]["fvu"] == pytest.approx(alone.result()["final"]["fvu"], rel=1e-3)
    assert params_of(runs[0])["W_dec"].shape == (24, D)
    groups.clear()
    again, _ = sweep(configs, open_stores(folder), tmp_path, together)
    assert not groups and len(again) == 6


def test_baselines_come_first_and_give_the_others_their_tau(folder: Path, tmp_path: Path) -> None:
    configs = [small("adaptive", seed=1), small("baseline")]
    runs, _ = sweep(configs, open_stores(folder), tmp_path, "map")
    tau = 1.25 * runs[1].result()["final"]["fvu_ema"]
    assert runs[0].config().penalty.tau == pytest.approx(tau) and runs[0].result()["tau"] == pytest.approx(tau)
    rows = write_table(runs, tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv") as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == ["adaptive-s1", "baseline-s0"]
    assert float(read[1]["fvu_ema"]) == rows[1]["fvu_ema"] == runs[1].result()["final"]["fvu_ema"]


def test_a_sweep_that_was_stopped_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [small(seed=seed) for seed in (0, 1, 2)]
    whole, _ = sweep(configs, open_stores(folder), tmp_path / "whole", "vmap")
    advance, calls = loop.Progress.advance, []

    def dies(self: Any, step: int, metrics: Any) -> None:
        advance(self, step, metrics)
        calls.append(step)
        if step == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "advance", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep(configs, open_stores(folder), tmp_path / "broken", "vmap")
    for name in ("forced", "other"):
        shutil.copytree(tmp_path / "broken", tmp_path / name)
    first = calls[0]
    monkeypatch.setattr(loop.Progress, "advance", lambda self, step, metrics: calls.append(step))
    calls.clear()
    runs, _ = sweep(configs, open_stores(folder), tmp_path / "broken", "vmap")
    assert calls[0] == 40  # from the checkpoint of step 32
    calls.clear()
    sweep(configs, open_stores(folder), tmp_path / "forced", "vmap", force=True)
    assert calls[0] == first  # `force` trains anew, from the first step
    for config in configs:
        shutil.rmtree(tmp_path / "other" / config.run_name)
    calls.clear()
    other = write_store(tmp_path / "rows" / "train", 1.5 * planted(3000, D, 20, 3)[0])
    sweep(configs, open_stores(other), tmp_path / "other", "vmap")
    assert calls[0] == first  # checkpoints of other rows are not theirs
    for run, other in zip(runs, whole, strict=True):
        for name, value in params_of(other).items():
            np.testing.assert_array_equal(params_of(run)[name], value)
        assert [(r["step"], r["loss"]) for r in run.metrics()] == [(r["step"], r["loss"]) for r in other.metrics()]


def test_what_a_sweep_that_was_killed_in_its_last_moment_has_left_goes(folder: Path, tmp_path: Path) -> None:
    configs = [small(seed=seed) for seed in (0, 1)]
    sweep(configs, open_stores(folder), tmp_path, "map")
    train(small(seed=8), folder, tmp_path)
    left = [tmp_path / f".together-{name}" for name in ("done", "half.old")]
    goes_on = {tmp_path / ".together-unfinished": "baseline-s7", tmp_path / ".together-of-others": "baseline-s8"}
    others = [(place, ["baseline-s0", name]) for place, name in goes_on.items()]
    for place, members in ((left[0], ["baseline-s0"]), (left[1], []), *others):
        write_record(place / "members.json", {"members": members})
        (place / "checkpoints").mkdir()
    sweep(configs, open_stores(folder), tmp_path, "map")
    assert set(tmp_path.glob(".together-*")) == set(goes_on)
    write_record(left[0] / "members.json", {"members": ["baseline-s0", "baseline-s1"]})
    (tmp_path / "baseline-s1" / "run.json").unlink()  # killed between the ends of two members
    sweep(configs, open_stores(folder), tmp_path, "map")
    assert set(tmp_path.glob(".together-*")) == set(goes_on)


def test_a_group_that_the_same_sweep_removes_meanwhile_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = loop.fit

    def beside(*arguments: Any) -> list[str]:
        failures = fit(*arguments)
        for group in tmp_path.glob(".together-*"):
            shutil.rmtree(group)
        return failures

    monkeypatch.setattr("hafs_jax.training.sweeps.fit", beside)
    runs, failures = sweep([small(seed=seed) for seed in (0, 1)], open_stores(folder), tmp_path, "map")
    assert not failures and all(run.finished() for run in runs)


def test_a_member_that_diverges_does_not_stop_the_others(folder: Path, tmp_path: Path) -> None:
    bad = with_fields(small(seed=1), {"optimizer": {"learning_rate": 1e30}, "tag": "lr=1e30"})
    configs = [dataclasses.replace(c, max_bad_fraction=0.0) for c in (small(), bad)]
    runs, failures = sweep(configs, open_stores(folder), tmp_path, "vmap")
    assert runs[0].finished() and not runs[1].finished()
    assert len(failures) == 1 and failures[0].startswith("baseline-s1-lr=1e30: ") and "not finite" in failures[0]


def test_what_a_sweep_refuses(folder: Path, tmp_path: Path) -> None:
    twins = [with_fields(small(), {"sparsity": {"coefficient": c}, "tag": f"l1={c}"}) for c in (1.0, 2.0)]
    why = r"baseline-s0-l1=1.0 and baseline-s0-l1=2.0 train the same SAE, which has not a coefficient or a penalty; exp"
    with pytest.raises(UserError, match=why):
        sweep(twins, open_stores(folder), tmp_path, "map")
    twins = [with_fields(small("strict", "relu"), {"tag": f"l1={text}"}) for text in ("1", "1.0")]
    with pytest.raises(UserError, match=r"strict-relu-s0-l1=1.0 train the same SAE; expected"):
        sweep(twins, open_stores(folder), tmp_path, "map")
    twins = [with_fields(small(), {"penalty": {"lam_max": lam}, "tag": f"lam={lam}"}) for lam in (1.0, 2.0)]
    with pytest.raises(UserError, match="train the same SAE"):
        sweep(twins, open_stores(folder), tmp_path, "map")
    with pytest.raises(UserError, match="gives baseline-s0 twice"):
        sweep([small(), small()], open_stores(folder), tmp_path, "map")
    for most in (0, -1):
        with pytest.raises(UserError, match=f"most_together={most}: expected at least 1"):
            sweep([small()], open_stores(folder), tmp_path, "map", most=most)
    patient = dataclasses.replace(small(), evaluate_every_steps=8, patience=1)
    with pytest.raises(UserError, match="patience: expected none in a sweep"):
        sweep([patient], open_stores(folder), tmp_path, "map")


def test_the_command_line_trains_a_grid_and_prints_one_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from hafs_jax.cli import main

    out = tmp_path / "out"
    (out / "tiny" / "store").mkdir(parents=True)
    (out / "tiny" / "store" / "train").symlink_to(folder)
    write_json(out / "auto.json", {"profile": "tiny"})
    flags = ["--tokens", "640", "--batch-size", "40", "--sae.n-latents", "24"]
    main(["sweep", "--out", str(out), "--grid", "variant=baseline,strict seed=0..1 k=2,3", *flags])
    shown = capsys.readouterr().out
    assert shown.count("2 together") == 4 and shown.count("strict-s1-k=3") == 2
    assert len(list((out / "tiny" / "runs").glob("[!.]*"))) == 8 and (out / "tiny" / "sweep.csv").exists()
    run = Run(out / "tiny" / "runs" / "strict-s1-k=3")
    assert run.config().sae.k == 3 and (run.summary().arm, run.summary().k, run.summary().tag) == ("strict", 3, "k=3")
    main(["sweep", "--out", str(out), "--grid", "lam=1", "--variant", "strict", "--sae.k", "2", *flags])
    assert Run(out / "tiny" / "runs" / "strict-s0-lam=1").summary().arm == "strict lam=1"
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--out", str(out), "--grid", "seed=0 sae.kk=3"])
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and "unknown argument '--sae.kk'; did you mean '--sae.k'?" in stderr
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--out", str(out), "--grid", "seed=0", "--sae.kk", "3"])
    assert stop.value.code == 2 and "--sae.kk" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir


@pytest.mark.slow
def test_synth_makes_a_world_trains_and_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rooms by one command; k and F come from the world. The commands that it starts run in this process."""
    from hafs_jax.cli import main

    started: list[str] = []

    def run(command: Sequence[str]) -> int:
        started.append(command[0])
        return main(list(command))

    monkeypatch.setattr(children, "run", run)
    flags = ["--batch-size", "64", "--passes", "2"]
    grid = "variant=baseline,random_init"
    main(["synth", "--out", str(tmp_path), "--world", "tiny", "--samples", "20000", "--grid", grid, *flags])
    shown = capsys.readouterr().out
    assert started == ["synth-world", "synth-score"]
    with open(tmp_path / "synth-tiny" / "eval" / "synthetic.csv") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"baseline-s0", "random_init-s0"} and "mcc" in shown
    assert float(rows["baseline-s0"]["mcc"]) > float(rows["random_init-s0"]["mcc"]) + 0.1
    config = Run(tmp_path / "synth-tiny" / "runs" / "baseline-s0").config()
    assert config.sae.n_latents == 28 and config.sae.k >= 1
