"""A run's folder: the summary of this version and of earlier ones, names, identity, metrics, where profiles lie."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hafs_jax.base.checksums.sealed import sealed_line
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_json
from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run, RunSummary, all_runs, finished_runs, identity, profile_folder
from tests.support.runs import COUNTS, finished_run
from tests.support.stores import write_store

NEW = {"arm", "k", "tag"}  # what run.json did not have before


def config_of(**changes: Any) -> TrainConfig:
    changes = {"tokens": 640, "batch_size": 64, "tag": "lam=0.3,k=3", "sae": {"k": 3, "n_latents": 24}, **changes}
    return with_fields(preset("strict", "relu"), {"seed": 2, **changes})


def summary_of(run: Run) -> RunSummary:
    return RunSummary(
        name=run.name,
        variant="strict",
        architecture="relu",
        seed=2,
        k=3,
        tag="lam=0.3,k=3",
        arm="strict lam=0.3",
        n_latents=24,
        d_model=5,
        d_out=7,
        steps=10,
        tokens=640,
        seconds=1.5,
        stopped_early=True,
        trained_together=4,
        tau=0.25,
        tau_reached=True,
        best={"step": 8, "heldout_fvu": 0.2},
        final={"fvu_ema": 0.21, "l0": 3.1, "step": 10},
        store_fingerprint="abc",
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of this version, of a store and a target that are not there."""
    config = config_of()
    run = Run(tmp_path / "runs" / config.run_name)
    store = {"folder": "../../store", "fingerprint": "abc", "target": {"folder": "../../target", "fingerprint": "def"}}
    run.write_config(config, store)
    run.write_result(summary_of(run))
    return run


def made_old(run: Run, *further: str) -> None:
    """Rewrites the run's files as the version before left them: no arm, the k under another name."""
    result, record = read_json(run.result_path, "a file"), read_json(run.config_path, "a file")
    result["k_or_target_l0"] = result["k"]
    write_json(run.result_path, {name: value for name, value in result.items() if name not in {*NEW, *further}})
    del record["config"]["arm"]
    write_json(run.config_path, record)


def test_a_summary_comes_back_as_it_was_written_and_needs_no_store(run: Run) -> None:
    assert run.summary() == summary_of(run)
    assert run.name == "strict-relu-s2-lam=0.3,k=3" and run.finished() and run.is_transcoder
    assert run.widths() == (5, 7)
    assert run.config() == config_of() and run.record() == read_json(run.config_path, "a file")


def test_a_run_of_the_version_before_is_read_from_its_config(run: Run) -> None:
    made_old(run)
    assert run.summary() == summary_of(run)
    assert run.config() == config_of()
    run.check_same(config_of(arm="anything"), run.store_record())  # an arm is a label, not part of what a run is


def test_a_renamed_old_run_keeps_what_its_config_says(run: Run) -> None:
    """Nothing is read from a name."""
    made_old(run)
    other = Run(run.folder.rename(run.folder.with_name("baseline-gated-s9-k=99")))
    found = other.summary()
    assert (found.variant, found.architecture, found.seed, found.k) == ("strict", "relu", 2, 3)
    assert (found.arm, found.tag, found.name) == ("strict lam=0.3", "lam=0.3,k=3", "baseline-gated-s9-k=99")


def test_a_still_older_runs_widths_are_those_of_its_stores(run: Run) -> None:
    made_old(run, "d_model", "d_out", "trained_together", "stopped_early", "best")
    with pytest.raises(UserError, match=r"store/manifest\.json, found no such file"):
        run.summary()
    for name, width in (("store", 5), ("target", 7)):
        write_store(run.folder.parents[1] / name, np.zeros((20, width)))
    assert run.widths() == (5, 7)
    expected = dataclasses.replace(summary_of(run), trained_together=1, stopped_early=False, best=None)
    assert run.summary() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "two"}, r"run\.json: seed: expected int, found 'two'"),
        ({"final": None}, r"run\.json: final: expected dict, found None"),
        (["tokens", "final"], r"run\.json: expected a finished run's summary, found none of tokens, final; train"),
    ],
)
def test_a_damaged_summary_is_one_line(run: Run, change: Any, message: str) -> None:
    result = read_json(run.result_path, "a file")
    if isinstance(change, dict):
        result |= change
    else:
        result = {name: value for name, value in result.items() if name not in change}
    write_json(run.result_path, result)
    with pytest.raises(UserError, match=message):
        run.summary()
    run.result_path.unlink()
    with pytest.raises(UserError, match=r"expected a finished run's run\.json at .*, found no such file"):
        run.summary()


def test_a_key_of_a_later_version_is_passed_over(run: Run) -> None:
    write_json(run.result_path, {**read_json(run.result_path, "a file"), "later": 1})
    assert run.summary() == summary_of(run)


def test_a_run_is_another_where_anything_but_its_arm_and_sinks_differs(run: Run) -> None:
    run.check_same(config_of(arm="strict lam=0.3"), run.store_record())
    run.check_same(config_of(tensorboard=True, wandb="project"), run.store_record())  # where metrics are shown
    with pytest.raises(UserError, match=r"holds a run with sae\.k=3, this one has 4; pass tag='NAME'"):
        run.check_same(config_of(sae={"k": 4, "n_latents": 24}), run.store_record())
    with pytest.raises(UserError, match=r"was trained on another store \(def, now other\)"):
        run.check_same(config_of(), {**run.store_record(), "target": {"folder": "", "fingerprint": "other"}})
    assert identity(config_of(arm="a", kernels="on")) == identity(config_of()) != identity(config_of(seed=3))


def test_of_a_step_logged_again_the_last_counts(run: Run) -> None:
    logged = [(8, 3.0), (16, 2.0), (24, 9.0), (16, 1.0)]
    lines = [{"step": step, "loss": loss, **COUNTS} for step, loss in logged]
    cut = '{"step": 32, "lo'
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    assert [(line["step"], line["loss"]) for line in run.metrics()] == [(8, 3.0), (16, 1.0), (24, 9.0)]
    assert run.drop_metrics(after=16) == run.metrics() == [lines[0], lines[3]]
    assert len(run.metrics_path.read_text().splitlines()) == 2  # the others and the cut line are gone


def test_runs_are_listed_by_name_and_other_folders_are_none(run: Run) -> None:
    runs = run.folder.parent
    started = Run(runs / "baseline-s0")
    started.write_config(config_of(), {"folder": "", "fingerprint": ""})
    (runs / ".together-0123").mkdir()  # a sweep's shared checkpoints
    (runs / "sweep.csv").write_text("")
    assert all_runs(runs) == [started, run] and finished_runs(runs) == [run]
    assert all_runs(runs / "nothing") == []


def test_a_profile_is_the_one_extracted_last_and_nothing_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile auto: expected .*auto\.json, found none; run `hafs extract`, or"):
        profile_folder(tmp_path, "auto")
    with pytest.raises(UserError, match=r"profile 'cpu': expected a folder .*, found no profile's folder; run"):
        profile_folder(tmp_path, "cpu")
    (tmp_path / "offline" / "store").mkdir(parents=True)
    with pytest.raises(UserError, match=r"found offline; did you mean 'offline'\?; run `hafs extract`, or"):
        profile_folder(tmp_path, "ofline")
    write_json(tmp_path / "auto.json", {"profile": "offline", "reason": "a test"})
    assert profile_folder(tmp_path, "auto") == profile_folder(tmp_path, "offline") == tmp_path / "offline"
    write_json(tmp_path / "auto.json", {"reason": "no name"})
    with pytest.raises(UserError, match=r"profile '': expected a folder"):
        profile_folder(tmp_path, "auto")


@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl"])
def test_a_flipped_digit_is_noticed(tmp_path: Path, name: str) -> None:
    run = finished_run(tmp_path / "baseline-s0", logged_steps=2)
    run.metrics_path.write_text("".join(sealed_line({"step": step, "fvu": 0.25, **COUNTS}) for step in (8, 16)))
    readers = {"config.json": run.config, "run.json": run.summary, "metrics.jsonl": run.metrics}
    readers[name]()
    whole = (run.folder / name).read_text()
    old, new = ("0.25", "0.26") if "0.25" in whole else ('"k": 3', '"k": 2')
    (run.folder / name).write_text(whole.replace(old, new, 1))
    with pytest.raises(UserError, match=f"{name}.* is damaged or was edited"):
        readers[name]()
    (run.folder / name).write_text(whole)
    readers[name]()
    run.metrics_path.write_text(run.metrics_path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="expected the 2 steps that the finished run logged, found 1"):
        run.metrics()


def test_an_edited_record_is_read_once_its_checksum_is_removed(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "baseline-s0")
    values = json.loads(run.config_path.read_text())
    values["config"]["batch_size"] = 128
    run.config_path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="remove the key sha256_of_above to use it as it is"):
        run.config()
    del values["sha256_of_above"]
    run.config_path.write_text(json.dumps(values))
    assert run.config().batch_size == 128
