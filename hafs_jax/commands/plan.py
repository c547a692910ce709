"""The command `hafs plan`."""

from hafs_jax.base.flags import Parser
from hafs_jax.commands.flags import run_config
from hafs_jax.store.manifest import DISK_DTYPES
from hafs_jax.targets.gpus import GPUS, gpu


def plan(arguments: list[str]) -> None:
    """`hafs plan`."""
    parsed, flags = plan_parser().parse_known_args(arguments)

    from hafs_jax.targets.report import described

    config, on = run_config(flags), gpu(parsed.target)
    print(*described(config, on, parsed.d_model, parsed.d_out, parsed.devices, parsed.store_dtype), sep="\n")


def plan_parser() -> Parser:
    parser = Parser(
        prog="hafs plan",
        description="Compiles the training step that the given flags of `hafs train` describe for a GPU, without one, "
        "and prints what it needs and would cost: the memory as its compiler plans it, and the time by roofline. That "
        "is, of each kernel the longer of its traffic at the GPU's bandwidth and its products at the GPU's rate, by "
        "public numbers. Nothing is timed: a device may be slower, and is never faster. It takes about a minute.",
        epilog="The flags of `hafs train` that describe the SAE and its training may be given, too.",
    )
    parser.add_argument("--target", default="h100", metavar="X", help=f"the GPU: {', '.join(GPUS)} [h100]")
    parser.add_argument("--devices", type=int, default=1, metavar="X", help="how many of them, in one host [1]")
    parser.add_argument("--d-model", type=int, required=True, metavar="X", help="D, the width of the activations")
    parser.add_argument("--d-out", type=int, metavar="X", help="the width of a transcoder's target [none]")
    parser.add_argument(
        "--store-dtype", default="bfloat16", choices=tuple(DISK_DTYPES), help="the rows' dtype on disk [bfloat16]"
    )
    return parser
