"""The global shuffle and the exact median: by seed and row number alone, in bounded memory."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hafs_extract.passes import _convert_rows
from hafs_jax.store.manifest import DISK_DTYPES, ShardInfo, from_float32, to_float32
from hafs_jax.store.shards import ShardWriter
from hafs_jax.store.shuffle import Spill, exact_median, n_buckets, norms, shuffle_keys, spill_record

D, N = 5, 997
RECORD = spill_record([(D, "float16")])


def _records(start: int, stop: int, seed: int = 0) -> np.ndarray:
    records = np.zeros(stop - start, RECORD)
    records["key"] = shuffle_keys(seed, 0, start, stop - start)
    records["row"]["token"] = np.arange(start, stop)
    records["norm"][:, 0] = np.random.default_rng(4).gamma(2.0, size=N).astype(np.float32)[start:stop]
    records["acts0"] = np.arange(start, stop)[:, None]
    return records


def _order(folder: Path, buckets: int, pieces: list[int], seed: int = 0) -> np.ndarray:
    with contextlib.closing(Spill(folder, RECORD, buckets)) as spill:
        for start, stop in zip([0, *pieces], [*pieces, N], strict=True):
            spill.append(_records(start, stop, seed))
        spill.flush()
    shuffled = np.concatenate(list(spill.shuffled()))
    assert (shuffled["acts0"] == shuffled["row"]["token"][:, None]).all()
    return shuffled["row"]["token"]


def test_the_order_is_that_of_one_sort_by_key(tmp_path: Path) -> None:
    expected = np.argsort(shuffle_keys(0, 0, 0, N))
    for name, buckets, pieces in (("a", 1, []), ("b", 7, [3, 500, 501]), ("c", 64, [900])):
        np.testing.assert_array_equal(_order(tmp_path / name, buckets, pieces), expected)
    assert sorted(expected) == list(range(N))
    assert (_order(tmp_path / "d", 7, [], seed=1) != expected).mean() > 0.99


def test_keys_are_counter_based_and_differ_by_seed_and_split() -> None:
    keys = shuffle_keys(3, 0, 0, N)
    np.testing.assert_array_equal(np.concatenate([shuffle_keys(3, 0, 0, 10), shuffle_keys(3, 0, 10, N - 10)]), keys)
    assert len(np.unique(keys)) == N
    for other in (shuffle_keys(4, 0, 0, N), shuffle_keys(3, 1, 0, N)):
        assert not np.isin(other, keys).any()


def test_keys_are_fixed_for_good() -> None:
    """These are the first keys of format version 1: another order would be another store under an equal config."""
    assert [int(key) for key in shuffle_keys(0, 0, 0, 2)] == [2558736989570252433, 17913671590881668180]


def test_keys_are_uniform_and_independent_of_neighbours() -> None:
    count, buckets = 200_000, 40
    keys = shuffle_keys(0, 0, 0, count)
    where = ((keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(int)
    chi2 = ((np.bincount(where) - count / buckets) ** 2 / (count / buckets)).sum()
    assert abs(chi2 - (buckets - 1)) < 5 * (2 * (buckets - 1)) ** 0.5  # its mean and five standard deviations
    ranks = np.argsort(np.argsort(keys))
    for lag in (1, 2, 127):
        assert abs(np.corrcoef(ranks[:-lag], ranks[lag:])[0, 1]) < 5 / count**0.5
    assert abs(np.corrcoef(ranks, np.arange(count))[0, 1]) < 5 / count**0.5


def test_every_kind_has_its_own_exact_median_and_stays_with_its_row(tmp_path: Path) -> None:
    norms = np.random.default_rng(1).gamma([1.0, 2.0, 7.0], size=(N, 3)).astype(np.float32)
    records = np.zeros(N, spill_record([(2, "float32"), (D, "float16"), (4, "bfloat16")]))
    records["key"], records["norm"] = shuffle_keys(0, 0, 0, N), norms
    for kind in range(3):
        records[f"acts{kind}"] = np.arange(N)[:, None] + kind
    with contextlib.closing(Spill(tmp_path, records.dtype, 3)) as spill:
        spill.append(records[:10])
        spill.append(records[10:])
        spill.flush()
        shuffled = np.concatenate(list(spill.shuffled()))
        assert spill.median_norms() == np.median(norms.astype(np.float64), axis=0).tolist()
    for kind in range(3):
        np.testing.assert_array_equal(shuffled[f"acts{kind}"][:, 1], np.argsort(records["key"]) + kind)


def test_buckets_are_enough_for_memory_and_not_too_many_files() -> None:
    assert n_buckets(0, RECORD) == 1 and n_buckets(10, RECORD) == 1
    rows = 10**7
    assert rows * RECORD.itemsize / n_buckets(rows, RECORD) <= 96 << 20
    assert n_buckets(10**12, RECORD) == 256


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 1001])
@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e30])
def test_the_median_is_exact(tmp_path: Path, count: int, scale: float) -> None:
    values = (np.random.default_rng(count).gamma(0.3, size=count) * scale).astype(np.float32)
    values[: count // 3] = values[0]  # ties
    values[-1] = 0
    (tmp_path / "n.bin").write_bytes(values.tobytes())
    assert exact_median(tmp_path / "n.bin") == np.median(values.astype(np.float64))


def test_the_median_sees_numbers_that_differ_in_their_last_bit(tmp_path: Path) -> None:
    bits = np.float32(129.0).view(np.uint32) + np.arange(7, dtype=np.uint32)
    (tmp_path / "n.bin").write_bytes(np.random.default_rng(0).permutation(bits).tobytes())
    assert exact_median(tmp_path / "n.bin") == float(bits[3].view(np.float32))


@pytest.mark.parametrize("dtype", list(DISK_DTYPES))
@pytest.mark.parametrize("ends", [(3, 3, 22, 23), (10, 20, 23), (9, 11, 21, 23)])
def test_shards_are_full_but_the_last_and_statistics_are_of_what_is_stored(
    tmp_path: Path, dtype: str, ends: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    acts = rng.normal(3.0, 2.0, (23, D)).astype(np.float32)
    raw = acts.astype(DISK_DTYPES[dtype]) if dtype != "bfloat16" else (acts.view(np.uint32) >> 16).astype(np.uint16)
    rows = np.zeros(23, RECORD["row"])
    rows["source"], rows["token"] = np.arange(23) % 3, np.arange(23)
    writer = ShardWriter(tmp_path, D, dtype, 10, 4)
    for start, stop in zip((0, *ends), ends, strict=False):
        writer.add(raw[start:stop], rows[start:stop])
    statistics = writer.finish()
    assert statistics is not None and [shard.rows for shard in writer.shards] == [10, 10, 3]
    assert all(isinstance(shard, ShardInfo) for shard in writer.shards)
    read = np.concatenate([np.load(tmp_path / f"shard-0000{index}.npy") for index in range(3)])
    np.testing.assert_array_equal(read, raw)
    tokens = np.concatenate([np.load(tmp_path / f"rows-0000{index}.npy") for index in range(3)])["token"]
    assert tokens.tolist() == list(range(23)) and writer.rows_by_source.tolist() == [8, 8, 7, 0]
    kept = to_float32(raw, dtype).astype(np.float64)
    np.testing.assert_allclose(statistics.mean_D, kept.mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.mean_squared_norm, (kept**2).sum(1).mean(), rtol=1e-14)
    np.testing.assert_allclose(statistics.variance, ((kept - kept.mean(0)) ** 2).sum(1).mean(), rtol=1e-12)


def test_statistics_are_sums_of_shards_which_are_added_in_their_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, scale = np.zeros(2_000, RECORD["row"]), 10.0 ** rng.integers(-9, 3, (2_000, 1))
    acts = (rng.normal(3.0, 2.0, (2_000, D)) * scale).astype(np.float32)
    total_D = running_D = np.zeros(D)
    for start in range(0, 2_000, 700):
        shard, sum_D = acts[start : start + 700].astype(np.float64), np.zeros(D)
        for piece in np.split(shard, range(256, len(shard), 256)):
            sum_D, running_D = sum_D + piece.sum(0), running_D + piece.sum(0)
        total_D = total_D + sum_D
    writer = ShardWriter(tmp_path, D, "float32", 700, 1)
    writer.add(acts, rows)
    statistics = writer.finish()
    assert statistics is not None and (running_D != total_D).any()  # the order shows
    np.testing.assert_array_equal(statistics.mean_D, total_D / 2_000)


def test_no_rows_are_no_statistics(tmp_path: Path) -> None:
    assert ShardWriter(tmp_path, D, "float32", 10, 1).finish() is None


@pytest.mark.parametrize("model_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", list(DISK_DTYPES))
def test_a_models_activations_are_kept_as_an_arrays_are(dtype: str, model_dtype: str) -> None:
    rng = np.random.default_rng(0)
    acts = (rng.standard_normal((50, 33)) * 10 ** rng.uniform(-9, 6, (50, 33))).astype(np.float32)
    acts[0, :4] = 0, -0.0, 65_520, np.inf
    of_model = torch.from_numpy(acts).to(getattr(torch, model_dtype))
    kept, expected = _convert_rows(of_model, dtype), from_float32(of_model.float().numpy(), dtype)
    assert kept.dtype == expected.dtype and kept.tobytes() == expected.tobytes()
    finite = np.isfinite(to_float32(expected, dtype)).all(1)
    np.testing.assert_array_equal(np.isfinite(norms(kept, dtype)), finite)
    assert not finite.all()
