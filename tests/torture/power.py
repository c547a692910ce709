"""A power loss at a random moment: what was synced is there, and of all else any prefix.

The changes of names are kept in their order, as a journal keeps them: all up to the last one in a folder that was
synced, and any number after it. Of the writes into a file those before its last sync are there, and any number after.
"""

import random
import shutil
from pathlib import Path

from tests.torture.jobs import Torture
from tests.torture.layer import Event, read_log

_logs: dict[str, list[Event]] = {}


def case(torture: Torture, number: int, seed: int) -> str | None:
    rng = random.Random(f"power {seed} {number}")
    job = torture.job(number)
    recorded = torture.folder / "case"
    if job not in _logs:
        log = torture.folder / f"{job}.log"
        log.unlink(missing_ok=True)
        code, said = torture.run(job, torture.fresh(job), log=log)
        assert code == 0, said
        _logs[job] = list(read_log(log))
    moment = rng.randint(1, len(_logs[job]))
    out = torture.fresh(job)
    replay(_logs[job][:moment], recorded, out, rng)
    problem = torture.problem(job, out)
    return problem and f"{job}, power lost after event {moment} of {len(_logs[job])}: {problem}"


def replay(events: list[Event], recorded: Path, out: Path, rng: random.Random) -> None:
    """Makes `out`, which is as before the events, what a power loss after them may leave of it."""
    names = [index for index, event in enumerate(events) if event.kind in "CRLUM"]
    synced = {event.path: index for index, event in enumerate(events) if event.kind == "D"}
    forced = max(
        (
            index
            for index in names
            for path in (events[index].path, events[index].other)
            if path and index < synced.get(str(Path(path).parent), -1)
        ),
        default=-1,
    )
    kept = rng.choice([forced, *(index for index in names if index > forced)])

    def place(path: str) -> Path:
        return out / Path(path).relative_to(recorded)

    inodes: dict[int, Path] = {}
    created: dict[int, int] = {}  # the event that made the file, since the number of a removed file is given again
    for index, event in ((index, events[index]) for index in names if index <= kept):
        path = place(event.path)
        if event.kind == "C":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            inodes[event.inode], created[event.inode] = path, index
        elif event.kind == "M":
            path.mkdir(exist_ok=True)
        elif event.kind == "U" and path.is_dir():
            shutil.rmtree(path)
        elif event.kind == "U":
            path.unlink(missing_ok=True)
            inodes = {inode: at for inode, at in inodes.items() if at != path}
        elif event.kind == "R" and path.exists():
            target = place(event.other)
            if target.is_dir() and path.is_dir():
                shutil.rmtree(target)
            inodes = {inode: at for inode, at in inodes.items() if at != target}
            path.rename(target)
            inodes = {
                inode: target / at.relative_to(path) if at.is_relative_to(path) else at for inode, at in inodes.items()
            }
        elif event.kind == "L" and path.exists():
            shutil.copy2(path, place(event.other))
    for inode, path in inodes.items():
        later = events[created[inode] + 1 :]
        again = next((i for i, event in enumerate(later) if event.inode == inode and event.kind == "C"), len(later))
        own = [event for event in later[:again] if event.inode == inode and event.kind in "WTS"]
        last = max((index for index, event in enumerate(own) if event.kind == "S"), default=-1)
        with open(path, "r+b") as file:
            for event in own[: rng.randint(last + 1, len(own))]:
                if event.kind == "W":
                    file.seek(event.offset)
                    file.write(event.data)
                elif event.kind == "T":
                    file.truncate(event.offset)
