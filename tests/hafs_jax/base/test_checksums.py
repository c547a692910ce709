"""Checksums: a record carries its own, and those of files lie beside them."""

import fcntl
from pathlib import Path

import pytest

from hafs_jax.base.checksums.checked import CHECKSUMS, check_folder, sha256_once, write_checksums
from hafs_jax.base.checksums.sealed import KEY, LINE_KEY, sealed_line
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, read_jsonl, write_record


def test_any_bit_that_flips_in_a_record_is_named_or_harmless(tmp_path: Path) -> None:
    """Its seal's own name too, without which it would be read as one of an earlier version."""
    path, values = tmp_path / "a.json", {"fvu": 0.25, "name": "baseline"}
    write_record(path, values)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                assert read_json(path, "a record") == values
            except UserError as error:
                assert str(path) in str(error)
    path.write_bytes(whole.replace(f',\n  "{KEY}": "'.encode(), b"}").split(b"}")[0] + b"}")
    assert read_json(path, "a record") == values  # the key was removed, as one does to use an edited file


def test_checksums_of_files_elsewhere_are_not_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    (folder / "weights").write_bytes(b"1")
    write_checksums(folder, ["weights"])
    assert check_folder(folder, "a file", "make it again")["files"] == {"weights": sha256_once(folder / "weights")}
    (tmp_path / "other").write_bytes(b"2")
    for name in ("../other", str(tmp_path / "other")):
        write_record(folder / CHECKSUMS, {"files": {name: "0" * 64}})
        check_folder(folder, "a file", "make it again")
    write_record(folder / CHECKSUMS, {"files": {"weights": "0" * 64}})
    with pytest.raises(UserError, match="it was damaged or replaced; make it again"):
        check_folder(folder, "a file", "make it again")


def test_a_line_whose_seal_lost_its_name_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [sealed_line({"step": step, "fvu": 0.5}) for step in range(3)]
    path.write_text(lines[0] + lines[1].replace(f'"{LINE_KEY}"', '"crc33"') + lines[2])
    with pytest.raises(
        UserError, match=r"metrics.jsonl, line 2: it is damaged: expected its checksum in the key crc32"
    ):
        read_jsonl(path)


def test_temporary_files_of_others_that_still_write_stay(tmp_path: Path) -> None:
    """Of a living process, and of one on another machine, whose number is of no process here but whose lock holds."""
    nobody = 2**22 + 1  # above the largest process number
    alive, elsewhere, left = (tmp_path / f".a.json.{pid}.tmp" for pid in (1, nobody, nobody + 1))
    for path in (alive, elsewhere, left):
        path.write_bytes(b"half")
    with open(elsewhere, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_record(tmp_path / "b.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, elsewhere.name, "b.json"])
