"""Extraction, training, evaluation and report in this process, round by round: what it holds stays."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

from tests.support.flat import used
from tests.torture.jobs import COMMANDS, UNDISTURBED, Torture

WARM = 3
"""Rounds after which a process holds what it goes on holding."""
_before: dict[Path, dict[str, int]] = {}


def case(torture: Torture, number: int, seed: int) -> str | None:
    """A round; all are the same."""
    from hafs_jax import cli

    out = torture.folder / "rounds"
    if not out.exists():
        torture.make_texts()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for job in ("extract", "fit", "evaluate", "report"):
        for command in (COMMANDS | UNDISTURBED)[job]:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                code = cli.main(torture.filled(command, out))
            if code:
                return f"{job} ends with {code}"
    if number < WARM:
        _before[out] = used()
        return None
    now, before = used(), _before[out]
    grown, after = {name: now[name] - before[name] for name in now}, number + 1 - WARM
    print(f"round {number + 1}: the process holds more: {grown}", file=sys.stderr)
    is_flat = grown["megabytes"] < 30 + 3 * after and grown["maps"] < 20 + 5 * after
    return None if is_flat and grown["descriptors"] <= 0 and grown["threads"] <= 2 else f"{after} rounds added {grown}"
