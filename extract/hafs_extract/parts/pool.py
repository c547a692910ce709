"""Which worker makes which part, and what happens when one dies. No torch here, and nothing of how workers run."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hafs_extract.parts.files import Entry
from hafs_extract.parts.jobs import Job
from hafs_jax.base.errors import UserError

LOG = logging.getLogger(__name__)

RETRIES = 3


@dataclass(frozen=True)
class Ready:
    """A worker has its model."""

    made_by: dict[str, Any]  # see `making.made_by`
    place: str  # what the worker is called in messages


@dataclass(frozen=True)
class Made:
    """A worker has made the first of its jobs."""

    entry: Entry


@dataclass(frozen=True)
class Refused:
    """A worker has found a user's mistake, which ends the extraction."""

    message: str


@dataclass(frozen=True)
class Died:
    """A worker is no more."""

    reason: str


Said = Ready | Made | Refused | Died


class Crew(Protocol):
    """Workers, numbered from 0."""

    size: int

    def start(self, worker: int) -> None:
        """Starts a worker, which then says `Ready`."""

    def depth(self, made_by: dict[str, Any]) -> int:
        """How many jobs a worker takes at once. Those after the first wait while the one before is written."""

    def send(self, worker: int, job: Job) -> None:
        """Gives a worker a job."""

    def wait(self) -> tuple[int, Said]:
        """What a worker says next, and which; waits for it."""

    def close(self) -> None:
        """Ends all workers."""


class Pool:
    """Gives jobs to the workers of a crew."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self.made_by: dict[str, Any] | None = None  # of every worker
        self.starts: Counter[Job] = Counter()  # how often each job was begun
        self._failures: Counter[Job | None] = Counter()  # None: workers that died before they were ready
        self._jobs: dict[int, deque[Job]] = {}  # of each worker that lives
        self._ready: dict[int, str] = {}

    def start(self, jobs: int) -> None:
        """Starts as many workers as there is work for, and returns when all are ready."""
        for worker in range(min(self._crew.size, jobs)):
            if worker not in self._jobs:
                self._start(worker)
        while len(self._ready) < len(self._jobs):
            self._hear(deque(), lambda *_: None)

    def make(self, jobs: Sequence[Job], made: Callable[[Job, Entry], None]) -> None:
        """Has the jobs done. `made(job, entry)` is called after each.

        Raises `UserError` where one fails `RETRIES` times more than once, and what a worker says of a user's mistake.
        """
        self.start(len(jobs))
        waiting = deque(jobs)
        while waiting or any(self._jobs.values()):
            self._deal(waiting)
            self._hear(waiting, made)

    def rest(self) -> None:
        """Ends the workers. They are started again when there is work."""
        self._crew.close()
        self._jobs, self._ready = {}, {}

    def _start(self, worker: int) -> None:
        self._jobs[worker] = deque()
        self._crew.start(worker)

    def _deal(self, waiting: deque[Job]) -> None:
        """Gives every worker that is ready a first job, then a second where it takes one."""
        most = self._crew.depth(self.made_by) if self.made_by else 1
        for depth in range(most):
            for worker in self._ready:
                if waiting and len(self._jobs[worker]) == depth:
                    job = waiting.popleft()
                    self._jobs[worker].append(job)
                    self.starts[job] += 1
                    self._crew.send(worker, job)

    def _hear(self, waiting: deque[Job], made: Callable[[Job, Entry], None]) -> None:
        worker, said = self._crew.wait()
        if isinstance(said, Refused):
            raise UserError(said.message)
        if isinstance(said, Ready):
            self._check(said)
            self._ready[worker] = said.place
        elif isinstance(said, Made):
            made(self._jobs[worker].popleft(), said.entry)
        else:
            self._died(worker, said.reason, waiting)

    def _died(self, worker: int, reason: str, waiting: deque[Job]) -> None:
        """Puts a dead worker's jobs back, and starts another in its place."""
        jobs = self._jobs.pop(worker)
        place = self._ready.pop(worker, f"worker {worker}")
        waiting.extendleft(reversed(jobs))
        failed = jobs[0] if jobs else None
        self._failures[failed] += 1
        what = f"part {failed.part.number} of the {failed.split} split" if failed else "a worker's start"
        if self._failures[failed] > RETRIES:
            raise UserError(
                f"{what} failed {RETRIES + 1} times, the last time on {place} ({reason}); put that right and give the"
                " same command again, which goes on from there"
            )
        LOG.warning(f"{what} failed on {place} ({reason}); it is tried again")
        self._start(worker)

    def _check(self, said: Ready) -> None:
        """Raises `UserError` where a worker would compute other last bits than the others."""
        if self.made_by is None:
            self.made_by = said.made_by
        for name, expected in self.made_by.items():
            if (found := said.made_by.get(name)) != expected:
                raise UserError(
                    f"expected workers that compute the same bits, found {name} {found} on {said.place} and {expected}"
                    " on another; give machines of one kind with the same versions installed"
                )
