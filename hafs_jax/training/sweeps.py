"""Sweeps: many SAEs from one grid. Those that can share a program train together, over one pass of the data."""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import re
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_record, write_text
from hafs_jax.base.options import to_dict
from hafs_jax.config import ALIASES, PenaltyConfig, TrainConfig, axes_tag
from hafs_jax.fast.plan import target
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.ops.devices import check_devices
from hafs_jax.runs import Run, identity
from hafs_jax.training.budget import check_memory
from hafs_jax.training.loop import Member, Stores, fit
from hafs_jax.training.runlog import OnRunMetrics
from hafs_jax.training.state import shared_config
from hafs_jax.training.train import describe, locked_unless_finished, prepare, resolve

LOG = logging.getLogger(__name__)

COLUMNS = ("fvu_ema", "heldout_fvu", "l0", "dead_fraction", "coherence_mean", "coherence_max", "lambda", "tau_reached")


MEMBERS, _REMOVED = "members.json", ".old"

MOST = 10_000
"""How many SAEs a sweep may have: a slip such as seed=0..1000000000 would fill the memory before anything trains."""


def automatic() -> str:
    """How SAEs share a program by default: in turn on a CPU, where batched products gain nothing; else by vmap."""
    return "map" if target() == "cpu" else "vmap"


def parse_grid(text: str) -> list[dict[str, str]]:
    """The points of a grid such as "seed=0..3 l1=0.5,1,2": {axis: value as text}, the last axis fastest.

    `a..b` are whole numbers from a to b, both included; `;` joins several grids, one after the other.
    Raises `UserError` where an axis is malformed or given twice, and for more than `MOST` points.
    """
    products = [_axes(part) for part in text.split(";")]
    points = sum(math.prod(map(len, axes.values())) for axes in products)
    if points > MOST:
        raise UserError(
            f"the grid has {points:,} SAEs: expected at most {MOST:,}; give fewer values, or several sweeps"
        )
    return [dict(zip(axes, point, strict=True)) for axes in products for point in itertools.product(*axes.values())]


def _axes(text: str) -> dict[str, list[str]]:
    """The values of each axis of a grid without `;`."""
    axes: dict[str, list[str]] = {}
    for word in text.split():
        name, equals, values = word.partition("=")
        if not (name and equals and values) or name in axes:
            raise UserError(f"grid {_shortened(word)!r}: expected NAME=VALUE,VALUE or NAME=FIRST..LAST, each name once")
        whole = re.fullmatch(r"(\d+)\.\.(\d+)", values)
        if whole:
            if max(map(len, whole.groups())) > 19 or int(whole[2]) - int(whole[1]) >= MOST:
                raise UserError(f"grid {_shortened(word)!r}: expected at most {MOST:,} values below 10^19")
            axes[name] = [str(number) for number in range(int(whole[1]), int(whole[2]) + 1)]
        else:
            axes[name] = [value for value in values.split(",") if value]
        if not axes[name]:
            raise UserError(f"grid {_shortened(word)!r}: expected at least one value")
    return axes


def _shortened(word: str) -> str:
    return word if len(word) <= 100 else f"{word[:97]}..."


def arguments_of(point: dict[str, str], tag_of_all: str = "", variant: str = "baseline") -> list[str]:
    """The flags of `train` that a grid's point stands for.

    Beside the axes themselves they give a tag, which names what a run's name lacks, and an arm: the variant (`variant`
    where it is no axis) and the axes but for architecture, seed and k.
    """
    flags: list[str] = []
    named: dict[str, str] = {}  # the axes that a run's name lacks
    arm = [point.get("variant", variant), *([tag_of_all] if tag_of_all else [])]
    for name, value in point.items():
        path = ALIASES.get(name, name)
        if value in ("true", "false"):
            flags.append(("--" if value == "true" else "--no-") + path.replace("_", "-"))
        else:
            flags += ["--" + path.replace("_", "-"), value]
        if path not in ("arch", "variant", "seed"):
            named[name] = value
            arm += [] if path == "sae.k" else [f"{name}={value}"]
    tag = axes_tag(named, tag_of_all)
    return [*flags, "--arm", " ".join(arm), *(["--tag", tag] if tag else [])]


def sweep(
    configs: list[TrainConfig],
    stores: Stores,
    runs: Path,
    together: str,
    force: bool = False,
    most: int = 32,
    *,
    on_metrics: OnRunMetrics | None = None,
    progress: bool | None = None,
) -> tuple[list[Run], list[str]]:
    """Trains all of `configs`, at most `most` in one program, and returns their runs and what became of failed ones.

    SAEs that differ only in seed, learning rate, sparsity coefficient, lam_max or tau share one compiled program and
    one pass over the data. All see the same batches in the same order, which `data_seed` gives (none: the first
    config's seed). Runs without a gate come first, so that a baseline's FVU can give the others' tau. Each run is left
    as training it alone would leave it, and runs that have finished are kept. `together` says how SAEs share a program
    (see `compile_steps`).
    `on_metrics(name, step, values)` is called on every logged step of each run, with the run's name; see `train`.
    Raises `UserError`, `Terminated` (the sweep goes on when called again) and `TrainingStopped` (all members failed).
    """
    if most < 1:
        raise UserError(f"most_together={most}: expected at least 1")
    seed = configs[0].seed if configs[0].data_seed is None else configs[0].data_seed
    configs = [dataclasses.replace(config, data_seed=seed) for config in configs]
    if any(config.patience is not None for config in configs):
        raise UserError(
            "patience: expected none in a sweep, whose SAEs take the same number of steps; train them alone"
        )
    names = [config.run_name for config in configs]
    if len(set(names)) < len(names):
        raise UserError(f"the grid gives {next(n for n in names if names.count(n) > 1)} twice; expected distinct runs")
    first: dict[str, str] = {}
    for config, name in zip(configs, names, strict=True):
        if (other := first.setdefault(_in_effect(config), name)) != name:
            unused = [
                *(["a coefficient"] if ARCHITECTURES[config.sae.architecture].cost is None else []),
                *(["a penalty"] if config.penalty.kind == "none" else []),
            ]
            why = f", which has not {' or '.join(unused)}" if unused else ""
            raise UserError(
                f"the grid's {other} and {name} train the same SAE{why}; expected axes that change it, each value once "
                "(`;` joins grids of other axes)"
            )
    check_devices()
    with ExitStack() as locks:
        locks.enter_context(stores.held())
        for config in configs:
            locks.enter_context(locked_unless_finished(config, runs, force))
        _remove_groups(runs, set(names), force)
        trained = _trained(configs, stores, runs, together, force, most, on_metrics, progress)
        _remove_groups(runs, set(names))  # of members that a killed sweep has finished in part, the rest came alone
        return trained


def _trained(
    configs: list[TrainConfig],
    stores: Stores,
    runs: Path,
    together: str,
    force: bool,
    most: int,
    on_metrics: OnRunMetrics | None,
    progress: bool | None,
) -> tuple[list[Run], list[str]]:
    """The same, of configs that are checked and whose runs are locked."""
    done: list[Run] = []
    failures: list[str] = []
    for gated in (False, True):
        groups: dict[str, list[Member]] = {}
        for config in configs:
            if config.penalty.gate != gated:
                continue
            resolved, _ = resolve(config, stores.train, runs, stores.target)
            member, finished = prepare(resolved, stores, runs, force)
            done.append(member.run)
            if not finished:
                groups.setdefault(json.dumps(to_dict(shared_config(resolved))), []).append(member)
        for members in groups.values():
            for start in range(0, len(members), most):
                part = members[start : start + most]
                size = describe(part[0].config, stores, len(part), together)
                check_memory(part[0].config, stores, len(part), together)
                LOG.info(f"{len(part)} together: {', '.join(member.run.folder.name for member in part)}: {size}")
                if len(part) == 1:
                    failures += fit(part, stores, part[0].run.checkpoints, None, on_metrics, progress)
                else:
                    group = _group(part, stores, runs)
                    failures += fit(part, stores, group / "checkpoints", together, on_metrics, progress)
                    _remove_group(group)
    order = {config.run_name: index for index, config in enumerate(configs)}
    return sorted(done, key=lambda run: order[run.folder.name]), failures


def _in_effect(config: TrainConfig) -> str:
    """The config as JSON, without names and without numbers that nothing reads."""
    same: dict[str, Any] = {"variant": "", "tag": "", "arm": ""}
    if ARCHITECTURES[config.sae.architecture].cost is None:
        same["sparsity"] = dataclasses.replace(config.sparsity, coefficient=1.0)
    if config.penalty.kind == "none":
        same["penalty"] = PenaltyConfig(kind="none")
    return json.dumps(to_dict(dataclasses.replace(config, **same)))


def write_table(runs: list[Run], path: Path) -> list[dict[str, Any]]:
    """Writes one row a finished run to the CSV file `path`, and returns the rows."""
    rows = []
    for run in runs:
        if run.finished():
            values = run.summary()
            names = ("name", "variant", "architecture", "seed", "k", "tau")
            rows.append({name: getattr(values, name) for name in names} | {n: values.final.get(n) for n in COLUMNS})
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(path, text.getvalue())
    return rows


def _group(members: list[Member], stores: Stores, runs: Path) -> Path:
    """The folder of the checkpoints that members share: the same ones in the same order, on the same rows, resume them.

    It names its members in members.json, so that a later sweep knows when nobody needs it.
    """
    rows = [store.manifest.fingerprint for store in (stores.train, stores.target) if store is not None]
    text = json.dumps([rows, [identity(member.config) for member in members]])
    folder = runs / f".together-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    write_record(folder / MEMBERS, {"members": [member.run.folder.name for member in members]})
    return folder


def _remove_groups(runs: Path, ours: set[str], force: bool = False) -> None:
    """Removes groups of `ours`, the runs of this sweep, that have all finished, and what a killed removal has left.

    With `force` those too of which a member is trained anew. Another sweep beside this one keeps its own.
    """
    for left in runs.glob(f".together-*{_REMOVED}"):
        shutil.rmtree(left, ignore_errors=True)
    for note in runs.glob(f".together-*/{MEMBERS}"):
        names = set(read_json(note, "the members of a sweep's group")["members"])
        if (force and names & ours) or (names <= ours and all(Run(runs / name).finished() for name in names)):
            _remove_group(note.parent)


def _remove_group(folder: Path) -> None:
    """Removes it. It loses its name first, so that a kill leaves no half of it under that name.

    The same sweep, given once more, may do so at the same moment.
    """
    removed = folder.with_name(folder.name + _REMOVED)
    with suppress(FileNotFoundError):
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
