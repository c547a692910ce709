"""Files that are what their checksums say: hashed once a process, or once they have changed. Standard library only.

A file is known by its device, inode, size and time of change. So a file that another replaces is hashed anew.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of, write_record
from hafs_jax.base.foreign import reading

CHECKSUMS = "checksums.json"
"""The checksums of files beside it: {"files": {name: SHA-256}}, and what its writer adds."""

_known: dict[tuple[int, int, int, int], str] = {}


def sha256_once(path: Path) -> str:
    """The file's SHA-256, computed at most once a process for what lies there."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
    place = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if place not in _known:
        _known[place] = sha256_of(path)
    return _known[place]


def check_file(path: Path, expected: str, what: str, mend: str) -> None:
    """Raises `UserError` where the file is missing or its SHA-256 is not the `expected` one; `mend` is what to do."""
    with reading(path, what):
        found = sha256_once(path)
    if found != expected:
        raise UserError(
            f"expected {what} of SHA-256 {expected[:12]}... at {path}, found {found[:12]}...: it was damaged or"
            f" replaced; {mend}"
        )


def write_checksums(folder: Path, names: list[str], more: Mapping[str, object] | None = None) -> None:
    """Writes the checksums of files in `folder` beside them, with `more` keys."""
    files = {name: sha256_of(folder / name) for name in names}
    write_record(folder / CHECKSUMS, {"files": files, **(more or {})})


def check_folder(folder: Path, what: str, mend: str) -> dict[str, object]:
    """Checks the files in `folder` whose checksums lie beside them, and returns what lies there; nothing where none do.

    Raises `UserError` naming the first file that is missing or another.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    noted = read_json(path, f"the checksums of {what}")
    files = noted.get("files")
    for name, expected in (files if isinstance(files, dict) else {}).items():
        if Path(name).name == name and isinstance(expected, str):
            check_file(folder / name, expected, what, mend)
    return noted
