"""The boundary around files that may be damaged, or that another program wrote. Standard library and numpy only.

A library that reads such a file raises errors of its own for what it finds there. `reading` turns those that are
expected into one `UserError`. Every other exception is our bug, and keeps its traceback.
"""

import contextlib
import json
import os
import stat
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hafs_jax.base.errors import UserError

POINTER = b"version https://git-lfs"
"""How a Git-LFS pointer begins: the short text that stands for a large file until that is fetched."""

NPY_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    EOFError,
    SyntaxError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    tokenize.TokenError,
)
"""What numpy raises for a header that is damaged: it parses the header as a Python literal."""

NPZ_ERRORS = (*NPY_ERRORS, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def reading(
    path: Path | str, what: str, *errors: type[Exception], fault: str = "cannot be read", mend: str = ""
) -> Iterator[None]:
    """Around the reading of `path`: an `OSError`, or one of `errors`, becomes a `UserError` that says what lies there.

    `what` is what is expected, such as "an npy file"; `fault` is what is wrong with a file that is there, whole and no
    pointer; `mend` says what to do about such a file.
    """
    expected: tuple[type[Exception], ...] = (OSError, *errors)
    refuse_special(path, what)
    try:
        yield
    except expected as error:
        found = found_instead(Path(path)) or f"a file that {fault} ({reason(error)}){mend}"
        raise UserError(f"expected {what} at {path}, found {found}") from error


_HEADER_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OverflowError)  # of a safetensors file
_SAFETENSORS_DTYPES: dict[str, np.dtype] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


def refuse_pointer(path: Path | str, what: str) -> None:
    """Raises `UserError` where the file is a Git-LFS pointer, or special.

    For formats that would take its text for content, and to name the cause where a library has refused it.
    """
    refuse_special(path, what)
    if (found := found_instead(Path(path))) and is_pointer(Path(path)):
        raise UserError(f"expected {what} at {path}, found {found}")


def refuse_special(path: Path | str, what: str, most_bytes: int | None = None) -> None:
    """Raises `UserError` for a pipe, a device or a socket, whose reading may never end, and for over `most_bytes`."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return  # who opens it says what is wrong
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise UserError(f"expected {what} at {path}, found a pipe, a device or a socket; give a plain file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise UserError(f"expected {what} of at most {most_bytes:,} bytes at {path}, found {found.st_size:,}")


def is_pointer(path: Path) -> bool:
    """Whether the file is a Git-LFS pointer."""
    try:
        with open(path, "rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def found_instead(path: Path) -> str | None:
    """What lies at `path` where that is no file with content of its own; None where it is one."""
    try:
        if path.is_dir():
            return "a folder"
        size = path.stat().st_size
    except FileNotFoundError:
        return "no such file"
    except NotADirectoryError:
        return f"no such file, since {next(part for part in path.parents if part.exists())} is no folder"
    except (OSError, ValueError):  # a name that is too long or holds a null character
        return None
    if is_pointer(path):
        return (
            "a Git-LFS pointer, which stands for a file that was not fetched;"
            " run `git lfs pull` in its repository, or download the file itself"
        )
    return "an empty file" if size == 0 else None


def reason(error: BaseException) -> str:
    """A library's error as part of a line: without line ends, at most 300 characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join((text or type(error).__name__).split())
    return text if len(text) <= 300 else text[:297] + "..."


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError for any text that is none, and for what Python does not read.

    That is a nesting of some thousand levels, and an integer of over 4,300 digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # of int()
        raise ValueError(f"an integer of over {sys.get_int_max_str_digits():,} digits") from None


def open_npy(path: Path | str, what: str = "an npy file") -> np.ndarray:
    """The array in an npy file, memory-mapped, never unpickled; `UserError` where there is none that opens."""
    with reading(path, what, *NPY_ERRORS, fault="does not open as one", mend="; save the array with numpy.save"):
        with open(path, "rb") as file:
            is_archive = file.read(2) == b"PK"
        if not is_archive:
            return np.load(path, mmap_mode="r", allow_pickle=False)
    raise UserError(f"expected {what} at {path}, found an npz archive; save its array with numpy.save")


def open_safetensors(path: Path | str) -> np.ndarray:
    """The one array of activations in a safetensors file, memory-mapped; `UserError` where there is none, or several.

    An array is one of activations where it has two dimensions or more.
    """
    what = "a safetensors file of activations"
    with reading(path, what, *_HEADER_ERRORS, fault="is no whole safetensors file"):
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > Path(path).stat().st_size:
                raise ValueError("its header is cut short")
            entries = {
                name: entry for name, entry in parse_json(file.read(start - 8)).items() if name != "__metadata__"
            }
        found = {name: entry for name, entry in entries.items() if len(entry["shape"]) > 1}
        if len(found) == 1:
            (entry,) = found.values()
            if entry["dtype"] in _SAFETENSORS_DTYPES:
                begin, _ = entry["data_offsets"]
                dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
                return np.memmap(path, dtype, "r", start + begin, shape)
    shown = (
        ", ".join(f"{name} {entry['shape']} {entry['dtype']}" for name, entry in list(entries.items())[:8]) or "none"
    )
    raise UserError(f"expected {what} at {path}, one array [rows, D] of F16, F32 or F64, found {shown}")


def read_npz(path: Path | str, what: str, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """All arrays of an npz archive, by name; `UserError` where one is damaged, or where one of `names` is missing."""
    with reading(path, what, *NPZ_ERRORS, fault="is no whole npz archive"), open(path, "rb") as file:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            arrays = dict(found)
            if missing := [name for name in names if name not in arrays]:
                raise UserError(f"expected {what} at {path}, found an archive without {', '.join(missing)}")
            return arrays
    raise UserError(f"expected {what} at {path}, found an npy file; save the arrays with numpy.savez")
