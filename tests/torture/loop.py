"""Extraction, training and evaluation again and again in one folder, killed at random moments.

After each round the results are the undisturbed ones, and nothing has grown: the files, processes that were left, and
what this process holds for the commands that it forks.
"""

import ctypes
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from tests.support.flat import used
from tests.torture.jobs import Torture

ROUND = ("extract", "fit", "evaluate")
WARM = 2
"""Rounds after which everything is there that stays."""
_MOST_MB = 30
_KEPT = 3
"""Checkpoints of a run: two last ones, and the best."""
_ADOPT = 36  # PR_SET_CHILD_SUBREAPER of prctl: what a killed command has left becomes a child of this process
_before: dict[Path, dict[str, int]] = {}
_names: dict[Path, set[Path]] = {}


def case(torture: Torture, number: int, seed: int) -> str | None:
    """A round: each command anew, killed up to twice, and then given again as it says, without `--force`."""
    if "evaluate" not in torture.essences:
        torture.make_texts()
        torture.prepare("evaluate")
    rng, out = random.Random(f"loop {seed} {number}"), torture.folder / "loop"
    if not out.exists():
        ctypes.CDLL(None).prctl(_ADOPT, 1)
        tempfile.tempdir = str(torture.folder / "temporary")  # of the forks too
        Path(tempfile.tempdir).mkdir()
        shutil.copytree(torture.folder / "of-evaluate", out, symlinks=True)
    for job in ROUND:
        if problem := _killed(torture, job, out, rng):
            return problem
    problem, deadline = torture.difference("evaluate", out), time.monotonic() + 10
    while not problem and (grown := _grown(out, number)):  # what a killed command has left may end in its own time
        if time.monotonic() > deadline:
            return grown
        time.sleep(0.2)
    return problem


def _killed(torture: Torture, job: str, out: Path, rng: random.Random) -> str | None:
    """The job anew, killed at random moments, until it has ended; what is wrong with its end."""
    if job == "evaluate":
        for results in out.rglob("eval"):
            shutil.rmtree(results)  # else there is nothing to measure
    names = [job if job == "evaluate" else f"{job} anew", job, job]
    kills = rng.choice((0, 1, 1, 2))
    for name in names[:kills]:
        moment = rng.uniform(0, torture.seconds[job])

        def kill(pid: int, moment: float = moment) -> None:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)

        torture.run(name, out, meanwhile=kill)
    code, said = torture.run(names[kills], out)
    return f"{names[kills]} ends with {code} after {kills} kills: {said.strip()[-4000:]}" if code else None


def _grown(out: Path, number: int) -> str | None:
    """What there is more of than after the first rounds. A checkpoint counts as one file."""
    held, steps = used(), [path for kind in ("checkpoints", "best") for path in out.rglob(f"{kind}/[0-9]*")]
    names = {path.relative_to(out) for path in out.rglob("*") if path.is_file() and not set(steps) & set(path.parents)}
    now = {
        "files": len(names),
        "checkpoints": max(0, len(steps) - _KEPT * len(list(out.rglob("run.json")))),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "processes": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
        **{name: held[name] for name in ("descriptors", "maps", "threads", "megabytes")},
    }
    if number < WARM:
        _before[out], _names[out] = now, names
    before = _before.setdefault(out, now)
    most = {name: count + (_MOST_MB if name == "megabytes" else 0) for name, count in before.items()}
    grown = [f"{name} {before[name]} to {now[name]}" for name in now if now[name] > most[name]]
    new = f" ({', '.join(map(str, sorted(names - _names.get(out, names))[:9]))})"
    return f"more than after {WARM} rounds: {', '.join(grown)}{new}" if grown else None
