"""Batches from an activation store: sequential reads of shuffled shards, a reproducible order, prefetch to the device.

The order depends on the seed and the pass alone, so a step number is a position in the data: resuming seeks.
"""

import contextlib
import mmap
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from hafs_jax.base.errors import UserError, arg
from hafs_jax.method.sae import InputScale
from hafs_jax.ops.parts import put_rows
from hafs_jax.store.reader import Store, check_aligned
from hafs_jax.store.stream import Stream
from hafs_jax.training.step import Batch

Rows = tuple[np.ndarray, ...]
"""Rows of the store, and for a transcoder the same rows of its target's store."""

_POPULATE_READ = 22  # Linux's MADV_POPULATE_READ, which the module mmap has no name for
_MOST_PAGES = 0.6  # of a shard, that are read one by one
_WAITING_SECONDS = 0.5
_THREADS = min(4, os.cpu_count() or 1)  # that gather rows


@dataclass(frozen=True)
class Part:
    """What one of `count` processes takes of each batch of `total` rows: those of `rows`, which follow one another.

    Each shard is checked by one process, before any step is taken with its rows.
    """

    rows: range
    total: int
    index: int = 0
    count: int = 1

    def checks(self, shard: int) -> bool:
        return shard % self.count == self.index


class Batches:
    """The batches of a training run over `store`: step n is always the same rows in the same order.

    Each pass visits the shards in a new order, and each shard's rows in a new order. Rows that do not fill the last
    batch of a pass are left out of that pass. It takes the memory of one dispatch of each store, and a shard in the
    system's file cache.
    """

    def __init__(
        self, store: Store, batch_size: int, seed: int, target: Store | None = None, part: Part | None = None
    ) -> None:
        """`target`: a transcoder's second store; `part`: what this process takes of each batch (none: all).

        Raises `UserError` where the store holds fewer rows than one batch, or the two do not hold the same rows in the
        same order.
        """
        if len(store) < batch_size:
            raise UserError(
                f"store {store.folder} holds {len(store):,} rows, fewer than {arg('batch_size', batch_size)}; give "
                f"more rows or set a smaller {arg('batch_size')}"
            )
        if target is not None:
            check_aligned(store, target)
        self.stores = (store,) if target is None else (store, target)
        self.batch_size, self.seed = batch_size, seed
        self.part = Part(range(batch_size), batch_size) if part is None else part
        self.steps_per_pass = len(store) // batch_size

    def dispatches(self, start: int, stop: int, size: int) -> Iterator[Rows]:
        """The batches of steps `start` to `stop`, [S, B, D] in the store's dtype, S = `size` but for the last.

        Of a part of the batches, B are its rows, and no others are read. Rows go straight from the mapped shard to
        their place in the dispatch, and are copied nowhere else.
        """
        B, left, own = self.batch_size, (stop - start) * self.batch_size, self.part.rows
        blocks: Rows = ()  # of the dispatch being filled: `passed` of its rows were seen, `filled` of them are its own
        passed, filled, memory = 0, 0, _Memory()
        with ThreadPoolExecutor(_THREADS, "rows") as pool:
            for shards, order in self.rows(start, stop):
                while len(order):
                    if not blocks:
                        rows = min(size * B, left)
                        length = rows // B * len(own)
                        blocks = tuple(memory.empty((length, shard.shape[1]), shard.dtype) for shard in shards)
                    seen, order = order[: rows - passed], order[rows - passed :]
                    taken = _those_of(own, B, passed, seen)
                    for shard, block in zip(shards, blocks, strict=True):
                        _take(shard, taken, block[filled : filled + len(taken)], pool)
                    passed, filled = passed + len(seen), filled + len(taken)
                    if passed == rows:
                        yield tuple(block.reshape(-1, len(own), block.shape[1]) for block in blocks)
                        blocks, passed, filled, left = (), 0, 0, left - rows

    def rows(self, start: int, stop: int) -> Iterator[tuple[Rows, np.ndarray]]:
        """The shards of steps `start` to `stop` as they lie on disk, each with the numbers of its rows, in order."""
        B, per_pass = self.batch_size, self.steps_per_pass
        step = start
        while step < stop:
            number, first = divmod(step, per_pass)
            last = min(per_pass, first + stop - step)
            wanted = (last - first) * B
            for shards, order in self._pass(number, skip=first * B):
                yield shards, order[:wanted]
                wanted -= min(wanted, len(order))
                if not wanted:
                    break
            step += last - first

    def _pass(self, number: int, skip: int) -> Iterator[tuple[Rows, np.ndarray]]:
        """The shards of pass `number` and the order of their rows, the first `skip` rows of the pass left out."""
        sizes = self.stores[0].shard_sizes
        for shard in self._random(number, 0).permutation(len(sizes)).tolist():
            if skip >= sizes[shard]:
                skip -= sizes[shard]
                continue
            order = self._random(number, 1 + shard).permutation(sizes[shard])[skip:]
            share, is_checked = len(self.part.rows) / self.batch_size, self.part.checks(shard)
            yield tuple(mapped_shard(store, shard, share, is_checked) for store in self.stores), order
            skip = 0

    def _random(self, number: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, (number << 32) + stream]))


def _those_of(own: range, batch_size: int, passed: int, numbers_N: np.ndarray) -> np.ndarray:
    """Those of consecutive rows, `passed` after the start of a batch, whose places in their batches are `own`."""
    if len(own) == batch_size:
        return numbers_N
    places_N = (passed + np.arange(len(numbers_N))) % batch_size
    return numbers_N[(places_N >= own.start) & (places_N < own.stop)]


def mapped_shard(store: Store, shard: int, share: float = 1.0, check: bool = True) -> np.ndarray:
    """A shard's rows in the store's dtype, bfloat16 as ml_dtypes', mapped from the file and read in sequence.

    Rows are then taken in any order. Without reading ahead that would be one small read of the disk for each row. That
    is what it is where only a `share` of the rows is taken, and lies on few enough pages. `check`: see `Store.raw`.
    """
    acts_ND = store.raw(shard, check)
    if isinstance(acts_ND.base, mmap.mmap) and sys.platform == "linux":
        advice = _POPULATE_READ if in_sequence(share, acts_ND[0].nbytes) else mmap.MADV_RANDOM
        with contextlib.suppress(OSError, ValueError):  # older than Linux 5.14: slower where the disk is, no more
            acts_ND.base.madvise(advice)
    rows_ND = np.asarray(acts_ND)
    return rows_ND.view(ml_dtypes.bfloat16) if store.manifest.dtype == "bfloat16" else rows_ND


def in_sequence(share: float, row_bytes: int) -> bool:
    """Whether a shard is read as a whole for a random share of its rows: they would need most of its pages."""
    pages = 1 - (1 - share) ** max(1.0, mmap.PAGESIZE / row_bytes)
    return pages > _MOST_PAGES


def _take(shard_ND: np.ndarray, numbers_N: np.ndarray, out_ND: np.ndarray, pool: ThreadPoolExecutor) -> None:
    """Copies rows `numbers_N` of the shard to `out_ND`, each thread a part: numpy releases the interpreter's lock."""

    def part(start: int, stop: int) -> None:  # without mode="clip" numpy would fill a copy of `out` first
        np.take(shard_ND, numbers_N[start:stop], axis=0, out=out_ND[start:stop], mode="clip")

    ends = [len(numbers_N) * thread // _THREADS for thread in range(_THREADS + 1)]
    list(pool.map(part, ends[:-1], ends[1:]))


class _Memory:
    """Memory for dispatches, used again once no array refers to it: new pages cost about as much as filling them.

    It starts on a page, so that JAX on a CPU uses it without a copy. An array of JAX's refers to it until what is
    computed from that array is done.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array whose contents mean nothing yet."""
        size = int(np.prod(shape)) * dtype.itemsize
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else _pages(size)
        owner = np.frombuffer(memory, np.uint8)  # what every view of it holds on to
        weakref.finalize(owner, free.append, memory).atexit = False
        return owner.view(dtype).reshape(shape)


def _pages(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def first_rows(store: Store | Stream, count: int) -> np.ndarray:
    """The store's first `count` rows (all, where it holds fewer), in its dtype; of a stream the first of its head."""
    if isinstance(store, Stream):
        return store.head_ND[:count]
    parts: list[np.ndarray] = []
    for shard in range(len(store.shard_sizes)):
        if sum(map(len, parts)) < count:
            parts.append(mapped_shard(store, shard)[:count])
    return np.concatenate(parts)[:count]


def input_scale(store: Store | Stream, target: Store | None = None) -> InputScale:
    """The affine map that centres the store's rows and scales their mean squared distance from the mean to D.

    `target`: a transcoder's second store, whose own map becomes the scale's `target`.
    """
    manifest = store.manifest
    if manifest.variance <= 0:
        raise UserError(f"store {store.folder}: its rows do not vary (variance {manifest.variance}); nothing to learn")
    return InputScale(
        mean_D=jnp.asarray(np.asarray(manifest.mean, np.float32)),
        scale=jnp.float32(np.sqrt(manifest.d_model / manifest.variance)),
        variance=jnp.float32(manifest.d_model),
        target=None if target is None else input_scale(target),
    )


def geometric_median(acts_ND: np.ndarray, iterations: int = 30) -> np.ndarray:
    """The point [D] whose summed distance to the rows is least, by Weiszfeld's iteration in float64."""
    rows_ND = acts_ND.astype(np.float64)
    point_D = rows_ND.mean(0)
    for _ in range(iterations):
        weight_N = 1.0 / np.maximum(np.linalg.norm(rows_ND - point_D, axis=1), 1e-12)
        point_D = weight_N @ rows_ND / weight_N.sum()
    return point_D


def prefetch(
    blocks: Iterator[Rows],
    sharding: jax.sharding.Sharding,
    depth: int = 2,
    waiting: Callable[[], None] = lambda: None,
    part: Part | None = None,
) -> Generator[Batch, None, None]:
    """`blocks` as device arrays (pairs for a transcoder), read and transferred by a thread that stays `depth` ahead.

    They are the `part` of the batches that this process takes (none: all); the arrays are those of all processes. An
    exception of the reading thread is raised here. Closing the iterator stops the thread. `waiting()` is called now and
    then while no block is ready, and may raise.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: object) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for block in blocks:
                on_device = tuple(
                    jax.device_put(rows, sharding) if part is None else put_rows(rows, sharding, part.rows, part.total)
                    for rows in block
                )
                offer(on_device if len(on_device) > 1 else on_device[0])
                if stop.is_set():
                    return
            offer(None)
        except Exception as error:  # handed over, and raised by the consumer
            offer(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=_WAITING_SECONDS)
            except queue.Empty:
                waiting()
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
