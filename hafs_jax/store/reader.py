"""Opens an activation store and reads it (`manifest` has its format). Standard library and numpy only."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from hafs_jax.base.checksums.checked import check_file
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import jsonl_records
from hafs_jax.base.foreign import open_npy
from hafs_jax.store.manifest import (
    CONTEXT,
    DISK_DTYPES,
    MANIFEST,
    ROW,
    read_manifest,
    rows_name,
    shard_name,
    to_float32,
)


@dataclass(frozen=True)
class Contexts:
    """The tokenised contexts of a store: `table` is [contexts] of CONTEXT, `tokens` is [tokens] int32."""

    table: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        """The token ids of context `index`, BOS included, [length] int32."""
        start, length = int(self.table["start"][index]), int(self.table["length"][index])
        return self.tokens[start : start + length]


class Batch(NamedTuple):
    """Consecutive rows of a store, all of one shard."""

    first: int  # number of the first row, counted through all shards
    acts_BD: np.ndarray  # float32, or as they lie on disk
    rows_B: np.ndarray  # of ROW


_MEND = "restore it, or extract the store again with --force (`hafs verify STORE` checks all of it)"


class Store:
    """A store opened for reading. Its files are memory-mapped; their shapes and sizes are checked when it is opened.

    A file's checksum is checked when it is first read, so that no more is hashed than is used. Where the file is then
    replaced, by another extraction into the same folder, the next reading of it raises `UserError`.

    The store is shuffled as a whole: its first n rows are a random sample of all.
    """

    def __init__(self, folder: Path | str) -> None:
        """Opens the store. Raises `UserError` naming a file that is missing or of the wrong shape or dtype."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        problems = self.shape_problems()
        if problems:
            raise UserError(f"{problems[0]}; extract it again")
        self.shard_sizes = [shard.rows for shard in self.manifest.shards]

    def __len__(self) -> int:
        return self.manifest.rows

    def raw(self, shard: int, check: bool = True) -> np.ndarray:
        """Shard `shard` as it lies on disk, memory-mapped, [rows, D] of DISK_DTYPES[dtype].

        Without `check` its checksum is not compared: another process does, of those that share the reading.
        """
        if not check:
            return open_npy(self.folder / shard_name(shard))
        return self._checked(shard_name(shard), self.manifest.shards[shard].sha256)

    def rows(self, shard: int) -> np.ndarray:
        """The rows file of shard `shard`, memory-mapped, [rows] of ROW."""
        return self._checked(rows_name(shard), self.manifest.shards[shard].rows_sha256)

    def read(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of shard `shard` as float32, [rows, D]."""
        return to_float32(self.raw(shard)[start:stop], self.manifest.dtype)

    def batches(self, rows: int, max_rows: int | None = None, *, raw: bool = False) -> Iterator[Batch]:
        """The store's first `max_rows` rows (default: all) in stored order, at most `rows` of them at a time.

        Every row comes once. A batch never spans two shards, so each shard's last one may be shorter. No batch is
        empty. The arrays are the caller's own copies, activations in float32.

        With `raw` both arrays are read-only views of the mapped files instead, the activations in DISK_DTYPES[dtype].
        Nothing is then read before it is used, so that a pass over `rows_B` alone is cheap.
        """
        if rows < 1:
            raise ValueError(f"rows={rows}: expected at least 1")
        first, left = 0, len(self) if max_rows is None else min(max_rows, len(self))
        for shard, size in enumerate(self.shard_sizes):
            if left <= 0:
                return
            for start in range(0, min(size, left), rows):
                part = slice(start, min(start + rows, size, left))
                # mapped anew for each batch: the pages of a mapping that stays open count as this process's memory
                acts_BD, rows_B = self.raw(shard)[part], self.rows(shard)[part]
                if not raw:
                    acts_BD, rows_B = to_float32(acts_BD, self.manifest.dtype), np.array(rows_B)
                yield Batch(first + start, acts_BD, rows_B)
            first, left = first + size, left - size

    def contexts(self) -> Contexts:
        """The tokenised contexts, memory-mapped."""
        table, tokens = (self._checked(name, self._sha256(name)) for name in ("contexts.npy", "tokens.npy"))
        return Contexts(table, tokens)

    def documents(self) -> list[dict[str, Any]]:
        """What is known of each document, in document order."""
        path = self.folder / "documents.jsonl"
        check_file(path, self._sha256(path.name), "a store's documents", _MEND)
        return [record for _, record in jsonl_records(path)]

    def _checked(self, name: str, sha256: str) -> np.ndarray:
        """The array in a file of the store, memory-mapped; `UserError` where it is not the manifest's."""
        path = self.folder / name
        array = open_npy(path)  # before it is hashed: what is replaced in between is noticed
        check_file(path, sha256, "a store's file", _MEND)
        return array

    def _sha256(self, name: str) -> str:
        """The checksum of a file that is no shard."""
        if name not in self.manifest.files_sha256:
            raise UserError(f"{self.folder / MANIFEST}: expected the checksum of {name}, found none; extract it again")
        return self.manifest.files_sha256[name]

    def shape_problems(self) -> list[str]:
        """A line for each file that is missing, does not open, or has another shape or dtype than the manifest says."""
        manifest, problems = self.manifest, []
        if manifest.dtype not in DISK_DTYPES:
            return [f"{self.folder / MANIFEST}: dtype {manifest.dtype!r}, expected one of {', '.join(DISK_DTYPES)}"]
        if sum(shard.rows for shard in manifest.shards) != manifest.rows:
            problems.append(f"{self.folder / MANIFEST}: its shards' rows do not add up to rows={manifest.rows}")
        expected: dict[str, tuple[tuple[int, ...] | None, np.dtype]] = {
            "contexts.npy": (None, CONTEXT),
            "tokens.npy": (None, np.dtype("<i4")),
        }
        for index, shard in enumerate(manifest.shards):
            expected[shard_name(index)] = ((shard.rows, manifest.d_model), DISK_DTYPES[manifest.dtype])
            expected[rows_name(index)] = ((shard.rows,), ROW)
        for name, (shape, dtype) in expected.items():
            path = self.folder / name
            try:
                array = open_npy(path, "a whole npy file")
            except UserError as error:
                problems.append(str(error))
                continue
            if array.dtype != dtype or (shape is not None and array.shape != shape):
                wanted = f"{list(shape) if shape else '[n]'} {_dtype_name(dtype)}"
                problems.append(f"{path}: expected {wanted}, found {list(array.shape)} {_dtype_name(array.dtype)}")
        return problems


def check_aligned(store_a: Store, store_b: Store) -> None:
    """Raises `UserError` unless both stores hold the same rows in the same order; their widths may differ.

    They do where their shards have equal sizes and their rows files equal checksums. Stores of hook points that were
    extracted together are aligned, and so are those of an array and the targets imported with it.
    """
    a, b = store_a.manifest, store_b.manifest
    found = None
    if a.rows != b.rows:
        found = f"{a.rows} rows and {b.rows}"
    elif store_a.shard_sizes != store_b.shard_sizes:
        found = f"shards of {_sizes(store_a)} rows and of {_sizes(store_b)}"
    else:
        pairs = zip(a.shards, b.shards, strict=True)
        differing = [index for index, (one, other) in enumerate(pairs) if one.rows_sha256 != other.rows_sha256]
        if differing:
            found = f"{rows_name(differing[0])} of another checksum ({len(differing)} of {len(a.shards)} shards differ)"
    if found:
        raise UserError(
            f"stores {store_a.folder} and {store_b.folder}: expected the same rows in the same order, found {found};"
            " extract both hook points in one command, or import the array together with its target"
        )


def _sizes(store: Store) -> str:
    sizes = store.shard_sizes
    return ", ".join(map(str, sizes[:3])) + (f", ... ({len(sizes)} shards)" if len(sizes) > 3 else "")


def _dtype_name(dtype: np.dtype) -> str:
    return "{" + ", ".join(dtype.names) + "}" if dtype.names else dtype.name
