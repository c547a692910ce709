"""Files that another program wrote, or that are damaged: what is expected becomes one line, a bug of ours does not."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import jsonl_records, read_json, read_jsonl, read_toml, sha256_of
from hafs_jax.base.foreign import open_npy, read_npz, reading, refuse_pointer
from hafs_jax.saelens_files import read_safetensors
from tests.support.fuzz import Fuzz, damaged

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in jsonl_records(path)]


READERS: dict[str, Callable[[Path], Any]] = {
    "json": lambda path: read_json(path, "a config"),
    "toml": lambda path: read_toml(path, "a config"),
    "jsonl": _jsonl,
    "own jsonl": read_jsonl,
    "npy": open_npy,
    "npz": lambda path: read_npz(path, "arrays"),
}


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_with_content_is_named(tmp_path: Path, kind: str) -> None:
    read, path = READERS[kind], tmp_path / "a.file"
    path.mkdir()
    with pytest.raises(UserError, match=r"expected .* at .*a\.file, found a folder"):
        read(path)
    path.rmdir()
    path.write_text(POINTER)
    with pytest.raises(UserError, match=r"a\.file, found a Git-LFS pointer, .* run `git lfs pull` .* or download"):
        read(path)
    if kind != "own jsonl":
        with pytest.raises(UserError, match=r"inner, found no such file, since .*a\.file is no folder"):
            read(path / "inner")
        path.unlink()
        with pytest.raises(UserError, match=r"a\.file, found no such file"):
            read(path)
    path.write_bytes(b"")
    if kind in ("json", "npy", "npz"):
        with pytest.raises(UserError, match=r"a\.file, found an empty file"):
            read(path)
    else:
        assert not read(path)


@pytest.mark.parametrize(
    "read",
    [
        *READERS.values(),
        sha256_of,
        lambda path: refuse_pointer(path, "a file"),
        lambda path: read_safetensors(path, "a file"),
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    path = tmp_path / "a.file"
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"expected .* at .*a\.file, found a pipe, a device or a socket; give a plain"):
        read(path)


BAD_JSON = {
    b"{": "not JSON|one JSON object a line",
    b'{"a": "\xff\xfe"}': r"can't decode byte 0xff",
    b'{"a": ' + b"9" * 5000 + b"}": r"\(an integer of over 4,300 digits\)",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": r"\(nested too deeply\)",
    b"[1]": "a list",
    b"null": "null",
    b"7": "a number",
    b'"a"': "a string",
    b"true": "true or false",
}


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: content[:12].decode("latin1"))
def test_bad_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=BAD_JSON[content]) as raised:
        read_json(path, "a config")
    assert str(raised.value).startswith(f"expected a config at {path}, found ") and "\n" not in str(raised.value)
    path.write_bytes(b'{"a": 1}\n\n' + content + b"\n")
    for read in (_jsonl, read_jsonl):
        with pytest.raises(UserError, match=BAD_JSON[content]) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}, line 3: expected ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "Invalid value"),
        (b"a = '\xff'", "decode"),
        (b"a = " + b"9" * 5000, "limit"),
        (b"a = " + b"[" * 9000, "nested too deeply"),
    ],
)
def test_bad_toml_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(UserError, match=f"expected a config at .*a.toml, found a file that is not TOML .*{message}"):
        read_toml(tmp_path / "a.toml", "a config")


def test_a_bug_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError), reading(tmp_path, "a file", ValueError):
        {}["a"]
    with pytest.raises(UserError, match=r"expected a file at .*, found a folder"), reading(tmp_path, "a file"):
        raise OSError


def test_a_pointer_in_place_of_weights_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sae_weights.safetensors"
    path.write_text(POINTER)
    with pytest.raises(UserError, match=r"expected a safetensors file at .*, found a Git-LFS pointer"):
        read_safetensors(path, "weights")


def test_archives_and_arrays_are_told_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.arange(3), b=np.ones((2, 2)))
    np.save(tmp_path / "a.npy", np.arange(3))
    found = read_npz(tmp_path / "a.npz", "arrays")
    assert sorted(found) == ["a", "b"] and found["a"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"found an npy file; save the arrays with numpy\.savez"):
        read_npz(tmp_path / "a.npy", "arrays")
    with pytest.raises(UserError, match=r"expected arrays at .*a\.npz, found an archive without density, mean"):
        read_npz(tmp_path / "a.npz", "arrays", ("a", "density", "mean"))
    with pytest.raises(UserError, match=r"found an npz archive; save its array with numpy\.save"):
        open_npy(tmp_path / "a.npz")


def test_a_damaged_file_is_read_or_refused(tmp_path: Path, fuzz: Fuzz) -> None:
    """Whatever is done to it: the reader returns a value of its type, or raises `UserError`, on one line."""
    path = tmp_path / "a.file"
    record = {"text": "a \u00e9 \ud83d\ude00", "n": [1, 2.5e3, None, True, {"deep": [[]]}]}
    np.save(tmp_path / "a.npy", np.arange(24, dtype=np.float32).reshape(4, 6))
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(24.0), b=np.ones((2, 3), np.float16))
    whole = {
        "json": json.dumps(record, indent=1).encode(),
        "toml": b'name = "a"\nks = [1, 2]\n[inner]\nrate = 1e-3\n',
        "jsonl": b"".join(json.dumps({**record, "line": line}).encode() + b"\n" for line in range(3)),
        "npy": (tmp_path / "a.npy").read_bytes(),
        "npz": (tmp_path / "a.npz").read_bytes(),
    }
    whole["own jsonl"] = whole["jsonl"]
    types = {"json": dict, "toml": dict, "jsonl": list, "own jsonl": list, "npy": np.ndarray, "npz": dict}
    count, refused = 0, 0
    for rng in fuzz("damaged files"):
        count += 1
        kind = rng.choice(list(READERS))
        data = damaged(whole[kind], rng)
        path.write_bytes(data)
        try:
            assert isinstance(READERS[kind](path), types[kind])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
        except BaseException as error:
            raise AssertionError(f"{kind} {data[:300]!r}") from error
    assert count < 50 or 0.3 * count < refused < count
