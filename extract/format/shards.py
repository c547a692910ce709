"""Pass 2's output: full shards, their checksums, and the statistics of the stored rows. Numpy only."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extract.format.files import sha256_of, write_npy
from extract.format.store import KEPT_AS, ROW, ShardInfo, rows_name, shard_name, to_float32

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Statistics:
    """Of all stored rows, in float64."""

    mean_D: np.ndarray
    mean_squared_norm: float  # mean of |x|^2
    variance: float  # mean of |x - mean|^2


class ShardWriter:
    """Collects rows in their final order and writes them to shards, all of `shard_rows` rows but the last."""

    def __init__(self, folder: Path, d_model: int, dtype: str, shard_rows: int, n_sources: int) -> None:
        self.folder, self.d_model, self.dtype, self.shard_rows = folder, d_model, dtype, shard_rows
        self.shards: list[ShardInfo] = []
        self.rows_by_source = np.zeros(n_sources, np.int64)
        self._acts = np.empty((0, d_model), KEPT_AS[dtype])
        self._rows = np.empty(0, ROW)
        self._sum_D = np.zeros(d_model, np.float64)
        self._squares_D = np.zeros(d_model, np.float64)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def add(self, acts_BD: np.ndarray, rows_B: np.ndarray) -> None:
        """Appends rows, [B, D] as kept on disk and [B] of ROW, and writes the shards that they fill."""
        self._acts = np.concatenate([self._acts, acts_BD])
        self._rows = np.concatenate([self._rows, rows_B])
        while len(self._rows) >= self.shard_rows:
            self._write(self.shard_rows)

    def finish(self) -> Statistics | None:
        """Writes the last shard; the statistics of everything written, None where that is nothing."""
        if len(self._rows):
            self._write(len(self._rows))
        if not self.rows:
            return None
        mean_D = self._sum_D / self.rows
        mean_squared_norm = float((self._squares_D / self.rows).sum())
        return Statistics(mean_D, mean_squared_norm, mean_squared_norm - float(mean_D @ mean_D))

    def _write(self, count: int) -> None:
        acts, rows = self._acts[:count], self._rows[:count]
        self._acts, self._rows = self._acts[count:].copy(), self._rows[count:].copy()
        for start in range(0, count, _ROWS_AT_ONCE):  # summed shard by shard, so that the sums are the same anywhere
            values = to_float32(acts[start : start + _ROWS_AT_ONCE], self.dtype).astype(np.float64)
            self._sum_D += values.sum(0)
            self._squares_D += np.square(values).sum(0)
        self.rows_by_source += np.bincount(rows["source"], minlength=len(self.rows_by_source))
        index = len(self.shards)
        paths = self.folder / shard_name(index), self.folder / rows_name(index)
        write_npy(paths[0], acts)
        write_npy(paths[1], rows)
        self.shards.append(ShardInfo(count, sha256_of(paths[0]), sha256_of(paths[1])))
