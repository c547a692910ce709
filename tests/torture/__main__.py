"""`python -m tests.torture`: all subjects, or some; each case that goes wrong is printed with its number."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

SUBJECTS = {"kills": 120, "signals": 60, "disks": 150, "power": 200, "damage": 2000, "fuzz": 10_000}
"""The cases of each subject, by default."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)} [all]")
    parser.add_argument("--cases", type=int, help=f"cases of each subject [{', '.join(map(str, SUBJECTS.values()))}]")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers [0]")
    parser.add_argument("--case", type=int, nargs="+", help="only these, of one subject")
    options = parser.parse_args()
    if unknown := set(options.subjects) - set(SUBJECTS):
        parser.error(f"expected {', '.join(SUBJECTS)}, found {', '.join(unknown)}")

    from tests.torture import layer

    if not layer.loaded():
        if not layer.is_buildable():
            parser.error("needs a C compiler, cc")
        return layer.under_layer(["-m", "tests.torture", *sys.argv[1:]])
    os.environ.pop("LD_PRELOAD")
    return torture(options)


def torture(options: argparse.Namespace) -> int:
    import importlib

    import hafs_jax.commands.training
    import hafs_jax.saelens
    import hafs_jax.training.sweeps  # noqa: F401 (what the forks would import)
    from tests.torture.jobs import Torture

    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        made = Torture(Path(folder))
        for subject in options.subjects or SUBJECTS:
            case = importlib.import_module(f"tests.torture.{subject}").case
            count, started = options.cases or SUBJECTS[subject], time.monotonic()
            numbers = options.case or range(count)
            found = 0
            for number in numbers:
                if problem := case(made, number, options.seed):
                    found += 1
                    print(f"{subject} {number}: {problem}", flush=True)
            seconds = time.monotonic() - started
            print(f"{subject}: {len(numbers)} cases of seed {options.seed}, {found} wrong, {seconds:.0f} s", flush=True)
            wrong += found
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
