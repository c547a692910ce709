"""A reduced form of `python -m tests.torture fuzz`, and proof that it sees a fault."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck

from hafs_jax.base.checksums.sealed import KEY, LINE_KEY
from tests.torture import fuzz
from tests.torture.fuzz import commands, documents
from tests.torture.fuzz.documents import EVAL, RUN, O
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


def _changed(path: str, change: Callable[[dict[str, Any]], object]) -> bytes:
    text = Path(path).read_text()
    values = json.loads(text.splitlines()[0] if path.endswith(".jsonl") else text)
    change(values)
    return json.dumps({key: value for key, value in values.items() if key not in (KEY, LINE_KEY)}).encode() + b"\n"


def _without_parents(values: dict[str, Any]) -> None:
    for tree in values["trees"].values():
        for node in tree["nodes"].values():
            node.pop("parent")


def _infinite_f1(values: dict[str, Any]) -> None:
    for source in values["sources"].values():
        source["latents"] = [{**latent, "f1": math.inf} for latent in source["latents"]]


CHANGES: dict[str, tuple[str, str, Callable[[dict[str, Any]], object]]] = {
    "classes without parents": ("hierarchy.json", f"{EVAL}/hierarchy.json", _without_parents),
    "a result without its verdict": ("first_letter.json", f"{EVAL}/first_letter.json", lambda values: values.clear()),
    "a step without rows": ("metrics.jsonl", f"{RUN}/metrics.jsonl", lambda values: values.pop("tokens")),
    "a step of null rows": ("metrics.jsonl", f"{RUN}/metrics.jsonl", lambda values: values.update(tokens=None)),
    "half of a pair": ("summary.json", f"{O}/experiment/summary.json", lambda values: values.update(name="\ud83d")),
    "half a pair in a run": (
        "run.json",
        f"{RUN}/run.json",
        lambda values: values.update(store_fingerprint="\ud83d"),
    ),
    "a figure that is null": ("run.json", f"{RUN}/run.json", lambda values: values["final"].update(dead_fraction=None)),
    "a neighbour without a cosine": (
        "latents.json",
        f"{EVAL}/latents.json",
        lambda values: [latent["nearest"].pop("cosine", None) for latent in values["latents"]],
    ),
    "latents of unknown rows": ("latents.json", f"{EVAL}/latents.json", lambda values: values.pop("rows_scanned")),
    "a cosine that is null": (
        "latents.json",
        f"{EVAL}/latents.json",
        lambda values: values.update(nearest_cosine=[None, *values["nearest_cosine"][1:]]),
    ),
    "a latent of infinite F1": ("domains.json", f"{EVAL}/domains.json", _infinite_f1),
    "a figure that is a list": ("run.json", f"{RUN}/run.json", lambda values: values["final"].update(fvu_ema=[])),
    "a probe that is infinite": (
        "llm probing.json",
        f"{O}/eval/llm/probing.json",
        lambda values: values["tasks"]["task_b"]["top_5"].update(test_accuracy=math.inf),
    ),
    "a checksum that is none": (
        "manifest.json",
        f"{O}/store/train/manifest.json",
        lambda values: values["files_sha256"].update({"contexts.npy": {}}),
    ),
    "a mean that is too short": (
        "manifest.json",
        f"{O}/store/train/manifest.json",
        lambda values: values["mean"].pop(),
    ),
    "no mean": ("manifest.json", f"{O}/store/train/manifest.json", lambda values: values["mean"].clear()),
    "a store that is none": ("run config.json", f"{RUN}/config.json", lambda values: values.update(store="")),
    "a figure that lacks": ("run.json", f"{RUN}/run.json", lambda values: values["final"].pop("l0")),
}
"""What was found wrong once: (the kind of file, its path, what is changed in it)."""


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_found_once_stays_mended(place: Place, name: str) -> None:
    kind, path, change = CHANGES[name]
    written = _changed(path, change)
    for number in range(len(documents.KINDS[kind].readers)):
        assert documents.case(place, (kind, number, written)) is None


@pytest.mark.parametrize("flag", ["--dry-run=--", "--dry-run=" + "a/" * 1500, "--licence=--", "--dry-run=\ud83d"])
def test_odd_values_of_flags_are_taken_or_refused(place: Place, flag: str) -> None:
    assert commands.case(place, [*documents.UPLOAD, flag]) is None


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
