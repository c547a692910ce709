"""extract/saving.py: rows are synced beside the model, and the journal is never ahead of the disk."""

import threading
from types import SimpleNamespace

import pytest

from hafs_extract.saving import Saver

HOUR = 3600.0


class FakeSpill:
    """Counts rows; a sync waits until `go` is set and takes down what had been appended when it began."""

    def __init__(self) -> None:
        self.counts, self.synced = [0, 0], [0, 0]
        self.go, self.begun = threading.Event(), threading.Event()

    def sync(self) -> None:
        before = list(self.counts)
        self.begun.set()
        assert self.go.wait(10)
        self.synced = before


@pytest.fixture
def case() -> SimpleNamespace:
    spill, saved = FakeSpill(), []

    def save(batches: int, counts: list[int]) -> None:
        assert all(synced >= count for synced, count in zip(spill.synced, counts, strict=True))
        saved.append((batches, counts))

    return SimpleNamespace(spill=spill, saved=saved, save=save)


def test_rows_go_on_being_appended_while_a_sync_is_under_way(case: SimpleNamespace) -> None:
    saver = Saver(case.spill, case.save, 0.0)
    case.spill.counts = [2, 1]
    saver.appended(1)
    assert case.spill.begun.wait(10)
    case.spill.counts = [4, 3]  # the sync of batch 1 has not ended
    assert case.saved == []
    case.spill.go.set()
    saver.appended(2)  # due at once, and so waits for the first
    saver.finish(2)
    saver.close()
    assert case.saved == [(1, [2, 1]), (2, [4, 3])]


def test_what_is_not_due_is_saved_at_the_end(case: SimpleNamespace) -> None:
    saver = Saver(case.spill, case.save, HOUR)
    case.spill.go.set()
    for batches in (1, 2, 3):
        case.spill.counts[0] += 5
        saver.appended(batches)
    assert case.saved == []
    saver.finish(3)
    saver.close()
    assert case.saved == [(3, [15, 0])]


def test_a_failed_sync_ends_the_pass(case: SimpleNamespace) -> None:
    def fail() -> None:
        raise OSError("no space left")

    case.spill.sync = fail
    saver = Saver(case.spill, case.save, 0.0)
    saver.appended(1)
    with pytest.raises(OSError, match="no space left"):
        saver.appended(2)
    with pytest.raises(OSError, match="no space left"):
        saver.finish(2)
    saver.close()
    assert case.saved == []
