"""Locks between processes: who may write, read and replace what. Standard library only.

A lock is a file, which flock(2) locks. The system frees it when its process ends, however it ends. The file itself is
never removed: another process may have opened it already, and would then hold a lock that nobody else sees. It says who
holds the lock, one JSON object a holder: {"id", "pid", "host", "work", "command", "since"}. Who shared it adds {"left":
id} at the end.

Many may share a lock (readers), or one may have it alone (a writer). Locks on a network file system hold where that
file system has them; on one without, or that keeps them to one machine, a lock is refused.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.places import make_folder

ANYWAY = "HAFS_LOCAL_LOCKS"
"""The environment variable that says that no other machine works on these files, and locks of one machine will do."""

_LONGEST = 160  # letters of a command
_MOST_BYTES = 1 << 16  # of notes of who shared a lock, which nobody has had alone meanwhile
_POLL_SECONDS = 0.1
MOUNTS = Path("/proc/self/mounts")
_OF_NETWORKS = ("nfs", "nfs4", "lustre")
_ONE_MACHINE = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}  # mount options


@contextlib.contextmanager
def locked(path: Path, work: str, of: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds the lock `path` for `work` ("a training", say) on the folder `of`, alone or shared with others.

    Where another process holds it, raises `UserError`, which says who; with `wait` it waits. A reader of files that it
    could not write locks them where there is a lock already: whoever writes them has made it.
    """
    with contextlib.ExitStack() as stack:
        file, is_asked = _opened(path, shared), False
        if file is not None:
            stack.enter_context(file)
            while not _taken(file, path, shared):
                if not _is_at(path, file.fileno()):  # someone has removed it, against the rule
                    file = stack.enter_context(_opened(path, shared) or contextlib.nullcontext(file))
                elif wait or not (is_asked or _records(path)):  # who has just taken it has not signed yet
                    is_asked = True
                    time.sleep(_POLL_SECONDS)
                else:
                    raise UserError(f"{of}: {_holders(path)}; wait for it, end it, or choose another folder")
            ident = _signed(file, work, shared)
            stack.callback(_note, file, {"left": ident} if shared else None)
        yield


def is_held(path: Path) -> bool:
    """Whether a process holds the lock now. Who takes it at that very moment must be one that waits."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _opened(path: Path, shared: bool) -> IO[bytes] | None:
    """The lock's file, made where it is missing; None where it is missing and can't be made by a reader."""
    try:
        make_folder(path.parent)
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
    except OSError as error:
        if not shared or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
    try:
        return open(path, "rb", buffering=0)
    except OSError:
        return None


def _taken(file: IO[bytes], path: Path, shared: bool) -> bool:
    """Whether the lock was free, and is ours now. Raises `UserError` where the file system has none that hold."""
    if mount := _of_one_machine(path):
        raise UserError(
            f"{path}: expected locks that hold on all machines, found a file system that keeps them to this one "
            f"({mount}); choose another folder, or set {ANYWAY}=1 where no other machine works in this one"
        )
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        raise UserError(
            f"{path}: expected a file system with locks, found one without ({error.strerror}); choose another folder"
        ) from None
    return _is_at(path, file.fileno())


def _signed(file: IO[bytes], work: str, shared: bool) -> str:
    """Notes who holds the lock, and returns the note's id. A full disk does not matter: it is the lock that counts."""
    command, ident = shlex.join(sys.argv), secrets.token_hex(8)
    record = {
        "id": ident,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "work": work,
        "command": command if len(command) <= _LONGEST else command[: _LONGEST - 3] + "...",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if not shared or os.fstat(file.fileno()).st_size > _MOST_BYTES:
        _note(file, None)
    _note(file, record)
    return ident


def _note(file: IO[bytes], record: dict[str, Any] | None) -> None:
    """Adds a line to the lock's file; None empties it. A reader may have no right to."""
    with contextlib.suppress(OSError):
        if record is None:
            file.truncate(0)
        else:
            file.write(json.dumps(record).encode() + b"\n")


def _holders(path: Path) -> str:
    """Who holds the lock, in words: those of its file that still live, as far as this machine can tell."""
    found = [record for record in _records(path) if _lives(record)]
    if not found:
        return f"another process holds it (lock {path})"
    shown = [
        f"{one['work']} is at work on it (pid {one['pid']} on {one['host']}, since {one['since']}: {one['command']})"
        for one in found[:3]
    ]
    return "; ".join(shown) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _records(path: Path) -> list[dict[str, Any]]:
    """The notes of those who have not said that they left."""
    try:
        lines = path.read_bytes()[: 2 * _MOST_BYTES].splitlines()
    except OSError:
        return []
    found: dict[Any, dict[str, Any]] = {}
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and {"pid", "host", "work", "command", "since"} <= set(record):
                found[str(record.get("id"))] = record
            elif isinstance(record, dict):
                found.pop(str(record.get("left")), None)
    return list(found.values())


def _lives(record: dict[str, Any]) -> bool:
    if record["host"] != socket.gethostname() or not isinstance(record["pid"], int) or record["pid"] < 1:
        return True
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _is_at(path: Path, number: int) -> bool:
    """Whether the open file `number` is the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False


def _of_one_machine(path: Path) -> str | None:
    """The mount of a network file system whose locks hold on one machine only, in words; None where locks hold."""
    if os.environ.get(ANYWAY) == "1":
        return None
    try:
        mounts = MOUNTS.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return None
    folder, best = str(path.parent.resolve()), ("", "", "")
    for line in mounts.splitlines():
        _, place, kind, options, *_ = [*line.split(" "), "", "", "", ""]
        place = place.encode().decode("unicode_escape", errors="replace")
        if (folder + "/").startswith(place.rstrip("/") + "/") and len(place) >= len(best[0]):
            best = place, kind, options
    place, kind, options = best
    kept = _ONE_MACHINE & set(options.split(","))
    return f"{place} is {kind} with {', '.join(sorted(kept))}" if kind in _OF_NETWORKS and kept else None
