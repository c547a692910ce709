"""Who makes the parts: this process, processes of this machine, or workers on a Ray cluster."""

import dataclasses
import gc
import os
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch

from hafs_extract.compiling import compile_blocks
from hafs_extract.models import LanguageModel
from hafs_extract.parts.engine import Engine
from hafs_extract.parts.files import Entry
from hafs_extract.parts.jobs import TOKEN, Job, Setup
from hafs_extract.parts.making import PartMaker, made_by
from hafs_extract.parts.pool import Crew, Pool
from hafs_extract.parts.processes import Processes
from hafs_jax.base.files import write_text


class Maker(Protocol):
    """Makes parts."""

    workers: int

    @property
    def made_by(self) -> dict[str, Any] | None:
        """What the parts are made by (`making.made_by`); None before `start`."""

    def prepare(self, setup: Setup, model: LanguageModel) -> None:
        """Says what is extracted. Nothing is started yet."""

    def move(self, folder: Path) -> None:
        """Says that all workers now share this folder instead of the setup's."""

    def start(self, jobs: int) -> None:
        """Gets ready for so many jobs."""

    def make(self, jobs: Sequence[Job], made: Callable[[Job, Entry], None]) -> None:
        """Makes parts, and calls `made(job, entry)` once each is on disk."""

    def rest(self) -> None:
        """Ends workers of its own, until there is work again."""

    def close(self) -> None:
        """Ends whatever it has started."""


def open_maker(engine: Engine, device: str = "auto") -> Maker:
    """The maker of parts on the config's `device`.

    A Ray cluster is found here: `UserError` where there is none, or no room.
    """
    if engine.engine == "ray":
        from hafs_extract.parts.on_ray import Cluster

        cluster = Cluster(engine.workers, device)
        return Workers(cluster.size, cluster.crew, cluster.close)
    if engine.workers is None or engine.workers == 1:
        return ThisProcess()
    size = engine.workers
    return Workers(size, lambda setup: _processes(setup, size), lambda: None)


class ThisProcess:
    """Makes parts here, with the model that is loaded already."""

    workers = 1

    def __init__(self) -> None:
        self.made_by: dict[str, Any] | None = None
        self._maker: PartMaker | None = None

    def prepare(self, setup: Setup, model: LanguageModel) -> None:
        self._setup, self._model = setup, model
        self._maker = PartMaker(model, setup.config, setup.widths, setup.has_bos)

    def move(self, folder: Path) -> None:
        """This process sees any."""

    def start(self, jobs: int) -> None:
        """Compiles the model, where it is to be, once."""
        if jobs and self.made_by is None:
            is_compiled = compile_blocks(self._setup.config, self._model, self._setup.rows)
            self.made_by = made_by(self._model, is_compiled)

    def make(self, jobs: Sequence[Job], made: Callable[[Job, Entry], None]) -> None:
        assert self._maker is not None, "make before prepare"
        self.start(len(jobs))
        written: deque[tuple[Job, Future[Entry]]] = deque()
        for job in jobs:
            written.append((job, self._maker.begin(job)))  # which has waited for the part before
            if len(written) > 1:
                before, entry = written.popleft()
                made(before, entry.result())
        for job, entry in written:
            made(job, entry.result())

    def rest(self) -> None:
        """The model stays."""

    def close(self) -> None:
        if self._maker is not None:
            self._maker.close()


class Workers:
    """Makes parts by workers, each with a model of its own."""

    def __init__(self, workers: int, crew: Callable[[Setup], Crew], disconnect: Callable[[], None]) -> None:
        self.workers, self._crew, self._disconnect = workers, crew, disconnect
        self.pool: Pool | None = None

    @property
    def made_by(self) -> dict[str, Any] | None:
        return self.pool.made_by if self.pool else None

    def prepare(self, setup: Setup, model: LanguageModel) -> None:
        """The model is not kept: it would take the room of a worker's."""
        self._share(setup)

    def move(self, folder: Path) -> None:
        self.rest()
        self._share(dataclasses.replace(self._setup, folder=str(folder)))

    def _share(self, setup: Setup) -> None:
        self._setup = dataclasses.replace(setup, token=secrets.token_hex(16))
        write_text(Path(setup.folder) / TOKEN, self._setup.token)
        self.pool = Pool(self._crew(self._setup))

    def start(self, jobs: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        assert self.pool is not None, "start before prepare"
        self.pool.start(jobs)

    def make(self, jobs: Sequence[Job], made: Callable[[Job, Entry], None]) -> None:
        assert self.pool is not None, "make before prepare"
        self.pool.make(jobs, made)

    def rest(self) -> None:
        if self.pool:
            self.pool.rest()

    def close(self) -> None:
        self.rest()
        self._disconnect()


def _processes(setup: Setup, size: int) -> Processes:
    """Workers that share the GPUs, or the cores, of this machine."""
    gpus: list[str] = []
    if setup.config.device in ("auto", "cuda") and torch.cuda.is_available():
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = shown.split(",") if shown else [str(index) for index in range(torch.cuda.device_count())]
    threads = None if gpus else max(1, torch.get_num_threads() // size)
    return Processes(dataclasses.replace(setup, threads=threads), size, gpus)
