"""Locks on folders: one owner at a time, free once the owner is gone, however it went."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hafs_jax.base import places
from hafs_jax.base.errors import UserError
from hafs_jax.base.places import locked


def test_a_locked_folder_is_refused_by_name_and_free_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with locked(folder), pytest.raises(UserError, match=f"another extraction is at work in {folder}; wait for it"):
        locked(folder).__enter__()
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_the_error_says_what_is_at_work_and_where(tmp_path: Path) -> None:
    with (
        locked(tmp_path, "training", ".a.lock", tmp_path / "a"),
        pytest.raises(UserError, match=f"another training is at work in {tmp_path / 'a'};"),
        locked(tmp_path, "training", ".a.lock", tmp_path / "a"),
    ):
        pass
    with locked(tmp_path, name=".a.lock"), locked(tmp_path, name=".b.lock"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", ".b.lock"]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from hafs_jax.base.places import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=dict(os.environ), check=False, timeout=60)
    assert done.returncode == -9 and (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_a_file_that_its_owner_removes_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner removes and frees the file between our opening and locking it, and a third process locks a new one."""
    real, third = fcntl.flock, []

    def flock(file: object, how: int) -> None:
        if not third:
            (tmp_path / ".lock").unlink()
            third.append(open(tmp_path / ".lock", "w"))  # noqa: SIM115
            real(third[0], fcntl.LOCK_EX)
        real(file, how)

    monkeypatch.setattr(places.fcntl, "flock", flock)
    with pytest.raises(UserError, match="another extraction is at work"), locked(tmp_path):
        pass
    third[0].close()
