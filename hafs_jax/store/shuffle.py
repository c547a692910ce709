"""The global shuffle in bounded memory, and the exact median of the norms. Standard library and numpy only.

Every row of a split has a 64-bit key: a hash of the seed, the split and the row's number. Rows are stored in the order
of their keys. Pass 1 puts each row into a bucket on disk, chosen by the top bits of its key. Pass 2 reads one bucket
after another and sorts it. The result is the order of one sort over all rows. It depends neither on the number of
buckets nor on when a run was interrupted.

`Spill` is one file for each bucket, for rows that one process makes. An extraction's rows lie in parts instead, which
several processes may make (`hafs_extract.parts`).
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hafs_jax.base.errors import UserError, arg, naming
from hafs_jax.base.places import make_folder
from hafs_jax.store.manifest import DISK_DTYPES, ROW, from_float32, to_float32

BUCKET_BYTES = 96 << 20
MAX_BUCKETS = 256  # each is a file that is open

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 20
_ROWS_AT_ONCE = 64  # so that their float64 values stay in the processor's cache


def shuffle_keys(seed: int, stream: int, start: int, count: int) -> np.ndarray:
    """Keys [count] uint64 of rows `start` to `start + count`: splitmix64 (Steele et al. 2014) at those counters.

    The hash of a counter gives any row's key without those of the rows before it. It is a bijection, so that no two
    rows have the same key.
    """
    return hash_numbers(seed, stream, np.arange(start, start + count, dtype=np.uint64))


def hash_numbers(seed: int, stream: int, numbers_N: np.ndarray) -> np.ndarray:
    """The keys [N] uint64 of any integers [N], negative ones modulo 2^64 (`shuffle_keys` takes consecutive ones)."""
    state = _splitmix(np.array([seed], np.uint64) + _GOLDEN)
    state = _splitmix(state + np.array([stream + 1], np.uint64) * _GOLDEN)
    return _splitmix(state + (numbers_N.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def _splitmix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def spill_record(kinds: Sequence[tuple[int, str]]) -> np.dtype:
    """The record of a row on its way through the shuffle: its key, its ROW, and a norm and activations of each kind.

    A kind is (width, dtype). Kinds are what must stay together, such as the activations of several hook points; they
    are the fields `acts0`, `acts1`, ...
    """
    acts = [(f"acts{index}", DISK_DTYPES[dtype], (width,)) for index, (width, dtype) in enumerate(kinds)]
    return np.dtype([("key", "<u8"), ("norm", "<f4", (len(kinds),)), ("row", ROW), *acts])


def convert_rows(acts_ND: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 rows in DISK_DTYPES[dtype], [N, D]; the norms [N] of the result; and whether each row is finite, [N]."""
    with np.errstate(invalid="ignore"):
        kept_ND = from_float32(acts_ND, dtype)
    norm_N = norms(kept_ND, dtype)
    return kept_ND, norm_N, np.isfinite(norm_N)


def norms(kept_ND: np.ndarray, dtype: str) -> np.ndarray:
    """The norms [N] float64 of rows in DISK_DTYPES[dtype]. A norm is finite exactly where all values of its row are."""
    norm_N = np.empty(len(kept_ND))
    with np.errstate(invalid="ignore"):  # a signalling NaN; the row's norm is then not finite
        for start in range(0, len(kept_ND), _ROWS_AT_ONCE):
            values = to_float32(kept_ND[start : start + _ROWS_AT_ONCE], dtype).astype(np.float64)
            norm_N[start : start + _ROWS_AT_ONCE] = np.sqrt(np.einsum("nd,nd->n", values, values))
    return norm_N


def n_buckets(rows: int, record: np.dtype) -> int:
    """The number of buckets for `rows` rows: about BUCKET_BYTES in each, and at most MAX_BUCKETS."""
    return min(MAX_BUCKETS, max(1, -(-rows * record.itemsize // BUCKET_BYTES)))


def buckets_of(keys_N: np.ndarray, count: int) -> np.ndarray:
    """The bucket [N] int64, of `count`, of each key [N] uint64. Buckets are in the order of their keys."""
    return ((keys_N >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


class Spill:
    """One split's rows on disk, between the two passes.

    They lie in buckets, and their norms in one more file, in row order.
    """

    def __init__(self, folder: Path, record: np.dtype, buckets: int) -> None:
        """Begins anew in `folder`, with `buckets` buckets."""
        make_folder(folder)
        self.record, self.counts, self.kinds = record, [0] * buckets, record["norm"].shape[0]
        self._paths = [folder / f"bucket-{index:04d}.bin" for index in range(buckets)]
        self._norms_path = folder / "norms.bin"
        self._files = [open(path, "wb") for path in self._paths]  # noqa: SIM115 - closed by `close`
        self._norms = open(self._norms_path, "wb")  # noqa: SIM115

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def append(self, records: np.ndarray) -> None:
        """Appends rows, each to the bucket of its key."""
        bucket = buckets_of(records["key"], len(self.counts))
        ordered = take_rows(records, np.argsort(bucket, kind="stable"))
        ends = np.cumsum(np.bincount(bucket, minlength=len(self.counts)))
        for index, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if stop > start:
                with naming(self._paths[index]):
                    self._files[index].write(ordered[start:stop].view(np.uint8).data)
                self.counts[index] += int(stop - start)
        with naming(self._norms_path):
            self._norms.write(np.ascontiguousarray(records["norm"]).tobytes())

    def flush(self) -> None:
        """Hands everything appended to the operating system, so that it can be read."""
        for file in (*self._files, self._norms):
            with naming(Path(file.name)):
                file.flush()

    def close(self) -> None:
        """Closes the files. What could not be written was said by `flush`."""
        for file in (*self._files, self._norms):
            with contextlib.suppress(OSError):
                file.close()

    def shuffled(self) -> Iterator[np.ndarray]:
        """All rows in the order of their keys, a bucket at a time."""
        for path, count in zip(self._paths, self.counts, strict=True):
            records = np.fromfile(path, self.record, count)
            if len(records) != count:  # numpy does not say that the disk has failed
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            records = take_rows(records, np.argsort(records["key"]))
            yield records
            del records  # frees its memory before the next bucket is read

    def median_norms(self) -> list[float]:
        """The exact median of each kind's norms. For an even number it is the mean of the middle two, as in numpy."""
        return [exact_median(self._norms_path, kind, self.kinds) for kind in range(self.kinds)]


def norm_limits(multiple: float | None, median_norms: Sequence[float]) -> np.ndarray | None:
    """The largest norm of each kind that is stored: `multiple` x its median norm, [kinds] float64. None: no limit."""
    if multiple is None:
        return None
    if not all(median_norms):
        raise UserError(
            f"norm_multiple={multiple:g}: the median norm of the training rows is 0, so that every row but those of"
            f" zeros would be dropped; say {arg('norm_multiple', None)}"
        )
    return multiple * np.asarray(median_norms, np.float64)


def within_limits(records: np.ndarray, limits: np.ndarray | None) -> np.ndarray:
    """The records none of whose norms is above its limit (see `norm_limits`)."""
    if limits is None or (is_near := (records["norm"].astype(np.float64) <= limits).all(1)).all():
        return records
    return take_rows(records, np.flatnonzero(is_near))


def exact_median(path: Path, column: int = 0, columns: int = 1) -> float:
    """The exact median of one column of the non-negative float32 numbers in a raw file, in constant memory."""
    count = path.stat().st_size // (4 * columns)
    with naming(path):
        return median_of_bits(lambda: _bits(path, column, columns), count)


def median_of_bits(bits: Callable[[], Iterator[np.ndarray]], count: int) -> float:
    """The exact median of `count` non-negative float32 numbers. `bits()` gives their bits in pieces [n] uint32.

    The bits of non-negative floats, read as integers, have the order of the floats. One pass counts the upper 16 bits;
    this gives the median's upper half. A second pass counts the lower 16 bits of the numbers that share it.
    """
    upper = np.zeros(1 << 16, np.int64)
    for piece in bits():
        upper += np.bincount(piece >> 16, minlength=1 << 16)
    ends = np.cumsum(upper)
    if ends[-1] != count:  # numpy does not say that the disk has failed
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    ranks = (count - 1) // 2, count // 2
    highs = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    lower = {high: np.zeros(1 << 16, np.int64) for high in highs}
    for piece in bits():
        for high, counts in lower.items():
            counts += np.bincount(piece[piece >> 16 == high] & 0xFFFF, minlength=1 << 16)
    middle = []
    for rank, high in zip(ranks, highs, strict=True):
        before = int(ends[high] - upper[high])
        low = int(np.searchsorted(np.cumsum(lower[high]), rank - before, side="right"))
        middle.append(float(np.uint32(high << 16 | low).view(np.float32)))
    return (middle[0] + middle[1]) / 2


def _bits(path: Path, column: int, columns: int) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(bits := np.fromfile(file, "<u4", _CHUNK * columns)):
            yield bits[column::columns]


def take_rows(records: np.ndarray, order: np.ndarray) -> np.ndarray:
    """records[order], copied as bytes. Field by field, numpy takes eight times as long."""
    return np.take(records.view(np.dtype((np.void, records.itemsize))), order).view(records.dtype)
