"""The commands about a run: `hafs tau` and `hafs inspect`."""

from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.flags import Parser
from hafs_jax.commands.flags import add_place
from hafs_jax.health import checks
from hafs_jax.presets import preset
from hafs_jax.runs import final_fvu, find_run

MEANINGS = {
    "loss": "loss",
    "loss_reconstruction": "  reconstruction",
    "loss_sparsity": "  sparsity",
    "loss_aux": "  dead latents' reconstruction",
    "loss_pre_activation": "  dead latents' pre-activations",
    "loss_orthogonality": "  penalty on the dictionary",
    "fvu": "FVU of the batch",
    "fvu_ema": "FVU, moving average over batches",
    "heldout_fvu": "FVU on held-out rows",
    "l0": "L0 of the batch, latents a row",
    "heldout_l0": "L0 on held-out rows, latents a row",
    "k": "k of the step, latents a row",
    "dead_fraction": "dead over the last training rows, share of latents",
    "coherence_mean": "cosine of nearest dictionary vectors, mean",
    "coherence_max": "cosine of nearest dictionary vectors, largest",
    "frobenius_excess": "squared cosines beyond those of random vectors",
    "penalty": "penalty before its weight",
    "penalty_gradient_share": "penalty's share of W_dec's gradient",
    "alpha": "alpha, how freely pairs share direction",
    "lambda": "lambda, the penalty's weight",
    "learning_rate": "learning rate",
    "sparsity_coefficient": "weight of the sparsity cost",
    "gradient_norm": "gradient norm",
    "bad_batches": "batches skipped",
}
"""What `hafs inspect` calls the metrics, in the order in which it shows them. Another metric goes by its own name."""

_ELSEWHERE = ("step", "tokens", "seconds", "tokens_per_second", "tau_reached")
_NOT_THERE = {"loss_sparsity", "loss_aux", "loss_orthogonality", "penalty", "penalty_gradient_share", "alpha", "lambda",
              "sparsity_coefficient", "bad_batches"}  # fmt: skip
"""Metrics that are not shown where they are 0: the run has no such thing."""


def tau(arguments: list[str]) -> None:
    """`hafs tau`."""
    parser = Parser(
        prog="hafs tau",
        description="Prints tau = FACTOR x the final FVU (moving average) of a finished baseline run.",
    )
    parser.add_argument("--baseline", required=True, metavar="RUN", help="the baseline run: its name or its folder")
    factor = preset().penalty.tau_factor
    parser.add_argument("--factor", type=float, default=factor, metavar="X", help=f"multiple of the FVU [{factor}]")
    add_place(parser)
    parsed = parser.parse_args(arguments)
    if not 0 < parsed.factor < float("inf"):
        raise UserError(f"--factor {parsed.factor}: expected a finite number above 0")
    run = find_run(parsed.baseline, parsed.out, parsed.profile)
    if (variant := run.summary().variant) != "baseline":
        raise UserError(f"{run.folder}: expected a baseline run, found variant {variant!r}")
    print(f"{parsed.factor * final_fvu(run):.6g}")


def inspect(arguments: list[str]) -> None:
    """`hafs inspect`."""
    parser = Parser(
        prog="hafs inspect",
        description="Prints what a run is, whether it is healthy, how far it got, and its latest metrics. LOOK marks "
        "what should be looked at.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's name, or its folder")
    add_place(parser)
    parsed = parser.parse_args(arguments)
    run = find_run(parsed.run, parsed.out, parsed.profile)
    config, metrics, record = run.config(), run.metrics(), run.store_record()
    state = "finished" if run.finished() else "unfinished: give the same `hafs train` again to go on"
    if run.finished() and run.summary().stopped_early:
        state = "finished, stopped early"
    kind = "transcoder, " if config.sae.transcode else ""
    print(f"{run.name}: {kind}{config.sae.architecture}, F={config.sae.n_latents}, k={config.sae.k}; {state}")
    if not metrics:
        print("no step was logged yet")
    else:
        found = checks(run)
        ill = sum(not passed for passed, _ in found)
        print(f"{ill} of {len(found)} checks should be looked at:" if ill else f"all {len(found)} checks passed:")
        for passed, said in sorted(found, key=lambda check: check[0]):
            print(f"  {'ok  ' if passed else 'LOOK'} {said}")
    print(f"trains on {record['folder']} ({record['fingerprint']}), a path from {run.folder}")
    if metrics:
        _print_metrics(metrics[-1], config.steps)


def _print_metrics(last: dict[str, Any], steps: int) -> None:
    print(
        f"step {last['step']:,} of {steps:,}: {last['tokens']:,} rows in {last['seconds']:.0f} s; "
        f"{last['tokens_per_second']:,.0f} rows/s at the end"
    )
    names = [*(name for name in MEANINGS if name in last), *(name for name in last if name not in MEANINGS)]
    for name in names:
        if name in _ELSEWHERE or (name in _NOT_THERE and not last[name]):
            continue
        shown = "not finite" if last[name] is None else f"{last[name]:.4g}"
        print(f"  {MEANINGS.get(name, name):<50} {shown}")
