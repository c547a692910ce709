"""Which batches are which part. Standard library and numpy only."""

from dataclasses import dataclass

import numpy as np

LEAST_BYTES, MOST_BYTES = 8 << 20, 64 << 20
SHARE = 256
"""A part is this share of the rows, within LEAST_BYTES and MOST_BYTES: a kill loses little of a small extraction, and a
large one has no more files than it needs."""


@dataclass(frozen=True)
class Part:
    """A run of consecutive batches, and the numbers of their rows: what the shuffle's keys are made of."""

    number: int
    first_batch: int
    stop_batch: int
    first_row: int
    rows: int

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}"


def plan_parts(rows_by_batch: np.ndarray, row_bytes: int, first_row: int = 0) -> list[Part]:
    """The parts of batches with so many rows each. A part ends with the batch in which it reaches its size.

    `row_bytes` are those of a row's record. `first_row` is the number of the first row.
    """
    ends = np.cumsum(rows_by_batch, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    wanted = max(1, min(MOST_BYTES, max(LEAST_BYTES, total * row_bytes // SHARE)) // row_bytes)
    parts: list[Part] = []
    batch = done = 0
    while batch < len(ends):
        stop = min(len(ends), int(np.searchsorted(ends, done + wanted)) + 1)
        rows = int(ends[stop - 1]) - done
        parts.append(Part(len(parts), batch, stop, first_row + done, rows))
        batch, done = stop, done + rows
    return parts
