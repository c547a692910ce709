"""Commands that a command starts: what stops them, and that nothing of them is left."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hafs_jax.base.process import children

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and ends with the parent there alone")

SCRIPT = """#!/bin/sh
# $1 -m, $2 hafs_jax, $3 the command: how many tenths of a second it takes to save what it has
trap 'sleep 0.$3; echo $3 >> saved; exit 143' TERM
echo $3 >> started
[ "$3" = 0 ] && exit 7
while :; do sleep 0.05; done
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which a script stands for `hafs` and notes what becomes of it."""
    script = tmp_path / "script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for child in children._children:  # of a test that has failed
        child.kill()


def _thread(run: Callable[..., object], *arguments: object) -> threading.Thread:
    return threading.Thread(target=run, args=arguments, daemon=True)


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _wait_for(path: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(_lines(path)) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_command_has_its_exit_code_and_cores_and_leaves_no_descriptor(here: Path) -> None:
    core = min(os.sched_getaffinity(0))
    assert children.run(["0"]) == 7
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        assert children.run(["0"], cores={core}) == 7
    assert os.listdir("/proc/self/fd") == before and _lines(here / "started") == ["0"] * 4


def test_its_threads_run_on_its_cores(here: Path) -> None:
    core = min(os.sched_getaffinity(0))
    thread = _thread(children.run, ["1"], {core})
    with pytest.raises(KeyError), children.stopping():
        thread.start()
        _wait_for(here / "started", 1)
        (child,) = children._children
        assert os.sched_getaffinity(child.pid) == {core}
        raise KeyError
    thread.join(30)


def test_an_exception_ends_all_and_nothing_is_started_after_it(here: Path) -> None:
    """One saves within 0.1 s, one within 0.9: what was to come after the first does not begin."""
    codes: list[int] = []

    def two_in_turn() -> None:
        codes.extend([children.run(["1"]), children.run(["1"])])

    threads = [_thread(two_in_turn), _thread(lambda: codes.append(children.run(["9"])))]
    with pytest.raises(KeyError), children.stopping():
        for thread in threads:
            thread.start()
        _wait_for(here / "started", 2)
        raise KeyError
    assert sorted(_lines(here / "saved")) == ["1", "9"]  # it has waited for both
    for thread in threads:
        thread.join(30)
    assert codes == [143, 143, 143] and sorted(_lines(here / "started")) == ["1", "9"]
    assert children.run(["0"]) == 7  # what comes later is another matter
    assert not children._children


def test_an_exception_while_one_is_waited_for_ends_it(here: Path) -> None:
    def interrupt() -> None:
        _wait_for(here / "started", 1)
        os.kill(os.getpid(), 2)

    thread = _thread(interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        children.run(["3"])
    assert _lines(here / "saved") == ["3"] and not children._children
    thread.join()
