"""Many trainings in one process: its memory, maps, descriptors and threads stay as they are."""

import sys
from pathlib import Path

import pytest

from tests.support.flat import Trainings


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_trainings_leave_the_process_as_one_does(tmp_path: Path) -> None:
    trainings = Trainings(tmp_path)
    for seed in range(10):
        trainings.train(seed)
    assert trainings.problem() is None
