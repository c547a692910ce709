"""What a run writes and shows while it trains: metrics.jsonl, the sinks of its metrics, and the progress bar.

A sink is TensorBoard, Weights & Biases or a user's callable. It gets what the step has returned already, so that
training is the same with and without it.
"""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from hafs_jax.base.checksums.sealed import sealed_line
from hafs_jax.base.errors import UserError, arg, naming
from hafs_jax.base.files import read_json, write_record
from hafs_jax.base.log import bar_options
from hafs_jax.base.options import to_dict
from hafs_jax.config import TrainConfig
from hafs_jax.runs import Run

LOG = logging.getLogger(__name__)

Values = dict[str, float | int | None]
"""The metrics of a logged step by name, as in metrics.jsonl; None for a number that is not finite."""

OnMetrics = Callable[[int, Values], object]
"""What `train` calls with the step and its values, on each logged step."""

OnRunMetrics = Callable[[str, int, Values], object]
"""What `sweep` calls with the run's name, the step and its values, on each logged step of each run."""


SINKS = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The package that each sink of a config needs. The extra that installs it has the sink's name."""


def check_sinks(config: TrainConfig) -> None:
    """Raises `UserError` where the package of a sink that the config asks for is not installed."""
    for sink, package in SINKS.items():
        if getattr(config, sink) not in (False, None) and find_spec(package) is None:
            given = arg(sink, getattr(config, sink))
            raise UserError(f"{given} needs the package {package}: pip install 'hafs-jax[{sink}]'")


class RunLog:
    """Writes one line per logged step, and gives it to the sinks; on resume it drops the lines past the checkpoint.

    The line is on disk before a sink gets it. A sink's exception passes: it ends the training as a kill would, and the
    run goes on from its last checkpoint.
    """

    def __init__(self, run: Run, config: TrainConfig, start: int, on_metrics: OnRunMetrics | None = None) -> None:
        check_sinks(config)
        kept = run.drop_metrics(after=start)
        self._batch_size, self._name = config.batch_size, run.name
        self._seconds = kept[-1]["seconds"] if kept else 0.0
        self._clock = time.perf_counter()
        self._on_metrics = on_metrics
        self._sinks: list[Sink] = []
        if config.tensorboard:
            self._sinks.append(_TensorBoard(run.folder / "tensorboard"))
        if config.wandb is not None:
            self._sinks.append(_Wandb(config, run))
        self._path = run.metrics_path
        self._file: IO[str] = open(run.metrics_path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self.last: dict[str, Any] = kept[-1] if kept else {}
        self.steps = len(kept)
        """How many steps are logged."""

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training so far, earlier attempts included (up to their last checkpoint)."""
        return self._seconds + time.perf_counter() - self._clock

    def write(self, metrics: dict[str, np.ndarray], index: int, extra: dict[str, float]) -> None:
        """Logs entry `index` of a dispatch's stacked metrics, with `extra` figures beside them."""
        record: dict[str, Any] = {name: _number(values[index]) for name, values in metrics.items()}
        step = int(record["step"])
        now = self.seconds
        since = now - (self.last.get("seconds", 0.0) if self.last else 0.0)
        rows = (step - int(self.last.get("step", 0))) * self._batch_size
        record |= {name: _number(np.float64(value)) for name, value in extra.items()}
        record.update(tokens=step * self._batch_size, seconds=now, tokens_per_second=rows / max(since, 1e-9))
        with naming(self._path):
            self._file.write(sealed_line(record))
            self._file.flush()
        self.last = record
        self.steps += 1
        for sink in self._sinks:
            sink.write(step, record)
        if self._on_metrics is not None:
            self._on_metrics(self._name, step, dict(record))

    def sync(self) -> None:
        """Puts the lines on disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was said before
            self._file.close()
        for sink in self._sinks:
            sink.close()


class NoLog(RunLog):
    """The log of a process that is not the first: it writes nothing."""

    def __init__(self, run: Run, config: TrainConfig, start: int, on_metrics: OnRunMetrics | None = None) -> None:
        pass

    def write(self, metrics: dict[str, np.ndarray], index: int, extra: dict[str, float]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class Sink(Protocol):
    """Where a run's metrics go beside metrics.jsonl."""

    def write(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Events in the run's folder `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of the Weights & Biases project `config.wandb`, under this run's name.

    Its id is kept in the run's folder, so that a resumed training goes on in the same run. The environment variable
    WANDB_MODE says whether it goes to the server ("online"), to the folder `wandb` ("offline") or nowhere ("disabled").
    """

    def __init__(self, config: TrainConfig, run: Run) -> None:
        import wandb

        noted = run.folder / "wandb.json"
        if not noted.exists():
            write_record(noted, {"id": secrets.token_hex(4)})
        try:
            self._run = wandb.init(
                project=config.wandb,
                id=read_json(noted, "the run's Weights & Biases id")["id"],
                name=run.name,
                config=to_dict(config),
                dir=run.folder,
                resume="allow",
                reinit="create_new",  # the runs of a sweep are open at the same time
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{arg('wandb', config.wandb)}: {reason}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._first = self._run.starting_step  # what the server has from before a resume is not sent again

    def write(self, step: int, values: Values) -> None:
        if step >= self._first:
            self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


class Progress:
    """The bar of a training: rows, rate, time left and the latest figures. `progress`: see `bar_options`.

    The bar says so while the program is compiled. Its rate and time left do not count that, nor the first steps.
    """

    def __init__(self, label: str, steps: int, batch_size: int, start: int, progress: bool | None = None) -> None:
        self._batch_size, self._last_step, self._is_first = batch_size, start, True
        self._bar = tqdm(
            total=steps * batch_size,
            initial=start * batch_size,
            desc=label,
            unit="row",
            unit_scale=True,
            **bar_options(LOG, progress),
        )

    def compiling(self) -> None:
        """Shows that a program is being compiled, which takes up to a minute."""
        self._bar.set_postfix_str("compiling ...")

    def advance(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Moves the bar to `step` and shows the last of `metrics`, the mean over SAEs where there are several."""
        shown = {"FVU": f"{np.mean(metrics['fvu'][-1]):.3f}", "L0": f"{np.mean(metrics['l0'][-1]):.1f}"}
        if np.max(metrics["lambda"][-1]) > 0:
            shown["lambda"] = f"{np.mean(metrics['lambda'][-1]):.2f}"
        self._bar.set_postfix(shown, refresh=False)
        if self._is_first and not self._bar.disable:
            self._bar.initial = self._bar.n = self._bar.last_print_n = step * self._batch_size
            self._bar.start_t = self._bar.last_print_t = time.time()
            self._bar.refresh()
        else:
            self._bar.update((step - self._last_step) * self._batch_size)
        self._last_step, self._is_first = step, False

    def close(self) -> None:
        self._bar.close()


def _number(value: np.generic) -> float | int | None:
    """A JSON number; None where it is not finite."""
    number = value.item()
    return number if np.isfinite(number) else None
