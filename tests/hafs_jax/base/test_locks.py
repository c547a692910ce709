"""Locks: one owner or many readers at a time, free once the owner is gone, however it went."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.base.process import locks
from hafs_jax.base.process.locks import locked

HOLD = """
import os, sys
from pathlib import Path
from hafs_jax.base.process.locks import locked
with locked(Path(sys.argv[1]), "a training", Path("there"), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read(1)
    {then}
"""


def held_elsewhere(path: Path, how: str = "alone", then: str = "pass") -> subprocess.Popen:
    """Another process that holds the lock until something is written to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_who_holds_a_lock_is_said(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    other = held_elsewhere(path)
    wanted = rf"there: a training is at work on it \(pid {other.pid} on {os.uname().nodename}, since 20.*-c"
    with pytest.raises(UserError, match=wanted), locked(path, "an evaluation", Path("there")):
        pass
    other.communicate(b"x", timeout=30)
    with locked(path, "an evaluation", Path("there")):
        assert b'"work": "an evaluation"' in path.read_bytes() and b"a training" not in path.read_bytes()
    assert path.exists() and path.read_bytes() == b""


def test_many_read_and_one_writes(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    other = held_elsewhere(path, "shared")
    with (
        locked(path, "an evaluation", tmp_path, shared=True),
        locked(path, "a report", tmp_path, shared=True),
        pytest.raises(UserError, match=r"a training is at .*; an evaluation is .*; a report is at") as caught,
    ):
        locked(path, "an extraction", tmp_path).__enter__()
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match="a training is at work on it") as caught:
        locked(path, "an extraction", tmp_path).__enter__()
    assert "evaluation" not in str(caught.value)  # which has left
    other.communicate(b"x", timeout=30)
    with locked(path, "an extraction", tmp_path), pytest.raises(UserError, match="an extraction is at work on it"):
        locked(path, "a training", tmp_path, shared=True).__enter__()


def test_notes_that_are_damaged_or_of_another_machine_do_not_hinder(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    note = {"pid": 2**22 + 1, "work": "a training", "command": "hafs train", "since": "now"}  # above the largest pid
    here, there = {**note, "id": "a", "host": os.uname().nodename}, {**note, "id": "b", "host": "elsewhere"}
    path.write_text("\n".join(["{", "[" * 100_000, "[1]", json.dumps(here), json.dumps(there), "\0\0"]))
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError) as caught:
            locked(path, "an evaluation", tmp_path).__enter__()
    assert f"a training is at work on it (pid {2**22 + 1} on elsewhere, since now: hafs train)" in str(caught.value)
    assert os.uname().nodename not in str(caught.value)


def test_who_has_just_taken_a_lock_has_a_moment_to_sign(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    note = {
        "id": "a",
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "work": "a sweep",
        "command": "",
        "since": "now",
    }
    with open(path, "wb", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(locks._POLL_SECONDS / 4, other.write, [json.dumps(note).encode() + b"\n"]).start()
        with pytest.raises(UserError, match="a sweep is at work on it"):
            locked(path, "an evaluation", tmp_path).__enter__()


def test_notes_of_many_readers_do_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    monkeypatch.setattr(locks, "_MOST_BYTES", 1000)
    monkeypatch.setattr(sys, "argv", ["hafs", "x" * 3000])
    for _ in range(30):
        with locked(path, "a report", tmp_path, shared=True):
            assert b'"work": "a report"' in path.read_bytes()
    assert path.stat().st_size < 2000


def test_the_lock_of_a_killed_process_is_free_and_its_name_forgotten(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    for how in ("alone", "shared"):
        killed = held_elsewhere(path, how, then="os.kill(os.getpid(), 9)")
        killed.communicate(b"x", timeout=30)
        assert killed.returncode == -9
        other = held_elsewhere(path, "shared")
        with pytest.raises(UserError) as caught, locked(path, "an extraction", tmp_path):
            pass
        assert f"pid {other.pid} " in str(caught.value) and f"pid {killed.pid} " not in str(caught.value)
        other.communicate(b"x", timeout=30)
        with locked(path, "an extraction", tmp_path):
            pass


def test_who_waits_gets_the_lock(tmp_path: Path) -> None:
    path, order = tmp_path / ".lock", []

    def second() -> None:
        with locked(path, "an evaluation", tmp_path, wait=True):
            order.append("second")

    with locked(path, "an evaluation", tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_a_lock_is_never_held_twice(tmp_path: Path) -> None:
    """Four processes take it as often as they can. Its file stays, so that none locks a file that others don't see."""
    script = (
        "import sys, time; from pathlib import Path; from hafs_jax.base.errors import UserError\n"
        "from hafs_jax.base.process.locks import locked\n"
        "folder, taken, end = Path(sys.argv[1]), 0, time.monotonic() + 2\n"
        "while time.monotonic() < end:\n"
        "    try:\n"
        "        with locked(folder / '.lock', 'a test', folder):\n"
        "            (folder / 'inside').touch(exist_ok=False); (folder / 'inside').unlink(); taken += 1\n"
        "    except UserError: pass\n"
        "print(taken)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(4)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert all(process.returncode == 0 for process in started) and sum(map(int, said)) > 50


def test_a_lock_that_someone_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third process makes and locks a new file between our opening and our locking of the old one."""
    path, real, third = tmp_path / ".lock", fcntl.flock, []

    def flock(file: object, how: int) -> None:
        if not third:
            path.unlink()
            third.append(open(path, "w"))  # noqa: SIM115
            real(third[0], fcntl.LOCK_EX)
        real(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process holds it"), locked(path, "a test", tmp_path):
        pass
    third[0].close()


def test_a_file_system_without_locks_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(UserError, match="expected a file system with locks, found one without"):
        locked(tmp_path / ".lock", "a test", tmp_path).__enter__()


@pytest.mark.parametrize("options", ["rw,nolock", "rw,vers=3,local_lock=all,addr=1", "local_lock=flock"])
def test_a_mount_whose_locks_hold_on_one_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(locks, "MOUNTS", mounts)
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs {options} 0 0\n")
    with pytest.raises(UserError, match=r"keeps them to this one .*HAFS_LOCAL_LOCKS=1"):
        locked(tmp_path / "a" / ".lock", "a test", tmp_path).__enter__()
    mounts.write_text(f"server:/x {tmp_path} nfs {options} 0 0\n/dev/a / ext4 rw 0 0\n")
    with pytest.raises(UserError, match="keeps them to this one"):  # the mount below counts, in any order
        locked(tmp_path / "a" / ".lock", "a test", tmp_path).__enter__()
    monkeypatch.setenv("HAFS_LOCAL_LOCKS", "1")
    with locked(tmp_path / "a" / ".lock", "a test", tmp_path):
        pass
    monkeypatch.delenv("HAFS_LOCAL_LOCKS")
    mounts.write_text(f"server:/x {tmp_path} nfs rw,local_lock=none 0 0\n")
    with locked(tmp_path / "a" / ".lock", "a test", tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_reader_locks_what_it_could_not_write(tmp_path: Path) -> None:
    """Of another's store. Where that has no lock, nobody who writes it keeps to locks either."""
    path = tmp_path / ".lock"
    with locked(path, "an extraction", tmp_path):
        pass
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    as_nobody = (
        "import os; from hafs_jax.base.process.locks import locked; from pathlib import Path; import sys\n"
        "import encodings.unicode_escape\n"  # Python's own files may be closed to others
        "os.setuid(65534)\n"
        "with locked(Path(sys.argv[1]), 'a training', Path('x'), shared=True): print('held', flush=True); input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", as_nobody, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another process holds it"), locked(path, "an extraction", tmp_path):
        pass
    other.communicate(b"\n", timeout=30)
    path.unlink()
    alone = subprocess.run([sys.executable, "-c", as_nobody, str(path)], input=b"\n", check=False, timeout=60)
    assert alone.returncode == 0 and not path.exists()
