"""The activation store: what is written is read, and what is damaged is found and named."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hafs_jax.base.checksums import checked
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of, write_json, write_npy
from hafs_jax.store.holding import as_it_is, reading, replacing
from hafs_jax.store.manifest import (
    CONTEXT,
    DISK_DTYPES,
    ROW,
    SourceInfo,
    TokenizerInfo,
    from_float32,
    read_manifest,
    to_float32,
)
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify
from tests.support.stores import resealed, save_store, write_store

D, LENGTHS, SHARDS = 5, (4, 3, 6), (7, 3)


def make_store(folder: Path, dtype: str = "float16", **fields: Any) -> np.ndarray:
    """Writes a store of 10 rows in 2 shards from 3 contexts; the float32 activations [10, D] before rounding."""
    table = np.zeros(3, CONTEXT)
    table["length"], table["start"], table["document"] = LENGTHS, (0, 4, 7), (0, 1, 1)
    tokens = np.arange(100, 113, dtype="<i4")
    rows = np.zeros(10, ROW)
    pairs = [(context, position) for context, length in enumerate(LENGTHS) for position in range(1, length)]
    rows["context"], rows["position"] = np.transpose(pairs)[:, [3, 0, 9, 5, 1, 2, 8, 4, 7, 6]]
    rows["token"] = tokens[table["start"][rows["context"]] + rows["position"]]
    rows["document"] = table["document"][rows["context"]]
    values = np.random.default_rng(3).normal(size=(10, D)).astype(np.float32) * 10
    facts = {"tokenizer": TokenizerInfo("m", 200, None, False), "hook_point": "blocks.1.hook_resid_post"}
    documents = [{"document": 0}, {"document": 1}]
    save_store(folder, values, rows, table, tokens, documents, SHARDS, dtype, **{**facts, **fields})
    return values


# half a unit in the last place, relative: float16 keeps 11 bits, bfloat16 8
@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2**-12), ("bfloat16", 2**-9)])
def test_round_trip(tmp_path: Path, dtype: str, error: float) -> None:
    values = make_store(tmp_path / "s", dtype)
    store = Store(tmp_path / "s")
    assert verify(tmp_path / "s") == []
    assert len(store) == 10 and store.shard_sizes == [7, 3]
    read = np.concatenate([store.read(0), store.read(1)])
    assert read.dtype == np.float32 and (np.abs(read - values) <= 2 * error * np.abs(values)).all()
    assert store.raw(0).dtype == DISK_DTYPES[dtype] and store.raw(0).shape == (7, D)
    np.testing.assert_array_equal(store.read(0, 2, 5), store.read(0)[2:5])
    assert store.contexts()[1].tolist() == [104, 105, 106] and len(store.contexts()) == 3
    assert [document["document"] for document in store.documents()] == [0, 1]
    assert read_manifest(tmp_path / "s") == store.manifest


@pytest.mark.parametrize("dtype", list(DISK_DTYPES))
@pytest.mark.parametrize("max_rows", [None, 0, 1, 3, 7, 8, 10, 99])
@pytest.mark.parametrize("rows", [1, 3, 7, 8, 99])
def test_batches_are_all_rows_once_in_stored_order(tmp_path: Path, rows: int, max_rows: int | None, dtype: str) -> None:
    make_store(tmp_path / "s", dtype)
    store = Store(tmp_path / "s")
    wanted = min(10, 10 if max_rows is None else max_rows)
    acts_ND = np.concatenate([store.read(0), store.read(1)])[:wanted]
    rows_N = np.concatenate([store.rows(0), store.rows(1)])[:wanted]
    for raw in (False, True):
        batches = list(store.batches(rows, max_rows, raw=raw))
        sizes = [len(batch.acts_BD) for batch in batches]
        assert all(1 <= size <= rows for size in sizes)
        assert [batch.first for batch in batches] == [sum(sizes[:index]) for index in range(len(sizes))]
        assert all(batch.first >= 7 or batch.first + len(batch.rows_B) <= 7 for batch in batches)  # of one shard
        parts = [to_float32(batch.acts_BD, dtype) if raw else batch.acts_BD for batch in batches]
        np.testing.assert_array_equal(np.concatenate([np.empty((0, D)), *parts]), acts_ND)
        np.testing.assert_array_equal(np.concatenate([np.empty(0, ROW), *(b.rows_B for b in batches)]), rows_N)
        for batch in batches:
            assert batch.acts_BD.dtype == (DISK_DTYPES[dtype] if raw else np.float32)
            assert batch.acts_BD.flags.writeable == batch.rows_B.flags.writeable == (not raw)


def test_batches_of_no_rows_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    with pytest.raises(ValueError, match="rows=0: expected at least 1"):
        next(Store(tmp_path / "s").batches(0))


@pytest.mark.parametrize("dtype", list(DISK_DTYPES))
def test_rounding_is_exact_for_values_that_fit_and_to_nearest_even(dtype: str) -> None:
    fitting = np.array([[0.0, -0.0, 1.5, -3.25, 2.0**-14, 65280.0]], np.float32)
    np.testing.assert_array_equal(to_float32(from_float32(fitting, dtype), dtype), fitting)
    assert np.isinf(to_float32(from_float32(np.array([np.inf], np.float32), dtype), dtype)).all()


def test_bfloat16_is_torchs_and_float16_overflow_is_infinity() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32) * 10.0 ** np.arange(-20, 20).repeat(25)
    ties = (np.arange(0x4000, 0x4010, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # halfway between two
    values = np.concatenate([values, ties, -ties])
    bits = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(from_float32(values, "bfloat16"), bits)
    assert np.isinf(from_float32(np.array([70000.0], np.float32), "float16")).all()


def test_no_manifest_is_no_store(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"expected an activation store's manifest .* found no such file"):
        Store(tmp_path / "s")
    assert len(verify(tmp_path / "s")) == 1 and len(verify(tmp_path / "nowhere")) == 1


def test_another_version_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    values = read_json(path, "a manifest")
    write_json(path, {**values, "format_version": 7})
    with pytest.raises(UserError, match="expected format_version 1, found 7"):
        Store(tmp_path / "s")
    write_json(path, {**values, "d_modle": 5})
    with pytest.raises(UserError, match=r"unknown key 'd_modle'; did you mean 'd_model'\?"):
        Store(tmp_path / "s")
    path.write_text("[]")
    assert "found JSON that is no object but a list" in verify(tmp_path / "s")[0]


FILES = ["shard-00000.npy", "shard-00001.npy", "rows-00001.npy", "contexts.npy", "tokens.npy", "documents.jsonl"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_by_its_checksum(tmp_path: Path, name: str) -> None:
    make_store(tmp_path / "s")
    path = tmp_path / "s" / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x10
    path.write_bytes(data)
    problems = verify(tmp_path / "s")
    assert len(problems) == 1 and name in problems[0] and "sha256" in problems[0]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    make_store(tmp_path / "s")
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:-3])
    assert all(name in problem for problem in verify(tmp_path / "s"))
    if name.endswith(".npy"):
        with pytest.raises(UserError, match=rf"expected a whole npy file at .*{name}, found a file that"):
            Store(tmp_path / "s")
    path.unlink()
    missing = (f"{path}: missing", f"expected a whole npy file at {path}, found no such file")
    assert any(problem in missing for problem in verify(tmp_path / "s"))
    path.touch()
    assert any(name in problem for problem in verify(tmp_path / "s"))


def test_a_stores_documents_may_hold_any_line_end_of_unicode(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    path = tmp_path / "s" / "documents.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["labels"] = {"title": "a\u2028b\x85c"}
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    assert Store(resealed(tmp_path / "s")).documents() == records
    path.write_text('{"document": 0}\n{"docu')
    resealed(tmp_path / "s")
    with pytest.raises(UserError, match=r"documents\.jsonl, line 2: expected one JSON object a line"):
        Store(tmp_path / "s").documents()


def test_shapes_and_dtypes_that_differ_from_the_manifest_are_named(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    write_npy(tmp_path / "s" / "shard-00001.npy", np.zeros((3, D + 1), np.float16))
    with pytest.raises(UserError, match=r"shard-00001.npy: expected \[3, 5\] float16, found \[3, 6\] float16"):
        Store(tmp_path / "s")
    write_npy(tmp_path / "s" / "shard-00001.npy", np.zeros((3, D), np.float32))
    with pytest.raises(UserError, match=r"expected \[3, 5\] float16, found \[3, 5\] float32"):
        Store(tmp_path / "s")


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    np.save(tmp_path / "s" / "tokens.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"tokens\.npy"):
        Store(tmp_path / "s")


def test_row_counts_must_add_up(tmp_path: Path) -> None:
    make_store(tmp_path / "s", rows=11)
    with pytest.raises(UserError, match="do not add up to rows=11"):
        Store(tmp_path / "s")


def _rewrite(folder: Path, name: str, array: np.ndarray) -> None:
    """Replaces an array and its checksum, so that only its contents are wrong."""
    write_npy(folder / name, array)
    text = read_json(folder / "manifest.json", "a manifest")
    digest, index = sha256_of(folder / name), int(name[-5]) if "-" in name else 0
    if name in text["files_sha256"]:
        text["files_sha256"][name] = digest
    else:
        text["shards"][index]["rows_sha256" if name.startswith("rows") else "sha256"] = digest
    write_json(folder / "manifest.json", text)


def test_verify_reads_the_rows_themselves(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    folder = tmp_path / "s"
    store = Store(folder)
    rows, acts, table = np.array(store.rows(1)), np.array(store.raw(1)), np.array(store.contexts().table)
    good = acts.copy()

    acts[2, 1] = np.inf
    _rewrite(folder, "shard-00001.npy", acts)
    assert verify(folder) == [f"{folder / 'shard-00001.npy'}: holds values that are not finite"]
    _rewrite(folder, "shard-00001.npy", np.array(good))

    for field, value, message in (
        ("position", 6, "a position lies past its context's end"),
        ("context", 3, "a context that is not there"),
        ("context", -1, "a context that is not there"),
        ("token", 7, "a token differs from its context's"),
        ("document", 1 - rows["document"][0], "a document or source differs from its context's"),
        ("source", 1, "a document or source differs from its context's"),
    ):
        wrong = rows.copy()
        wrong[field][0] = value
        _rewrite(folder, "rows-00001.npy", wrong)
        assert verify(folder) == [f"{folder / 'rows-00001.npy'}: {message}"]
    _rewrite(folder, "rows-00001.npy", rows)
    assert verify(folder) == []

    for field, value, message in (
        ("length", 5, "contexts do not tile tokens.npy"),
        ("start", 6, "contexts do not tile tokens.npy"),
        ("source", 1, "a source that the manifest does not list"),
        ("document", 2, "a document that is not among documents.jsonl's 2"),
    ):
        wrong = table.copy()
        wrong[field][2] = value
        _rewrite(folder, "contexts.npy", wrong)
        assert verify(folder) == [f"{folder / 'contexts.npy'}: {message}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.0,) * D}, "mean differs from the rows'"),
        ({"mean_squared_norm": 1.0}, "mean_squared_norm=1.0, the rows' is"),
        ({"variance": 1.0}, "variance=1.0, the rows' is"),
        ({"sources": (SourceInfo("a", "a.txt", 1.0, 2, 13, 9),)}, r"the sources' rows are \[10\]"),
        ({"context_length": 5}, "a context is longer than context_length=5"),
    ],
)
def test_verify_recounts_what_the_manifest_says(tmp_path: Path, changes: dict, message: str) -> None:
    make_store(tmp_path / "s", **changes)
    (problem,) = verify(tmp_path / "s")
    assert re.search(message, problem)


def test_verify_finds_rows_of_bos(tmp_path: Path) -> None:
    make_store(tmp_path / "s", tokenizer=TokenizerInfo("m", 200, 100, True))
    assert verify(tmp_path / "s") == []  # the store's rows begin at position 1
    store = Store(tmp_path / "s")
    rows = np.array(store.rows(1))
    rows["position"][1] = 0
    rows["token"][1] = store.contexts()[int(rows["context"][1])][0]
    _rewrite(tmp_path / "s", "rows-00001.npy", rows)
    assert verify(tmp_path / "s") == [f"{tmp_path / 's' / 'rows-00001.npy'}: a row of a BOS token"]


def test_the_fingerprint_is_of_the_bytes(tmp_path: Path) -> None:
    make_store(tmp_path / "a")
    make_store(tmp_path / "b", hook_point="blocks.2.hook_resid_post")
    make_store(tmp_path / "c", "float32")
    a, b, c = (read_manifest(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c and len(a) == 16


@pytest.mark.parametrize("name", ["shard-00001.npy", "rows-00001.npy", "contexts.npy", "tokens.npy", "documents.jsonl"])
def test_what_is_read_is_what_the_manifest_says(tmp_path: Path, name: str) -> None:
    folder = make_store(tmp_path / "s")
    path = tmp_path / "s" / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # of a value
    path.write_bytes(data)
    store = Store(tmp_path / "s")
    readers = {"shard": lambda: store.read(1), "rows": lambda: store.rows(1), "documents": store.documents}
    reader = readers.get(name.split(".")[0].split("-")[0], store.contexts)
    with pytest.raises(UserError, match=f"{name}, found .*: it was damaged or replaced; restore it, or extract"):
        reader()
    store.read(0), store.rows(0)  # what is not read is not hashed
    assert folder is not None


def test_a_store_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    store = Store(tmp_path / "s")
    first = store.read(0).copy()
    shard = np.array(store.raw(0))
    shard[0, 0] += 1
    write_npy(tmp_path / "s" / "shard-00000.npy", shard)
    resealed(tmp_path / "s")
    with pytest.raises(UserError, match="damaged or replaced"):
        store.read(0)
    assert (Store(tmp_path / "s").read(0) != first).sum() == 1


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s")
    hashed: list[str] = []
    real = checked.sha256_of
    monkeypatch.setattr(checked, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    store = Store(tmp_path / "s")
    for _ in store.batches(2):
        pass
    for _ in Store(tmp_path / "s").batches(1):
        pass
    assert sorted(hashed) == sorted(set(hashed)) and "shard-00001.npy" in hashed and "tokens.npy" not in hashed


def test_a_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    whole = path.read_bytes()
    place = whole.index(b'"mean": [') + 20
    path.write_bytes(whole[:place] + (b"1" if whole[place : place + 1] != b"1" else b"2") + whole[place + 1 :])
    with pytest.raises(UserError, match="it is damaged or was edited: its SHA-256 is not the one in its last key"):
        Store(tmp_path / "s")


def test_a_store_behind_a_link_is_held_where_it_lies(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "store" / "train", np.zeros((8, 3), np.float32))
    link = tmp_path / "elsewhere" / "train"
    link.parent.mkdir()
    link.symlink_to(folder)
    for held in (reading([Store(link)], "a training"), as_it_is(link, "a check")):
        with held, pytest.raises(UserError, match="is at work on it"):
            replacing([folder.parent], "an extraction").__enter__()
