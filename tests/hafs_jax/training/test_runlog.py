"""Where a run's metrics go: training is the same with any sink, a resume goes on in it, and what it raises passes."""

import json
import logging
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run
from hafs_jax.training import programs
from hafs_jax.training.checkpoint import load_checkpoint
from hafs_jax.training.sweeps import sweep
from hafs_jax.training.train import open_stores, train
from tests.support.stores import planted, write_store

D, STEPS = 8, 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("sinks") / "store" / "train", planted(600, D, 10, 2)[0])


@pytest.fixture(scope="module")
def silent(store: Path) -> Run:
    """A run without any sink."""
    return train(small(), store, store.parent / "silent")


def small(**changes: Any) -> TrainConfig:
    settings = {"tokens": STEPS * 20, "batch_size": 20, "sae": {"n_latents": 12, "k": 2}, "log_every_steps": 2}
    return with_fields(preset("strict"), {**settings, "checkpoint_every_steps": 16, **changes})


def state(run: Run) -> list[bytes]:
    """The bytes of every leaf of the last checkpoint."""
    found, scale = load_checkpoint(run.checkpoints, run.config(), D)
    return [
        np.asarray(leaf).tobytes()
        for leaf in jax.tree.leaves((found.replace(key=jax.random.key_data(found.key)), scale))
    ]


def wandb_steps(run: Run) -> list[dict[str, Any]]:
    """The logged steps that Weights & Biases' own files of the run hold, in the order of its attempts.

    Its process goes on writing after a run has been finished: this waits for the last record of each file.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(run.folder.glob("wandb/offline-run-*/*.wandb")):
        deadline, records = time.monotonic() + 60, list[Any]()
        while not (records and records[-1].HasField("exit")):
            assert time.monotonic() < deadline, f"{path} has no last record"
            time.sleep(0.05)
            records = [Record.FromString(data) for data in leveldb_records(path.read_bytes()[7:])]
        for items in (record.history.item for record in records if record.HasField("history")):
            found.append({(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items})
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: pieces in blocks of 32 KiB, each after checksum, length and kind.

    The 7 bytes of a file's own header count into its first block.
    """
    at, whole = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + 7) % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            return  # not yet written to its end
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or the last of its pieces
            yield whole
            whole = b""


def test_sinks_do_not_change_training(
    store: Path, silent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    calls: list[tuple[int, dict]] = []

    def on_metrics(step: int, values: dict) -> None:
        calls.append((step, dict(values)))
        values.clear()  # a copy: nothing of the run's

    run = train(small(tensorboard=True, wandb="tests"), store, tmp_path, on_metrics=on_metrics)
    assert state(run) == state(silent)
    records = run.metrics()
    assert [(step, values["step"]) for step, values in calls] == [(step, step) for step in range(2, STEPS + 1, 2)]
    assert [values for _, values in calls] == records
    assert run.result()["final"] == records[-1]
    timed = {"seconds", "tokens_per_second"}
    for record, other in zip(records, silent.metrics(), strict=True):
        assert {name: record[name] for name in set(record) - timed} == {
            name: other[name] for name in set(other) - timed
        }
    (events,) = (run.folder / "tensorboard").glob("events*")
    assert events.stat().st_size > 1000
    theirs = wandb_steps(run)
    assert [values["_step"] for values in theirs] == [record["step"] for record in records]
    for values, record in zip(theirs, records, strict=True):
        assert {name: values[name] for name in record} == record


def test_a_resumed_run_goes_on_in_the_same_wandb_run(
    store: Path, silent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")

    class Broken(Exception):
        pass

    def on_metrics(step: int, values: dict) -> None:
        if step == 26:
            raise Broken(step)

    config = small(wandb="tests", steps_per_dispatch=2)
    with pytest.raises(Broken, match="26") as raised:
        train(config, store, tmp_path, on_metrics=on_metrics)
    assert raised.traceback[-1].name == "on_metrics"
    run = Run(tmp_path / "strict-s0")
    assert not run.finished() and run.metrics()[-1]["step"] == 26
    first = [values["_step"] for values in wandb_steps(run)]
    assert first == list(range(2, 27, 2))
    noted = json.loads((run.folder / "wandb.json").read_text())["id"]

    train(config, store, tmp_path)
    assert state(run) == state(silent)
    assert [values["_step"] for values in wandb_steps(run)] == first + list(range(18, STEPS + 1, 2))
    attempts = [path.name for path in run.folder.glob("wandb/offline-run-*")]
    assert len(attempts) == 2 and all(f"-{noted}" in name for name in attempts)  # two of one second are numbered


def test_a_sweep_names_the_run_of_each_step(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    calls: list[tuple[str, int, float]] = []
    configs = [small(seed=seed, wandb="tests", log_every_steps=20) for seed in (0, 1)]
    runs, _ = sweep(
        configs,
        open_stores(store),
        tmp_path,
        "vmap",
        on_metrics=lambda name, step, values: calls.append((name, step, values["loss"])),
    )
    expected = [(run.name, step) for step in (20, 40) for run in runs]
    assert [(name, step) for name, step, _ in calls] == expected
    for run in runs:
        assert [record["loss"] for record in run.metrics()] == [loss for name, _, loss in calls if name == run.name]
        assert [values["loss"] for values in wandb_steps(run)] == [record["loss"] for record in run.metrics()]


@pytest.mark.parametrize(("sink", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_before_training(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = small(**{sink: True if sink == "tensorboard" else "tests"})
    with pytest.raises(UserError, match=rf"{sink}=.* needs the package {package}: pip install 'hafs-jax\[{sink}\]'"):
        train(config, store, tmp_path)
    assert not Run(tmp_path / "strict-s0").metrics()


def test_a_server_that_takes_no_login_is_one_line(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refused(**_: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(UserError, match=r"wandb='p': api_key not configured \(no-tty\); log in with .* WANDB_MODE"):
        train(small(wandb="p"), store, tmp_path)


def test_bars_and_notes_are_shown_where_they_are_asked_for(
    store: Path, silent: Run, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    def said(name: str, **options: Any) -> str:
        train(small(), store, tmp_path / name, **options)
        return capsys.readouterr().err

    assert said("default") == ""
    assert "strict-s0: 100%" in said("asked", progress=True)
    with caplog.at_level(logging.INFO, "hafs_jax"):
        assert "strict-s0: 100%" in said("noted") and said("hidden", progress=False) == ""
    assert any(message.startswith("strict-s0: batchtopk D=8 F=12 k=2, 40 steps") for message in caplog.messages)


class Noting:
    """A compiled program that notes its calls."""

    def __init__(self, program: Any, events: list[Any]) -> None:
        self._program, self._events = program, events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def __call__(self, *arguments: Any) -> Any:
        self._events.append("dispatch")
        return self._program(*arguments)


def test_metrics_are_read_while_the_next_dispatch_is_computed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those after which the state is saved or measured, which the next dispatch takes the place of."""
    events: list[Any] = []
    monkeypatch.setattr(
        "hafs_jax.training.loop.compile_steps", lambda *args: Noting(programs.compile_steps(*args), events)
    )
    config = small(
        tokens=12 * 20, steps_per_dispatch=2, log_every_steps=2, checkpoint_every_steps=8, coherence_every_steps=100
    )
    train(config, store, tmp_path, on_metrics=lambda step, _: events.append(step))
    assert events == [*["dispatch"] * 2, 2, "dispatch", 4, "dispatch", 6, 8, *["dispatch"] * 2, 10, 12]
