"""Which split and document each row of an array belongs to, and the files that say so (`arrays` explains the fields).

Standard library and numpy only.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from hafs_jax.base.places import make_folder
from hafs_jax.store.manifest import CONTEXT
from hafs_jax.store.shuffle import hash_numbers

FILES = ("contexts.npy", "tokens.npy", "documents.jsonl")

_SPLIT_STREAM = 2  # streams 0 and 1 are the shuffles of the two splits
_ROWS_AT_ONCE = 1 << 20


class Grouping:
    """Which group and split each row belongs to. A hash of the seed and the group's number decides on the split.

    Without groups, each row is a group of its own, with the row's number; this takes no memory. Groups take 8 bytes a
    row.
    """

    def __init__(self, rows: int, groups_N: np.ndarray | None, seed: int, heldout_fraction: float) -> None:
        self.seed, self.groups_N = seed, groups_N
        self.below = np.uint64(min(int(heldout_fraction * 2**64), 2**64 - 1))
        heldout = 0
        for start in range(0, rows, _ROWS_AT_ONCE):
            heldout += int(self.read(start, min(rows, start + _ROWS_AT_ONCE))[0].sum())
        self.rows_by_split = [rows - heldout, heldout]

    @property
    def sha256(self) -> str | None:
        """The checksum of the groups as int64; None without groups."""
        if self.groups_N is None:
            return None
        return hashlib.sha256(self.groups_N.astype("<i8").tobytes()).hexdigest()

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """For rows `start` to `stop`: whether each is held out, [N] bool, and its group, [N]."""
        group_N = np.arange(start, stop) if self.groups_N is None else self.groups_N[start:stop]
        return hash_numbers(self.seed, _SPLIT_STREAM, group_N) < self.below, group_N


class Descriptions:
    """Writes one split's contexts.npy, tokens.npy and documents.jsonl while its rows come in, in input order.

    Documents are numbered in the order in which their groups first appear. Groups are remembered for this; single rows
    need no memory.
    """

    def __init__(self, folder: Path, rows: int, n_sources: int, is_grouped: bool) -> None:
        """Opens the files for `rows` rows in all."""
        make_folder(folder)
        self.documents_by_source = np.zeros(n_sources, np.int64)
        self._documents, self._document_of = 0, dict[int, int]()
        self._is_grouped = is_grouped
        self._contexts, self._tokens, self._lines = (open(folder / name, "wb") for name in FILES)  # noqa: SIM115
        for file, dtype in ((self._contexts, CONTEXT), (self._tokens, np.dtype("<i4"))):
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows,)})

    def add(self, row_N: np.ndarray, group_N: np.ndarray) -> None:
        """Fills in the documents of rows [N] of ROW, all of one source, and writes what describes these rows."""
        if not len(row_N):
            return
        row_N["document"] = self._number(group_N, int(row_N["source"][0]))
        table = np.zeros(len(row_N), CONTEXT)
        table["start"], table["length"] = row_N["context"], 1
        table["document"], table["source"] = row_N["document"], row_N["source"]
        self._contexts.write(table.tobytes())
        self._tokens.write(row_N["token"].tobytes())

    def _number(self, group_N: np.ndarray, source: int) -> np.ndarray:
        """The document of each group, [N]; new groups become new documents."""
        if not self._is_grouped:
            numbers = np.arange(self._documents, self._documents + len(group_N))
            self._append(group_N.tolist(), source)
            return numbers
        found_G, first_G, inverse_N = np.unique(group_N, return_index=True, return_inverse=True)
        groups = found_G.tolist()
        fresh = [groups[index] for index in np.argsort(first_G) if groups[index] not in self._document_of]
        self._document_of |= {group: self._documents + index for index, group in enumerate(fresh)}
        self._append(fresh, source)
        return np.array([self._document_of[group] for group in groups])[inverse_N]

    def _append(self, groups: list[int], source: int) -> None:
        start = self._documents
        lines = [f'{{"document": {start + index}, "group": {group}}}\n' for index, group in enumerate(groups)]
        self._lines.write("".join(lines).encode())
        self._documents += len(groups)
        self.documents_by_source[source] += len(groups)

    def sync(self) -> None:
        """Puts everything written on disk."""
        for file in (self._contexts, self._tokens, self._lines):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in (self._contexts, self._tokens, self._lines):
            file.close()
