"""The benchmark suite: `python -m benchmarks [--quick] [--only SUITE ...] [--write FILE.json]`; see README.md here."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads would take our cores
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # of a GPU's memory; the other libraries need some too

import importlib

from tqdm import tqdm

from benchmarks.harness import Row, device, show, write_table
from hafs_jax.base.errors import one_line_errors
from hafs_jax.base.files import write_text
from hafs_jax.base.flags import Parser

SUITES = (
    "limits",
    "steps",
    "dead",
    "updates",
    "penalties",
    "products",
    "sweeping",
    "loading",
    "extraction",
    "streaming",
    "evaluation",
    "memory",
    "startup",
    "accelerator",
)
QUICK = ("limits", "steps", "penalties", "loading", "startup")
"""The suites that `--quick` runs, each at fewer sizes and rounds: under three minutes on two cores."""


def main() -> int:
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help=f"only {', '.join(QUICK)}, at fewer sizes and rounds: under three minutes"
    )
    parser.add_argument(
        "--only", nargs="+", choices=SUITES, metavar="SUITE", help=f"run these suites: {', '.join(SUITES)} [all]"
    )
    parser.add_argument(
        "--write", type=Path, help="JSON file for the table [benchmarks/results/<device>.json; none with --only]"
    )
    options = parser.parse_args()
    names = options.only or (QUICK if options.quick else SUITES)
    path = options.write
    if path is None and not options.only:  # with --only, a part of the table would replace all of it
        path = Path(__file__).parent / "results" / f"{device()}.json"
    rows: list[Row] = []
    limits: dict[str, float] = {}
    with tqdm(names, unit="suite") as bar:
        for name in bar:
            bar.set_description(name)
            for row in importlib.import_module(f"benchmarks.{name}").measure(options.quick):
                rows.append(row)
                if name == "limits":
                    limits[row.name] = row.ours
                tqdm.write(show([row]).splitlines()[-1])
            command = f"python -m benchmarks {' '.join(sys.argv[1:])}".strip()
            if path is not None:
                write_table(path, rows, command, limits)
    print(show(rows))
    if path is not None:
        write_text(path.with_suffix(".md"), show(rows) + "\n")
        print(f"\n{path}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
