"""`python -m evaluate`: run the evaluations, write the report, export a run. Torch and jax are imported when needed."""

import argparse
import os
import sys
from pathlib import Path

from evaluate.config import DATASETS, OFFLINE_TASKS, EvalConfig
from evaluate.workspace import FinishedRun, Workspace, finished_runs, open_workspace
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

REPORT = """\
Write OUT/<profile>/report/: index.html, one page that opens from disk, report.md with PNG figures, and results.json.
Runs that differ in their seed alone are an arm: means with 95% intervals. What was not evaluated is said to be so.
"""

FORMATS = ("saelens", "dictionary_learning")
RUN_DIR = "a run's folder: OUT/<profile>/runs/<run>"
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
    run.add_argument("--sae", type=Path, metavar="SOURCE", help="measure this SAE of another library's instead of runs")
    run.add_argument("--name", help="with --sae: its name in OUT/<profile>/eval [the SOURCE's]")
    add_flags(run, EvalConfig())
    run.set_defaults(command=_run)
    synth = commands.add_parser(
        "synth",
        help="score all finished runs of a synthetic world against its truth",
        description="Score the finished runs of a world that `python -m extract.synthetic` sampled against its true"
        " features: OUT/<profile>/eval/<run>/synthetic.json, and a row a run in OUT/<profile>/eval/synthetic.csv."
        " What an earlier call computed from the same SAE and truth is kept.",
    )
    _add_place(synth)
    synth.add_argument("--runs", nargs="+", default=[], metavar="NAME", help="only these runs [all that have finished]")
    synth.add_argument("--device", default="auto", help="torch device; auto takes CUDA where there is one [auto]")
    synth.set_defaults(command=_synth)
    report = commands.add_parser("report", help="write the report", description=REPORT)
    _add_place(report)
    report.set_defaults(command=_report)
    export = commands.add_parser(
        "export",
        help="write one run for other libraries",
        description="Write RUN_DIR/sae, which sae_lens.SAE.load_from_disk loads, and print its path. With --format "
        "dictionary_learning also RUN_DIR/dictionary_learning/trainer_0, which its load_dictionary loads.",
    )
    export.add_argument("run_folder", type=Path, metavar="RUN_DIR", help=RUN_DIR)
    export.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="whose format to write [saelens]")
    export.set_defaults(command=_export)
    imported = commands.add_parser(
        "import",
        help="write another library's SAE as a SAELens folder",
        description="Read a SAELens folder or a dictionary_learning ae.pt, check it, and write it as a SAELens folder.",
    )
    imported.add_argument("source", type=Path, metavar="SOURCE", help="SAELens folder, ae.pt, or the folder of one")
    imported.add_argument("target", type=Path, metavar="TARGET_DIR", help="SAELens folder to write, or to replace")
    imported.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="the SOURCE's format [auto]")
    imported.add_argument("--hook-point", help="where the SAE belongs, e.g. blocks.3.hook_resid_post [the SOURCE's]")
    imported.set_defaults(command=_import)
    upload = commands.add_parser(
        "upload",
        help="put one run on the model hub",
        description="Upload the run's SAELens folder and a model card to the hub, in one commit; print the address.",
    )
    upload.add_argument("run_folder", type=Path, metavar="RUN_DIR", help=RUN_DIR)
    upload.add_argument("--repo-id", required=True, metavar="USER/NAME", help="the hub's repository, made if need be")
    upload.add_argument("--private", action="store_true", help="make a new repository private")
    upload.add_argument("--license", dest="licence", help="the licence that the card names, e.g. apache-2.0 [none]")
    upload.add_argument("--dry-run", type=Path, metavar="DIR", help="write what would be uploaded to DIR instead")
    upload.set_defaults(command=_upload)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of all profiles [artifacts]")
    parser.add_argument("--profile", default="auto", help=PLACE)


def _run(options: argparse.Namespace) -> int:
    config = with_flags(EvalConfig(), options)
    workspace = open_workspace(options.out, options.profile)
    if options.runs if options.sae is not None else options.name is not None:
        raise UserError("expected --name only with --sae, and --sae without --runs; leave one of them out")
    if options.sae is not None:
        runs = [_imported(workspace, options.sae, options.name)]
    else:
        runs = finished_runs(workspace, options.runs)

    from evaluate.stages import Evaluation  # seconds

    Evaluation(workspace, config, options.skip).run(runs)
    print(workspace.eval)
    return 0


def _synth(options: argparse.Namespace) -> int:
    workspace = open_workspace(options.out, options.profile)
    finished_runs(workspace, options.runs)  # a wrong name is said before the seconds that imports take

    from evaluate.synthetic_stage import TABLE, evaluate_synthetic, table

    print(table(evaluate_synthetic(workspace, options.runs, options.device)))
    print(workspace.eval / TABLE)
    return 0


def _report(options: argparse.Namespace) -> int:
    workspace = open_workspace(options.out, options.profile)

    from evaluate.report import write_report

    write_report(workspace.folder)
    print(workspace.report / "index.html")
    return 0


def _imported(workspace: Workspace, source: Path, name: str | None) -> FinishedRun:
    """A public SAE as a run that needs no export: its SAELens folder lies in OUT/<profile>/imported/<name>/sae."""
    resolved = source.resolve()
    name = name or (resolved.parent.name if resolved.name == "ae.pt" else resolved.name)
    if name in ("llm", "..") or Path(name).name != name or (workspace.runs / name).exists():
        raise UserError(f"--name {name!r}: expected a name that no run in {workspace.runs} has; give another --name")

    from evaluate.interop import import_sae

    folder = workspace.folder / "imported" / name
    import_sae(source, folder / "sae")
    return FinishedRun(name, folder, is_exported=True)


def _export(options: argparse.Namespace) -> int:
    _check_folder(options.run_folder)

    from evaluate.bridge import export_run

    folder = export_run(options.run_folder)
    if options.format == "dictionary_learning":
        from evaluate.interop import to_dictionary_learning

        folder = to_dictionary_learning(folder, options.run_folder / "dictionary_learning")
    print(folder)
    return 0


def _import(options: argparse.Namespace) -> int:
    from evaluate.interop import import_sae

    print(import_sae(options.source, options.target, options.format, options.hook_point))
    return 0


def _upload(options: argparse.Namespace) -> int:
    _check_folder(options.run_folder)

    from evaluate.hub import upload

    print(
        upload(
            options.run_folder,
            options.repo_id,
            private=options.private,
            licence=options.licence,
            dry_run=options.dry_run,
        )
    )
    return 0


def _check_folder(run_folder: Path) -> None:
    if not run_folder.is_dir():
        raise UserError(f"expected a run's folder at {run_folder}, found none")


if __name__ == "__main__":
    sys.exit(main())
