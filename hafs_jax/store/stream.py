"""Activations that come from an iterator, and are not stored: what a training needs of them. numpy only.

The first rows are not trained on. They give the mean and the scale, and are the held-out rows. All later rows are
trained on in the order in which they come: shuffling is the caller's.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.tensors import host_array
from hafs_jax.store.manifest import FORMAT_VERSION, Manifest, ModelInfo, NormFilter, ShardInfo, TokenizerInfo


class Stream:
    """Batches of activations [..., D] from an iterable; each is flattened to rows.

    An iterable that gives new iterators, such as a list or a data loader, is read from its start again where it ends.
    One that can be read only once must hold all rows. For a resumed training it must begin at its start again: the rows
    that were trained on already are read past.
    """

    def __init__(self, source: Iterable[Any], head_rows: int) -> None:
        """Reads the first `head_rows` rows; `UserError` where there are fewer, or what comes is no activations."""
        self.folder = Path("(an iterator)")
        self._source = source
        self._is_once = iter(source) is source
        self.d_model = 0
        self._blocks = self._checked(iter(source))
        head: list[np.ndarray] = []
        while (rows := sum(map(len, head))) < head_rows:
            block = next(self._blocks, None)
            if block is None:
                raise UserError(
                    f"expected over {arg('heldout_rows', head_rows)} from the iterator, whose first rows give the "
                    f"statistics, found {rows:,}; give more rows, or set a smaller {arg('heldout_rows')}"
                )
            head.append(block)
        joined = np.concatenate(head)
        self.head_ND, self._left = joined[:head_rows], joined[head_rows:]
        self.manifest = _manifest(self.head_ND)
        self._is_fresh = True  # no row after the head was handed out

    def __len__(self) -> int:
        """The rows that are known: those of the head."""
        return len(self.head_ND)

    def rows(self, skip: int) -> Iterator[np.ndarray]:
        """The rows after the head and `skip` more, in float32 blocks as they come; again and again, if they can be."""
        if not self._is_fresh:
            if self._is_once:
                raise UserError("expected an iterator at its start, found one that was read; make a new one")
            self._blocks, self._left = self._restarted(), self.head_ND[:0]
        self._is_fresh = False
        blocks = self._chain(self._left, self._blocks)
        while True:
            seen = 0
            for block in blocks:
                seen += len(block)
                if skip < len(block):
                    yield block[skip:]
                skip = max(0, skip - len(block))
            if self._is_once or not seen:
                return
            blocks = self._restarted()

    def _restarted(self) -> Iterator[np.ndarray]:
        """The blocks after the head, from a new iterator."""
        return _after(len(self.head_ND), self._checked(iter(self._source)))

    @staticmethod
    def _chain(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        yield first
        yield from rest

    def _checked(self, batches: Iterator[Any]) -> Iterator[np.ndarray]:
        for number, batch in enumerate(batches):
            what = f"activations [rows, D] as batch {number} of the iterator"
            if isinstance(batch, (list, tuple)) and len(batch) == 1:  # of a torch TensorDataset
                batch = batch[0]
            if isinstance(batch, (list, tuple, dict, str)):
                found = f"{type(batch).__name__} of {len(batch)}"
                raise UserError(f"expected {what}, found a {found}; yield one array")
            array = host_array(batch, what)
            if array.ndim < 2 or not array.shape[-1]:
                raise UserError(f"expected {what}, found shape {list(array.shape)}")
            if self.d_model and array.shape[-1] != self.d_model:
                raise UserError(f"expected {what} with D={self.d_model} as before, found shape {list(array.shape)}")
            self.d_model = array.shape[-1]
            block = array.reshape(-1, self.d_model)
            if not np.isfinite(block).all():
                row = int(np.argmin(np.isfinite(block).all(1)))
                raise UserError(f"expected {what}, found a value in its row {row} that is not finite in float32")
            if len(block):
                yield block


class StreamBatches:
    """The batches of a training over a stream: step n is the n-th `batch_size` rows after the head."""

    def __init__(self, stream: Stream, batch_size: int) -> None:
        self.stream, self.batch_size = stream, batch_size

    def dispatches(self, start: int, stop: int, size: int) -> Iterator[tuple[np.ndarray, ...]]:
        """The batches of steps `start` to `stop`, [S, B, D] in float32, S = `size` but for the last.

        Raises `UserError` where the iterator ends before.
        """
        B, D = self.batch_size, self.stream.d_model
        blocks, left = self.stream.rows(start * B), np.empty((0, D), np.float32)
        for first in range(start, stop, size):
            wanted = min(size, stop - first) * B
            parts, found = [left], len(left)
            while found < wanted:
                block = next(blocks, None)
                if block is None:
                    raise UserError(
                        f"the iterator ended after {first * B + found:,} rows of training, expected {stop * B:,}; give "
                        f"more rows, or set smaller {arg('tokens')}"
                    )
                parts.append(block)
                found += len(block)
            joined = np.concatenate(parts)
            left = joined[wanted:]
            yield (joined[:wanted].reshape(-1, B, D),)


def _after(skip: int, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks without their first `skip` rows."""
    for block in blocks:
        if skip < len(block):
            yield block[skip:]
        skip = max(0, skip - len(block))


def _manifest(head_ND: np.ndarray) -> Manifest:
    """What a store's manifest would say, of the head; its fingerprint tells two streams apart."""
    rows_ND = head_ND.astype(np.float64)
    mean_D = rows_ND.mean(0)
    digest = hashlib.sha256(np.ascontiguousarray(head_ND).tobytes()).hexdigest()
    return Manifest(
        format_version=FORMAT_VERSION,
        split="train",
        profile={"requested": "iterator", "resolved": "iterator", "reason": "given in Python"},
        model=ModelInfo("iterator", None, "iterator", "float32", 0, head_ND.shape[1]),
        tokenizer=TokenizerInfo("", 0, None, False),
        hook_point="array",
        d_model=head_ND.shape[1],
        dtype="float32",
        context_length=1,
        seed=0,
        sources=(),
        norm_filter=NormFilter(None, float(np.median(np.linalg.norm(rows_ND, axis=1))), None, 0),
        rows=len(head_ND),
        shards=(ShardInfo(len(head_ND), digest, ""),),
        files_sha256={},
        mean=tuple(mean_D.tolist()),
        mean_squared_norm=float((rows_ND**2).sum(1).mean()),
        variance=float(((rows_ND - mean_D) ** 2).sum(1).mean()),
        config={"kind": "iterator", "rows": len(head_ND)},
    )
