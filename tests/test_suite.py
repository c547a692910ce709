"""The suite's own set-up: shapes are checked, and a test that hangs is named, with stacks, while the others run."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from hafs_jax.method.penalties import coherence
from tests.support import fuzz
from tests.support.sources import ROOT

HANGS = """
import ctypes
import time

def test_in_python():
    time.sleep(1000)

def test_outside_of_python():
    mutex, lock = ctypes.create_string_buffer(64), ctypes.PyDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)

def test_that_runs_after_them():
    pass
"""


def test_the_shapes_of_arrays_are_checked() -> None:
    with pytest.raises(TypeCheckError, match=r"W_dec"):
        coherence(jnp.zeros(5))


def test_every_test_has_a_limit(pytestconfig: pytest.Config) -> None:
    seconds, dump = float(pytestconfig.getini("timeout")), float(pytestconfig.getini("faulthandler_timeout"))
    assert 60 <= seconds < dump <= 300 and pytestconfig.getini("faulthandler_exit_on_timeout")
    assert pytestconfig.pluginmanager.hasplugin("timeout")


def test_random_and_damaged_inputs_are_tried_by_the_thousand(pytestconfig: pytest.Config) -> None:
    assert fuzz.TOTAL >= 1_700 and pytestconfig.getoption("fuzz_cases") > 0
    others = (path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    tests = "".join(path.read_text() for path in others)
    assert [kind for kind in fuzz.CASES if tests.count(f'"{kind}"') != 1] == []
    assert {kind: fuzz.count(kind) for kind in fuzz.CASES} == fuzz.CASES
    assert fuzz.count("npy files", 10 * fuzz.TOTAL) == 2_000 and fuzz.count("npy files", 1) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the lock that hangs outside of Python is glibc's")
def test_what_hangs_is_named_and_the_rest_runs(tmp_path: Path) -> None:
    """With the suite's settings, on a worker as `make test` uses them; the limits shortened to seconds."""
    (tmp_path / "test_hangs.py").write_text(HANGS)
    limits = ("timeout=1", "faulthandler_timeout=3")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-n", "1",
         *(part for limit in limits for part in ("-o", limit)), "test_hangs.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_hangs.py::test_in_python - Failed: Timeout (>1.0s)" in done.stdout
    assert re.search(r"FAILED test_hangs.py::test_outside_of_python - worker '\w+' crashed", done.stdout)
    assert re.search(r'test_hangs.py", line \d+ in test_outside_of_python', done.stderr)  # where it hangs
    assert done.stdout.count("Stack of") >= 1  # the threads of the one that hangs in Python
