"""The commands of training: `hafs train`, `sweep`, `tau`, `inspect` and `synth`."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError, one_line_errors
from hafs_jax.base.log import shown
from hafs_jax.base.options import Parser, add_flags, with_flags
from hafs_jax.config import TrainConfig
from hafs_jax.health import INACTIVE_LAMBDA
from hafs_jax.presets import ARCHITECTURES, VARIANTS, preset

_SKIP = ("variant", "seed", "sae.architecture", "sae.transcode")

GRID = """\
GRID is a list of axes, NAME=VALUE,VALUE or NAME=FIRST..LAST, with spaces
between. Every combination of their values is one SAE. `;` joins several grids.
A sweep has at most 10,000 SAEs.

An axis is one of variant, arch, seed, k, l1 (the sparsity coefficient), lr (the
learning rate), lam (lam_max) and tau, or any flag of `hafs train` without its
dashes, such as sparsity.aux=0,0.03. Other flags of `hafs train` may be given
too, and hold for all SAEs.

SAEs that differ only in seed, l1, lr, lam or tau share one compiled program and
one pass over the data.

  --grid "arch=relu seed=0..3 l1=0.5,1,2"
  --grid "arch=relu,batchtopk variant=baseline,strict,adaptive seed=0..4"
  --grid "variant=baseline k=20,40; variant=strict k=20,40 lam=0.3,1,3"
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs one subcommand; a user's mistake is one line and exit code 2, a stopped training exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_errors(), shown("stdout"):
        parser = _parser(arguments)
        parsed, unknown = parser.parse_known_args(arguments)
        if getattr(parsed, "rest", False):
            parsed.unknown = unknown  # flags of `train`, checked with each point of the grid
        elif unknown:
            parser.parse_args(arguments)  # complains
        parsed.command(parsed)


def _parser(arguments: list[str]) -> Parser:
    parser = Parser(prog="hafs")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train one SAE, or go on with an interrupted run",
        description="Trains one SAE on an activation store into OUT/PROFILE/runs/<variant>[-<arch>]-s<seed>[-<tag>]/. "
        "The same command resumes an interrupted run to bit-identical weights. Defaults in brackets are those of the "
        "chosen variant and architecture.",
    )
    _add_place(train)
    _add_data(train)
    _add_run_flags(train, arguments)
    train.set_defaults(command=_train)

    sweep = commands.add_parser(
        "sweep",
        help="train a grid of SAEs, those of one program over one pass of the data",
        description="Trains every point of a grid into its own run, and writes one table, OUT/PROFILE/sweep.csv.",
        epilog=GRID,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_place(sweep)
    _add_data(sweep)
    _add_grid(sweep)
    sweep.set_defaults(command=_sweep, rest=True)

    synth = commands.add_parser(
        "synth",
        help="train and score SAEs on a synthetic world whose true features are known",
        description="Samples a synthetic world's activations, trains the grid on them, and scores every run "
        "against the true features. Everything lies in OUT/synth-<world>/. F defaults to the number of "
        "true features, at most 4,096, and k to their mean number in a row.",
        epilog=GRID,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    synth.add_argument("--out", type=Path, default=Path("artifacts"), help="where worlds live [artifacts]")
    synth.add_argument("--world", default="toy-0", help="a world of `hafs synth-world --help` [toy-0]")
    synth.add_argument("--samples", type=int, default=1_000_000, help="training rows to draw [1000000]")
    _add_grid(synth, default="variant=baseline,strict,adaptive")
    synth.set_defaults(command=_synth, rest=True)

    tau = commands.add_parser(
        "tau",
        help="print the threshold tau that a finished baseline run gives",
        description="Prints tau = FACTOR x the final FVU (moving average) of a finished baseline run.",
    )
    tau.add_argument("--baseline", type=Path, required=True, metavar="RUN", help="folder of the baseline run")
    tau.add_argument("--factor", type=float, default=preset().penalty.tau_factor, help="multiple of the FVU [1.25]")
    tau.set_defaults(command=_tau)

    inspect = commands.add_parser("inspect", help="print what a run is, how far it got and how healthy it is")
    inspect.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    inspect.set_defaults(command=_inspect)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="where stores and runs live [artifacts]")
    parser.add_argument(
        "--profile", default="auto", help="the profile that was extracted; auto: the one extracted last [auto]"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, help="train on this store instead of OUT/PROFILE/store/train")
    parser.add_argument("--target", type=Path, help="a second store of the same rows: train a transcoder into it")
    parser.add_argument("--force", action="store_true", help="replace a run of the same name")


def _add_run_flags(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The flags of one SAE, whose defaults are those of the variant and architecture that `arguments` name."""
    parser.add_argument("--variant", default="baseline", help=f"the arm: {', '.join(VARIANTS)} [baseline]")
    parser.add_argument("--arch", default="batchtopk", help=f"the architecture: {', '.join(ARCHITECTURES)} [batchtopk]")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order and chunks [0]")
    chosen, _ = parser.parse_known_args([flag for flag in arguments[1:] if flag not in ("-h", "--help")])
    defaults = preset(chosen.variant, chosen.arch)
    add_flags(parser, defaults, skip=_SKIP)
    parser.set_defaults(defaults=defaults)


def _add_grid(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    shown = "" if default is None else f" [{default}]"
    parser.add_argument(
        "--grid", default=default, required=default is None, help=f"the SAEs to train, see below{shown}"
    )
    parser.add_argument("--tag", default="", help="what every run's tag begins with; the grid's values follow")
    parser.add_argument(
        "--together",
        choices=("auto", "vmap", "map"),
        default="auto",
        help="how SAEs share a program: batched products, or one after the other; auto: vmap on accelerators [auto]",
    )
    parser.add_argument("--most-together", type=int, default=32, help="most SAEs in one program [32]")


def _run_config(arguments: list[str]) -> TrainConfig:
    """The config that `train ARGUMENTS` would train."""
    parser = Parser(prog="hafs sweep")
    _add_run_flags(parser, ["train", *arguments])
    parsed = parser.parse_args(arguments)
    return dataclasses.replace(with_flags(parsed.defaults, parsed), seed=parsed.seed)


def _variant(arguments: list[str]) -> str:
    """The variant that flags of `train` name, or the default one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--variant", default=TrainConfig().variant)
    return parser.parse_known_args(arguments)[0].variant


def _train(parsed: argparse.Namespace) -> None:
    from hafs_jax.training.train import train

    _use_compilation_cache()
    config = dataclasses.replace(with_flags(parsed.defaults, parsed), seed=parsed.seed)
    store, runs = _places(parsed)
    with _stops():
        run = train(config, store, runs, parsed.force, parsed.target)
    summary, final = run.summary(), run.summary().final
    print(
        f"{run.name}: FVU {_figure(final['fvu_ema'], '.4f')}, L0 {_figure(final['l0'], '.1f')}, "
        f"dead {_figure(final['dead_fraction'], '.1%')}, coherence {_figure(final['coherence_mean'], '.3f')} mean "
        f"{_figure(final['coherence_max'], '.3f')} max, "
        f"{summary.seconds:.0f} s -> {run.folder}"
    )
    if summary.stopped_early:
        print(f"{run.name}: stopped at step {summary.steps}; best held-out FVU {summary.best}")
    if summary.tau_reached is False:
        said = "adaptive inactive: " if final["lambda"] < INACTIVE_LAMBDA else ""
        print(f"{run.name}: {said}the error never fell to tau; lambda ended at {final['lambda']:.2f}")


def _sweep(parsed: argparse.Namespace, extra: tuple[str, ...] = ()) -> None:
    from hafs_jax.training.sweeps import arguments_of, parse_grid
    from hafs_jax.training.train import open_stores

    points = parse_grid(parsed.grid)
    of_all = [*extra, *parsed.unknown]
    variant = _variant(of_all)
    configs = [_run_config([*of_all, *arguments_of(point, parsed.tag, variant)]) for point in points]
    _use_compilation_cache()
    store, runs = _places(parsed)
    _trained(configs, open_stores(store, parsed.target), runs, parsed)


def _trained(configs: list[TrainConfig], stores: Any, runs: Path, parsed: argparse.Namespace) -> None:
    """Trains and prints the table; exit code 1 where SAEs failed."""
    from hafs_jax.training.sweeps import automatic, sweep, write_table

    together = automatic() if parsed.together == "auto" else parsed.together
    with _stops():
        done, failures = sweep(configs, stores, runs, together, getattr(parsed, "force", False), parsed.most_together)
    rows = write_table(done, runs.parent / "sweep.csv")
    if rows:
        widths = {name: max(len(name), *(len(_cell(row[name])) for row in rows)) for name in rows[0]}
        print("  ".join(name.ljust(width) for name, width in widths.items()))
        for row in rows:
            print("  ".join(_cell(row[name]).ljust(width) for name, width in widths.items()))
    print(runs.parent / "sweep.csv")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise SystemExit(1)


def _figure(value: float | None, form: str) -> str:
    """The figure in words; None stands for one that is not finite, such as the coherence of a single latent."""
    return "not finite" if value is None else format(value, form)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _synth(parsed: argparse.Namespace) -> None:
    import subprocess

    from hafs_jax.base.files import read_json

    profile = f"synth-{parsed.world}"

    def run(*command: str) -> None:
        code = subprocess.run([sys.executable, "-m", "hafs_jax", *command], check=False).returncode
        if code:
            raise SystemExit(code)

    place = ("--out", str(parsed.out))
    run("synth-world", *place, "--world", parsed.world, "--samples", str(parsed.samples))
    truth = read_json(parsed.out / profile / "truth.json", "a synthetic world's truth")
    F = min(int(truth["features"]), 4096)
    parsed.profile, parsed.store, parsed.target = profile, None, None
    _sweep(parsed, ("--sae.n-latents", str(F), "--sae.k", str(max(1, round(truth["true_l0"]["train"])))))
    run("synth-score", *place, "--profile", profile)


def _places(parsed: argparse.Namespace) -> tuple[Path, Path]:
    """The store to train on and the folder of the runs."""
    from hafs_jax.runs import profile_folder

    folder = parsed.out / parsed.profile if parsed.store else profile_folder(parsed.out, parsed.profile)
    if parsed.store and parsed.profile == "auto":
        folder = parsed.out
    return parsed.store or folder / "store" / "train", folder / "runs"


@contextmanager
def _stops() -> Iterator[None]:
    """Turns a training's stop into its message and exit code."""
    from hafs_jax.training.loop import Terminated, TrainingStopped

    try:
        yield
    except Terminated as stop:
        print("stopped and checkpointed; run the same command again to go on", file=sys.stderr)
        raise SystemExit(128 + stop.args[0]) from None
    except TrainingStopped as stop:
        print(f"error: {stop}", file=sys.stderr)
        raise SystemExit(1) from None


def _tau(parsed: argparse.Namespace) -> None:
    from hafs_jax.runs import Run, final_fvu

    if not 0 < parsed.factor < float("inf"):
        raise UserError(f"--factor {parsed.factor}: expected a finite number above 0")
    summary = Run(parsed.baseline).summary()
    if summary.variant != "baseline":
        raise UserError(f"{parsed.baseline}: expected a baseline run, found variant {summary.variant!r}")
    print(parsed.factor * final_fvu(Run(parsed.baseline)))


def _inspect(parsed: argparse.Namespace) -> None:
    from hafs_jax.health import death, health
    from hafs_jax.runs import Run

    run = Run(parsed.run)
    config, metrics = run.config(), run.metrics()
    state = "finished" if run.finished() else f"unfinished: run `train` again to go on ({run.checkpoints})"
    if run.finished() and run.summary().stopped_early:
        state = "finished, stopped early"
    kind = "transcoder, " if config.sae.transcode else ""
    print(f"{config.run_name}: {kind}{config.sae.architecture} F={config.sae.n_latents} k={config.sae.k}, {state}")
    print(f"trains on {run.store_record()['folder']} ({run.store_record()['fingerprint']}), relative to the run")
    if not metrics:
        print("no step logged yet")
        return
    last = metrics[-1]
    print(f"step {last['step']} of {config.steps}, {last['seconds']:.0f} s, {last['tokens_per_second']:,.0f} rows/s")
    for name, value in last.items():
        print(f"  {name:22s} {_figure(value, '.6g')}")
    if dead := death(run):
        print(f"  LOOK {dead}")
    for verdict, said in health(config, metrics):
        print(f"  {'ok  ' if verdict else 'LOOK'} {said}")


def _use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts without compiling.

    All of them: a start compiles about a hundred small programs, which together take seconds. Where the folder cannot
    be written there is no cache.
    """
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hafs-jax" / "jax"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(cache, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
