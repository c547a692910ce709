"""Atomic writing and checked reading of small files; checksums of large ones. Standard library and numpy only."""

import contextlib
import fcntl
import hashlib
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from hafs_jax.base.checksums.sealed import KEY, LINE_KEY, json_text, sealed, unsealed, unsealed_line
from hafs_jax.base.errors import UserError
from hafs_jax.base.foreign import parse_json, reading, reason, refuse_pointer, refuse_special
from hafs_jax.base.places import make_folder, sync_folder

_TEMPORARY = re.compile(r"\..+\.(\d{1,10})\.tmp")
_DISK_ADVICE = "free space, put the disk right or choose another folder, and repeat the command"
MOST_JSON_BYTES = 2 << 30  # of a file that is read as one value; the largest that is written is a run's latents.json
_MOST_TOML_BYTES = 16 << 20
_cleaned: set[tuple[int, str]] = set()

_MEND = f"restore or remake the file, or remove the key {KEY} to use it as it is"


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, syncs it, renames it to `path`, and syncs the folder.

    Whenever the process is killed or the power fails, a reader sees the old file or the whole new one, never a part.
    Raises `UserError` where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        _remove_leftovers(path.parent)
        with open(temporary, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {_DISK_ADVICE}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed processes have left in the folder; once a process."""
    key = os.getpid(), str(folder.absolute())
    if key in _cleaned:
        return
    _cleaned.add(key)
    for entry in list(os.scandir(folder)):
        found = _TEMPORARY.fullmatch(entry.name)
        if found and not _is_alive(int(found[1])) and entry.is_file(follow_symlinks=False):
            with contextlib.suppress(OSError), open(entry.path, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else a process of another machine has it
                os.unlink(entry.path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    text = json_text(value, indent=2) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_record(path: Path, values: dict[str, Any], indent: int | None = 2) -> None:
    """Writes `values` as JSON that carries its checksum, atomically (`checksums.sealed`); `read_json` checks it."""
    write_atomic(path, lambda file: file.write(sealed(values, indent)))


def write_figures(path: Path, values: dict[str, Any]) -> None:
    """`write_record` of measured figures: one that is not finite becomes null, and `not_finite` says what it was.

    That key is added at the top only where there is such a figure: {"final.coherence_max": "-inf"}.
    """
    plain, odd = finite(values)
    write_record(path, plain | {"not_finite": odd} if odd else plain)


def finite(value: Any, place: str = "") -> tuple[Any, dict[str, str]]:
    """The JSON value with None for each number that is not finite, and what these were by their dotted places."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, {place: str(value)}
    if not isinstance(value, (dict, list, tuple)):
        return value, {}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {key: finite(item, f"{place}.{key}" if place else str(key)) for key, item in items}
    odd = {where: text for _, inner in found.values() for where, text in inner.items()}
    plain = {key: item for key, (item, _) in found.items()}
    return plain if isinstance(value, dict) else list(plain.values()), odd


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically; half of a surrogate pair, which UTF-8 does not have, as its escape."""
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_npy(path: Path, array: np.ndarray) -> None:
    """Writes `array` in numpy's npy format, atomically, without pickling."""
    write_atomic(path, lambda file: np.save(file, array, allow_pickle=False))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in the file at `path`, without its checksum; `what` names it in the error where there is none.

    Raises `UserError` too where it carries a checksum that is not its own.
    """
    refuse_special(path, what, MOST_JSON_BYTES)
    with reading(path, what, ValueError, fault="is not JSON"):
        data = path.read_bytes()
        value = parse_json(data)
    if not isinstance(value, dict):
        raise UserError(f"expected {what} at {path}, found JSON that is no object but {json_type(value)}")
    try:
        return unsealed(data, value)
    except ValueError as error:
        raise UserError(f"expected {what} at {path}, found a file with a fault: {error}; {_MEND}") from None


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table in the TOML file at `path`; `what` names it in the error where there is none."""
    refuse_special(path, what, _MOST_TOML_BYTES)
    with reading(path, what, ValueError, RecursionError, fault="is not TOML"):
        return tomllib.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file that this project writes; none where there is no such file.

    A last line without its end is left out: the process was killed while writing it. Any other bad line is a
    `UserError`, and so is one that carries a checksum which is not its own.
    """
    if not path.exists():
        return []
    with reading(path, "JSON lines"), open(path, "rb") as file:
        lines = file.readlines()
    records = []
    found = list(json_lines(lines, path, whole_lines=True))
    is_sealed = any(LINE_KEY in record for _, record in found)
    for number, record in found:
        try:
            if is_sealed and LINE_KEY not in record:
                raise ValueError(f"it is damaged: expected its checksum in the key {LINE_KEY}, as other lines have")
            records.append(unsealed_line(lines[number - 1], record))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; restore the file, or remove the line") from None
    return records


def jsonl_records(path: Path, whole_lines: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with the number of its line. Blank lines are left out.

    Raises `UserError` naming a line that is no JSON object. With `whole_lines`, a last line without its end is left
    out.
    """
    with reading(path, "JSON lines"), open(path, "rb") as file:
        yield from json_lines(file, path, whole_lines)


def json_lines(
    lines: Iterable[bytes], path: Path, whole_lines: bool = False, expected: str = "one JSON object a line"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`jsonl_records` of the lines of `path`, which may be those that it holds compressed."""
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (whole_lines and not line.endswith(b"\n")):
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == 1:
                refuse_pointer(path, "JSON lines")
            raise UserError(f"{path}, line {number}: expected {expected} ({reason(error)})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {json_type(record)}")
        yield number, record


def json_type(value: Any) -> str:
    """The type of a JSON value in words: "a list", "a number", ..."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits; `UserError` for what is no plain file."""
    refuse_special(path, "a file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
