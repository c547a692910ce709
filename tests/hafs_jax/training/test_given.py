"""What `train` takes as data: arrays of any library, files, iterators; what it refuses, in one line."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from hafs_jax.api import load
from hafs_jax.base.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run
from hafs_jax.store.given import array_store, is_array, store_folder
from hafs_jax.store.reader import Store
from hafs_jax.store.stream import Stream, StreamBatches
from hafs_jax.training.train import train
from tests.support.stores import planted, write_store

D, B, HEAD = 6, 20, 50
ROWS = planted(700, D, 9, 2)[0]


def config(**fields: Any) -> TrainConfig:
    small = {"sae.n_latents": 11, "k": 2, "tokens": 400, "batch_size": B, "heldout_rows": HEAD}
    return preset("baseline", "topk", **{**small, **fields})


def batches(size: int = 37) -> Iterator[np.ndarray]:
    for start in range(0, len(ROWS), size):
        yield ROWS[start : start + size]


class Loader:
    """An object that gives new iterators."""

    def __init__(self, rows: np.ndarray = ROWS) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.array_split(self.rows, 7))


def weights(run: Run) -> str:
    params = load(run.folder).params
    return hashlib.sha256(b"".join(np.asarray(params[name]).tobytes() for name in sorted(params))).hexdigest()


def test_an_array_of_any_library_or_a_file_finds_the_same_store(tmp_path: Path) -> None:
    np.save(tmp_path / "acts.npy", ROWS)
    safetensors.numpy.save_file({"acts": ROWS, "norms": ROWS[:, 0].copy()}, tmp_path / "acts.safetensors")
    given = [
        ROWS, ROWS.reshape(7, 100, D), jnp.asarray(ROWS), torch.tensor(ROWS, requires_grad=True),
        [ROWS[:30], ROWS[30:]],
        ROWS.tolist(), tmp_path / "acts.npy", str(tmp_path / "acts.safetensors"), [tmp_path / "acts.npy"],
    ]  # fmt: skip
    places = set()
    for data in given:
        assert is_array(data) and store_folder(data) is None
        places.add(array_store(data, None, tmp_path / "runs"))
    ((place, target),) = places
    assert target is None and place.parent.parent.parent == tmp_path / "runs"
    stored = np.concatenate([Store(place.parent / split).read(0) for split in ("train", "heldout")])
    np.testing.assert_array_equal(np.sort(stored, 0), np.sort(ROWS, 0))
    assert array_store(ROWS[1:], None, tmp_path / "runs")[0] != place
    assert array_store(ROWS, ROWS[:, :2], tmp_path / "runs")[1] is not None
    rounded = array_store(torch.tensor(ROWS).bfloat16(), None, tmp_path / "runs")[0]
    assert Store(rounded).manifest.d_model == D and rounded != place


def test_training_on_an_array_or_its_store_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(config(), ROWS, progress=False)
    assert run.folder == Path("runs/baseline-topk-s0") and run.summary().steps == 16
    assert train(config(), torch.tensor(ROWS), progress=False).folder == run.folder  # finished already
    (place,) = Path("runs").glob("data-*")
    again = train(config(), place / "store" / "train", progress=False)
    assert again.folder == place / "runs" / "baseline-topk-s0" and weights(again) == weights(run)
    assert (
        train(config(tag="b"), place, "runs", progress=False).summary().store_fingerprint
        == Store(place / "store" / "train").manifest.fingerprint
    )
    with pytest.raises(UserError, match=r"was trained on another store .* pass force=True to replace it"):
        train(config(), ROWS[5:], progress=False)


@pytest.mark.parametrize("size", [1, 7, B, 37, 700])
def test_a_streams_batches_are_its_rows_in_order_after_the_head(size: int) -> None:
    whole = StreamBatches(Stream(batches(size), HEAD), B)
    found = np.concatenate([block.reshape(-1, D) for (block,) in whole.dispatches(0, 32, 8)])
    np.testing.assert_array_equal(found, ROWS[HEAD : HEAD + 32 * B])
    resumed = StreamBatches(Stream(batches(size), HEAD), B)
    found = np.concatenate([block.reshape(-1, D) for (block,) in resumed.dispatches(11, 32, 8)])
    np.testing.assert_array_equal(found, ROWS[HEAD + 11 * B : HEAD + 32 * B])
    stream = Stream(batches(size), HEAD)
    np.testing.assert_allclose(stream.manifest.mean, ROWS[:HEAD].mean(0), rtol=1e-5)
    assert stream.manifest.fingerprint == Stream(Loader(), HEAD).manifest.fingerprint
    assert stream.manifest.fingerprint != Stream(Loader(ROWS + 1), HEAD).manifest.fingerprint


def test_an_object_that_gives_iterators_is_read_again_and_a_generator_is_not() -> None:
    repeated = np.tile(ROWS[HEAD:], (3, 1))
    for start in (3, 40, 70):  # in the first pass, the second and the third
        blocks = StreamBatches(Stream(Loader(), HEAD), B).dispatches(start, 90, 8)
        found = np.concatenate([block.reshape(-1, D) for (block,) in blocks])
        np.testing.assert_array_equal(found, repeated[start * B : 90 * B])
    with pytest.raises(UserError, match=r"the iterator ended after 650 rows of training, expected 800; give more rows"):
        list(StreamBatches(Stream(batches(), HEAD), B).dispatches(0, 40, 8))


def test_training_on_an_iterator_resumes_to_the_same_bits(tmp_path: Path) -> None:
    asked = config(tokens=640, evaluate_every_steps=16, checkpoint_every_steps=8, log_every_steps=4)

    class Stopped(Exception):
        pass

    def stop(step: int, _: dict) -> None:
        if step >= 20:
            raise Stopped

    seen: list[int] = []
    whole = train(asked, batches(), tmp_path / "a", progress=False, on_metrics=lambda step, _: seen.append(step))
    with pytest.raises(Stopped):
        train(asked, batches(), tmp_path / "b", progress=False, on_metrics=stop)
    resumed = train(asked, Loader(), tmp_path / "b", progress=False)
    assert weights(resumed) == weights(whole) and seen == list(range(4, 33, 4))
    assert whole.summary().final["heldout_fvu"] < 1 and whole.store_record()["folder"] == "(an iterator)"
    with pytest.raises(UserError, match="was trained on another store"):
        train(asked, Loader(ROWS + 1), tmp_path / "b", progress=False)


def yielding(*arrays: Any) -> Callable[[], Iterator[Any]]:
    return lambda: iter(arrays)


def spoilt() -> np.ndarray:
    rows = ROWS.copy()
    rows[60, 2] = np.nan
    return rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: 3, "expected data: a store's folder, an array .*; found a int"),
        (lambda: {"acts": ROWS}, "found a dict"),
        (lambda: ROWS[0], r"expected activations \[rows, D\], found \[6\] float32"),
        (lambda: ROWS.astype(np.int32) > 0, "found values of dtype bool; convert them to float32"),
        (spoilt, "row 60: value nan in dimension 2 is not finite; leave such rows out"),
        (lambda: ROWS[:15], r"holds \d+ rows, fewer than batch_size=20"),
        (lambda: ROWS[:0], "expected rows of activations, found none"),
        (lambda: [ROWS, ROWS[:, :3]], r"array 1: expected D=6 as in array 0, found \[700, 3\]"),
        (lambda: "nowhere.npy", "expected an npy file at nowhere.npy, found no such file"),
        (lambda: "nowhere.safetensors", "expected a safetensors file of activations at nowhere.safetensors, found no"),
        (lambda: "nowhere", "expected an activation store's manifest .*nowhere"),
        (yielding(ROWS[:60], ROWS[:, :3]), r"as batch 1 of the iterator with D=6 as before, found shape \[700, 3\]"),
        (yielding(ROWS[:30], spoilt()), "batch 1 of the iterator, found a value in its row 60 that is not finite"),
        (yielding(ROWS[:30]), r"expected over heldout_rows=50 from the iterator, .* found 30; give more rows"),
        (yielding((ROWS, ROWS)), "as batch 0 of the iterator, found a tuple of 2; yield one array"),
        (yielding("rows"), "as batch 0 of the iterator, found a str of 4"),
        (yielding(ROWS[0]), r"as batch 0 of the iterator, found shape \[6\]"),
        (yielding(ROWS[:60]), "the iterator ended after 10 rows of training, expected 320"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_line(
    data: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        train(config(), data(), progress=False)
    assert "\n" not in str(error.value) and "--" not in str(error.value)


def test_an_iterator_needs_tokens_and_has_no_target(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected tokens, the rows to train on: an iterator does not say how many"):
        train(with_fields(config(), tokens=None), batches(), tmp_path, progress=False)
    with pytest.raises(UserError, match="target: expected none with an iterator"):
        train(config(), batches(), tmp_path, target=ROWS, progress=False)
    store = write_store(tmp_path / "store" / "train", ROWS)
    with pytest.raises(UserError, match="target: expected a store's folder, as the data are, found a ndarray"):
        train(config(), store, tmp_path, target=ROWS, progress=False)
    with pytest.raises(UserError, match="target: expected an array, as the data are, found a"):
        train(config(), ROWS, tmp_path, target=store, progress=False)
