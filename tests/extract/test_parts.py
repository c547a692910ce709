"""Parts of an extraction: planned by text and config alone, checked when they are read, made again where damaged."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hafs_extract.parts import plan
from hafs_extract.parts.files import Parts, write_part
from hafs_extract.parts.plan import Part, plan_parts
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of
from hafs_jax.store.shuffle import shuffle_keys, spill_record

RECORD = spill_record([(5, "float16"), (3, "float32")])
BUCKETS = 4


def _records(part: Part) -> np.ndarray:
    numbers = np.arange(part.first_row, part.first_row + part.rows)
    records = np.zeros(part.rows, RECORD)
    records["key"] = shuffle_keys(0, 0, part.first_row, part.rows)
    records["row"]["token"], records["norm"] = numbers, np.stack([numbers % 89, 1000.0 - numbers], 1)
    records["acts0"] = numbers[:, None]
    return records


class Made:
    """Parts in a folder, and which of them were made."""

    def __init__(self, folder: Path, rows: list[int]) -> None:
        starts = np.cumsum([0, *rows])
        self.plan = [Part(n, n, n + 1, int(starts[n]), count) for n, count in enumerate(rows)]
        self.folder, self.numbers = folder, list[int]()
        self.spoil: Callable[[Part], object] = lambda part: None

    def open(self) -> Parts:
        def make(wanted: list[Part]) -> None:
            for part in wanted:
                self.numbers.append(part.number)
                parts.note(write_part(self.folder, part, _records(part), BUCKETS))
                self.spoil(part)

        parts = Parts(self.folder, self.plan, RECORD, BUCKETS, make)
        return parts

    def file(self, number: int, end: str = "bin") -> Path:
        return self.folder / f"{self.plan[number].name}.{end}"


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path / "parts", [70, 31, 90])
    made.open().finish()
    made.numbers.clear()
    return made


def _order(parts: Parts) -> np.ndarray:
    records = np.concatenate(list(parts.shuffled()))
    np.testing.assert_array_equal(records["acts0"][:, 2], records["row"]["token"])
    return records["row"]["token"]


EXPECTED = np.argsort(shuffle_keys(0, 0, 0, 191))


def test_parts_are_runs_of_batches_of_about_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 900, 4_000)
    for size, bytes_each in (
        (100, 8 << 20),
        (1_000, 8 << 20),
        (5_000, int(rows.sum()) * 5_000 // 256),
        (100_000, 64 << 20),
    ):
        parts = plan_parts(rows, size, first_row=7)
        assert [part.number for part in parts] == list(range(len(parts)))
        assert [part.first_batch for part in parts] == [0, *(part.stop_batch for part in parts[:-1])]
        assert parts[-1].stop_batch == len(rows) and all(part.rows > 0 for part in parts)
        starts = 7 + np.cumsum([0, *(part.rows for part in parts)])
        assert [part.first_row for part in parts] == starts[:-1].tolist() and starts[-1] == 7 + rows.sum()
        assert all(part.rows == rows[part.first_batch : part.stop_batch].sum() for part in parts)
        most = max(part.rows for part in parts)
        assert 0.9 * bytes_each / size <= most <= bytes_each / size + rows.max(), size
    monkeypatch.setattr(plan, "LEAST_BYTES", 1)
    assert [part.rows for part in plan_parts(np.array([3, 1, 2]), 10)] == [3, 1, 2]
    assert plan_parts(np.zeros(0, np.int64), 10) == []


def test_rows_come_in_the_order_of_one_sort_and_the_median_is_exact(made: Made) -> None:
    parts = made.open()
    assert parts.rows == parts.rows_made == 191 and parts.missing == []
    np.testing.assert_array_equal(_order(parts), EXPECTED)
    norms = np.concatenate([_records(part)["norm"] for part in made.plan]).astype(np.float64)
    assert parts.median_norms() == np.median(norms, axis=0).tolist()
    assert made.numbers == []


def test_a_part_is_the_same_file_whatever_the_order_of_its_rows(made: Made, tmp_path: Path) -> None:
    part = made.plan[2]
    shuffled = _records(part)[np.random.default_rng(0).permutation(part.rows)]
    write_part(tmp_path / "again", part, shuffled, BUCKETS)
    for end in ("bin", "json"):
        assert sha256_of(tmp_path / "again" / f"{part.name}.{end}") == sha256_of(made.file(2, end))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Made], object]] = {
    "truncated": lambda made: made.file(1).write_bytes(made.file(1).read_bytes()[:-1]),
    "missing": lambda made: made.file(1).unlink(),
    "no entry": lambda made: made.file(1, "json").unlink(),
    "a bit of the entry": lambda made: _flip(made.file(1, "json"), 40),
    "half an entry": lambda made: made.file(1, "json").write_bytes(made.file(1, "json").read_bytes()[:100]),
    "another part's entry": lambda made: made.file(1, "json").write_bytes(made.file(0, "json").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_whole_is_made_again_when_the_parts_are_opened(made: Made, damage: Callable) -> None:
    before = sha256_of(made.file(1))
    damage(made)
    parts = made.open()
    assert [part.number for part in parts.missing] == [1] and parts.rows_made == 160
    parts.finish()
    assert made.numbers == [1] and sha256_of(made.file(1)) == before
    np.testing.assert_array_equal(_order(parts), EXPECTED)


def test_a_flipped_bit_of_any_byte_is_found_when_it_is_read(made: Made) -> None:
    size, norms = made.file(1).stat().st_size, 31 * RECORD.itemsize
    for at in (0, norms - 1, norms, size - 1, *np.random.default_rng(0).integers(0, size, 8)):
        _flip(made.file(1), int(at))
        parts = made.open()
        assert parts.missing == []
        expected = np.median([1000.0 - n for n in range(191)])
        assert parts.median_norms()[1] == expected and (made.numbers == [1]) == (at >= norms)
        np.testing.assert_array_equal(_order(parts), EXPECTED)
        assert made.numbers == [1]
        made.numbers.clear()


def test_a_part_that_goes_while_it_is_needed_is_made_again(made: Made) -> None:
    parts = made.open()
    made.file(0).unlink()
    np.testing.assert_array_equal(_order(parts), EXPECTED)
    assert made.numbers == [0]


def test_a_part_that_is_damaged_again_is_named(made: Made) -> None:
    parts = made.open()
    made.spoil = lambda part: _flip(made.file(part.number), 0)
    made.spoil(made.plan[1])
    with pytest.raises(UserError, match=r"part-00001.bin was damaged, was made again, and is damaged again; check"):
        _order(parts)


def test_parts_of_another_plan_are_made_again(made: Made) -> None:
    other = Made(made.folder, [70, 121])
    parts = other.open()
    assert [part.number for part in parts.missing] == [1]
    parts.finish()
    np.testing.assert_array_equal(_order(parts), EXPECTED)
    other.plan[0] = dataclasses.replace(other.plan[0], first_row=500)
    assert [part.number for part in other.open().missing] == [0]
