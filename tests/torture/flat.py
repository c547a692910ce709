"""A training in this process, case by case: what the process holds stays as after the first ones."""

import sys

from tests.support.flat import WARM, Trainings
from tests.torture.jobs import Torture

_begun: dict[str, Trainings] = {}
SHOWN = 50  # trainings between two lines


def case(torture: Torture, number: int, seed: int) -> str | None:
    folder = torture.folder / "flat"
    if "all" not in _begun:
        folder.mkdir()
        _begun["all"] = Trainings(folder)
    trainings = _begun["all"]
    trainings.train(1000 * seed + number)
    if trainings.count <= WARM:
        return None
    if trainings.count % SHOWN == 0:
        print(f"after {trainings.count} trainings the process holds more: {trainings.grown()}", file=sys.stderr)
    return trainings.problem()
