"""The command line of training: `python -m hafs_jax train | tau | inspect`."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from extract.format.config import Parser, add_flags, with_flags
from extract.format.errors import UserError, one_line_errors
from hafs_jax.config import TrainConfig
from hafs_jax.presets import ARCHITECTURES, VARIANTS, preset

_SKIP = ("variant", "seed", "sae.architecture")


def main(arguments: list[str] | None = None) -> None:
    """Runs one subcommand; a user's mistake is one line and exit code 2, a stopped training exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_errors():
        parsed = _parser(arguments).parse_args(arguments)
        parsed.command(parsed)


def _parser(arguments: list[str]) -> Parser:
    parser = Parser(prog="python -m hafs_jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train one SAE, or go on with an interrupted run",
        description="Trains one SAE on an activation store into OUT/PROFILE/runs/<variant>[-<arch>]-s<seed>/. "
        "The same command resumes an interrupted run to bit-identical weights. Defaults in brackets are those of the "
        "chosen variant and architecture.",
    )
    _add_place(train)
    train.add_argument("--variant", default="baseline", help=f"the arm: {', '.join(VARIANTS)} [baseline]")
    train.add_argument("--arch", default="batchtopk", help=f"the architecture: {', '.join(ARCHITECTURES)} [batchtopk]")
    train.add_argument("--seed", type=int, default=0, help="seed of weights, data order and chunks [0]")
    train.add_argument("--store", type=Path, help="train on this store instead of OUT/PROFILE/store/train")
    train.add_argument("--force", action="store_true", help="replace a run of the same name")
    chosen, _ = train.parse_known_args([flag for flag in arguments[1:] if flag not in ("-h", "--help")])
    defaults = preset(chosen.variant, chosen.arch)
    add_flags(train, defaults, skip=_SKIP)
    train.set_defaults(command=lambda parsed: _train(parsed, defaults))

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


def _train(parsed: argparse.Namespace, defaults: TrainConfig) -> None:
    from hafs_jax.runs import profile_folder
    from hafs_jax.train import Terminated, TrainingStopped, train

    _use_compilation_cache()
    config = dataclasses.replace(with_flags(defaults, parsed), seed=parsed.seed)
    folder = parsed.out / parsed.profile if parsed.store else profile_folder(parsed.out, parsed.profile)
    if parsed.store and parsed.profile == "auto":
        folder = parsed.out
    try:
        run = train(config, parsed.store or folder / "store" / "train", folder / "runs", parsed.force)
    except Terminated as stop:
        print("stopped and checkpointed; run the same command again to go on", file=sys.stderr)
        raise SystemExit(128 + stop.args[0]) from None
    except TrainingStopped as stop:
        print(f"error: {stop}", file=sys.stderr)
        raise SystemExit(1) from None
    final = run.result()["final"]
    print(
        f"{run.folder.name}: FVU {final['fvu_ema']:.4f}, L0 {final['l0']:.1f}, dead {final['dead_fraction']:.1%}, "
        f"coherence {final['coherence_mean']:.3f} mean {final['coherence_max']:.3f} max, "
        f"{run.result()['seconds']:.0f} s -> {run.folder}"
    )
    if run.result()["tau_reached"] is False:
        said = "adaptive inactive: " if final["lambda"] < 0.05 else ""
        print(f"{run.folder.name}: {said}the error never fell to tau; lambda ended at {final['lambda']:.2f}")


def _tau(parsed: argparse.Namespace) -> None:
    from hafs_jax.runs import Run

    run = Run(parsed.baseline)
    if run.result()["variant"] != "baseline":
        raise UserError(f"{parsed.baseline}: expected a baseline run, found variant {run.result()['variant']!r}")
    print(parsed.factor * run.result()["final"]["fvu_ema"])


def _inspect(parsed: argparse.Namespace) -> None:
    from hafs_jax.runs import Run

    run = Run(parsed.run)
    config, metrics = run.config(), run.metrics()
    state = "finished" if run.finished() else f"unfinished: run `train` again to go on ({run.checkpoints})"
    print(f"{config.run_name}: {config.sae.architecture} F={config.sae.n_latents} k={config.sae.k}, {state}")
    if not metrics:
        print("no step logged yet")
        return
    last = metrics[-1]
    print(f"step {last['step']} of {config.steps}, {last['seconds']:.0f} s, {last['tokens_per_second']:,.0f} rows/s")
    for name, value in last.items():
        print(f"  {name:22s} {value if value is None else format(value, '.6g')}")


def _use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts without compiling."""
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hafs-jax" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    main()
