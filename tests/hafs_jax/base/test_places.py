"""Folders that last: what is on disk before and after a name changes, and what a killed process has left."""

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import pytest

from hafs_jax.base import places
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_atomic
from hafs_jax.base.places import make_folder, put_in_place, sync_folder, sync_tree, temporary_folder


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(sync, what) and (rename, from where), as they come; paths are relative to the test's folder."""
    found: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_sync(number: int) -> None:
        found.append(("sync", os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), tmp_path)))
        fsync(number)

    def noted_rename(self: Path, target: Path) -> Path:
        found.append(("rename", os.path.relpath(self, tmp_path)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return found


def _made(folder: Path, text: str) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").write_text(text)
    (folder / "link").symlink_to("nowhere")
    return folder


def test_each_new_folders_name_is_on_disk(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    make_folder(tmp_path / "a" / "b" / "c")
    assert sorted(events) == [("sync", "."), ("sync", "a"), ("sync", "a/b")]
    events.clear()
    make_folder(tmp_path / "a" / "b" / "c")
    assert not events


def test_a_path_of_very_many_new_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected at most 100 new folders in a path, found 101"):
        make_folder(tmp_path / "/".join("a" * 101))
    assert not list(tmp_path.iterdir())
    make_folder(tmp_path / "/".join("a" * 100))


def test_a_folder_is_on_disk_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    made, place, old = _made(tmp_path / "made", "new"), tmp_path / "here" / "store", tmp_path / "there" / "old"
    put_in_place(made, place, old)
    at = events.index(("rename", "made"))
    assert {("sync", "made/inner/a"), ("sync", "made/inner"), ("sync", "made")} <= set(events[:at])
    assert events[at + 1 :] == [("sync", "here")]
    assert (place / "inner" / "a").read_text() == "new" and not old.exists()
    events.clear()
    _made(old, "older")
    put_in_place(_made(tmp_path / "made", "newer"), place, old)
    assert (place / "inner" / "a").read_text() == "newer" and (old / "inner" / "a").read_text() == "new"
    first, second = events.index(("rename", "here/store")), events.index(("rename", "made"))
    assert ("sync", "there") in events[first:second] and events[-1] == ("sync", "here")


@pytest.mark.parametrize(("number", "is_said"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_disk_that_fails_is_named_and_one_that_cannot_sync_is_none(
    number: int, is_said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuses)
    if not is_said:
        sync_folder(tmp_path)
        return
    with pytest.raises(OSError) as raised:
        sync_folder(tmp_path)
    assert raised.value.filename == str(tmp_path)
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError) as raised:
        sync_tree(tmp_path)
    assert raised.value.filename == str(tmp_path / "a")


def test_a_temporary_folder_goes_and_so_does_one_that_a_kill_has_left(tmp_path: Path) -> None:
    left, other = _made(tmp_path / "work-left", "half"), _made(tmp_path / "elsewhere", "whole")
    with temporary_folder(tmp_path, "work-") as first:
        assert not left.exists() and other.exists() and os.stat(first).st_mode & 0o777 == 0o700
        with temporary_folder(tmp_path, "work-") as second:
            assert first.exists() and second != first
        assert first.exists() and not second.exists()
        with pytest.raises(BlockingIOError), places._locked_folder(first):
            pass
    with pytest.raises(KeyError), temporary_folder(tmp_path, "work-") as third:
        raise KeyError
    assert not third.exists() and sorted(tmp_path.iterdir()) == [other]


def test_a_file_that_is_being_written_is_locked_and_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """So no process of another machine takes it for one that a kill has left."""

    def write(file: IO[bytes]) -> None:
        (temporary,) = tmp_path.iterdir()
        with open(temporary, "rb+") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(b"half")
        raise KeyError

    with pytest.raises(KeyError):
        write_atomic(tmp_path / "a", write)
    assert not list(tmp_path.iterdir())
