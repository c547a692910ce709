"""Trainings of two processes, which meet over loopback: what one process trains, signals, deaths, refusals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hafs_jax.cli import main
from hafs_jax.runs import Run
from hafs_jax.training.checkpoint import load_checkpoint
from tests.support.stores import planted, write_store

ROOT = Path(__file__).parents[3]
D, ROWS, STEPS = 16, 1000, 32
FLAGS = {
    "--profile": "tiny",
    "--arch": "topk",
    "--tokens": str(STEPS * 40),
    "--batch-size": "40",
    "--sae.k": "3",
    "--sae.n-latents": "24",
    "--steps-per-dispatch": "2",
    "--checkpoint-every-steps": "8",
    "--log-every-steps": "1",
}
MEASURED = ("--evaluate-every-steps", "16", "--heldout-rows", "48")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `artifacts` folder with stores, and the run `alone` of one process."""
    out = tmp_path_factory.mktemp("artifacts")
    for split, rows in (("train", ROWS), ("heldout", 64)):
        write_store(out / "tiny" / "store" / split, planted(rows, D, 20, 3)[0], "float16", shard_rows=170)
    main(arguments(out, "alone", *MEASURED))
    return out


def arguments(out: Path, tag: str, *extra: str) -> list[str]:
    return ["train", "--out", str(out), "--tag", tag, *[text for pair in FLAGS.items() for text in pair], *extra]


def run_of(out: Path, tag: str) -> Run:
    return Run(out / "tiny" / "runs" / f"baseline-topk-s0-{tag}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def processes(*commands: list[str]) -> list[subprocess.Popen]:
    """Processes of `tests.support.one_host` with these arguments, to be ended by `ends`."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.one_host", *command],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command in commands
    ]  # fmt: skip


def pair(arguments: list[str], *options: dict[str, Any]) -> list[subprocess.Popen]:
    """Two processes of one training; `options` of each are those of `tests.support.one_host`."""
    port = free_port()
    flags = [["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(index)] for index in range(2)]
    return processes(*[[json.dumps(one), *arguments, *own] for one, own in zip(options, flags, strict=True)])


def ends(started: list[subprocess.Popen]) -> list[tuple[int, list[str], list[str]]]:
    """The exit code and the lines of output and errors of each process, without those of the library Gloo."""
    found = []
    try:
        for process in started:
            texts = process.communicate(timeout=120)
            out, err = ([line for line in text.splitlines() if "[Gloo]" not in line and line] for text in texts)
            found.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return found


def same_weights(one: Run, other: Run) -> None:
    """Asserts that the last checkpoints of both runs hold the same numbers."""
    states = [load_checkpoint(run.checkpoints, run.config(), D)[0] for run in (one, other)]
    for (path, expected), value in zip(
        jax.tree_util.tree_leaves_with_path(states[0].replace(key=jax.random.key_data(states[0].key))),
        jax.tree.leaves(states[1].replace(key=jax.random.key_data(states[1].key))),
        strict=True,
    ):
        np.testing.assert_allclose(value, expected, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


def logged(run: Run) -> int:
    return len(run.metrics_path.read_text().splitlines()) if run.metrics_path.exists() else 0


def wait_for_steps(run: Run, steps: int, started: list[subprocess.Popen]) -> None:
    until = time.monotonic() + 120
    while logged(run) < steps:
        assert time.monotonic() < until and all(process.poll() is None for process in started), ends(started)
        time.sleep(0.02)


def test_two_processes_train_what_one_does(out: Path) -> None:
    """The weights are those of one process; each file has one writer; each process reads half of the rows."""
    (code, said, errors), (other_code, other_said, other_errors) = ends(pair(arguments(out, "two", *MEASURED), {}, {}))
    assert (code, other_code) == (0, 0), (errors, other_errors)
    run, alone = run_of(out, "two"), run_of(out, "alone")
    same_weights(alone, run)
    assert [record["step"] for record in run.metrics()] == [record["step"] for record in alone.metrics()]
    assert logged(run) == len(run.metrics())
    for record, expected in zip(run.metrics(), alone.metrics(), strict=True):
        assert record["fvu"] == pytest.approx(expected["fvu"], abs=1e-5)
    assert run.summary().best == pytest.approx(alone.summary().best, abs=1e-5)

    assert len(said) == 4 and len(other_said) == 1 and not other_errors  # the last line is for this test
    first, second = json.loads(said[-1]), json.loads(other_said[-1])
    inside = [Path(path).relative_to(run.folder).parts[0] for path in second["written"] if str(run.folder) in path]
    assert set(inside) <= {"checkpoints", "best"}
    assert any(str(run.metrics_path) in path for path in first["written"])

    total = STEPS * 40 * D * 2
    assert first["taken"] + second["taken"] == total
    assert max(first["taken"], second["taken"]) <= 0.55 * total
    shards = [[name for name in seen["hashed"] if name.startswith("train/shard")] for seen in (first, second)]
    assert sorted(shards[0] + shards[1]) == [f"train/shard-{number:05d}.npy" for number in range(6)]


def test_a_run_goes_on_with_other_processes_after_signals_and_deaths(out: Path) -> None:
    """Deaths of either process, a signal to the second, one process, two again: the weights are those of one go."""
    run, slow = run_of(out, "chain"), {"dispatch_seconds": 0.3}
    for dead, steps in ((1, 9), (0, 17)):
        started = pair(arguments(out, "chain"), slow, slow)
        wait_for_steps(run, steps, started)
        started[dead].kill()
        begin = time.monotonic()
        code, _, errors = ends(started)[1 - dead]
        assert code == 1
        assert errors[-1].startswith(f"error: process {dead} has died (")
        assert [line for line in errors if "row/s" not in line] == errors[-1:]
        assert time.monotonic() - begin < 12

    started = pair(arguments(out, "chain"), slow, slow)
    wait_for_steps(run, 19, started)
    started[1].send_signal(signal.SIGTERM)
    (code, _, errors), (other_code, _, other_errors) = ends(started)
    assert (code, other_code) == (143, 143), (errors, other_errors)
    assert errors[-1].startswith("stopped and checkpointed") and not other_errors
    saved = sorted(int(path.name) for path in run.checkpoints.iterdir())
    assert saved[-1] == logged(run) < STEPS

    started = processes([json.dumps(slow), *arguments(out, "chain")])
    wait_for_steps(run, saved[-1] + 2, started)
    started[0].send_signal(signal.SIGINT)
    assert ends(started)[0][0] == 130

    for code, _, errors in ends(pair(arguments(out, "chain"), {}, {})):
        assert code == 0, errors
    same_weights(run_of(out, "alone"), run)
    assert logged(run) == STEPS


def test_processes_of_other_code_are_refused(out: Path) -> None:
    for code, _, errors in ends(pair(arguments(out, "code"), {"code": {"jax": "1"}}, {"code": {"jax": "2"}})):
        assert code == 2
        (line,) = errors
        assert line.startswith("error: expected the same on all 2 processes, found jax 1 on process 0 and 2 on process")
    assert not run_of(out, "code").folder.exists()


def test_processes_that_do_not_fit_are_refused_on_all(out: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", planted(ROWS, D, 20, 3, seed=1)[0], "float16", shard_rows=170)
    store = str(out / "tiny" / "store" / "train")
    damaged = tmp_path / "damaged"
    shutil.copytree(store, damaged)
    os.truncate(damaged / "shard-00001.npy", 1000)
    plain = arguments(out, "refused")
    elsewhere = ["--out", str(tmp_path), "--store", store]
    cases: list[tuple[list[str], list[str], str]] = [
        ([], ["--lr", "0.5"], "config.optimizer.learning_rate 0.0"),
        ([], ["--force"], "found force False on process 0 and True on process 1"),
        (["--store", store], ["--store", str(other)], "found store "),
        (["--store", store], elsewhere, "expected the folder that process 0 writes to, found another one"),
        (["--mesh", "data=3"], ["--mesh", "data=3"], "--mesh data=3: expected a divisor"),
        (["--store", store], ["--store", str(damaged)], "shard-00001.npy"),  # found by process 1 alone
    ]
    port = free_port()
    commands = [
        json.dumps({"port": port, "index": index, "cases": [[*plain, *case[index]] for case in cases]})
        for index in range(2)
    ]
    found = []
    for code, said, errors in ends(processes(*[[command] for command in commands])):
        assert code == 0, errors
        found.append(json.loads(said[-1]))
    for (_, _, expected), *of_each in zip(cases, *found, strict=True):
        for code, said in of_each:
            assert code == 2, said
            assert expected in said and said.count("\n") == 1
    assert "error: process 1: " in found[0][-1][1]
    assert not run_of(out, "refused").folder.exists()
    assert not list((out / "tiny" / "runs").glob(".shared-*"))
