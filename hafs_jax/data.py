"""Batches from an activation store: sequential reads of shuffled shards, a reproducible order, prefetch to the device.

The order depends on the seed and the pass alone, so a step number is a position in the data: resuming seeks.
"""

import queue
import threading
from collections.abc import Generator, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from extract.format.errors import UserError
from extract.format.store import Store
from hafs_jax.sae import InputScale


class Batches:
    """The batches of a training run over `store`: step n is always the same rows in the same order.

    Each pass visits the shards in a fresh order and each shard's rows in a fresh order; rows that do not fill a last
    batch of a pass are left out of that pass. Memory: one shard and one dispatch.
    """

    def __init__(self, store: Store, batch_size: int, seed: int) -> None:
        """Raises `UserError` where the store holds fewer rows than one batch."""
        if len(store) < batch_size:
            raise UserError(
                f"store {store.folder} holds {len(store)} rows, fewer than batch_size={batch_size}; "
                "extract more rows or set a smaller --batch-size"
            )
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self.steps_per_pass = len(store) // batch_size

    def dispatches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """The batches of steps `start` to `stop`, [S, B, D] in the store's dtype, S = `size` but for the last."""
        stacked: list[np.ndarray] = []
        for batch_BD in self._batches(start, stop):
            stacked.append(batch_BD)
            if len(stacked) == size:
                yield np.stack(stacked)
                stacked = []
        if stacked:
            yield np.stack(stacked)

    def _batches(self, start: int, stop: int) -> Iterator[np.ndarray]:
        step = start
        while step < stop:
            number, first = divmod(step, self.steps_per_pass)
            last = min(self.steps_per_pass, first + stop - step)
            yield from self._pass(number, first, last)
            step += last - first

    def _pass(self, number: int, first: int, last: int) -> Iterator[np.ndarray]:
        """Batches `first` to `last` of pass `number`."""
        B, wanted = self.batch_size, last - first
        parts: list[np.ndarray] = []  # of the batch being filled
        for rows in self._shards(number, skip=first * B):
            at = 0
            while at < len(rows) and wanted:
                take = B - sum(map(len, parts))
                parts.append(rows[at : at + take])
                at += take
                if sum(map(len, parts)) == B:
                    yield np.concatenate(parts)
                    parts, wanted = [], wanted - 1
            if not wanted:
                return

    def _shards(self, number: int, skip: int) -> Iterator[np.ndarray]:
        """The rows of each shard in pass `number`'s order, the first `skip` rows of the pass left out."""
        for shard in self._random(number, 0).permutation(len(self.store.shard_sizes)):
            rows = self.store.shard_sizes[shard]
            if skip >= rows:
                skip -= rows
                continue
            acts = np.array(self.store.raw(shard))  # one sequential read; the permutation is taken in memory
            if self.store.manifest.dtype == "bfloat16":
                acts = acts.view(ml_dtypes.bfloat16)
            yield acts[self._random(number, 1 + int(shard)).permutation(rows)[skip:]]
            skip = 0

    def _random(self, number: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, (number << 32) + stream]))


def input_scale(store: Store) -> InputScale:
    """The affine map that centres the store's rows and scales their mean squared distance from the mean to D."""
    manifest = store.manifest
    if manifest.variance <= 0:
        raise UserError(f"store {store.folder}: its rows do not vary (variance {manifest.variance}); nothing to learn")
    return InputScale(
        mean_D=jnp.asarray(np.asarray(manifest.mean, np.float32)),
        scale=jnp.float32(np.sqrt(manifest.d_model / manifest.variance)),
        variance=jnp.float32(manifest.d_model),
    )


def prefetch(
    blocks: Iterator[np.ndarray], sharding: jax.sharding.Sharding, depth: int = 2
) -> Generator[jax.Array, None, None]:
    """`blocks` as device arrays, read and transferred by a thread that stays `depth` blocks ahead.

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
                offer(jax.device_put(block, sharding))
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
