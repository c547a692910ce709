"""Parts on disk, between the two passes. Standard library and numpy only.

    part-00012.bin    the records of its rows (`shuffle.spill_record`) in the order of their keys, and so of their
                      buckets; then the rows' norms [rows, kinds] float32, in the same order
    part-00012.json   its journal entry, written last: without it there is no part

Both are put on disk whole. A part that is missing or damaged is made again, which gives the same bytes.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from hafs_extract.parts.plan import Part
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_atomic, write_record
from hafs_jax.base.options import from_dict, to_dict
from hafs_jax.base.places import make_folder
from hafs_jax.store.shuffle import buckets_of, median_of_bits, take_rows


@dataclass(frozen=True)
class Entry:
    """A part's journal entry. A checksum is the first 16 hexadecimal digits of a SHA-256."""

    part: Part
    rows_by_bucket: tuple[int, ...]
    checksums: tuple[str, ...]  # of each bucket's records
    norms_checksum: str


def write_part(folder: Path, part: Part, records: np.ndarray, buckets: int) -> Entry:
    """Puts a part on disk: its rows' records, in any order, and its journal entry, which is returned."""
    order = np.argsort(records["key"])
    rows_by_bucket = np.bincount(buckets_of(records["key"], buckets), minlength=buckets)
    ends = np.cumsum(rows_by_bucket)
    norms = records["norm"][order].tobytes()
    checksums: list[str] = []

    def write(file: IO[bytes]) -> None:
        for start, stop in zip(ends - rows_by_bucket, ends, strict=True):  # a bucket at a time, for memory's sake
            piece = take_rows(records, order[start:stop]).view(np.uint8).data
            file.write(piece)
            checksums.append(_checksum(piece))
        file.write(norms)

    write_atomic(folder / f"{part.name}.bin", write)
    entry = Entry(part, tuple(rows_by_bucket.tolist()), tuple(checksums), _checksum(norms))
    write_record(folder / f"{part.name}.json", to_dict(entry))
    return entry


class Parts:
    """The parts of a split: which are on disk, and their rows in the order of the store."""

    def __init__(
        self,
        folder: Path,
        plan: Sequence[Part],
        record: np.dtype,
        buckets: int,
        make: Callable[[list[Part]], None],
    ) -> None:
        """`make(parts)` makes parts and calls `note` with the entry of each."""
        make_folder(folder)
        self.folder, self.plan, self.record, self.buckets, self._make = folder, plan, record, buckets, make
        self.kinds = record["norm"].shape[0]
        self._rows = np.zeros((len(plan), buckets), np.int64)
        self._checksums = np.zeros((len(plan), buckets), "S16")
        self._norms_checksums = np.zeros(len(plan), "S16")
        self.is_made = np.zeros(len(plan), bool)
        names = set(os.listdir(folder))  # one look: a name that is asked for too early stays missing on some networks
        for part in plan:
            if {f"{part.name}.bin", f"{part.name}.json"} <= names and (entry := self._read_entry(part)) is not None:
                self.note(entry)

    @property
    def rows(self) -> int:
        """Rows of all parts, made or not."""
        return sum(part.rows for part in self.plan)

    @property
    def rows_made(self) -> int:
        return int(self._rows[self.is_made].sum())

    @property
    def missing(self) -> list[Part]:
        return [part for part in self.plan if not self.is_made[part.number]]

    def note(self, entry: Entry) -> None:
        """Notes that a part is on disk."""
        number = entry.part.number
        self._rows[number], self._checksums[number] = entry.rows_by_bucket, entry.checksums
        self._norms_checksums[number] = entry.norms_checksum
        self.is_made[number] = True

    def finish(self) -> None:
        """Makes what is missing."""
        if missing := self.missing:
            self._make(missing)

    def median_norms(self) -> list[float]:
        """The exact median of each kind's norms."""

        def bits(kind: int) -> Iterator[np.ndarray]:
            for part in self.plan:
                norms = np.empty((part.rows, self.kinds), "<f4")
                self._fill([part], partial(self._read_norms, into=norms))
                yield norms.view("<u4")[:, kind]

        return [median_of_bits(partial(bits, kind), self.rows) for kind in range(self.kinds)]

    def shuffled(self) -> Iterator[np.ndarray]:
        """All rows in the order of their keys, a bucket at a time."""
        for bucket in range(self.buckets):
            records = self._bucket(bucket)
            records = take_rows(records, np.argsort(records["key"]))
            yield records
            del records  # frees its memory before the next bucket is read

    def _bucket(self, bucket: int) -> np.ndarray:
        """The records of a bucket, those of one part after those of another."""
        rows_P = self._rows[:, bucket]
        first_P = self._rows[:, :bucket].sum(1)  # of the bucket's rows in each part
        ends_P = np.cumsum(rows_P)
        records = np.empty(int(ends_P[-1]), self.record)

        def read(part: Part) -> bool:
            number = part.number
            into = records[ends_P[number] - rows_P[number] : ends_P[number]]
            return self._read(part, int(first_P[number]) * self.record.itemsize, into, self._checksums[number, bucket])

        self._fill([part for part in self.plan if rows_P[part.number]], read)
        return records

    def _fill(self, parts: list[Part], read: Callable[[Part], bool]) -> None:
        """Reads from each part. Those that are damaged are made again, once."""
        damaged = [part for part in parts if not read(part)]
        if not damaged:
            return
        self._make(damaged)
        for part in damaged:
            if not read(part):
                raise UserError(
                    f"{self.folder / part.name}.bin was damaged, was made again, and is damaged again; check the disk"
                )

    def _read_norms(self, part: Part, into: np.ndarray) -> bool:
        return self._read(part, part.rows * self.record.itemsize, into, self._norms_checksums[part.number])

    def _read(self, part: Part, offset: int, into: np.ndarray, expected: bytes) -> bool:
        """Reads bytes of a part. Returns whether they are those that were written."""
        piece = into.view(np.uint8).reshape(-1).data
        try:
            with open(self.folder / f"{part.name}.bin", "rb", buffering=0) as file:
                file.seek(offset)
                return file.readinto(piece) == len(piece) and _checksum(piece).encode() == expected
        except FileNotFoundError:
            return False

    def _read_entry(self, part: Part) -> Entry | None:
        """The entry of a part on disk; None where it is not that of the plan's part, or the file has another size."""
        path = self.folder / f"{part.name}.json"
        try:
            entry = from_dict(Entry, read_json(path, "a part's entry"), str(path))
        except UserError:  # damaged
            return None
        size = (self.folder / f"{part.name}.bin").stat().st_size
        is_whole = size == part.rows * (self.record.itemsize + 4 * self.kinds)
        return entry if is_whole and entry.part == part and len(entry.rows_by_bucket) == self.buckets else None


def _checksum(piece: memoryview | bytes) -> str:
    return hashlib.sha256(piece).hexdigest()[:16]
