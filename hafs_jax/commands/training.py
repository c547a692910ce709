"""The commands that train: `hafs train`, `sweep` and `synth`."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError, note_flags
from hafs_jax.base.files import read_json
from hafs_jax.base.flags import Parser
from hafs_jax.base.process import children, signals
from hafs_jax.commands.flags import chosen_config, run_config, sweep_parser, synth_parser, train_parser
from hafs_jax.config import ALIASES, TrainConfig
from hafs_jax.health import dead_latents
from hafs_jax.runs import Run, find_run, is_run, profile_folder


def train(arguments: list[str]) -> None:
    """`hafs train`."""
    parsed = train_parser(arguments).parse_args(arguments)
    config = chosen_config(parsed)
    if config.sae.transcode and parsed.target is None:
        raise UserError(f"--config {parsed.config} is that of a transcoder: give its --target, too")
    with _extraction_beside(parsed), _joined(parsed):
        store, runs = _places(parsed)

        from hafs_jax.ops import hosts
        from hafs_jax.training.train import train

        with hosts.together():
            if hosts.first():  # which may write an export
                config = _started_from(config, parsed)
        config = _started_from(config, parsed)
        with _stops():
            _say_where(store, runs)
            run = train(config, store, runs, parsed.force, parsed.target)
            if hosts.first():
                print(_result(run))


def _joined(parsed: argparse.Namespace) -> AbstractContextManager[None]:
    """What makes the command one of several processes, where the flags say so."""
    given = parsed.coordinator, parsed.processes, parsed.process
    if given == (None, None, None):
        return nullcontext()
    if parsed.stream is not None:
        raise UserError("--stream: expected neither --coordinator, --processes nor --process beside it; extract first")
    from hafs_jax.ops.hosts import joined

    return joined(*given)


def _extraction_beside(parsed: argparse.Namespace) -> AbstractContextManager[None]:
    """The extraction that --stream asks for; nothing without it."""
    if parsed.stream is None:
        return nullcontext()
    if parsed.store is not None or parsed.target is not None:
        raise UserError("--stream: expected neither --store nor --target beside it: it extracts the store itself")
    from hafs_jax.commands.streaming import extraction

    return extraction(parsed.out, parsed.profile, parsed.stream)


def sweep(arguments: list[str]) -> None:
    """`hafs sweep`."""
    parsed, flags_of_all = sweep_parser().parse_known_args(arguments)
    _sweep(parsed, flags_of_all)


def synth(arguments: list[str]) -> None:
    """`hafs synth`."""
    parsed, flags_of_all = synth_parser().parse_known_args(arguments)
    # A wrong flag is said before the minutes that sampling takes. F and k, where no flag gives them, are the world's.
    _points(parsed, ["--sae.n-latents", "4096", "--sae.k", "1", *flags_of_all])
    profile = f"synth-{parsed.world}"

    def run(*command: str) -> None:
        if code := children.run(command):
            raise SystemExit(code if code > 0 else 128 - code)

    place = ("--out", str(parsed.out))
    run("synth-world", *place, "--world", parsed.world, "--samples", str(parsed.samples))
    truth = read_json(parsed.out / profile / "truth.json", "a synthetic world's truth")
    F = min(int(truth["features"]), 4096)
    parsed.profile, parsed.store, parsed.target = profile, None, None
    sizes = ["--sae.n-latents", str(F), "--sae.k", str(max(1, round(truth["true_l0"]["train"])))]
    _sweep(parsed, [*sizes, *flags_of_all])
    run("synth-score", *place, "--profile", profile)


def _sweep(parsed: argparse.Namespace, flags_of_all: list[str]) -> None:
    """Trains the grid; `flags_of_all` are flags of `hafs train`, which hold for every SAE."""
    from hafs_jax.training.train import open_stores

    configs = _points(parsed, flags_of_all)
    note_flags({name: f"--{alias}" for alias, name in ALIASES.items()})
    store, runs = _places(parsed)
    configs = [_started_from(config, parsed) for config in configs]
    _say_where(store, runs)
    _trained(configs, open_stores(store, parsed.target), runs, parsed)


def _points(parsed: argparse.Namespace, flags_of_all: list[str]) -> list[TrainConfig]:
    """The config of each SAE of the grid."""
    from hafs_jax.training.sweeps import arguments_of, parse_grid

    variant = _variant(flags_of_all)
    points = parse_grid(parsed.grid)
    return [run_config([*flags_of_all, *arguments_of(point, parsed.tag, variant)]) for point in points]


def _variant(arguments: list[str]) -> str:
    """The variant that flags of `train` name, or the default one."""
    parser = Parser(add_help=False)
    parser.add_argument("--variant", default=TrainConfig().variant)
    return parser.parse_known_args(arguments)[0].variant


def _trained(configs: list[TrainConfig], stores: Any, runs: Path, parsed: argparse.Namespace) -> None:
    """Trains, warns of SAEs that look ill, and prints the table; exit code 1 where SAEs failed."""
    from hafs_jax.training.sweeps import automatic, sweep, write_table
    from hafs_jax.training.train import warn

    together = automatic() if parsed.together == "auto" else parsed.together
    with _stops():
        done, failures = sweep(configs, stores, runs, together, getattr(parsed, "force", False), parsed.most_together)
    for run in done:
        if run.finished():
            warn(run)
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


def _places(parsed: argparse.Namespace) -> tuple[Path, Path]:
    """The store to train on and the folder of the runs."""
    folder = parsed.out / parsed.profile if parsed.store else profile_folder(parsed.out, parsed.profile)
    if parsed.store and parsed.profile == "auto":
        folder = parsed.out
    return parsed.store or folder / "store" / "train", folder / "runs"


def _say_where(store: Path, runs: Path) -> None:
    """Prints the profile, the store and the device, before the work begins."""
    from hafs_jax.ops.devices import describe_devices
    from hafs_jax.ops.hosts import first
    from hafs_jax.store.manifest import read_manifest

    manifest, devices = read_manifest(store), describe_devices()
    if not first():
        return
    rows = f"{manifest.rows:,} rows of {manifest.d_model} {manifest.dtype}"
    print(f"profile {runs.parent.name}: store {store} ({rows}), on {devices}", flush=True)


def _started_from(config: TrainConfig, parsed: argparse.Namespace) -> TrainConfig:
    """The config, whose init_from may name a run: that run's SAE is exported, and its folder is put there."""
    if config.init_from is None or (Path(config.init_from) / "cfg.json").exists():
        return config
    source = Path(config.init_from)
    if source.exists() and not is_run(source):
        return config  # training says what is wrong with it
    run = find_run(config.init_from, parsed.out, parsed.profile)

    from hafs_jax.saelens import export_saelens

    with run.held("an export"):
        return dataclasses.replace(config, init_from=str(export_saelens(run.folder)))


def _result(run: Run) -> str:
    """What became of a finished run, in a few lines."""
    summary, final, config = run.summary(), run.summary().final, run.config()
    held = final.get("heldout_fvu")
    parts = [
        f"FVU {_figure(final['fvu_ema'], '.4f')} (moving average)" + ("" if held is None else f", {held:.4f} held-out"),
        f"L0 {_figure(final['l0'], '.1f')}",
        dead_latents(config, final),
        f"nearest cosines {_figure(final['coherence_mean'], '.3f')} mean, {_figure(final['coherence_max'], '.3f')} max",
        f"{summary.seconds:.0f} s",
    ]
    lines = [f"{run.name}: {'; '.join(parts)} -> {run.folder}"]
    if summary.stopped_early:
        best = summary.best or {}
        lines.append(
            f"{run.name}: stopped at step {summary.steps:,}, since held-out FVU did not fall; best "
            f"{_figure(best.get('heldout_fvu'), '.4f')} at step {best.get('step')}"
        )
    return "\n".join(lines)


@contextmanager
def _stops() -> Iterator[None]:
    """Turns a training's stop into its message and exit code."""
    from hafs_jax.ops.hosts import first
    from hafs_jax.training.loop import Terminated, TrainingStopped

    try:
        yield
    except Terminated as stop:
        if first():
            print(f"stopped and checkpointed; {signals.again()} to go on", file=sys.stderr)
        signals.said()
        raise SystemExit(128 + stop.args[0]) from None
    except TrainingStopped as stop:
        print(f"error: {stop}", file=sys.stderr)
        raise SystemExit(1) from None
