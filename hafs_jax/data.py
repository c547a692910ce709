"""Batches from an activation store: sequential reads of shuffled shards, a reproducible order, prefetch to the device.

The order depends on the seed and the pass alone, so a step number is a position in the data: resuming seeks.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from extract.format.errors import UserError
from extract.format.store import Store, check_aligned
from hafs_jax.sae import InputScale
from hafs_jax.step import Batch

Rows = tuple[np.ndarray, ...]
"""Rows of the store, and for a transcoder the same rows of its target's store."""


class Batches:
    """The batches of a training run over `store`: step n is always the same rows in the same order.

    Each pass visits the shards in a fresh order and each shard's rows in a fresh order; rows that do not fill a last
    batch of a pass are left out of that pass. Memory: one shard and one dispatch (of each store).
    """

    def __init__(self, store: Store, batch_size: int, seed: int, target: Store | None = None) -> None:
        """`target`: a transcoder's second store. Raises `UserError` where the store holds fewer rows than one batch, or
        the two do not hold the same rows in the same order."""
        if len(store) < batch_size:
            raise UserError(
                f"store {store.folder} holds {len(store)} rows, fewer than batch_size={batch_size}; "
                "extract more rows or set a smaller --batch-size"
            )
        if target is not None:
            check_aligned(store, target)
        self.stores = (store,) if target is None else (store, target)
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_pass = len(store) // batch_size

    def dispatches(self, start: int, stop: int, size: int) -> Iterator[Rows]:
        """The batches of steps `start` to `stop`, [S, B, D] in the store's dtype, S = `size` but for the last."""
        stacked: list[Rows] = []
        for rows in self._batches(start, stop):
            stacked.append(rows)
            if len(stacked) == size:
                yield _joined(np.stack, stacked)
                stacked = []
        if stacked:
            yield _joined(np.stack, stacked)

    def _batches(self, start: int, stop: int) -> Iterator[Rows]:
        step = start
        while step < stop:
            number, first = divmod(step, self.steps_per_pass)
            last = min(self.steps_per_pass, first + stop - step)
            yield from self._pass(number, first, last)
            step += last - first

    def _pass(self, number: int, first: int, last: int) -> Iterator[Rows]:
        """Batches `first` to `last` of pass `number`."""
        B, wanted = self.batch_size, last - first
        parts: list[Rows] = []  # of the batch being filled
        for shard in self._shards(number, skip=first * B):
            at = 0
            while at < len(shard[0]) and wanted:
                take = B - sum(len(part[0]) for part in parts)
                parts.append(tuple(rows[at : at + take] for rows in shard))
                at += take
                if sum(len(part[0]) for part in parts) == B:
                    yield _joined(np.concatenate, parts)
                    parts, wanted = [], wanted - 1
            if not wanted:
                return

    def _shards(self, number: int, skip: int) -> Iterator[Rows]:
        """The rows of each shard in pass `number`'s order, the first `skip` rows of the pass left out."""
        sizes = self.stores[0].shard_sizes
        for shard in self._random(number, 0).permutation(len(sizes)).tolist():
            if skip >= sizes[shard]:
                skip -= sizes[shard]
                continue
            order = self._random(number, 1 + shard).permutation(sizes[shard])[skip:]
            yield tuple(raw_shard(store, shard)[order] for store in self.stores)
            skip = 0

    def _random(self, number: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, (number << 32) + stream]))


def raw_shard(store: Store, shard: int) -> np.ndarray:
    """A shard's rows in the store's dtype, bfloat16 as ml_dtypes', by one sequential read into memory."""
    acts_ND = np.array(store.raw(shard))
    return acts_ND.view(ml_dtypes.bfloat16) if store.manifest.dtype == "bfloat16" else acts_ND


def first_rows(store: Store, count: int) -> np.ndarray:
    """The store's first `count` rows (all, where it holds fewer), in its dtype."""
    parts: list[np.ndarray] = []
    for shard in range(len(store.shard_sizes)):
        if sum(map(len, parts)) < count:
            parts.append(raw_shard(store, shard))
    return np.concatenate(parts)[:count]


def _joined(join: Callable[[list[np.ndarray]], np.ndarray], parts: list[Rows]) -> Rows:
    return tuple(join(list(arrays)) for arrays in zip(*parts, strict=True))


def input_scale(store: Store, target: Store | None = None) -> InputScale:
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


def prefetch(blocks: Iterator[Rows], sharding: jax.sharding.Sharding, depth: int = 2) -> Generator[Batch, None, None]:
    """`blocks` as device arrays (pairs for a transcoder), read and transferred by a thread that stays `depth` ahead.

    An exception of the reading thread is raised here. Closing the iterator stops the thread.
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
                on_device = tuple(jax.device_put(rows, sharding) for rows in block)
                offer(on_device if len(on_device) > 1 else on_device[0])
                if stop.is_set():
                    return
            offer(None)
        except Exception as error:  # handed over, and raised by the consumer
            offer(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
