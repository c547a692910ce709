"""`python -m evaluate`: run the evaluations, write the report, export a run. Torch and jax are imported when needed."""

import argparse
import os
import sys
from pathlib import Path

from evaluate.config import DATASETS, OFFLINE_TASKS, EvalConfig
from evaluate.workspace import finished_runs, open_workspace
from extract.format.config import Parser, add_flags, with_flags
from extract.format.errors import UserError, one_line_errors

DESCRIPTION = """\
Measure the SAEs of all finished runs. Results lie in OUT/<profile>/eval/<run>/. What an earlier call computed from
the same SAE, store and settings is kept; an interrupted call goes on where it stopped.
"""

EPILOG = f"""\
stages, in this order:
  export   the run's last checkpoint as a SAELens folder, runs/<run>/sae
  core     FVU, L0, coherence and the rest on the held-out store              eval/<run>/core.json, core_latents.npz
  splice   cross-entropy and KL of the language model with the SAE in place   eval/<run>/core.json
  probing  SAE-Bench's sparse probing, of each SAE and the language model     eval/<run>/probing.json, eval/llm/
  latents  densities, top contexts, promoted tokens                           eval/<run>/latents.json

tasks of --suite sae_probes, unless named (any binary task of the sae-probes wheel):
  {chr(10).join("  " + task for task in OFFLINE_TASKS).strip()}
datasets of --suite standard, unless named:
  {chr(10).join("  " + dataset for dataset in DATASETS).strip()}
"""

PLACE = "profile's folder in OUT; auto is the one extracted last [auto]"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; its exit code."""
    # Read when torch is imported. On busy cores, OpenMP threads that spin while they wait cost four times the run.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with one_line_errors():
        options = _parser().parse_args(argv)
        return options.command(options)


def _parser() -> Parser:
    parser = Parser(prog="python -m evaluate", description="Evaluate trained SAEs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="measure all finished runs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_place(run)
    run.add_argument("--runs", nargs="+", default=[], metavar="NAME", help="only these runs [all that have finished]")
    run.add_argument(
        "--skip", nargs="+", default=[], choices=("splice", "probing", "latents"), help="stages to leave out [none]"
    )
    add_flags(run, EvalConfig())
    run.set_defaults(command=_run)
    report = commands.add_parser("report", help="write the report", description="Write OUT/<profile>/report/.")
    _add_place(report)
    report.set_defaults(command=_report)
    export = commands.add_parser(
        "export",
        help="write one run's SAELens folder",
        description="Write RUN_DIR/sae, which sae_lens.SAE.load_from_disk loads, and print its path.",
    )
    export.add_argument("run_folder", type=Path, metavar="RUN_DIR", help="a run's folder: OUT/<profile>/runs/<run>")
    export.set_defaults(command=_export)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of all profiles [artifacts]")
    parser.add_argument("--profile", default="auto", help=PLACE)


def _run(options: argparse.Namespace) -> int:
    config = with_flags(EvalConfig(), options)
    workspace = open_workspace(options.out, options.profile)
    runs = finished_runs(workspace, options.runs)

    from evaluate.stages import Evaluation  # seconds

    Evaluation(workspace, config, options.skip).run(runs)
    print(workspace.eval)
    return 0


def _report(options: argparse.Namespace) -> int:
    workspace = open_workspace(options.out, options.profile)

    from evaluate.report import write_report

    write_report(workspace.folder)
    print(workspace.report / "index.html")
    return 0


def _export(options: argparse.Namespace) -> int:
    if not options.run_folder.is_dir():
        raise UserError(f"expected a run's folder at {options.run_folder}, found none")

    from evaluate.bridge import export_run

    print(export_run(options.run_folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
