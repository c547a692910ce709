"""Workers on a Ray cluster: one actor for each GPU, or actors that share the cores. Ray is imported in functions.

The cluster is that of the environment variable RAY_ADDRESS; without it, one is started on this machine and ended again.
"""

import contextlib
import dataclasses
import os
import re
import socket
import threading
from pathlib import Path
from typing import Any

from hafs_extract.parts.files import Entry
from hafs_extract.parts.jobs import Job, Setup
from hafs_extract.parts.pool import Died, Made, Ready, Refused, Said
from hafs_jax.base.errors import UserError, arg, disk_errors
from hafs_jax.base.options import from_dict, to_dict

ADDRESS = "RAY_ADDRESS"
CONNECT_SECONDS = 15.0
START_SECONDS = 900.0  # for a worker to be placed and to load its model


class Cluster:
    """A connection to a Ray cluster, with room for workers."""

    def __init__(self, workers: int | None, device: str) -> None:
        """`device` is the config's. Raises `UserError` where there is no cluster, or no room for so many workers."""
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; it warns without
        import ray

        address = os.environ.get(ADDRESS)
        if address:
            _check_answers(address)
        try:
            quiet = {"log_to_driver": False, "logging_level": "ERROR"}
            ray.init(address=address or "local", **quiet, **({} if address else {"include_dashboard": False}))
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"{ADDRESS}={address}" if address else "a cluster on this machine"
            raise UserError(
                f"{where}: expected a Ray cluster, found none ({_first_line(error)}); start one with `ray start"
                f" --head`, or correct {ADDRESS}"
            ) from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._cpus = [int(node.get("CPU", 0)) for node in nodes]
        self._gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        self._on_gpus = self._gpus > 0 and device in ("auto", "cuda")
        self.size = workers or (self._gpus if self._on_gpus else max(1, sum(cpus > 0 for cpus in self._cpus)))
        self._threads = 0 if self._on_gpus else threads_each(self._cpus, self.size)
        if self.size > self._gpus if self._on_gpus else self._threads == 0:
            self.close()
            has = f"{self._gpus} GPUs" if self._on_gpus else f"{sum(self._cpus)} CPUs"
            raise UserError(f"{arg('workers', self.size)}: the Ray cluster has {has}; give fewer, or a larger cluster")

    def crew(self, setup: Setup) -> "Actors":
        """The workers of an extraction."""
        if self._on_gpus:
            return Actors(setup, self.size, {"num_gpus": 1, "num_cpus": 0})
        return Actors(dataclasses.replace(setup, threads=self._threads), self.size, {"num_cpus": self._threads})

    def close(self) -> None:
        """Ends the connection, and a cluster that was started here."""
        import ray

        ray.shutdown()


def threads_each(cpus: list[int], workers: int) -> int:
    """The most threads that each of `workers` can have on machines with so many CPUs; 0 where there is no room."""
    for threads in range(max(cpus, default=0), 0, -1):
        if sum(count // threads for count in cpus) >= workers:
            return threads
    return 0


class Actors:
    """A crew (`pool.Crew`) of Ray actors."""

    def __init__(self, setup: Setup, size: int, resources: dict[str, int]) -> None:
        import ray

        self.size, self._setup = size, setup
        self._remote = ray.remote(**resources, max_restarts=0, max_concurrency=2)(Actor)
        self._actors: dict[int, Any] = {}
        self._waiting: dict[Any, int] = {}  # the worker of each answer that is to come
        self._starting: set[int] = set()

    def start(self, worker: int) -> None:
        self._actors[worker] = actor = self._remote.remote(to_dict(self._setup))
        self._waiting[actor.ready.remote()] = worker
        self._starting.add(worker)

    def depth(self, made_by: dict[str, Any]) -> int:
        """On a CPU one: a part that is written beside another would be lost with it."""
        return 1 if str(made_by["device"]).startswith("cpu") else 2

    def send(self, worker: int, job: Job) -> None:
        self._waiting[self._actors[worker].make.remote(to_dict(job))] = worker

    def wait(self) -> tuple[int, Said]:
        import ray

        done, _ = ray.wait(list(self._waiting), num_returns=1, timeout=START_SECONDS if self._starting else None)
        if not done:
            raise UserError(
                f"no worker of the Ray cluster was ready in {START_SECONDS:g} s; look at `ray status`, and give the"
                " same command again, which goes on from there"
            )
        worker = self._waiting.pop(done[0])
        self._starting.discard(worker)
        try:
            return worker, _said(ray.get(done[0]))
        except ray.exceptions.RayError as error:
            self._end(worker)
            return worker, Died(_first_line(error))

    def close(self) -> None:
        for worker in list(self._actors):
            self._end(worker)
        self._starting.clear()

    def _end(self, worker: int) -> None:
        import ray

        self._waiting = {answer: other for answer, other in self._waiting.items() if other != worker}
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._actors.pop(worker))


class Actor:
    """What a worker on a cluster runs. Its answers are plain values, so that a `UserError` is one on the other side."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._computing = threading.Lock()

    def ready(self) -> dict[str, Any]:
        """Loads the model."""
        from hafs_extract.parts.making import Worker

        try:
            setup = from_dict(Setup, self._setup, "a worker's setup")
            self._worker = Worker(setup)
        except UserError as error:
            return {"refused": f"{error} (machine {socket.gethostname()})"}
        return {"ready": self._worker.made_by, "place": f"process {os.getpid()} of machine {socket.gethostname()}"}

    def make(self, record: dict[str, Any]) -> dict[str, Any]:
        """Makes a part. A second call computes while the first one's part is written."""

        try:
            job = from_dict(Job, record, "a worker's job")
            with disk_errors(Path(job.folder)):
                with self._computing:
                    written = self._worker.begin(job)
                return {"made": to_dict(written.result())}
        except UserError as error:
            return {"refused": error.args[0]}


def _said(record: dict[str, Any]) -> Said:
    if "ready" in record:
        return Ready(record["ready"], record["place"])
    if "made" in record:
        return Made(from_dict(Entry, record["made"], "a worker's answer"))
    return Refused(record["refused"])


def _check_answers(address: str) -> None:
    """Raises `UserError` where nothing listens at HOST:PORT within CONNECT_SECONDS. Ray would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found is None:  # such as "auto", which Ray looks up itself
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{ADDRESS}={address}: expected a Ray cluster, found nothing that answers there within"
            f" {CONNECT_SECONDS:g} s ({error}); start it, or correct {ADDRESS}"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
