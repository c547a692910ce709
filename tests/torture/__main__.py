"""`python -m tests.torture`: all subjects, or some; each case that goes wrong is printed with its number."""

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

SUBJECTS = {"kills": 90, "times": 45, "signals": 60, "disks": 90, "power": 200, "concurrency": 45}
SUBJECTS |= {"loop": 30, "damage": 5000, "fuzz": 10_000, "flat": 200, "rounds": 12}
"""The cases of each subject, by default."""
IN_PROCESS = {"damage", "fuzz", "flat", "rounds"}
"""Subjects that work in this process, after all forks."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)} [all]")
    parser.add_argument("--cases", type=int, help=f"cases of each subject [{', '.join(map(str, SUBJECTS.values()))}]")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers [0]")
    parser.add_argument("--case", type=int, nargs="+", help="only these, of one subject")
    parser.add_argument("--jobs", nargs="+", metavar="JOB", help="the commands that are disturbed, in turn [all]")
    options = parser.parse_args()
    if unknown := set(options.subjects) - set(SUBJECTS):
        parser.error(f"expected {', '.join(SUBJECTS)}, found {', '.join(unknown)}")

    from tests.torture import layer
    from tests.torture.jobs import COMMANDS

    if unknown := set(options.jobs or ()) - set(COMMANDS):
        parser.error(f"--jobs: expected {', '.join(COMMANDS)}, found {', '.join(unknown)}")
    if not layer.loaded():
        if not layer.is_buildable():
            parser.error("needs a C compiler, cc")
        return layer.under_layer(["-m", "tests.torture", *sys.argv[1:]])
    os.environ.pop("LD_PRELOAD")
    return torture(options)


def torture(options: argparse.Namespace) -> int:
    from tests.torture.jobs import COMMANDS, Torture

    subjects = [name for name in SUBJECTS if not options.subjects or name in options.subjects]
    jobs = (options.jobs or sorted(COMMANDS)) if set(subjects) - IN_PROCESS else []
    _import_for(jobs)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        made = Torture(Path(folder), jobs)
        for subject in subjects:
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


def _import_for(jobs: list[str]) -> None:
    """Imports here, once, what each fork would import."""
    from tests.torture.jobs import OF_MODELS

    names = ["hafs_jax.commands.training", "hafs_jax.saelens", "hafs_jax.training.sweeps"]
    if OF_MODELS & set(jobs):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch

        torch.set_num_threads(1)  # a fork has none of its parent's threads
        names += ["transformers", "transformer_lens", "sae_lens", "sae_bench.evals.core.main"]
        names += [
            "hafs_extract.run",
            "hafs_extract.synthetic.samples",
            "hafs_evaluate.stages",
            "hafs_evaluate.report.report",
        ]
    for name in names:
        importlib.import_module(name)


if __name__ == "__main__":
    raise SystemExit(main())
