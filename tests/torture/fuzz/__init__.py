"""Input that nobody would give: every command and every reader answers with its work, or with one line and exit code 2.

commands    command lines, drawn from the commands' own parsers
documents   the JSON, TOML, CSV and text files that are read
foreign     files of other programs: npy, safetensors, SAELens folders, texts
place       where the cases run
values      what they are made of

`python -m tests.torture fuzz --case NUMBER --seed SEED` repeats one case.
"""

from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

ORDER = ("commands", "documents", "commands", "documents", "foreign")
"""The kinds of cases, by their numbers."""


def drawn(strategy: Any, seed: str) -> Any:
    """An example of a strategy, the same for the same seed.

    Of the first two that hypothesis draws the second: the first is always the simplest one there is.
    """
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=2, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck)
    )
    @hypothesis.given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found[-1]


@cache
def _place(folder: Path) -> Any:
    from tests.torture.fuzz import place

    place.preload()
    return place.Place(folder)


@cache
def kinds(place: Any) -> dict[str, Any]:
    """{kind: (the strategy of its examples, what tries one)}."""
    from tests.torture.fuzz import commands, documents, foreign

    return {
        "commands": (commands.lines(), commands.case),
        "documents": (documents.documents(place), documents.case),
        "foreign": (foreign.files(place), foreign.case),
    }


def case(made: Any, number: int, seed: int) -> str | None:
    """What went wrong in one case; None where nothing did. `made.folder` is a folder for all cases."""
    from tests.torture.fuzz.place import Hangs, limited, said

    place = _place(made.folder / "fuzz")
    kind = ORDER[number % len(ORDER)]
    strategy, check = kinds(place)[kind]
    example = drawn(strategy, f"{kind} {seed} {number}")
    try:
        with limited():
            return check(place, example)
    except (Exception, Hangs) as error:
        place.restore()
        return f"{kind}: {str(example)[:600]}: {said(error)}"
