"""The flags and the help of the commands of training."""

import argparse
import dataclasses
from pathlib import Path

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json
from hafs_jax.base.flags import Parser, add_flags, with_flags
from hafs_jax.base.options import from_dict
from hafs_jax.config import ALIASES, TrainConfig
from hafs_jax.presets import ARCHITECTURES, VARIANTS, preset

_SKIP = ("variant", "sae.architecture", "sae.transcode")

_FIRST = (
    "variant", "arch", "sae.k", "sae.n_latents", "sae.expansion", "tokens", "passes", "batch_size",
    "optimizer.learning_rate", "sparsity.coefficient", "penalty.lam_max", "penalty.tau", "seed", "tag",
)  # fmt: skip
"""What the help shows first, in this order."""

_PARTS = {
    "sae": "SAE",
    "penalty": "penalty on the dictionary (variants other than baseline)",
    "sparsity": "sparsity and dead latents",
    "optimizer": "optimizer",
}

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


def train_parser(arguments: list[str]) -> Parser:
    """The parser of `hafs train`; its defaults are those of what `arguments` name."""
    parser = Parser(
        prog="hafs train",
        description="Trains one SAE on an activation store into OUT/PROFILE/runs/<variant>[-<arch>]-s<seed>[-<tag>]/. "
        "The same command resumes an interrupted run to bit-identical weights. Defaults in brackets are those of the "
        "chosen variant and architecture.",
    )
    first, place = (parser.add_argument_group(title) for title in ("most used", "data and place"))
    _add_run_flags(parser, arguments, first, place)
    add_place(place)
    _add_data(place)
    place.add_argument(
        "--stream",
        metavar="FLAGS",
        help="extract beside the training, by `hafs extract FLAGS`; with --window-gb no more than that is stored",
    )
    _add_hosts(parser.add_argument_group("several processes, on one host or on many"))
    return parser


def sweep_parser() -> Parser:
    parser = Parser(
        prog="hafs sweep",
        description="Trains every point of a grid into its own run, and writes one table, OUT/PROFILE/sweep.csv.",
        epilog=GRID,
    )
    place = parser.add_argument_group("data and place")
    add_place(place)
    _add_data(place)
    _add_grid(parser)
    return parser


def synth_parser() -> Parser:
    parser = Parser(
        prog="hafs synth",
        description="Samples a synthetic world's activations, trains the grid on them, and scores every run against "
        "the true features. Everything lies in OUT/synth-<world>/. F defaults to the number of true features, at most "
        "4,096, and k to their mean number in a row.",
        epilog=GRID,
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="where worlds live [artifacts]")
    parser.add_argument("--world", default="toy-0", help="a world of `hafs synth-world --help` [toy-0]")
    parser.add_argument("--samples", type=int, default=1_000_000, metavar="X", help="training rows to draw [1000000]")
    _add_grid(parser, default="variant=baseline,strict,adaptive")
    return parser


def run_config(arguments: list[str]) -> TrainConfig:
    """The config that `hafs train ARGUMENTS` would train, before the store fills in the rest."""
    parser = Parser(prog="hafs train")
    _add_run_flags(parser, arguments, parser, parser)
    return chosen_config(parser.parse_args(arguments))


def chosen_config(parsed: argparse.Namespace) -> TrainConfig:
    """The config that the parsed flags of a run stand for."""
    given, config = vars(parsed), parsed.defaults
    if parsed.config is not None:  # what followed from flags that are given anew
        if "passes" in given:
            config = dataclasses.replace(config, tokens=None)
        if "sae.expansion" in given:
            config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, n_latents=None))
    return with_flags(config, parsed)


def add_place(parser: argparse._ActionsContainer) -> None:
    """--out and --profile."""
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="the folder of stores and runs [artifacts]")
    parser.add_argument(
        "--profile", default="auto", help="the profile that was extracted; auto: the one extracted last [auto]"
    )


def _add_hosts(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens; auto: ask Slurm or Open MPI [one process]",
    )
    parser.add_argument("--processes", type=int, metavar="X", help="how many processes there are")
    parser.add_argument("--process", type=int, metavar="X", help="which of them this is, from 0")


def _add_data(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--store", type=Path, help="train on this store instead of OUT/PROFILE/store/train")
    parser.add_argument("--target", type=Path, help="a second store of the same rows: train a transcoder into it")
    parser.add_argument("--force", action="store_true", help="replace a run of the same name")


def _add_run_flags(
    parser: Parser, arguments: list[str], first: argparse._ActionsContainer, place: argparse._ActionsContainer
) -> None:
    """The flags of one SAE, whose defaults are those of the variant and architecture, or of the file, that are named.

    Those that matter most stand in the group `first`, the others in a group for each part of the config.
    """
    first.add_argument("--variant", default=argparse.SUPPRESS, help=f"the arm: {', '.join(VARIANTS)} [baseline]")
    first.add_argument(
        "--arch", default=argparse.SUPPRESS, help=f"the architecture: {', '.join(ARCHITECTURES)} [batchtopk]"
    )
    place.add_argument(
        "--config", type=Path, metavar="FILE", help="repeat the run of this config.json; other flags override it"
    )
    defaults = _defaults(arguments)
    groups = {name: first for name in _FIRST}
    groups[""] = parser.add_argument_group("run: data order, logs, checkpoints, devices")
    groups |= {part: parser.add_argument_group(title) for part, title in _PARTS.items()}
    add_flags(parser, defaults, skip=_SKIP, aliases=ALIASES, groups=groups)
    order = {name: number for number, name in enumerate(_FIRST)}
    getattr(first, "_group_actions", []).sort(key=lambda action: order.get(action.dest, len(order)))
    parser.set_defaults(defaults=defaults)


def _defaults(arguments: list[str]) -> TrainConfig:
    """The config that --variant and --arch, or --config, among the arguments name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--variant", nargs="?")
    parser.add_argument("--arch", nargs="?")
    parser.add_argument("--config", nargs="?")
    chosen, _ = parser.parse_known_args(arguments)
    if chosen.config is None:
        return preset(chosen.variant or "baseline", chosen.arch or "batchtopk")
    if chosen.variant is not None or chosen.arch is not None:
        raise UserError("--config: expected it without --variant and --arch, which the file gives; leave one out")
    path = Path(chosen.config)
    path = path / "config.json" if path.is_dir() else path
    values = read_json(path, "a run's config.json")
    inner = values.get("config") if isinstance(values, dict) else None
    return from_dict(TrainConfig, values if inner is None else inner, str(path))


def _add_grid(parser: Parser, default: str | None = None) -> None:
    group = parser.add_argument_group("grid")
    shown = "" if default is None else f" [{default}]"
    group.add_argument("--grid", default=default, required=default is None, help=f"the SAEs to train, see below{shown}")
    group.add_argument("--tag", default="", help="what every run's tag begins with; the grid's values follow [none]")
    group.add_argument(
        "--together",
        choices=("auto", "vmap", "map"),
        default="auto",
        help="how SAEs share a program: batched products, or one after the other; auto: vmap on accelerators [auto]",
    )
    group.add_argument("--most-together", type=int, default=32, metavar="X", help="most SAEs in one program [32]")
