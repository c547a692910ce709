"""A reduced form of `python -m tests.torture fuzz`, and proof that it sees a fault."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck

from tests.torture import fuzz
from tests.torture.fuzz import commands, documents
from tests.torture.fuzz.place import Ended, Place, preload, problem

CASES = {"commands": 200, "documents": 200, "foreign": 100}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        preload()
        yield Place(Path.cwd())


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore")  # of libraries, about what they are given
def test_whatever_is_given_is_taken_or_refused_in_one_line(kind: str, place: Place) -> None:
    strategy, check = fuzz.kinds(place)[kind]

    @hypothesis.settings(
        max_examples=CASES[kind],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(strategy)
    def holds(example: Any) -> None:
        assert check(place, example) is None

    holds()


def test_a_case_is_the_same_for_the_same_number() -> None:
    first, again, other = (fuzz.drawn(commands.lines(), seed) for seed in ("a 0 1", "a 0 1", "a 0 2"))
    assert first == again != other


def test_a_traceback_an_error_with_exit_code_0_and_nonsense_are_seen(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problem(Ended(0, "", "", False)) is None and problem(Ended(2, "", "error: a\n", False)) is None
    assert problem(Ended(2, "", "error: a\nb\n", False)) and problem(Ended(2, "", "", False))
    assert problem(Ended(0, "", "error: a\n", False)) and problem(Ended(1, "", "", False))
    assert commands.senseless(["train", "--lr", "nan"]) and not commands.senseless(["train", "--lr", "1e-3"])
    assert commands.senseless(["train", "--seed=1.5"]) and not commands.senseless(["train", "--seed=1"])

    def broken(*_: object) -> None:
        raise KeyError("steps")

    monkeypatch.setattr("hafs_jax.runs.Run.metrics", broken)
    with pytest.raises(KeyError):
        documents.case(place, ("metrics.jsonl", 0, b""))
    place.restore()
    monkeypatch.undo()
    assert documents.case(place, ("metrics.jsonl", 0, b'{"step": []}\n')) is None
