"""Stores made of arrays: every row once, leading back to its file, aligned with its target, whatever befalls."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hafs_extract.cli import main
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of
from hafs_jax.store import arrays, descriptions, npy, shards, shuffle
from hafs_jax.store.arrays import write_array_store
from hafs_jax.store.manifest import read_manifest
from hafs_jax.store.reader import Store, check_aligned
from hafs_jax.store.shuffle import shuffle_keys
from hafs_jax.store.verify import verify
from tests.support.fuzz import Fuzz, damaged

D, TARGET_D, SIZES = 5, 3, (23, 42, 31)
N = sum(SIZES)
SPLITS = ("train", "heldout")
ROOT = Path(arrays.__file__).parents[2]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of float32 activations, [23, 5], [6, 7, 5] and [31, 5]."""
    values = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    parts = np.split(values, np.cumsum(SIZES)[:-1])
    paths = [tmp_path / f"acts-{index}.npy" for index in range(3)]
    for path, part, shape in zip(paths, parts, [(23, D), (6, 7, D), (31, D)], strict=True):
        np.save(path, part.reshape(shape))
    return paths


def _joined(files: list[Path]) -> np.ndarray:
    return np.concatenate([np.load(path).reshape(-1, D) for path in files])


def _all(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a store: activations [N, D] and descriptions [N]."""
    store = Store(folder)
    shards_ = range(len(store.shard_sizes))
    return np.concatenate([store.read(i) for i in shards_]), np.concatenate([store.rows(i) for i in shards_])


def _numbers(rows: np.ndarray) -> np.ndarray:
    """The input's row numbers of stored rows."""
    return np.array([0, *np.cumsum(SIZES)])[rows["source"]] + rows["token"]


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def test_every_row_is_stored_once_in_shuffled_order_and_leads_back_to_its_file(
    files: list[Path], tmp_path: Path
) -> None:
    made = write_array_store(tmp_path / "p", files, heldout_fraction=0.3, shard_rows=20, name="vision", seed=4)
    assert made == {split: tmp_path / "p" / "store" / split for split in SPLITS}
    found, groups = [], []
    for stream, split in enumerate(SPLITS):
        assert verify(made[split]) == []
        manifest, (acts, rows) = read_manifest(made[split]), _all(made[split])
        np.testing.assert_array_equal(acts, _joined(files)[_numbers(rows)])
        np.testing.assert_array_equal(rows["context"], np.argsort(shuffle_keys(4, stream, 0, len(rows))))
        assert (np.diff(np.sort(_numbers(rows))) > 0).all()
        assert manifest.rows == len(rows) and manifest.shards[0].rows == 20 and manifest.split == split
        assert manifest.model.name == "vision" and manifest.model.origin == "array:acts-0.npy,acts-1.npy,acts-2.npy"
        assert not manifest.has_tokens and manifest.hook_point == "array" and manifest.dtype == "float32"
        assert [source.path for source in manifest.sources] == [str(path) for path in files]
        assert [s.documents for s in manifest.sources] == [s.rows for s in manifest.sources]
        norms = np.sqrt((acts.astype(np.float64) ** 2).sum(1))
        median = np.median(norms if split == "train" else np.sqrt((_all(made["train"])[0] ** 2.0).sum(1)))
        assert manifest.norm_filter.median_norm == pytest.approx(median, rel=1e-6)
        lines = Store(made[split]).documents()
        assert [lines[row["document"]]["group"] for row in rows] == _numbers(rows).tolist()
        found += _numbers(rows).tolist()
        groups += [line["group"] for line in lines]
    assert sorted(found) == sorted(groups) == list(range(N))
    assert 0.15 < read_manifest(made["heldout"]).rows / N < 0.45
    assert [path.name for path in (tmp_path / "p").rglob("*") if path.name.startswith(".")] == [".lock"]


@pytest.mark.parametrize("kind", [np.int64, np.int16, np.uint64])
def test_groups_fall_into_one_split_and_are_named(files: list[Path], tmp_path: Path, kind: type) -> None:
    group_N = np.random.default_rng(1).integers(0, 17, N)
    group_N = (group_N * 1000 - (5000 if kind is np.int16 else 0)).astype(kind)
    if kind is np.uint64:
        group_N += np.uint64(2**63)
    made = write_array_store(tmp_path / "p", files, groups=group_N, heldout_fraction=0.3)
    seen = {}
    for split in SPLITS:
        assert verify(made[split]) == []
        rows, lines = _all(made[split])[1], Store(made[split]).documents()
        of_row = [lines[document]["group"] for document in rows["document"]]
        assert of_row == group_N[_numbers(rows)].tolist()
        assert [line["document"] for line in lines] == list(range(len(lines)))
        assert sum(source.documents for source in read_manifest(made[split]).sources) == len(lines) == len(set(of_row))
        seen[split] = set(of_row)
    assert not seen["train"] & seen["heldout"] and seen["train"] | seen["heldout"] == set(group_N.tolist())


def test_targets_are_the_same_rows_in_the_same_order(files: list[Path], tmp_path: Path) -> None:
    target = np.random.default_rng(2).normal(size=(N, TARGET_D)).astype(np.float16)
    parts = [target[:50], target[50:]]  # divided in another place than the activations
    made = write_array_store(tmp_path / "p", files, target=parts, heldout_fraction=0.3, shard_rows=20)
    assert sorted(made) == ["heldout", "target_heldout", "target_train", "train"]
    for split in SPLITS:
        assert verify(made[f"target_{split}"]) == []
        check_aligned(Store(made[split]), Store(made[f"target_{split}"]))
        acts, rows = _all(made[f"target_{split}"])
        np.testing.assert_array_equal(acts, target[_numbers(rows)].astype(np.float32))
        assert made[f"target_{split}"] == tmp_path / "p" / "target" / split
    manifest = read_manifest(made["target_train"])
    assert manifest.dtype == "float16" and manifest.d_model == TARGET_D and manifest.model.origin.startswith("array:")
    assert manifest.norm_filter.median_norm == pytest.approx(
        np.median(np.sqrt((_all(made["target_train"])[0].astype(np.float64) ** 2).sum(1))), rel=1e-6
    )
    with pytest.raises(UserError, match=r"expected the same rows in the same order, found \d+ rows and \d+"):
        check_aligned(Store(made["train"]), Store(made["target_heldout"]))
    again = write_array_store(tmp_path / "q", files, heldout_fraction=0.3, shard_rows=20)
    for split in SPLITS:  # the target changes nothing of the activations' own rows
        assert read_manifest(again[split]).shards == read_manifest(made[split]).shards


def test_stores_of_other_rows_are_not_aligned(files: list[Path], tmp_path: Path) -> None:
    def store(name: str, **more) -> Store:
        return Store(
            write_array_store(tmp_path / name, files, **{"heldout_fraction": 0.3, "shard_rows": 20, **more})["train"]
        )

    first = store("a")
    check_aligned(first, store("b", dtype="float16"))
    with pytest.raises(UserError, match=r"a/store/train and .*c/store/train: .* found shards of 20, .* and of 21, "):
        check_aligned(first, store("c", shard_rows=21))
    other = store("d")
    manifest = read_json(other.folder / "manifest.json", "manifest")
    manifest["shards"][1]["rows_sha256"] = "0" * 64
    (other.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"rows-00001.npy of another checksum \(1 of \d shards differ\); extract both"):
        check_aligned(first, Store(other.folder))


@pytest.mark.parametrize(
    ("given", "asked", "kept"),
    [
        (np.float16, "keep", "float16"),
        (np.float32, "keep", "float32"),
        (np.float64, "keep", "float32"),
        (">f4", "keep", "float32"),
        (np.float32, "bfloat16", "bfloat16"),
        (np.float16, "float32", "float32"),
        (np.float64, "float16", "float16"),
    ],
)
def test_dtypes(tmp_path: Path, given: type, asked: str, kept: str) -> None:
    values = np.random.default_rng(3).normal(size=(61, D)).astype(given)
    made = write_array_store(tmp_path / "p", values, dtype=asked, heldout_fraction=0.4)
    acts, rows = _all(made["train"])
    assert read_manifest(made["train"]).dtype == kept and verify(made["train"]) == []
    tolerance = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24}[kept]
    exact = values[rows["token"]].astype(np.float64)
    assert (np.abs(acts - exact) <= tolerance * np.abs(exact)).all()


def test_blocks_and_buckets_change_no_byte(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group_N = np.arange(N) // 4
    more = {"target": _joined(files)[:, :2].astype(np.float16), "groups": group_N, "heldout_fraction": 0.3}
    write_array_store(tmp_path / "a" / "p", files, **more)
    monkeypatch.setattr(npy, "_BLOCK_BYTES", 4 * D * 4)  # 4 rows
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 500)
    monkeypatch.setattr(descriptions, "_ROWS_AT_ONCE", 7)
    write_array_store(tmp_path / "b" / "p", files, **more)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).normal(size=(150_000, 32)).astype(np.float32)  # 19 MB
    np.save(tmp_path / "acts.npy", values)
    del values
    monkeypatch.setattr(npy, "_BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 1 << 20)
    tracemalloc.start()
    write_array_store(tmp_path / "p", tmp_path / "acts.npy", shard_rows=5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7e6  # measured 4.9e6


def test_a_row_that_cannot_be_stored_is_named(files: list[Path], tmp_path: Path) -> None:
    values = np.load(files[1])
    values[2, 3, 4] = np.nan
    np.save(files[1], values)
    place = rf"{files[1]}: row 17: value nan in dimension 4 is not finite"
    with pytest.raises(UserError, match=place):
        write_array_store(tmp_path / "p", files)
    values[2, 3, 4] = 7e4
    np.save(files[1], values)
    with pytest.raises(UserError, match=r"row 17: value 70000 in dimension 4 does not fit into float16; say dtype='b"):
        write_array_store(tmp_path / "p", files, dtype="float16")
    with pytest.raises(
        UserError, match=r"array 0: row 2: value -1e\+300 in dimension 1 does not fit into float32; sca"
    ):
        write_array_store(tmp_path / "p", np.where(np.arange(60).reshape(20, 3) == 7, -1e300, 1.0))
    with pytest.raises(UserError, match=r"array 1: row 3: value inf in dimension 0 is not finite"):
        target = np.ones((N, 2), np.float32)
        target[53] = np.inf
        write_array_store(tmp_path / "p", _joined(files), target=[target[:50], target[50:]])
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("acts", "more", "message"),
    [
        (
            np.ones((9, 4), np.int32),
            {},
            r"array 0: expected activations in float16, float32 or float64, found \[9, 4\] i",
        ),
        (np.ones(9, np.float32), {}, r"expected activations \[rows, D\], found \[9\] float32; reshape it"),
        (np.ones((0, 4), np.float32), {}, "expected rows of activations, found none"),
        ([], {}, "expected at least one array of activations, found none"),
        ([np.ones((9, 4)), np.ones((9, 5))], {}, r"array 1: expected D=4 as in array 0, found \[9, 5\] float64"),
        (np.ones((9, 4)), {"target": np.ones((8, 4))}, "targets: expected 9 rows, as many as activations, found 8"),
        (np.ones((9, 4)), {"groups": np.ones(9)}, r"groups: expected one integer for each of 9 rows, found \[9\] fl"),
        (
            np.ones((9, 4)),
            {"groups": np.arange(8)},
            r"groups: expected one integer for each of 9 rows, found \[8\] int",
        ),
        (
            np.ones((9, 4)),
            {"groups": np.zeros(9, int)},
            "no row of 9 fell into the (train|heldout) split; give more rows or",
        ),
        (np.ones((9, 4)), {"heldout_fraction": 1.0}, "heldout_fraction=1.0: expected above 0 and below 1"),
        (np.ones((9, 4)), {"seed": -1}, "seed=-1: expected 0 to"),
        (np.ones((9, 4)), {"shard_rows": 0}, "shard_rows=0: expected 1 to"),
        (np.ones((9, 4)), {"dtype": "float64"}, "dtype='float64': expected one of keep, float16"),
        (np.ones((9, 4)), {"name": ""}, "expected a name for the activations"),
        ("nowhere.npy", {}, "expected an npy file at nowhere.npy, found no such file"),
    ],
)
def test_unusable_input_is_one_line(tmp_path: Path, acts: object, more: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_array_store(tmp_path / "p", acts, **more)  # type: ignore[arg-type]
    assert not (tmp_path / "p").exists()


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.ones((9, 4)))
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save(tmp_path / "f.npy", np.asfortranarray(np.ones((3, 4, 5))))
    (tmp_path / "t.npy").write_text("text")
    for name, message in (
        ("a.npz", "found an npz archive"),
        ("o.npy", "found a file that does not open as one"),
        ("t.npy", "found a file that does not open as one"),
        ("f.npy", r"expected C order, found \[3, 4, 5\] float64 in Fortran order"),
    ):
        with pytest.raises(UserError, match=rf"{name}.*{message}"):
            write_array_store(tmp_path / "p", tmp_path / name)
    acts = np.random.default_rng(0).normal(size=(40, 3))
    np.save(tmp_path / "g.npy", np.asfortranarray(acts))  # of two dimensions either order will do
    np.save(tmp_path / "c.npy", acts)
    for name in "gc":
        write_array_store(tmp_path / name, tmp_path / f"{name}.npy", heldout_fraction=0.4)
    g, c = (read_manifest(tmp_path / name / "store" / "train") for name in "gc")
    assert g.fingerprint == c.fingerprint and g.config == c.config


@pytest.mark.parametrize("of", ["activations", "targets"])
def test_rows_far_above_the_median_norm_are_dropped_and_counted(tmp_path: Path, of: str) -> None:
    rng = np.random.default_rng(7)
    acts, target = rng.normal(size=(400, D)).astype(np.float16), rng.normal(size=(400, 3)).astype(np.float16)
    far = [3, 77, 78, 200, 311, 399]
    (acts if of == "activations" else target)[far] = 6e4
    made = write_array_store(tmp_path / "p", acts, target=target, heldout_fraction=0.3, norm_multiple=4.0)
    dropped, stored = 0, []
    for name, folder in made.items():
        manifest, values = read_manifest(folder), target if name.startswith("target") else acts
        assert verify(folder) == [] and manifest.norm_filter.multiple == manifest.config["norm_multiple"] == 4.0
        rows = _all(folder)[1]
        assert not set(far) & set(rows["token"].tolist()) and len(rows) == manifest.rows == manifest.sources[0].rows
        assert manifest.norm_filter.dropped_rows == manifest.sources[0].tokens - manifest.rows
        assert manifest.norm_filter.max_norm == 4 * manifest.norm_filter.median_norm
        assert manifest.variance < 100
        assert manifest.norm_filter.median_norm == pytest.approx(
            np.median(np.linalg.norm(values.astype(np.float64), axis=1)), rel=0.1
        )
        if not name.startswith("target"):
            dropped += manifest.norm_filter.dropped_rows
            stored += rows["token"].tolist()
    assert dropped == len(far) and sorted(stored + far) == list(range(400))
    check_aligned(Store(made["train"]), Store(made["target_train"]))


def test_without_far_rows_the_filter_changes_no_byte(files: list[Path], tmp_path: Path) -> None:
    filtered = write_array_store(tmp_path / "a", files, norm_multiple=1e6, heldout_fraction=0.3)
    plain = write_array_store(tmp_path / "b", files, norm_multiple=None, heldout_fraction=0.3)
    for split, folder in filtered.items():
        here, there = _digests(folder), _digests(plain[split])
        assert {key: value for key, value in here.items() if here[key] != there[key]}.keys() == {"manifest.json"}
        assert read_manifest(plain[split]).norm_filter.max_norm is None
    with pytest.raises(UserError, match=r"was made with norm_multiple=None, not 3.0; pass force=True"):
        write_array_store(tmp_path / "b", files, heldout_fraction=0.3)


def test_a_filter_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    acts = np.zeros((60, 4), np.float32)
    acts[::3] = 1
    with pytest.raises(UserError, match=r"norm_multiple=3: the median norm of the training rows is 0, .* say norm_mul"):
        write_array_store(tmp_path / "p", acts, heldout_fraction=0.3)
    assert read_manifest(write_array_store(tmp_path / "p", acts, norm_multiple=None)["train"]).variance > 0
    with pytest.raises(UserError, match=r"norm_multiple=0.5 drops every row of the train split; raise it"):
        write_array_store(tmp_path / "q", acts + 1 - acts, heldout_fraction=0.3, norm_multiple=0.5)


def test_bfloat16_and_tensors(tmp_path: Path) -> None:
    acts = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", acts.astype(ml_dtypes.bfloat16))
    for given in (tmp_path / "a.npy", acts.astype(ml_dtypes.bfloat16)):
        with pytest.raises(
            UserError, match=r"found \[40, 4\] bfloat16, which npy does not have .*save them as float32"
        ):
            write_array_store(tmp_path / "p", given)

    class Tensor:
        """What numpy turns into an array, as tensors are; or refuses to, as those of bfloat16."""

        def __init__(self, values: np.ndarray | None) -> None:
            self.values = values

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            if self.values is None:
                raise TypeError("Got unsupported ScalarType BFloat16")
            return self.values

    with pytest.raises(
        UserError, match=r"expected an array that numpy takes, found Tensor \(Got unsupported ScalarType"
    ):
        write_array_store(tmp_path / "p", Tensor(None))  # type: ignore[arg-type]
    made = [write_array_store(tmp_path / name, each) for name, each in (("t", Tensor(acts)), ("n", acts))]  # type: ignore[arg-type]
    assert len({read_manifest(each["train"]).fingerprint for each in made}) == 1


def test_any_file_of_activations_is_read_or_refused(tmp_path: Path, fuzz: Fuzz) -> None:
    path, count, read = tmp_path / "a.npy", 0, 0
    whole = []
    for values in (
        np.arange(24, dtype=np.float32).reshape(4, 6),
        np.ones((2, 3, 5), np.float16),
        np.asfortranarray(np.ones((4, 3))),
    ):
        np.save(path, values)
        whole.append(path.read_bytes())
    for rng in fuzz("npy files"):
        count += 1
        data = damaged(rng.choice(whole), rng)
        path.write_bytes(data)
        try:
            rows = npy.ArrayRows(path)
            for _, start, stop in rows.blocks():
                kept, norm = rows.convert(start, stop, rows.dtype, hashlib.sha256())
                assert kept.shape == (stop - start, rows.d_model) and np.isfinite(norm).all()
            read += 1
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        except BaseException as error:
            raise AssertionError(f"{data[:200]!r}") from error
    assert count < 50 or 0 < read < count


def test_the_same_command_does_nothing_and_another_is_refused_unless_forced(files: list[Path], tmp_path: Path) -> None:
    place, group_N = tmp_path / "p", np.arange(N) // 3
    first = {"heldout_fraction": 0.3, "target": _joined(files)[:, :2], "groups": group_N}
    write_array_store(place, files, **first)
    before, time = _digests(place), (place / "store" / "train" / "manifest.json").stat().st_mtime_ns

    steps: list[str] = []
    write_array_store(place, files, **first, progress=lambda what, *_: steps.append(what))
    assert set(steps) == {"comparing"} and (place / "store" / "train" / "manifest.json").stat().st_mtime_ns == time
    write_array_store(place, _joined(files), **first)  # the same rows, wherever they are read from
    assert _digests(place) == before

    changed = _joined(files)
    changed[-1, -1] += 1
    for acts, more, key in (
        (changed, {}, "store_sha256='"),
        (_joined(files), {"target": changed[:, -2:]}, "target_sha256='"),
        (files, {"target": None}, "target_d_model=2, not None"),
        (files, {"groups": group_N + 1}, "groups_sha256='"),
        (files, {"seed": 1}, "seed=0, not 1"),
        (files[:2], {"target": changed[:65, :2], "groups": group_N[:65]}, "rows=96, not 65"),
        (files, {"dtype": "float16"}, "dtype='keep', not 'float16'"),
        (files, {"name": "other"}, "name='array', not 'other'"),
    ):
        with pytest.raises(UserError, match=rf"was made with {key}.*; pass force=True to replace it"):
            write_array_store(place, acts, **{**first, **more})
    assert _digests(place) == before

    write_array_store(place, changed, heldout_fraction=0.3, force=True)
    assert not (place / "target" / "train").exists() and _digests(place) != before
    with pytest.raises(UserError, match="groups_sha256=None, not"):
        write_array_store(place, files, **first)
    write_array_store(place, files, **first, force=True)
    assert _digests(place) == before
    shutil.rmtree(place / "store")  # of the target stores, too, no one is replaced unasked
    with pytest.raises(UserError, match=r"target/train was made with .*; pass force=True to replace it"):
        write_array_store(place, changed, heldout_fraction=0.3)


class Killed(BaseException):
    """Stands for SIGKILL."""


STEPS: list[tuple[object, str]] = [
    (shuffle.Spill, "append"),
    (shuffle.Spill, "flush"),
    (descriptions.Descriptions, "add"),
    (shards, "write_npy"),
    (arrays, "write_manifest"),
    (Path, "rename"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_an_import_stopped_at_any_step_leaves_no_half_store(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, when: str
) -> None:
    more = {"target": _joined(files)[:, :2], "heldout_fraction": 0.3, "shard_rows": 40}
    write_array_store(tmp_path / "a" / "p", files, **more)
    original: Callable = getattr(owner, name)
    attempt, calls = 0, itertools.count(1)

    def stopping(*args, **kwargs):
        call = next(calls)  # shards are written by threads
        if call == attempt and when == "before":
            raise Killed
        result = original(*args, **kwargs)
        if call == attempt:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, stopping)
    place, finished = tmp_path / "b" / "p", False
    folders = {f"{kind}/{split}": place / kind / split for kind in ("store", "target") for split in SPLITS}
    while not finished:
        attempt, calls = attempt + 1, itertools.count(1)
        with contextlib.suppress(Killed):
            write_array_store(place, files, **more)
            finished = True
        for folder in folders.values():
            assert not folder.exists() or verify(folder) == []
        assert not folders["store/train"].exists() or all(folder.exists() for folder in folders.values())
    assert attempt > 1 and _digests(tmp_path / "b") == _digests(tmp_path / "a")


def test_an_unfinished_extraction_and_another_process_are_respected(files: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "p" / "store"
    (root / ".work").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds an unfinished extraction; pass force=True to discard it"):
        write_array_store(tmp_path / "p", files)
    write_array_store(tmp_path / "p", files, force=True)
    assert not (root / ".work").exists()
    with arrays.replacing([root], "an import"), pytest.raises(UserError, match="an import is at work on it"):
        write_array_store(tmp_path / "p", files, force=True)


def test_too_little_space_is_said_first(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(arrays.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"needs 0\.\d GB of free disk space .* found 0.0 GB; free some"):
        write_array_store(tmp_path / "p", files)


def test_the_command_line(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(tmp_path / "t.npy", _joined(files)[:, :2])
    np.save(tmp_path / "g.npy", np.arange(N) // 3)
    out = tmp_path / "out"
    flags = ["import", *map(str, files), "--out", str(out), "--profile", "vision", "--heldout-fraction", "0.3"]
    flags += ["--target", str(tmp_path / "t.npy"), "--groups", str(tmp_path / "g.npy"), "--name", "vision-embeddings"]
    assert main([*flags, "--dtype", "float16"]) == 0
    said = capsys.readouterr()
    manifest = read_manifest(out / "vision" / "store" / "train")
    assert manifest.model.name == "vision-embeddings" and manifest.profile["resolved"] == "vision"
    documents = sum(source.documents for source in manifest.sources)
    assert f"train: {manifest.rows} rows of 5 float16 in {documents} groups; 0 (0.00%) over 3 x the" in said.out
    assert "reading: 100%" in said.err and "shuffling: 100%" in said.err and "row/s" in said.err
    assert read_json(out / "auto.json", "auto") == {"profile": "vision", "reason": "imported from arrays"}
    (out / "auto.json").unlink()
    assert main([*flags, "--dtype", "float16"]) == 0
    assert "the stores are there already, made of these very activations" in capsys.readouterr().err
    assert (out / "auto.json").exists()
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2 and "dtype='float16', not 'keep'; pass --force" in capsys.readouterr().err
    assert main([*flags, "--force"]) == 0
    capsys.readouterr()
    for kind in ("store", "target"):
        assert main(["verify", str(out / "vision" / kind / "heldout")]) == 0
    assert "heldout split, vision-embeddings at array" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "auto"], "--profile auto: expected a name of your own"),
        (["--profile", "../p"], "--profile ../p: expected a name of your own"),
        (["--profile", "p"], "expected an npy file at nowhere.npy, found no such file"),
        ([], "the following arguments are required: --profile"),
        (["--profile", "p", "--heldout", "0.5"], "unknown argument '--heldout'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["import", "nowhere.npy", *flags])
    (said,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said.startswith("error: ") and message in said


def test_an_import_needs_no_torch(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(90, 3)))
    script = "import sys; from hafs_extract.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, "import", "a.npy", "--profile", "p", "--out", "out"]
    environment = dict(os.environ)
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, timeout=600, cwd=tmp_path
    )
    assert done.stdout.endswith("False\n")
