"""Batches: every row once a pass, reproducible, seekable; dtypes; the prefetching thread."""

from pathlib import Path

import jax
import numpy as np
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.store.reader import Store
from hafs_jax.training.data import Batches, Part, first_rows, geometric_median, in_sequence, input_scale, prefetch
from tests.support.stores import write_store

N, D, B = 203, 5, 6


@pytest.fixture
def store(tmp_path: Path) -> Store:
    acts = np.arange(N, dtype=np.float32)[:, None] + np.array([0.0, 0.1, 0.2, 0.3, 0.4], np.float32)
    return Store(write_store(tmp_path / "store", acts, shard_rows=40))


def first_column(batches: Batches, start: int, stop: int, size: int = 4) -> list[list[float]]:
    return [list(map(float, batch[:, 0])) for (block,) in batches.dispatches(start, stop, size) for batch in block]


def test_a_pass_has_every_row_once_but_for_the_unfilled_batch(store: Store) -> None:
    batches = Batches(store, B, seed=0)
    seen = np.concatenate(first_column(batches, 0, batches.steps_per_pass))
    assert len(seen) == N - N % B and len(set(seen.tolist())) == len(seen)
    second = np.concatenate(first_column(batches, batches.steps_per_pass, 2 * batches.steps_per_pass))
    assert len(set(second.tolist())) == len(second) and not np.array_equal(seen, second)


def test_any_step_can_be_sought_and_the_seed_decides_the_order(store: Store) -> None:
    batches = Batches(store, B, seed=3)
    whole = first_column(batches, 0, 80)
    for start in (1, 6, 7, 33, 34, 35, 66, 79):
        assert first_column(Batches(store, B, seed=3), start, 80, size=3) == whole[start:]
    assert first_column(Batches(store, B, seed=4), 0, 80) != whole


def test_rows_come_in_the_order_of_the_permutations(store: Store) -> None:
    """What step n reads is part of every run's record: this order may never change."""
    seed, expected = 5, []
    per_pass = N // B * B
    for number in range(2):
        random = lambda stream: np.random.Generator(np.random.Philox(key=[seed, (number << 32) + stream]))  # noqa: B023, E731
        shards = random(0).permutation(len(store.shard_sizes))
        rows = [store.read(shard)[random(1 + shard).permutation(store.shard_sizes[shard])] for shard in shards]
        expected.append(np.concatenate(rows)[:per_pass])
    blocks = [block for (block,) in Batches(store, B, seed).dispatches(0, 2 * (N // B), 5)]
    np.testing.assert_array_equal(np.concatenate(blocks).reshape(-1, D), np.concatenate(expected))


def test_parts_of_the_batches_make_the_batches(store: Store) -> None:
    parts = [Part(range(2), B, 0, 3), Part(range(2, 3), B, 1, 3), Part(range(3, B), B, 2, 3)]
    for start, stop, size in ((0, 80, 4), (7, 33, 5)):
        of_each = [Batches(store, B, 3, part=part).dispatches(start, stop, size) for part in parts]
        for (block,), *found in zip(Batches(store, B, 3).dispatches(start, stop, size), *of_each, strict=True):
            np.testing.assert_array_equal(np.concatenate([own for (own,) in found], axis=1), block)


def test_each_shard_is_checked_by_one_part(store: Store) -> None:
    path = store.folder / "shard-00001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    rows = N // B
    assert len(list(Batches(store, B, 0, part=Part(range(3), B, 0, 2)).dispatches(0, rows, 1))) == rows
    with pytest.raises(UserError, match=r"shard-00001.npy, found"):
        list(Batches(store, B, 0, part=Part(range(3, B), B, 1, 2)).dispatches(0, rows, 1))


def test_a_shard_is_read_in_sequence_where_most_of_its_pages_are_needed() -> None:
    assert [in_sequence(1.0, 4096), in_sequence(0.5, 1024), in_sequence(0.25, 1024)] == [True] * 3
    assert not any([in_sequence(0.5, 4096), in_sequence(0.5, 8192), in_sequence(0.125, 1152)])


def test_memory_is_used_again_once_nothing_looks_at_it(store: Store) -> None:
    addresses = [block.ctypes.data for (block,) in Batches(store, B, 0).dispatches(0, 60, 4)]
    assert len(set(addresses)) <= 3 and all(address % 64 == 0 for address in addresses)  # else JAX copies them
    kept = [block for (block,) in Batches(store, B, 0).dispatches(0, 60, 4)]
    assert len({block.ctypes.data for block in kept}) == len(kept)


def test_memory_is_not_used_again_while_a_computation_reads_it(tmp_path: Path) -> None:
    acts = np.random.default_rng(0).normal(size=(600, 64)).astype(np.float32)
    batches = Batches(Store(write_store(tmp_path / "store", acts)), 100, 0)

    @jax.jit
    def slow(block: jax.Array) -> jax.Array:  # reads the block again and again
        return jax.lax.fori_loop(0, 200, lambda i, total: total + jax.numpy.sum(block * i), 0.0)

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = [slow(block) for block in prefetch(batches.dispatches(0, 60, 2), here)]
    expected = [slow(jax.numpy.array(block)) for (block,) in batches.dispatches(0, 60, 2)]
    np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_dispatches_are_full_but_for_the_last(store: Store) -> None:
    assert [len(block) for (block,) in Batches(store, B, 0).dispatches(0, 11, 4)] == [4, 4, 3]
    one_batch = Batches(store, N, 0)
    assert [block.shape for (block,) in one_batch.dispatches(0, 3, 2)] == [(2, N, D), (1, N, D)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_stored_dtype_reaches_the_device(tmp_path: Path, dtype: str) -> None:
    acts = np.random.default_rng(0).normal(size=(24, D)).astype(np.float32)
    store = Store(write_store(tmp_path / dtype, acts, dtype))
    (block,) = next(Batches(store, 24, 0).dispatches(0, 1, 1))
    assert block.dtype.name == dtype
    np.testing.assert_allclose(np.sort(block[0].astype(np.float32), 0), np.sort(acts, 0), rtol=0.01, atol=0.01)


def test_the_scale_centres_and_normalises(store: Store) -> None:
    scaled = np.asarray(input_scale(store)(jax.numpy.asarray(store.read(0))))
    everything = np.concatenate(
        [np.asarray(input_scale(store)(jax.numpy.asarray(store.read(i)))) for i in range(len(store.shard_sizes))]
    )
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(everything.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose((everything**2).sum(1).mean(), D, rtol=1e-4)


def test_a_store_smaller_than_a_batch_or_without_variance_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 203 rows, fewer than batch_size=204; give more rows or set a smaller"):
        Batches(store, N + 1, 0)
    constant = Store(write_store(tmp_path / "constant", np.ones((8, D), np.float32)))
    with pytest.raises(UserError, match="its rows do not vary"):
        input_scale(constant)


def test_prefetch_keeps_the_order_and_hands_over_errors() -> None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    blocks = [(np.full((1, 2, 3), i, np.float32),) for i in range(7)]
    assert [int(block[0, 0, 0]) for block in prefetch(iter(blocks), here)] == list(range(7))

    def failing():
        yield blocks[0]
        raise OSError("disk gone")

    stream = prefetch(failing(), here)
    next(stream)
    with pytest.raises(OSError, match="disk gone"):
        next(stream)


def test_an_abandoned_prefetch_stops_its_thread() -> None:
    import threading

    stream = prefetch(
        ((np.zeros((1, 1, 1), np.float32),) for _ in range(1000)), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_transcoders_rows_stay_together(store: Store, tmp_path: Path) -> None:
    wide = np.concatenate([store.read(i) for i in range(len(store.shard_sizes))])
    target = Store(write_store(tmp_path / "target", np.repeat(wide, 2, axis=1) * 3.0, shard_rows=40))
    batches = Batches(store, B, seed=1, target=target)
    for rows, targets in batches.dispatches(5, 40, 4):
        assert targets.shape[-1] == 2 * D
        np.testing.assert_allclose(targets[..., ::2], 3.0 * rows)
    pair = next(prefetch(batches.dispatches(0, 4, 4), jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    assert isinstance(pair, tuple) and pair[1].shape == (4, B, 2 * D)
    short = Store(write_store(tmp_path / "short", wide[:-1], shard_rows=40))
    with pytest.raises(UserError, match="expected the same rows in the same order, found 203 rows and 202"):
        Batches(store, B, 0, short)


def test_first_rows_and_the_geometric_median(store: Store) -> None:
    np.testing.assert_array_equal(first_rows(store, 55)[:, 0], np.arange(55))
    assert len(first_rows(store, 10**6)) == N
    points = np.random.default_rng(0).normal(size=(400, 3)) + np.array([1.0, -2.0, 0.5])
    points[:40] += 1000.0  # the mean follows them, the median does not
    median = geometric_median(points.astype(np.float32))
    assert np.abs(median - [1.0, -2.0, 0.5]).max() < 0.3
    steps = np.stack([median, median + np.array([0.02, 0, 0]), median - np.array([0, 0.02, 0])])
    distances = np.linalg.norm(points[None] - steps[:, None], axis=2).sum(1)
    assert distances.argmin() == 0
