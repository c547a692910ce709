"""The layer over the file system (layer.c): built with the system's C compiler, loaded before all other libraries."""

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("layer.c")
_HEAD = struct.Struct("c7xQqqqq")


def is_buildable() -> bool:
    return shutil.which("cc") is not None


def build(folder: Path) -> Path:
    """The layer as a library in `folder`."""
    made = folder / "layer.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", made, _SOURCE, "-ldl", "-lpthread"], check=True)
    return made


def loaded() -> bool:
    """Whether this process was started under the layer."""
    return "layer.so" in os.environ.get("LD_PRELOAD", "")


def arm(root: Path, at: int = 0, action: int = 0, log: Path | None = None) -> None:
    """Watches `root`. Before event `at`: signal -`action`, or errno `action` (for ever from -`at` on)."""
    ctypes.CDLL(None).torture_arm(
        os.fsencode(root), ctypes.c_long(at), ctypes.c_long(action), b"" if log is None else os.fsencode(log)
    )


def events() -> int:
    """How many events there were since `arm`."""
    call = ctypes.CDLL(None).torture_events
    call.restype = ctypes.c_long
    return int(call())


@dataclass(frozen=True)
class Event:
    """C create, T truncate, W write, S sync a file, D sync a folder, R rename, L link, U unlink, M make a folder."""

    kind: str
    inode: int
    offset: int
    path: str
    other: str
    data: bytes


def read_log(path: Path) -> Iterator[Event]:
    with open(path, "rb") as file:
        while head := file.read(_HEAD.size):
            kind, inode, offset, a, b, size = _HEAD.unpack(head)
            yield Event(
                kind.decode(), inode, offset, os.fsdecode(file.read(a)), os.fsdecode(file.read(b)), file.read(size)
            )


def under_layer(arguments: list[str]) -> int:
    """Runs this Python again with `arguments`, under the layer; its exit code."""
    import sys

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LD_PRELOAD": str(build(Path(folder)))}
        return subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode
