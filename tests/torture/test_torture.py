"""A few cases of each subject of `make torture`, and proof that the layer sees and refuses what files go through."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture import layer
from tests.torture.__main__ import SUBJECTS
from tests.torture.layer import Event
from tests.torture.power import replay

needs_compiler = pytest.mark.skipif(not layer.is_buildable(), reason="needs a C compiler, cc")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)  # of many commands
def test_a_few_cases_of_each_subject() -> None:
    others = ("fuzz", "flat", "loop", "rounds")  # the first three have tests of their own
    subjects = [name for name in SUBJECTS if name not in others]
    assert _faultless(*subjects, jobs=["export", "import", "replace"]) == subjects


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rounds_of_commands_that_are_killed_leave_nothing_behind() -> None:
    assert _faultless("loop", jobs=["evaluate"]) == ["loop"]


def _faultless(*subjects: str, jobs: list[str]) -> list[str]:
    """Those of the subjects of which three cases went right."""
    command = [sys.executable, "-m", "tests.torture", *subjects, "--cases", "3", "--jobs", *jobs]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^(\w+): 3 cases of seed 0, 0 wrong", done.stdout, re.MULTILINE)


@needs_compiler
def test_the_layer_counts_refuses_and_records(tmp_path: Path) -> None:
    script = (
        "import sys, errno; from pathlib import Path; from tests.torture import layer\n"
        "from hafs_jax.base.files import write_text, UserError\n"
        "root = Path(sys.argv[1]) / 'root'; root.mkdir(); log = root.parent / 'log'\n"
        "layer.arm(root, log=log); write_text(root / 'a', 'hello'); n = layer.events()\n"
        "print(n, ''.join(event.kind for event in layer.read_log(log)))\n"
        "for at in range(1, n + 1):\n"
        "    layer.arm(root, at, errno.EIO)\n"
        "    try: write_text(root / 'a', 'other')\n"
        "    except UserError as error: assert 'cannot write' in str(error), error\n"
        "    layer.arm(Path('/nowhere')); assert (root / 'a').read_text() in ('hello', 'other')\n"
        "    assert [p.name for p in root.iterdir()] == ['a']; write_text(root / 'a', 'hello')\n"
    )
    library = layer.build(tmp_path)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7 CWSRD\n"  # with a folder and a leftover that are there and not there already


def test_a_power_loss_keeps_what_was_synced_and_any_prefix_of_the_rest(tmp_path: Path) -> None:
    """Without the sync of the folder the rename may be lost, and without that of the file its content."""

    def outcomes(*kinds: str) -> set[str]:
        events = {
            "C": Event("C", 1, 0, "/r/t", "", b""),
            "W": Event("W", 1, 0, "/r/t", "", b"new"),
            "S": Event("S", 1, 0, "/r/t", "", b""),
            "R": Event("R", 0, 0, "/r/t", "/r/a", b""),
            "D": Event("D", 0, 0, "/r", "", b""),
        }
        found = set()
        for case in range(60):
            out = tmp_path / f"{''.join(kinds)}{case}"
            out.mkdir()
            (out / "a").write_text("old")
            replay([events[kind] for kind in kinds], Path("/r"), out, random.Random(case))
            found.add((out / "a").read_text())
        return found

    # The number of a file that was removed is given to the next one; what was written to either is its own.
    reused = [
        Event("C", 1, 0, "/r/t", "", b""),
        Event("W", 1, 0, "/r/t", "", b"longer"),
        Event("U", 0, 0, "/r/t", "", b""),
    ]
    whole = [
        Event(kind, 1 if kind in "CWS" else 0, 0, "/r" if kind == "D" else "/r/t", "/r/a", b"new") for kind in "CWSRD"
    ]
    out = tmp_path / "reused"
    out.mkdir()
    replay([*reused, *whole], Path("/r"), out, random.Random(0))
    assert (out / "a").read_text() == "new"
    assert outcomes(*"CWSRD") == {"new"}
    assert outcomes(*"CWSR") == {"old", "new"}
    assert outcomes(*"CWRD") == {"", "new"}
