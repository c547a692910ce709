"""Parts from the model. What every worker has: the model, and a thread that writes one part beside the next."""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hafs_extract.compiling import compile_blocks
from hafs_extract.config import ExtractConfig
from hafs_extract.hub.presence import prepare_hub
from hafs_extract.models import LanguageModel, check_same_model, load_model
from hafs_extract.parts.files import Entry, write_part
from hafs_extract.parts.jobs import TOKEN, Job, Setup
from hafs_extract.passes import Split, open_split, part_records
from hafs_jax.base import plugins
from hafs_jax.base.errors import UserError
from hafs_jax.base.memory import give_back_memory


class PartMaker:
    """Makes parts one after another."""

    def __init__(self, model: LanguageModel, config: ExtractConfig, widths: tuple[int, ...], has_bos: bool) -> None:
        self._model, self._config, self._widths, self._has_bos = model, config, widths, has_bos
        self._storing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._opened: tuple[str, Split] | None = None
        self._written: Future[Entry] | None = None

    def begin(self, job: Job) -> Future[Entry]:
        """Runs the model over a part. It is then written in a thread, once the part before is on disk."""
        split = self._split(job)
        records = part_records(split, self._model, self._config, job.part, self._storing)
        if self._written is not None:
            self._written.result()
        give_back_memory()
        self._written = self._writing.submit(write_part, Path(job.folder), job.part, records, split.buckets)
        return self._written

    def close(self) -> None:
        """Ends the threads once a part that is being written is on disk. If that fails, nothing is raised here."""
        self._storing.shutdown()
        self._writing.shutdown()

    def _split(self, job: Job) -> Split:
        if self._opened is None or self._opened[0] != job.text:
            split = open_split(job.split, Path(job.text), self._config, self._has_bos, self._widths)
            self._opened = job.text, split
        return self._opened[1]


class Worker:
    """One of several that make parts of one extraction. Its model, device and libraries are those of all others."""

    def __init__(self, setup: Setup) -> None:
        """Raises `UserError` where it does not see the shared folder, or finds another model."""
        _check_shared(setup)
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        plugins.load()
        config = _without_texts(setup)
        prepare_hub(config)
        model = load_model(config.model, config.model_dtype, config.revision, config.device)
        check_same_model(model.info, setup.model, "the extraction that a worker takes part in has")
        is_compiled = compile_blocks(config, model, setup.rows)
        self.made_by = made_by(model, is_compiled)
        self._maker = PartMaker(model, config, setup.widths, setup.has_bos)

    def begin(self, job: Job) -> Future[Entry]:
        """See `PartMaker.begin`."""
        return self._maker.begin(job)


def made_by(model: LanguageModel, is_compiled: bool) -> dict[str, Any]:
    """What decides the last bits of activations, beside the model and the text."""
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    else:
        device = f"{model.device.type} {torch.backends.cpu.get_cpu_capability()}"
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "hafs-jax")}
    return {"device": device, "compiled": is_compiled, **versions}


def _check_shared(setup: Setup) -> None:
    try:
        found = (Path(setup.folder) / TOKEN).read_text(encoding="utf-8")
    except OSError:
        found = None
    if found != setup.token:
        raise UserError(
            f"expected {setup.folder} to be a folder that all machines share, found"
            f" {'none' if found is None else 'another'} here; give --out on a file system that all of them see"
        )


def _without_texts(setup: Setup) -> ExtractConfig:
    """The config for a worker: the very model that the driver has read, and no texts, which are read already."""
    info, config = setup.model, setup.config
    kind, _, place = info.origin.partition(":")
    return dataclasses.replace(
        config,
        model=place if kind in ("folder", "file") else config.model,
        revision=info.revision if kind == "hub" else config.revision,
        sources=tuple(dataclasses.replace(source, path=setup.folder) for source in config.sources),
    )
