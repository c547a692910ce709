"""The commands `hafs evaluate`, `report`, `experiment`, `export` and their like: one function each.

Torch and JAX are imported once a command's arguments are known to be right, since they take seconds.
"""

import os
import sys
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.labels.command import label
from hafs_evaluate.saebench.datasets import PROBING_DATASETS
from hafs_evaluate.saebench.suites import SUITES
from hafs_evaluate.stage import LANGUAGE_MODEL, Stage
from hafs_evaluate.stages import STAGES
from hafs_evaluate.workspace import FinishedRun, Workspace, finished_runs, open_workspace, run_names
from hafs_jax.base.errors import UserError, one_line_errors
from hafs_jax.base.files import read_json
from hafs_jax.base.flags import Parser, add_flags, with_flags
from hafs_jax.base.log import shown
from hafs_jax.base.options import did_you_mean
from hafs_jax.base.process.locks import locked
from hafs_jax.runs import find_run
from hafs_jax.runs import finished_runs as trained

FORMATS = ("saelens", "dictionary_learning")
OUT = Path("artifacts")
EXPERIMENT_STAGES = ("extract", "train", "evaluate", "table", "report")


def main(argv: list[str] | None = None) -> int:
    """Runs the command that `argv` names first; its exit code."""
    # Read when torch is imported. On busy cores, OpenMP threads that spin while they wait cost four times the run.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    with one_line_errors(), shown():
        if name not in COMMANDS:
            raise UserError(
                f"expected one of the commands {', '.join(COMMANDS)}, found {name!r}{did_you_mean(name, COMMANDS)}"
            )
        return COMMANDS[name](arguments)


def evaluate(arguments: list[str]) -> int:
    options = evaluate_parser().parse_args(arguments)
    config = with_flags(EvalConfig(), options)
    workspace = open_workspace(options.out, options.profile)
    if options.runs if options.sae is not None else options.name is not None:
        raise UserError("expected --name only with --sae, and --sae without --runs; leave one of them out")
    if options.sae is not None:
        runs = [_imported(workspace, options.sae, options.name)]
    else:
        runs = finished_runs(workspace, options.runs)

    what = f"{len(runs)} SAE{'s' if len(runs) > 1 else ''} on store {workspace.folder / 'store'}"

    from hafs_evaluate.stages import evaluate

    said = f"profile {workspace.profile}: {what}, device {_device(config.device)}"
    print(said, file=sys.stderr, flush=True)

    modes = {stage.name: getattr(options, stage.name) for stage in STAGES.values() if stage.modes}
    evaluate(workspace, config, runs, options.skip, {name: mode for name, mode in modes.items() if mode})
    print(workspace.eval)
    return 0


def _device(device: str) -> str:
    """The device that `device` stands for. Torch, whose import takes seconds, is not asked where it has no CUDA."""
    if device == "cpu" or (device == "auto" and version("torch").endswith("+cpu")):
        return "cpu"

    from hafs_extract.models import pick_device

    return str(pick_device(device))


def evaluate_parser() -> Parser:
    """The flags of `hafs evaluate`, and its help: the stages and the probing suites are those that are registered."""
    parser = _parser(
        "evaluate",
        "Measure the SAEs of all finished runs. The results lie in OUT/<profile>/eval/<run>/. What an earlier call"
        " computed from the same SAE, store and settings is kept, so an interrupted call goes on where it stopped."
        " With --sae it measures an SAE of another library instead.",
        epilog="\n".join([*_stage_lines(), "", *_suite_lines()]),
    )
    _add_place(parser)
    _add_runs(parser, "all that have finished")
    skippable = [stage.name for stage in STAGES.values() if stage.can_be_skipped and not stage.modes]
    parser.add_argument(
        "--skip",
        nargs="+",
        action="extend",
        default=[],
        choices=skippable,
        help="stages to leave out; given twice, those of both [none]",
    )
    parser.add_argument(
        "--sae", type=Path, metavar="SOURCE", help="measure this SAE of another library instead of runs"
    )
    parser.add_argument("--name", help="with --sae: its name in OUT/<profile>/eval [the SOURCE's]")
    for stage in STAGES.values():
        if stage.modes:
            help = f"{stage.help} [off]".replace("%", "%%")
            parser.add_argument(_mode_flag(stage), nargs="?", const=stage.modes[0], choices=stage.modes, help=help)
    add_flags(parser, EvalConfig())
    return parser


def synth_score(arguments: list[str]) -> int:
    parser = _parser(
        "synth-score",
        "Score the finished runs of a world that `hafs synth-world` sampled against its true features. It writes"
        " OUT/<profile>/eval/<run>/synthetic.json, and OUT/<profile>/eval/synthetic.csv with a row for each run."
        " What an earlier call computed from the same SAE and truth is kept.",
    )
    _add_place(parser)
    _add_runs(parser, "all that have finished")
    parser.add_argument("--device", default="auto", help="torch device; auto takes CUDA where there is one [auto]")
    options = parser.parse_args(arguments)
    workspace = open_workspace(options.out, options.profile)
    names = run_names(workspace, options.runs)
    finished_runs(workspace, names)  # a wrong name is said before the seconds that imports take

    from hafs_evaluate.truth.synth_score import TABLE, evaluate_synthetic, table

    print(table(evaluate_synthetic(workspace, names, options.device)))
    print(workspace.eval / TABLE)
    return 0


def agreement(arguments: list[str]) -> int:
    parser = _parser(
        "agreement",
        "Rank the runs of a synthetic world by measures that need no truth, and correlate the ranks with those of the"
        " true absorption. The runs must have been scored by `hafs synth-score`. It writes"
        " OUT/<profile>/eval/agreement.json.",
    )
    _add_place(parser)
    _add_runs(parser, "all that are scored")
    options = parser.parse_args(arguments)
    workspace = open_workspace(options.out, options.profile)

    from hafs_evaluate.truth.agreement import evaluate_agreement, result_path, table

    print(table(evaluate_agreement(workspace, run_names(workspace, options.runs))))
    print(result_path(workspace))
    return 0


def report(arguments: list[str]) -> int:
    parser = _parser(
        "report",
        "Write OUT/<profile>/report/: index.html, one page that opens from disk, with latents/, the scripts that it"
        " loads on demand; report.md with PNG figures; and results.json. Runs that differ only in their seed are one"
        " arm, shown as a mean with its 95% interval. What was not evaluated is said to be so. Latents are called what"
        " OUT/<profile>/labels.csv says (columns variant, latent, label), where there is one.",
    )
    _add_place(parser)
    options = parser.parse_args(arguments)
    _write_report(open_workspace(options.out, options.profile))
    return 0


def explore(arguments: list[str]) -> int:
    from hafs_evaluate.explore.command import main

    return main(arguments)


def experiment(arguments: list[str]) -> int:
    parser = _parser(
        "experiment",
        "Extract, train, evaluate and compare as a TOML file says: see experiments/ for examples. The results lie in"
        " OUT/<name>/<profile>/experiment/. The same command goes on where an interrupted one stopped.",
    )
    parser.add_argument("config", type=Path, metavar="FILE", help="the experiment, e.g. experiments/reduced.toml")
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="folder of experiments [artifacts]")
    parser.add_argument("--workers", type=int, default=0, help="commands at a time [one a core, at most 2]")
    parser.add_argument(
        "--stages", nargs="+", default=EXPERIMENT_STAGES, choices=EXPERIMENT_STAGES, help="only these [all]"
    )
    options = parser.parse_args(arguments)

    from hafs_evaluate.experiment.config import read_experiment
    from hafs_evaluate.experiment.experiment import SUMMARY, run_experiment

    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: expected at least 1, or 0 for one a core and at most 2")
    config = read_experiment(options.config)
    workers = options.workers or min(2, os.cpu_count() or 1)
    workspace = run_experiment(config, options.out, workers, options.stages)
    if "table" in options.stages:
        print("\n".join(read_json(workspace.folder / "experiment" / SUMMARY, "the experiment's summary")["verdict"]))
    if "report" in options.stages:
        _write_report(workspace)
    return 0


def export(arguments: list[str]) -> int:
    parser = _parser(
        "export",
        "Write <run>/sae, which sae_lens.SAE.load_from_disk loads, and print its path. With --format"
        " dictionary_learning also write <run>/dictionary_learning/trainer_0, which that library's load_dictionary"
        " loads. With --k the folders are <run>/sae-k<K> and <run>/dictionary_learning-k<K>.",
    )
    _add_run(parser)
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="whose format to write [saelens]")
    parser.add_argument(
        "--k", type=int, help="active latents per row of a hierarchical_topk or topk, at most those of training [those]"
    )
    options = parser.parse_args(arguments)
    run = find_run(options.run, options.out, options.profile)

    from hafs_jax.saelens import export_saelens

    with run.held("an export"):
        folder = export_saelens(run.folder, options.k)
        if options.format == "dictionary_learning":
            from hafs_evaluate.exchange.dictionary_learning import to_dictionary_learning

            folder = to_dictionary_learning(folder, run.folder / folder.name.replace("sae", "dictionary_learning"))
    print(folder)
    return 0


def import_sae(arguments: list[str]) -> int:
    parser = _parser(
        "import-sae",
        "Read a SAELens folder or a dictionary_learning ae.pt, check it, and write it as a SAELens folder.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="SAELens folder, ae.pt, or the folder of one")
    parser.add_argument("target", type=Path, metavar="TARGET_DIR", help="SAELens folder to write, or to replace")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="the SOURCE's format [auto]")
    parser.add_argument("--hook-point", help="where the SAE belongs, e.g. blocks.3.hook_resid_post [the SOURCE's]")
    options = parser.parse_args(arguments)

    from hafs_evaluate.exchange.dictionary_learning import import_sae

    print(import_sae(options.source, options.target, options.format, options.hook_point))
    return 0


def neuronpedia(arguments: list[str]) -> int:
    parser = _parser(
        "neuronpedia",
        "From the run's latents.json, write DIR/sae_dashboard/batch-0.json, which is SAEDashboard's output, and"
        " DIR/<model>/<layer>-<set>/, which is Neuronpedia's export bundle. Print the path of the latter.",
    )
    _add_run(parser, with_out=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--set", dest="set_name", metavar="NAME", help="the source set's name [the run's]")
    parser.add_argument("--creator", default="", metavar="NAME", help="who made the SAE [nobody]")
    options = parser.parse_args(arguments)
    run = find_run(options.run, OUT, options.profile)

    from hafs_evaluate.exchange.neuronpedia import write_neuronpedia

    with run.held("an export"):
        print(write_neuronpedia(run.folder, options.out, set_name=options.set_name, creator=options.creator))
    return 0


def upload(arguments: list[str]) -> int:
    parser = _parser(
        "upload",
        "Upload the run's SAELens folder and a model card to the model hub in one commit. Print the address.",
    )
    _add_run(parser)
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="the hub's repository, made if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", dest="licence", help="the licence that the card names, e.g. apache-2.0 [none]")
    parser.add_argument("--dry-run", type=Path, metavar="DIR", help="write what would be uploaded to DIR instead")
    options = parser.parse_args(arguments)
    run = find_run(options.run, options.out, options.profile)

    from hafs_evaluate.exchange.hub import upload

    private, licence, dry_run = options.private, options.licence, options.dry_run
    with run.held("an upload"):
        print(upload(run.folder, options.repo_id, private=private, licence=licence, dry_run=dry_run))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "evaluate": evaluate,
    "synth-score": synth_score,
    "agreement": agreement,
    "report": report,
    "explore": explore,
    "label": label,
    "experiment": experiment,
    "export": export,
    "import-sae": import_sae,
    "neuronpedia": neuronpedia,
    "upload": upload,
}


def _parser(name: str, description: str, epilog: str = "") -> Parser:
    """A parser whose help keeps the epilog's lines as they are."""
    return Parser(prog=f"hafs {name}", description=description, epilog=epilog)


def _add_place(parser: Parser) -> None:
    _add_out(parser)
    _add_profile(parser)


def _add_out(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, default=OUT, help="folder of all profiles [artifacts]")


def _add_profile(parser: Parser) -> None:
    parser.add_argument(
        "--profile", default="auto", help="profile's folder in OUT; auto is the one extracted last [auto]"
    )


def _add_runs(parser: Parser, otherwise: str) -> None:
    help = f"only these runs, by name or folder [{otherwise}]"
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help=help)


def _add_run(parser: Parser, with_out: bool = True) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's name, or its folder OUT/<profile>/runs/<run>")
    _add_profile(parser)
    if with_out:
        _add_out(parser)


def _stage_lines() -> list[str]:
    """The stages and where their results lie, as the help lists them."""
    rows = [("export", "the run's last checkpoint as a SAELens folder", "runs/<run>/sae")]
    for stage in STAGES.values():
        asked_for = f" (only with {_mode_flag(stage)})" if stage.modes else ""
        rows.append((stage.name, stage.help + asked_for, stage.place))
    width = max(len(name) for name, _, _ in rows)
    lines = ["stages, in this order, and where their results lie:"]
    for name, help, place in rows:
        lines += textwrap.wrap(help, 79, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4))
        lines += textwrap.wrap(place, 79, initial_indent=" " * (width + 4), subsequent_indent=" " * (width + 4))
    return lines


def _mode_flag(stage: Stage) -> str:
    """The flag that asks for a stage that does not run otherwise."""
    return "--" + stage.name.replace("_", "-")


def _suite_lines() -> list[str]:
    """The probing suites and the tasks that each probes unless some are named."""
    lines = ["probing suites, and the tasks that they probe unless --tasks names others:"]
    for suite in SUITES.values():
        lines += textwrap.wrap(f"{suite.name}: {suite.help}", 79, initial_indent="  ", subsequent_indent="    ")
        lines += [f"    {task}" for task in suite.tasks]
    if PROBING_DATASETS:
        lines.append("  registered datasets, which --tasks may name too:")
        for dataset in PROBING_DATASETS.values():
            lines += textwrap.wrap(f"    {dataset.name}: {dataset.help}", 79, subsequent_indent=" " * 6)
    return lines


def _imported(workspace: Workspace, source: Path, name: str | None) -> FinishedRun:
    """A public SAE as a run that needs no export: its SAELens folder lies in OUT/<profile>/imported/<name>/sae."""
    resolved = source.resolve()
    name = name or (resolved.parent.name if resolved.name == "ae.pt" else resolved.name)
    if name in (LANGUAGE_MODEL, "..") or Path(name).name != name or (workspace.runs / name).exists():
        raise UserError(f"--name {name!r}: expected a name that no run in {workspace.runs} has; give another --name")

    from hafs_evaluate.exchange.dictionary_learning import import_sae

    folder = workspace.folder / "imported" / name
    import_sae(source, folder / "sae")
    return FinishedRun(name, folder, is_exported=True)


def _write_report(workspace: Workspace) -> None:
    from hafs_evaluate.report.report import write_report

    with ExitStack() as locks:
        locks.enter_context(locked(workspace.lock("report"), "a report", workspace.report))
        for run in trained(workspace.runs):
            locks.enter_context(run.held("a report"))
        write_report(workspace.folder)
    print(workspace.report / "index.html")
