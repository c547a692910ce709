"""What a run writes and shows while it trains: metrics.jsonl, TensorBoard, the progress bar; finished numbers only."""

import json
import logging
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_jsonl, write_text
from hafs_jax.base.log import bar_options

LOG = logging.getLogger(__name__)


class RunLog:
    """Writes one line per logged step; on resume it drops the lines past the checkpoint and continues the clock."""

    def __init__(self, path: Path, batch_size: int, start: int, tensorboard: bool) -> None:
        kept = [record for record in read_jsonl(path) if record["step"] <= start]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._batch_size = batch_size
        self._seconds = kept[-1]["seconds"] if kept else 0.0
        self._clock = time.perf_counter()
        self._events = _event_writer(path.parent / "tensorboard") if tensorboard else None
        self.last: dict[str, Any] = kept[-1] if kept else {}

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
        record.update(extra, tokens=step * self._batch_size, seconds=now, tokens_per_second=rows / max(since, 1e-9))
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events:
            for name, value in record.items():
                self._events.add_scalar(name, value, step)
        self.last = record

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


class Progress:
    """The bar of a training: rows, rate, time left and the latest figures. `progress`: see `bar_options`."""

    def __init__(self, label: str, steps: int, batch_size: int, start: int, progress: bool | None = None) -> None:
        self._batch_size, self._last_step = batch_size, start
        self._bar = tqdm(
            total=steps * batch_size,
            initial=start * batch_size,
            desc=label,
            unit="row",
            unit_scale=True,
            **bar_options(LOG, progress),
        )

    def advance(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Moves the bar to `step` and shows the last of `metrics`, the mean over SAEs where there are several."""
        shown = {"FVU": f"{np.mean(metrics['fvu'][-1]):.3f}", "L0": f"{np.mean(metrics['l0'][-1]):.1f}"}
        if np.max(metrics["lambda"][-1]) > 0:
            shown["lambda"] = f"{np.mean(metrics['lambda'][-1]):.2f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update((step - self._last_step) * self._batch_size)
        self._last_step = step

    def close(self) -> None:
        self._bar.close()


def _number(value: np.generic) -> float | int | None:
    """A JSON number; null where it is not finite."""
    number = value.item()
    return number if np.isfinite(number) else None


def _event_writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboardX: pip install 'hafs-jax[tensorboard]'") from None
    return SummaryWriter(str(folder))
