"""Writing a store's shards: rows in their final order, checksums and statistics. Standard library and numpy only."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hafs_jax.base.files import sha256_of, write_npy
from hafs_jax.store.manifest import DISK_DTYPES, ROW, ShardInfo, rows_name, shard_name, to_float32

_ROWS_AT_ONCE = 256  # so that their float64 values stay in the processor's cache


@dataclass(frozen=True)
class Statistics:
    """Statistics of all stored rows, computed in float64."""

    mean_D: np.ndarray
    mean_squared_norm: float  # mean of |x|^2
    variance: float  # mean of |x - mean|^2


class ShardWriter:
    """Collects rows in their final order and writes them to shards of `shard_rows` rows each; the last may be shorter.

    While the next shard fills, one thread writes and hashes the full one and another sums up its statistics. Call
    `finish` at the end: `shards` and `rows_by_source` are complete after it. Call `close` if something fails before.
    """

    def __init__(self, folder: Path, d_model: int, dtype: str, shard_rows: int, n_sources: int) -> None:
        self.folder, self.d_model, self.dtype, self.shard_rows = folder, d_model, dtype, shard_rows
        self.shards: list[ShardInfo] = []
        self.rows = 0  # of full shards
        self.rows_by_source = np.zeros(n_sources, np.int64)
        self._sum_D = np.zeros(d_model, np.float64)
        self._squares_D = np.zeros(d_model, np.float64)
        self._threads = ThreadPoolExecutor(2)
        self._at_work: list[Future[None]] = []
        self._acts, self._rows, self._filled = self._empty()

    def add(self, acts_BD: np.ndarray, rows_B: np.ndarray) -> None:
        """Appends rows, [B, D] in DISK_DTYPES[dtype] and [B] of ROW; shards that they fill are written."""
        done = 0
        while done < len(rows_B):
            count = min(len(rows_B) - done, self.shard_rows - self._filled)
            into, part = slice(self._filled, self._filled + count), slice(done, done + count)
            self._acts[into], self._rows[into] = acts_BD[part], rows_B[part]
            self._filled, done = self._filled + count, done + count
            if self._filled == self.shard_rows:
                self._hand_over()

    def finish(self) -> Statistics | None:
        """Writes the last shard and ends the threads. Returns the statistics of all rows; None if there were none."""
        if self._filled:
            self._hand_over()
        self._wait()
        self.close()
        if not self.rows:
            return None
        mean_D = self._sum_D / self.rows
        mean_squared_norm = float((self._squares_D / self.rows).sum())
        return Statistics(mean_D, mean_squared_norm, mean_squared_norm - float(mean_D @ mean_D))

    def close(self) -> None:
        """Ends the threads when they have done their work. If that work fails, nothing is raised here."""
        self._threads.shutdown()

    def _empty(self) -> tuple[np.ndarray, np.ndarray, int]:
        return np.empty((self.shard_rows, self.d_model), DISK_DTYPES[self.dtype]), np.empty(self.shard_rows, ROW), 0

    def _hand_over(self) -> None:
        """Gives the collected rows to the threads, once these are done with the shard before."""
        self._wait()
        self.rows += self._filled
        acts, rows = self._acts[: self._filled], self._rows[: self._filled]
        self._at_work = [self._threads.submit(self._write, acts, rows), self._threads.submit(self._sum, acts, rows)]
        self._acts, self._rows, self._filled = self._empty()

    def _wait(self) -> None:
        for work in self._at_work:
            work.result()

    def _write(self, acts: np.ndarray, rows: np.ndarray) -> None:
        index = len(self.shards)
        paths = self.folder / shard_name(index), self.folder / rows_name(index)
        write_npy(paths[0], acts)
        write_npy(paths[1], rows)
        self.shards.append(ShardInfo(len(acts), sha256_of(paths[0]), sha256_of(paths[1])))

    def _sum(self, acts: np.ndarray, rows: np.ndarray) -> None:
        # in the order of the shard's rows, then of the shards, so that the sums are the same on every machine
        sum_D, squares_D = np.zeros(self.d_model), np.zeros(self.d_model)
        for start in range(0, len(acts), _ROWS_AT_ONCE):
            values = to_float32(acts[start : start + _ROWS_AT_ONCE], self.dtype).astype(np.float64)
            sum_D += values.sum(0)
            squares_D += np.square(values, out=values).sum(0)
        self._sum_D += sum_D
        self._squares_D += squares_D
        self.rows_by_source += np.bincount(rows["source"], minlength=len(self.rows_by_source))
