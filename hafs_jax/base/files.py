"""Atomic writing and checked reading of small files; checksums of large ones. Standard library and numpy only."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from hafs_jax.base.errors import UserError


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, syncs it, and renames it to `path`.

    Whenever the process is killed, a reader sees the old file or the whole new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another OUT") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_npy(path: Path, array: np.ndarray) -> None:
    """Writes `array` in numpy's npy format, atomically, without pickling."""
    write_atomic(path, lambda file: np.save(file, array, allow_pickle=False))


def read_json(path: Path, what: str) -> Any:
    """The parsed JSON file at `path`; `what` names it in the error when it is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"expected {what} at {path}, found no such file") from None
    except (ValueError, RecursionError, OSError) as error:  # a number of 5,000 digits, brackets without end, a folder
        raise UserError(f"expected {what} at {path}, found a file that is not JSON ({error})") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file that this project writes.

    A last line without its end is left out: the process was killed while writing it. Any other bad line raises.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def jsonl_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a user's JSON-lines file, without blank lines; `UserError` names a line that is no JSON object."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path}, line {number}: expected one JSON object a line ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
            yield record


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits, read in 1 MiB pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
