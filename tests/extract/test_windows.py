"""Rolling stores: windows that are made ahead of a training and removed behind it, whatever is killed on the way."""

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hafs_extract import run
from hafs_extract.config import ExtractConfig, parse_source
from hafs_extract.profiles import PYTHIA70M, resolve
from hafs_extract.windows import Windows
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of
from hafs_jax.presets import preset, with_fields
from hafs_jax.store.reader import Store
from hafs_jax.store.rolling.windows import Rolling, Wanted, rolling_at, window_rows
from hafs_jax.store.shuffle import spill_record
from hafs_jax.store.verify import verify
from hafs_jax.training.checkpoint import load_checkpoint
from hafs_jax.training.rows import rolling as batches_module
from hafs_jax.training.rows.rolling import RollingBatches
from hafs_jax.training.train import train
from tests.support.tiny_models import save_model, save_wikitext

RESOLVED = resolve("pythia70m")
B = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    folder = tmp_path_factory.mktemp("inputs")
    model, text = save_model(folder / "m"), save_wikitext(folder / "w", 60)
    fields = {"model": str(model), "sources": (parse_source(f"wikitext={text}", PYTHIA70M.sources),)}
    fields |= {"context_length": 17, "shard_rows": 200, "batch_tokens": 256, "dtype": "float32"}
    return dataclasses.replace(PYTHIA70M, heldout_fraction=0.2, norm_multiple=1.1, **fields)


def _extract(config: ExtractConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store `train`, without any window but the first."""
    with monkeypatch.context() as patch:
        patch.setattr(run.Windows, "run", lambda self: None)
        ((_, folders),) = run.extract(config, RESOLVED, out).items()
    return folders["train"]


@pytest.fixture
def stored(config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store with all rows."""
    return _extract(config, tmp_path / "stored", monkeypatch)


@pytest.fixture
def windowed(
    config: ExtractConfig, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ExtractConfig, Rolling]:
    """The same text in four windows or so."""
    smaller = _in_windows(config, stored)
    rolling = rolling_at(_extract(smaller, tmp_path / "windowed", monkeypatch))
    assert rolling is not None and rolling.windows >= 4
    return smaller, rolling


def _in_windows(config: ExtractConfig, stored: Path) -> ExtractConfig:
    """The config with room for a fifth of the rows five times, whereas all need the room of 5.2 fifths."""
    manifest = Store(stored).manifest
    rows = manifest.rows + manifest.norm_filter.dropped_rows
    size = spill_record([(manifest.d_model, config.dtype)]).itemsize
    return dataclasses.replace(config, window_gb=0.95 * rows * size / 1e9)


@contextmanager
def _making(config: ExtractConfig, rolling: Rolling) -> Iterator[list[int]]:
    """Makes the windows that are asked for in a thread, as an extraction beside the training does; their numbers."""
    made: list[int] = []

    class Noted(Windows):
        def make(self, window: int) -> None:
            made.append(window)
            super().make(window)

    maker = threading.Thread(target=Noted(config, rolling).run, daemon=True)
    maker.start()
    yield made
    Rolling(rolling.train).ask(Wanted(finished=True))
    maker.join(30)
    assert not maker.is_alive()


def _contents(stores: list[Path]) -> np.ndarray:
    """All rows of the stores, sorted."""
    rows = np.concatenate(
        [store.read(shard) for store in map(Store, stores) for shard in range(len(store.shard_sizes))]
    )
    return rows[np.lexsort(rows.T)]


def test_windows_hold_the_rows_of_the_one_store_and_verify(
    config: ExtractConfig, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_row = dataclasses.replace(_in_windows(config, stored), norm_multiple=None)
    train_store = _extract(every_row, tmp_path / "out", monkeypatch)
    whole = _extract(dataclasses.replace(every_row, window_gb=None), tmp_path / "whole", monkeypatch)
    rolling = Rolling(train_store)
    maker = Windows(every_row, rolling)
    for window in range(1, rolling.windows):
        maker.make(window)
    places = [rolling.place(window) for window in range(rolling.windows)]
    assert [verify(place) for place in places] == [[]] * len(places)
    assert [len(Store(place)) for place in places] == list(rolling.ledger.rows)
    np.testing.assert_allclose(_contents(places), _contents([whole]), atol=1e-5)  # batches of other contexts
    documents = [record["sha256"] for place in places for record in Store(place).documents()]
    assert documents == [record["sha256"] for record in Store(whole).documents()]


def test_a_window_as_large_as_the_data_is_the_ordinary_store(
    config: ExtractConfig, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_store = _extract(dataclasses.replace(config, window_gb=1), tmp_path / "out", monkeypatch)
    assert rolling_at(train_store) is None and not (train_store.parent / "rolling").exists()
    names = sorted(path.name for path in stored.iterdir() if path.suffix in (".npy", ".jsonl"))
    assert [sha256_of(train_store / name) for name in names] == [sha256_of(stored / name) for name in names]


def test_a_window_is_the_same_made_again_and_after_a_kill(windowed, monkeypatch: pytest.MonkeyPatch) -> None:
    config, rolling = windowed
    maker = Windows(config, rolling)
    maker.make(2)
    first = {path.name: sha256_of(path) for path in rolling.place(2).iterdir() if path.name != "timing.json"}
    rolling.remove(2)
    assert not rolling.is_made(2) and not list(rolling.folder.glob(".old*"))
    from hafs_extract import windows

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(windows, "write_stores", killed)
        maker.make(2)
    assert (maker.making / "journal.json").exists()
    Windows(config, rolling).make(2)
    assert {path.name: sha256_of(path) for path in rolling.place(2).iterdir()} == first
    assert not maker.making.exists()


def _config(**changes: object):
    fields = {"sae": {"n_latents": 16, "k": 3}, "batch_size": B, "seed": 1, "steps_per_dispatch": 2, "passes": 1.6}
    return with_fields(preset("baseline", "topk"), {**fields, "checkpoint_every_steps": 4, **changes})


def _weights(run_made) -> np.ndarray:
    state, _ = load_checkpoint(run_made.checkpoints, run_made.config(), *run_made.widths())
    return np.asarray(state.weights()["W_dec"])


def test_training_asks_for_windows_removes_them_and_resumes_exactly(windowed, tmp_path: Path) -> None:
    config, rolling = windowed
    most = 0

    def measured(*_: object) -> None:
        nonlocal most
        most = max(most, len(rolling.on_disk()))

    with _making(config, rolling) as made:
        whole = train(_config(log_every_steps=1), rolling.train, tmp_path / "a", on_metrics=measured, progress=False)
    count = rolling.windows
    in_turn = itertools.islice(itertools.cycle(range(1, count)), len(made))
    assert made == list(in_turn) and len(made) >= count  # into the second pass
    assert most <= 3 and rolling.on_disk() == []

    class Killed(Exception):
        pass

    def kill(step: int, _: object) -> None:
        if step >= 11:
            raise Killed

    with _making(config, rolling) as made, pytest.raises(Killed):
        train(_config(log_every_steps=1), rolling.train, tmp_path / "b", on_metrics=kill, progress=False)
    for window in rolling.on_disk():  # even where a fallback needs a window that is gone
        shutil.rmtree(rolling.place(window))
    with _making(config, rolling):
        resumed = train(_config(log_every_steps=1), rolling.train, tmp_path / "b", progress=False)
    assert whole.summary().steps == resumed.summary().steps
    np.testing.assert_array_equal(_weights(whole), _weights(resumed))


def test_batches_are_those_of_the_ordinary_store_in_the_first_window(windowed) -> None:
    _, rolling = windowed
    rows = RollingBatches(Store(rolling.train), rolling, B, seed=5, steps=2)
    (block,) = next(iter(rows.dispatches(0, 2, 2)))
    from hafs_jax.training.data import Batches

    (expected,) = next(iter(Batches(Store(rolling.train), B, 5).dispatches(0, 2, 2)))
    np.testing.assert_array_equal(block, expected)


def test_a_training_without_an_extraction_beside_it_says_so(
    windowed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "_PATIENCE_SECONDS", 0.2)
    _, rolling = windowed
    with pytest.raises(UserError, match="no extraction is at work that would make it"):
        train(_config(), rolling.train, tmp_path / "runs", progress=False)


def test_two_trainings_do_not_share_windows(windowed) -> None:
    _, rolling = windowed
    store = Store(rolling.train)
    first = RollingBatches(store, rolling, B, 0).dispatches(0, 1, 1)
    next(first)
    with pytest.raises(UserError, match="training"):
        next(RollingBatches(store, rolling, B, 0).dispatches(0, 1, 1))
    first.close()


def test_a_stop_while_waiting_for_a_window_ends_the_wait(windowed) -> None:
    _, rolling = windowed
    waiting = RollingBatches(Store(rolling.train), rolling, B, 0)
    threading.Timer(0.3, waiting.close).start()
    began = time.monotonic()
    with pytest.raises(UserError, match="ended while it waited"):
        list(waiting.dispatches(0, 1_000, 1))
    assert time.monotonic() - began < 5


def test_sizes_of_windows() -> None:
    assert window_rows(None, 10**9, 100) == [10**9] and window_rows(1, 10**7, 100) == [10**7]
    sizes = window_rows(1, 10**7 + 1, 100)
    assert sum(sizes) == 10**7 + 1 and max(sizes) * 100 * 5.2 <= 1e9 and max(sizes) - min(sizes) <= 1
    with pytest.raises(UserError, match="window_gb=1e-09: expected room for a row of 100 bytes"):
        window_rows(1e-9, 10, 100)


def test_several_hook_points_have_no_windows(config: ExtractConfig) -> None:
    with pytest.raises(UserError, match="one hook point"):
        dataclasses.replace(config, window_gb=1, hook_point="blocks.1.hook_resid_post,blocks.2.hook_resid_post")


def test_one_command_extracts_and_trains(config: ExtractConfig, stored: Path, tmp_path: Path) -> None:
    """`hafs train --stream`: the store is too large for its windows; the child ends with the training."""
    source, gigabytes = config.sources[0].path, _in_windows(config, stored).window_gb
    flags = f"--model {config.model} --text wikitext={source} --context-length 17 --shard-rows 200 --batch-tokens 256"
    flags += f" --dtype float32 --heldout-fraction 0.2 --norm-multiple 1.1 --window-gb {gigabytes}"
    sae = ["--arch", "topk", "--sae.k", "3", "--sae.n-latents", "16", "--batch-size", str(B), "--seed", "1"]
    place = ["--out", str(tmp_path / "out"), "--profile", "pythia70m"]
    command = [sys.executable, "-m", "hafs_jax", "train", *place, *sae, "--passes", "1.6", "--stream", flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "training rows in" in ended.stderr and "window 1 of" not in ended.stderr
    runs = tmp_path / "out" / "pythia70m" / "runs"
    assert ended.stdout.strip().splitlines()[-1].endswith(str(runs / "baseline-topk-s1"))
    rolling = rolling_at(runs.parent / "store" / "train")
    assert rolling is not None and rolling.wanted().finished and rolling.on_disk() == []
    failed = subprocess.run(
        [*command[:-1], flags.replace("--window-gb", "--window")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert failed.returncode == 2 and "unknown argument" in failed.stderr and "Traceback" not in failed.stderr
