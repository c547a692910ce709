"""The commands of training: `hafs train`, `sweep`, `synth`, `tau`, `inspect` and `plan`.

flags      their flags and help
training   the commands that train
runs       the commands about a run
plan       what a training would cost on a GPU
"""

import sys
from collections.abc import Callable

from hafs_jax.base.errors import one_line_errors
from hafs_jax.base.log import shown
from hafs_jax.commands.plan import plan
from hafs_jax.commands.runs import inspect, tau
from hafs_jax.commands.training import sweep, synth, train

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "sweep": sweep,
    "synth": synth,
    "tau": tau,
    "inspect": inspect,
    "plan": plan,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; a user's mistake is one line and exit code 2, a stopped training exit code 1."""
    name, *rest = sys.argv[1:] if arguments is None else arguments
    with one_line_errors(), shown("stdout"):
        COMMANDS[name](rest)
