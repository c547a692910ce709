"""Reading a store into training: its rate against a plain read, the time that a step waits for it, and its memory.

A store of random float16 rows is made in a temporary folder. All reads come from the system's file cache.
"""

import dataclasses
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Row, interleaved
from hafs_jax.presets import preset, with_fields
from hafs_jax.store.arrays import write_array_store
from hafs_jax.store.manifest import shard_name
from hafs_jax.store.reader import Store
from hafs_jax.training.data import Batches, input_scale, prefetch
from hafs_jax.training.loop import Stores, first_state
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters
from hafs_jax.training.step import Batch
from hafs_jax.training.train import resolve

D, B, STEPS_PER_DISPATCH = 576, 2048, 8
N_LATENTS = 4608
READ_TARGET, WAIT_TARGET, MEMORY_TARGET = 0.7, 0.02, 1.1


def measure(quick: bool) -> Iterator[Row]:
    """Rows of the suite: the rate, the memory and the wait."""
    megabytes = 128 if quick else 512
    with tempfile.TemporaryDirectory(prefix="hafs-loading-") as temporary:
        store = make_store(Path(temporary), megabytes << 20)
        sizes = {"MB": megabytes, "D": D, "B": B, "dtype": "float16", "shards": len(store.shard_sizes)}
        yield from _reading(store, 3 if quick else 7, sizes)
        yield _memory(store, sizes)
        yield waiting(store, 2 if quick else 6, sizes)


def make_store(folder: Path, size: int, d_model: int = D) -> Store:
    """A store of `size` bytes of random rows, in shards of the default number of rows."""
    random = np.random.default_rng(0)
    files = []
    for number in range(max(1, size >> 27)):
        rows = min(size, 1 << 27) // (2 * d_model)
        acts_ND = random.standard_normal((rows, d_model), np.float32).astype(np.float16)
        files.append(folder / f"acts-{number}.npy")
        np.save(files[-1], acts_ND)
    made = write_array_store(folder / "made", files, heldout_fraction=0.01)
    for file in files:
        file.unlink()
    return Store(made["train"])


def _reading(store: Store, rounds: int, sizes: dict) -> Iterator[Row]:
    """Rows with GB/s of shuffled batches on the device, against the shards' files read in order.

    Both make enough passes for a gigabyte, since the extra cost of the first dispatches comes only once in a training.
    """
    batches = Batches(store, B, seed=0)
    files = [store.folder / shard_name(index) for index in range(len(store.shard_sizes))]
    memory = np.zeros(max(file.stat().st_size for file in files), np.uint8)

    everything = sum(file.stat().st_size for file in files)
    passes = -(-(1 << 30) // everything)

    def shuffled() -> None:
        for block in _blocks(batches, passes * batches.steps_per_pass):
            block.block_until_ready()

    def into_one_buffer() -> None:
        for file in passes * files:
            with open(file, "rb", buffering=0) as opened:
                opened.readinto(memory.data)

    def into_fresh_memory() -> None:
        for file in passes * files:
            np.fromfile(file, np.uint8)

    cases = {"ours": shuffled, "readinto": into_one_buffer, "fromfile": into_fresh_memory}
    times = interleaved(cases, rounds, warm_ups=1)
    ours, spread = times["ours"].rate(passes * batches.steps_per_pass * B * 2 * D / 1e9)
    notes = {
        "fromfile": "the files in order, read into new memory, as batches are",
        "readinto": "the files in order, read into one buffer again and again, so that no data could be kept",
    }
    for name, note in notes.items():
        theirs, _ = times[name].rate(passes * everything / 1e9)
        target = READ_TARGET if name == "fromfile" else None
        yield Row("shuffled batches", name, ours, theirs, "GB/s", ours / theirs, target, ">=", sizes, spread, note)


def waiting(store: Store, dispatches: int, sizes: dict, batch_size: int = B, **sae: Any) -> Row:
    """The fraction of a relu step in which it waits for its batch. The first dispatch, which compiles, is left out."""
    config = with_fields(
        preset("baseline", "relu"),
        {"batch_size": batch_size, "steps_per_dispatch": STEPS_PER_DISPATCH, "sae": {"n_latents": N_LATENTS, **sae}},
    )
    config, _ = resolve(dataclasses.replace(config, passes=100.0), store, store.folder)
    scale, hyper = input_scale(store), hyperparameters(config)
    # The state is put where the batches are, as in a training. Otherwise the second dispatch, which is timed, would
    # compile again.
    state, scale = jax.device_put((first_state(config, Stores(store), scale, hyper), scale), _here())
    train_steps = compile_steps()
    blocks = _blocks(Batches(store, batch_size, seed=0), (1 + dispatches) * STEPS_PER_DISPATCH)
    state, metrics = train_steps(state, next(blocks), scale, hyper, config)
    jax.block_until_ready(metrics)
    waited, started = 0.0, time.perf_counter()
    for _ in range(dispatches):
        asked = time.perf_counter()
        block = next(blocks)
        waited += time.perf_counter() - asked
        state, metrics = train_steps(state, block, scale, hyper, config)
        jax.block_until_ready(metrics)
    steps = dispatches * STEPS_PER_DISPATCH
    per_step, waited = (time.perf_counter() - started) / steps, waited / steps
    blocks.close()
    sizes = {**sizes, "F": config.sae.F, "steps": steps}
    share = waited / per_step
    return Row(
        "waiting for a batch", "a relu step", waited * 1e3, per_step * 1e3, "ms", share, WAIT_TARGET, "<=", sizes
    )


def _memory(store: Store, sizes: dict) -> Row:
    """The largest resident memory in the second pass over the store, against that in the first."""
    batches = Batches(store, B, seed=0)
    peaks = [0.0, 0.0]
    for number in range(2):
        start = number * batches.steps_per_pass
        for block in _blocks(batches, start + batches.steps_per_pass, start):
            block.block_until_ready()
            peaks[number] = max(peaks[number], _resident_bytes())
    first, second = (peak / 1e6 for peak in peaks)
    return Row("memory, second pass", "the first", second, first, "MB", second / first, MEMORY_TARGET, "<=", sizes)


def _blocks(batches: Batches, stop: int, start: int = 0) -> Generator[Batch, None, None]:
    return prefetch(batches.dispatches(start, stop, STEPS_PER_DISPATCH), _here())


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _resident_bytes() -> int:
    """The resident memory of this process now, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096
