"""Reads the activations that a user gives: numpy arrays and npy files, one after another, in blocks of rows.

The last dimension is the width D. The others, such as [images, patches], are flattened to rows. Standard library and
numpy only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.foreign import open_npy, open_safetensors, reason
from hafs_jax.store.shuffle import convert_rows


@runtime_checkable
class Tensor(Protocol):
    """What numpy can turn into an array: arrays, and other libraries' tensors."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray: ...


Arrays = Tensor | str | Path | Sequence[Tensor | str | Path]

_BLOCK_BYTES = 8 << 20  # of float32


@dataclass(frozen=True)
class Part:
    """One array or file of the input, as [rows, D]."""

    name: str  # the file's path, or "array <n>"
    first: int  # number of its first row among the rows of all parts
    rows: int
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]  # its own rows from start to stop


class ArrayRows:
    """The rows of one or more [..., D] float arrays or npy files, one after another."""

    def __init__(self, arrays: Arrays) -> None:
        """Opens the files. Raises `UserError` naming one that does not open, is no float16/32/64, or differs in D."""
        several: list[Any] = (
            [arrays] if isinstance(arrays, (str, Path)) or hasattr(arrays, "__array__") else list(arrays)
        )
        if not several:
            raise UserError("expected at least one array of activations, found none")
        self.parts: list[Part] = []
        self.d_model = self.rows = 0
        for number, array in enumerate(several):
            self._add(_opened(array), str(array) if isinstance(array, (str, Path)) else f"array {number}", array)
        if not self.rows or not self.d_model:
            raise UserError(f"{self.parts[0].name}: expected rows of activations, found none")

    def _add(self, values: np.ndarray, name: str, given: Tensor | str | Path) -> None:
        found = f"{list(values.shape)} {values.dtype}"
        if values.dtype.kind == "V" and values.dtype.itemsize == 2 and not values.dtype.names:
            raise UserError(
                f"{name}: expected activations in float16, float32 or float64, found {list(values.shape)} bfloat16,"
                f' which npy does not have (numpy reads it as "|V2"); save them as float32, then say '
                f"{arg('dtype', 'bfloat16')}"
            )
        if values.dtype.kind != "f" or values.dtype.itemsize not in (2, 4, 8):
            raise UserError(f"{name}: expected activations in float16, float32 or float64, found {found}; convert them")
        if values.ndim < 2:
            raise UserError(f"{name}: expected activations [rows, D], found {found}; reshape it")
        width = values.shape[-1]
        if self.parts and width != self.d_model:
            raise UserError(f"{name}: expected D={self.d_model} as in {self.parts[0].name}, found {found}")
        if not isinstance(given, (str, Path)):
            flat = values.reshape(-1, width)

            def read(start: int, stop: int) -> np.ndarray:
                return flat[start:stop]
        else:
            if values.ndim > 2 and not values.flags.c_contiguous:
                raise UserError(f"{name}: expected C order, found {found} in Fortran order; save it again in C order")

            def read(start: int, stop: int) -> np.ndarray:
                # mapped anew for each block: the pages of a mapping that stays open count as this process's memory
                return np.array(_opened(given).reshape(-1, width)[start:stop])

        self.parts.append(Part(name, self.rows, values.size // width if width else 0, values.dtype, read))
        self.d_model = width
        self.rows += self.parts[-1].rows

    @property
    def dtype(self) -> str:
        """The dtype to store these rows in: float16 if all parts are float16, else float32."""
        return "float16" if all(part.dtype.itemsize == 2 for part in self.parts) else "float32"

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """All rows in order, in blocks (part number, start, stop) of a bounded size; each lies in one part."""
        size = max(1, _BLOCK_BYTES // (4 * self.d_model))
        for number, part in enumerate(self.parts):
            for start in range(part.first, part.first + part.rows, size):
                yield number, start, min(start + size, part.first + part.rows)

    def pieces(self, start: int, stop: int, digest: Any) -> list[np.ndarray]:
        """Rows `start` to `stop` in their own dtype, one piece [n, D] for each part; adds their bytes to `digest`."""
        pieces = []
        for part in self.parts:
            first, last = max(start, part.first), min(stop, part.first + part.rows)
            if first < last:
                pieces.append(part.read(first - part.first, last - part.first))
                digest.update(np.ascontiguousarray(pieces[-1]).reshape(-1).view(np.uint8).data)
        return pieces

    def convert(self, start: int, stop: int, dtype: str, digest: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows `start` to `stop` converted to DISK_DTYPES[dtype], [N, D], and their norms [N].

        Raises `UserError` naming the first row that is not finite or whose values are too large for `dtype`.
        """
        pieces = self.pieces(start, stop, digest)
        with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are found below
            acts_ND = np.concatenate([piece.astype(np.float32) for piece in pieces])
        kept_ND, norm_N, is_finite_N = convert_rows(acts_ND, dtype)
        if is_finite_N.all():
            return kept_ND, norm_N
        bad = int(np.argmin(is_finite_N))
        with np.errstate(invalid="ignore"):
            values_D = np.concatenate([piece.astype(np.float64) for piece in pieces])[bad]
        if np.isfinite(values_D).all():
            column = int(np.argmax(np.abs(values_D)))
            mend = f"say {arg('dtype', 'bfloat16')}" if dtype == "float16" else "scale the activations down"
            why = f"does not fit into {dtype}; {mend}"
        else:
            column, why = int(np.argmin(np.isfinite(values_D))), "is not finite; leave such rows out"
        raise UserError(f"{self._place(start + bad)}: value {values_D[column]:g} in dimension {column} {why}")

    def _place(self, row: int) -> str:
        """The part and the row in it that row `row` of all is, in words."""
        part = next(part for part in self.parts if row < part.first + part.rows)
        return f"{part.name}: row {row - part.first}"


def read_groups(groups: np.ndarray | str | Path, rows: int) -> np.ndarray:
    """The group of each row, [rows] of an integer dtype; `UserError` where there is not one integer for each row."""
    values = _opened(groups)
    if values.dtype.kind not in "iu" or values.size != rows:
        name = "groups" if isinstance(groups, np.ndarray) else str(groups)
        raise UserError(
            f"{name}: expected one integer for each of {rows} rows, found {list(values.shape)} {values.dtype}"
        )
    return np.array(values).reshape(-1)


def _opened(array: Tensor | str | Path) -> np.ndarray:
    """The array, memory-mapped if it is a file."""
    if isinstance(array, (str, Path)):
        return open_safetensors(array) if Path(array).suffix == ".safetensors" else open_npy(array)
    try:
        return np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, or of bfloat16; a ragged list
        raise UserError(f"expected an array that numpy takes, found {type(array).__name__} ({reason(error)})") from None
