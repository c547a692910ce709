"""The commands `hafs evaluate`, `report`, `experiment`, `export` and their like. Torch and JAX come when needed."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from hafs_evaluate.config import DATASETS, OFFLINE_TASKS, STAGES, EvalConfig
from hafs_evaluate.workspace import FinishedRun, Workspace, finished_runs, open_workspace
from hafs_jax.base.errors import UserError, one_line_errors
from hafs_jax.base.files import read_json
from hafs_jax.base.log import shown
from hafs_jax.base.options import Parser, add_flags, with_flags

DESCRIPTION = """\
Measure the SAEs of all finished runs. Results lie in OUT/<profile>/eval/<run>/. What an earlier call computed from
the same SAE, store and settings is kept; an interrupted call goes on where it stopped.
With --sae it measures an SAE of another library instead.
"""

EPILOG = f"""\
stages, in this order:
  export     the run's last checkpoint as a SAELens folder, runs/<run>/sae
  core       FVU, L0, coherence and the rest on the held-out store              eval/<run>/core.json, core_latents.npz
  splice     cross-entropy and KL of the language model with the SAE in place   eval/<run>/core.json
  probing    SAE-Bench's sparse probing, of each SAE and the language model     eval/<run>/probing.json, eval/llm/
  hierarchy  label trees: probes of parents and children, absorption, holes     eval/<run>/hierarchy.json, eval/llm/
  latents    densities, contexts, promoted tokens, what fires with it           eval/<run>/latents.json
  domains    latents as detectors of one text source against the others         eval/<run>/domains.json
  across     alike dictionaries over seeds; each latent's match in other runs   eval/stability.json, latents.json

tasks of --suite sae_probes, unless named (any binary task of the sae-probes wheel):
  {chr(10).join("  " + task for task in OFFLINE_TASKS).strip()}
datasets of --suite standard, unless named:
  {chr(10).join("  " + dataset for dataset in DATASETS).strip()}
"""

EXPERIMENT_STAGES = ("extract", "train", "evaluate", "table", "report")
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
    arguments = sys.argv[1:] if argv is None else argv
    with one_line_errors(), shown():
        options = _parser().parse_args(arguments)
        return options.command(options)


def _parser() -> Parser:
    parser = Parser(prog="hafs")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _run_flags,
        _synth_flags,
        _agreement_flags,
        _report_flags,
        _experiment_flags,
        _export_flags,
        _import_flags,
        _neuronpedia_flags,
        _upload_flags,
    ):
        add(commands)
    return parser


def _run_flags(commands: Any) -> None:
    run = commands.add_parser(
        "evaluate",
        help="measure all finished runs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_place(run)
    run.add_argument("--runs", nargs="+", default=[], metavar="NAME", help="only these runs [all that have finished]")
    run.add_argument("--skip", nargs="+", default=[], choices=STAGES, help="stages to leave out [none]")
    run.add_argument(
        "--sae",
        type=Path,
        metavar="SOURCE",
        help="measure this SAE of another library instead of runs",
    )
    run.add_argument("--name", help="with --sae: its name in OUT/<profile>/eval [the SOURCE's]")
    run.add_argument(
        "--first-letter",
        nargs="?",
        const="on",
        choices=("on", "force"),
        help="also SAE-Bench's first-letter absorption, hours a run: eval/<run>/first_letter.json; refused where model "
        "or dictionary are too small for it to be valid, unless `force`d [off]",
    )
    add_flags(run, EvalConfig())
    run.set_defaults(command=_run)


def _synth_flags(commands: Any) -> None:
    synth = commands.add_parser(
        "synth-score",
        help="score all finished runs of a synthetic world against its truth",
        description="Score the finished runs of a world that `hafs synth-world` sampled against its true"
        " features: OUT/<profile>/eval/<run>/synthetic.json, and a row a run in OUT/<profile>/eval/synthetic.csv."
        " What an earlier call computed from the same SAE and truth is kept.",
    )
    _add_place(synth)
    synth.add_argument("--runs", nargs="+", default=[], metavar="NAME", help="only these runs [all that have finished]")
    synth.add_argument("--device", default="auto", help="torch device; auto takes CUDA where there is one [auto]")
    synth.set_defaults(command=_synth)


def _agreement_flags(commands: Any) -> None:
    agreement = commands.add_parser(
        "agreement",
        help="compare hole, absorption and probing with a synthetic world's truth",
        description="Rank the runs of a synthetic world that `synth` has scored by measures that need no truth, and"
        " correlate the ranks with those of the true absorption: OUT/<profile>/eval/agreement.json.",
    )
    _add_place(agreement)
    agreement.add_argument(
        "--runs", nargs="+", default=[], metavar="NAME", help="only these runs [all that are scored]"
    )
    agreement.set_defaults(command=_agreement)


def _report_flags(commands: Any) -> None:
    report = commands.add_parser("report", help="write the report", description=REPORT)
    _add_place(report)
    report.set_defaults(command=_report)


def _experiment_flags(commands: Any) -> None:
    experiment = commands.add_parser(
        "experiment",
        help="train, measure and compare every SAE of an experiment",
        description="Extract, train, evaluate and compare as the TOML file says (see experiments/ and"
        " evaluate/experiment_config.py): OUT/<name>/<profile>/experiment/. The same command resumes.",
    )
    experiment.add_argument("config", type=Path, metavar="FILE", help="the experiment, e.g. experiments/reduced.toml")
    experiment.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of experiments [artifacts]")
    experiment.add_argument("--workers", type=int, default=0, help="commands at a time [one a core, at most 2]")
    experiment.add_argument(
        "--stages", nargs="+", default=EXPERIMENT_STAGES, choices=EXPERIMENT_STAGES, help="only these [all]"
    )
    experiment.set_defaults(command=_experiment)


def _export_flags(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write one run for other libraries",
        description="Write RUN_DIR/sae, which sae_lens.SAE.load_from_disk loads, and print its path. With --format "
        "dictionary_learning also RUN_DIR/dictionary_learning/trainer_0, which its load_dictionary loads.",
    )
    export.add_argument("run_folder", type=Path, metavar="RUN_DIR", help=RUN_DIR)
    export.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="whose format to write [saelens]")
    export.set_defaults(command=_export)


def _import_flags(commands: Any) -> None:
    imported = commands.add_parser(
        "import-sae",
        help="write another library's SAE as a SAELens folder",
        description="Read a SAELens folder or a dictionary_learning ae.pt, check it, and write it as a SAELens folder.",
    )
    imported.add_argument("source", type=Path, metavar="SOURCE", help="SAELens folder, ae.pt, or the folder of one")
    imported.add_argument("target", type=Path, metavar="TARGET_DIR", help="SAELens folder to write, or to replace")
    imported.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="the SOURCE's format [auto]")
    imported.add_argument("--hook-point", help="where the SAE belongs, e.g. blocks.3.hook_resid_post [the SOURCE's]")
    imported.set_defaults(command=_import)


def _neuronpedia_flags(commands: Any) -> None:
    neuronpedia = commands.add_parser(
        "neuronpedia",
        help="write a run's latents for Neuronpedia and SAEDashboard",
        description="From the run's latents.json write DIR/sae_dashboard/batch-0.json, SAEDashboard's output, and"
        " DIR/<model>/<layer>-<set>/, Neuronpedia's export bundle; print the latter's path.",
    )
    neuronpedia.add_argument("run_folder", type=Path, metavar="RUN_DIR", help=RUN_DIR)
    neuronpedia.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    neuronpedia.add_argument("--set", dest="set_name", metavar="NAME", help="the source set's name [the run's]")
    neuronpedia.add_argument("--creator", default="", metavar="NAME", help="who made the SAE [nobody]")
    neuronpedia.set_defaults(command=_neuronpedia)


def _upload_flags(commands: Any) -> None:
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

    from hafs_evaluate.stages import Evaluation  # seconds

    Evaluation(workspace, config, options.skip, options.first_letter).run(runs)
    print(workspace.eval)
    return 0


def _synth(options: argparse.Namespace) -> int:
    workspace = open_workspace(options.out, options.profile)
    finished_runs(workspace, options.runs)  # a wrong name is said before the seconds that imports take

    from hafs_evaluate.truth.synth_score import TABLE, evaluate_synthetic, table

    print(table(evaluate_synthetic(workspace, options.runs, options.device)))
    print(workspace.eval / TABLE)
    return 0


def _experiment(options: argparse.Namespace) -> int:
    from hafs_evaluate.experiment.config import read_experiment
    from hafs_evaluate.experiment.experiment import SUMMARY, run_experiment

    config = read_experiment(options.config)
    workers = options.workers or min(2, os.cpu_count() or 1)
    workspace = run_experiment(config, options.out, workers, options.stages)
    if "table" in options.stages:
        print("\n".join(read_json(workspace.folder / "experiment" / SUMMARY, "the experiment's summary")["verdict"]))
    if "report" in options.stages:
        from hafs_evaluate.report.report import write_report

        write_report(workspace.folder)
        print(workspace.report / "index.html")
    return 0


def _agreement(options: argparse.Namespace) -> int:
    workspace = open_workspace(options.out, options.profile)

    from hafs_evaluate.truth.agreement import evaluate_agreement, result_path, table

    print(table(evaluate_agreement(workspace, options.runs)))
    print(result_path(workspace))
    return 0


def _report(options: argparse.Namespace) -> int:
    workspace = open_workspace(options.out, options.profile)

    from hafs_evaluate.report.report import write_report

    write_report(workspace.folder)
    print(workspace.report / "index.html")
    return 0


def _imported(workspace: Workspace, source: Path, name: str | None) -> FinishedRun:
    """A public SAE as a run that needs no export: its SAELens folder lies in OUT/<profile>/imported/<name>/sae."""
    resolved = source.resolve()
    name = name or (resolved.parent.name if resolved.name == "ae.pt" else resolved.name)
    if name in ("llm", "..") or Path(name).name != name or (workspace.runs / name).exists():
        raise UserError(f"--name {name!r}: expected a name that no run in {workspace.runs} has; give another --name")

    from hafs_evaluate.exchange.dictionary_learning import import_sae

    folder = workspace.folder / "imported" / name
    import_sae(source, folder / "sae")
    return FinishedRun(name, folder, is_exported=True)


def _export(options: argparse.Namespace) -> int:
    _check_folder(options.run_folder)

    from hafs_evaluate.exchange.bridge import export_run

    folder = export_run(options.run_folder)
    if options.format == "dictionary_learning":
        from hafs_evaluate.exchange.dictionary_learning import to_dictionary_learning

        folder = to_dictionary_learning(folder, options.run_folder / "dictionary_learning")
    print(folder)
    return 0


def _import(options: argparse.Namespace) -> int:
    from hafs_evaluate.exchange.dictionary_learning import import_sae

    print(import_sae(options.source, options.target, options.format, options.hook_point))
    return 0


def _neuronpedia(options: argparse.Namespace) -> int:
    _check_folder(options.run_folder)

    from hafs_evaluate.exchange.neuronpedia import write_neuronpedia

    print(write_neuronpedia(options.run_folder, options.out, set_name=options.set_name, creator=options.creator))
    return 0


def _upload(options: argparse.Namespace) -> int:
    _check_folder(options.run_folder)

    from hafs_evaluate.exchange.hub import upload

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
