"""The examples run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_train_on_array(given: bool, tmp_path: Path) -> None:
    arguments = []
    if given:
        np.save(tmp_path / "acts.npy", np.random.default_rng(0).normal(size=(3000, 12)).astype(np.float16))
        arguments = [str(tmp_path / "acts.npy")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_on_array.py"), *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if "nearest dictionary" in line]
    assert [line.split(":")[0] for line in lines] == ["baseline-s0", "adaptive-s0"]
    assert ("true directions found" in lines[0]) == (not given)
