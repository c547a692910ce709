"""`hafs experiment FILE`: trains, measures and compares every SAE of an experiment. No torch, no jax.

The stages run `hafs` commands, which skip what is done: a killed experiment goes on where it stopped. They leave

    OUT/<name>/<profile>/store, runs, eval                  as `hafs extract`, `sweep` and `evaluate` leave them
    OUT/<name>/<profile>/experiment/results.{parquet,csv}   one row per SAE, measure and dataset (`measurements`)
    OUT/<name>/<profile>/experiment/summary.json            arms, comparisons, falsifiers, verdict (`comparisons`)
    OUT/<name>/<profile>/experiment/logs/                   what the commands printed
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from tqdm import tqdm

from hafs_evaluate.experiment.comparisons import summary_of
from hafs_evaluate.experiment.config import ExperimentConfig
from hafs_evaluate.experiment.measurements import Cell, rows_of
from hafs_evaluate.workspace import Workspace, open_workspace
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import finite, write_atomic, write_json, write_text
from hafs_jax.base.log import bar_options
from hafs_jax.base.places import make_folder
from hafs_jax.base.process import children
from hafs_jax.base.process.locks import locked
from hafs_jax.runs import Run

LOG = logging.getLogger(__name__)

FOLDER, TABLE, SUMMARY = "experiment", "results", "summary.json"
STAGES = ("extract", "train", "evaluate", "table")


def run_experiment(config: ExperimentConfig, out: Path, workers: int, stages: Sequence[str] = STAGES) -> Workspace:
    """Runs `stages` of the experiment, `workers` commands at a time, and returns the workspace that holds all of it."""
    root = out / config.name
    with locked(root / ".lock", "an experiment", root):
        if "extract" in stages:
            command = ["extract", "--out", str(root), "--profile", config.profile, *config.extract]
            _command(command, root / "extract.log", cores=None)
        workspace = open_workspace(root, config.profile)
        if "train" in stages:
            train(config, workspace, workers)
        if "evaluate" in stages:
            evaluate(config, workspace, workers)
        if "table" in stages:
            summarise(config, workspace)
    return workspace


def train(config: ExperimentConfig, workspace: Workspace, workers: int) -> None:
    """Trains what has not finished. Seed 0 comes first, because its baselines give the gates of all seeds their tau."""
    missing = [cell for cell in config.cells() if not Run(workspace.runs / cell.run).finished()]
    jobs = sorted({(cell.seed > 0, cell.architecture, cell.seed) for cell in missing})
    total, n_arms = len(list(config.cells())), len(config.arms) * len(config.ks)
    with tqdm(total=total, initial=total - len(missing), desc="training", unit="SAE", **bar_options(LOG)) as bar:
        for is_later in (False, True):
            commands = {
                f"train-{architecture}-s{seed}": [
                    *["sweep", *_place(workspace), "--grid", config.grid(), "--arch", architecture],
                    *["--seed", str(seed), *config.train],
                ]
                for later, architecture, seed in jobs
                if later == is_later
            }
            _run_all(commands, workspace, workers, lambda: bar.update(n_arms))
    for cell in config.cells():
        _check(cell, workspace)


def evaluate(config: ExperimentConfig, workspace: Workspace, workers: int) -> None:
    """Measures every SAE. The first one is measured alone: it fills the caches of the language model's activations."""
    cells = list(config.cells())
    names = [cell.run for cell in cells]
    shown = {
        cell.run for cell in cells if cell.seed < config.latents_seeds and cell.k in (config.latents_ks or config.ks)
    }
    base = ["evaluate", *_place(workspace), *config.evaluate]
    parts = [part for start in range(workers) if (part := names[1:][start::workers])]
    with tqdm(total=len(names) + len(shown), desc="evaluating", unit="SAE", **bar_options(LOG)) as bar:

        def run_all(commands: dict[str, list[str]], saes: int) -> None:
            _run_all(commands, workspace, workers, lambda: bar.update(saes))

        for_all = [*base, "--skip", "latents", "domains", "across", "--runs"]
        run_all({"evaluate-first": [*for_all, names[0]]}, 1)
        run_all({f"evaluate-{index}": [*for_all, *part] for index, part in enumerate(parts)}, len(names) // workers)
        run_all({"evaluate-latents": [*base, "--runs", *(shown or names[:1])]}, len(shown))


def summarise(config: ExperimentConfig, workspace: Workspace) -> dict[str, Any]:
    """Writes the table and summary.json, and returns the summary; `UserError` where nothing was measured."""
    import pandas

    cells = list(config.cells())
    rows = [row for cell in cells for row in rows_of(cell, workspace.eval / cell.run)]
    if not rows:
        raise UserError(f"{workspace.eval}: expected evaluated runs of {config.name}, found none; run its other stages")
    table = pandas.DataFrame(rows)
    folder = workspace.folder / FOLDER
    write_atomic(folder / f"{TABLE}.parquet", lambda file: table.to_parquet(file, index=False))
    write_text(folder / f"{TABLE}.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    summary = summary_of(rows, config)
    write_json(folder / SUMMARY, finite(summary)[0])  # one seed gives no finite interval
    return summary


def _check(cell: Cell, workspace: Workspace) -> None:
    run = Run(workspace.runs / cell.run)
    if not run.finished():
        logs = workspace.folder / FOLDER / "logs"
        raise UserError(f"expected the sweep to leave {run.result_path}, found none; see {logs}")
    found = run.summary()
    if (found.architecture, found.k, found.seed) != (cell.architecture, cell.k, cell.seed):
        raise UserError(
            f"{run.result_path}: expected {cell.architecture}, k={cell.k}, seed {cell.seed}, "
            f"found {found.architecture}, k={found.k}, seed {found.seed}"
        )


def _place(workspace: Workspace) -> list[str]:
    return ["--out", str(workspace.folder.parent), "--profile", workspace.folder.name]


def _run_all(commands: dict[str, list[str]], workspace: Workspace, workers: int, done: Any) -> None:
    logs, cores = workspace.folder / FOLDER / "logs", Queue[set[int] | None]()
    for share in _shares(workers):
        cores.put(share)

    def run(name: str, command: list[str]) -> None:
        share = cores.get()
        try:
            _command(command, logs / f"{name}.log", share)
        finally:
            cores.put(share)

    with ThreadPoolExecutor(max(1, workers)) as pool, children.stopping():
        started = [pool.submit(run, name, command) for name, command in commands.items()]
        for future in started:
            future.result()
            done()


def _shares(workers: int) -> list[set[int] | None]:
    """A set of cores for each of `workers` commands that run at the same time.

    None stands for all cores: for a command that runs alone, and on systems that cannot pin processes. Programs whose
    threads share cores wait for each other: two trainings on two shared cores took three times as long.
    """
    if workers <= 1 or not hasattr(os, "sched_setaffinity"):
        return [None] * max(1, workers)
    ours = sorted(os.sched_getaffinity(0))
    return [set(ours[start::workers]) or {ours[start % len(ours)]} for start in range(workers)]


def _command(command: list[str], log: Path, cores: set[int] | None) -> None:
    """Runs `hafs COMMAND` on `cores` and appends its output to `log`.

    Raises `UserError` with the last line of the output where the command fails.
    """
    make_folder(log.parent)
    environment = dict(os.environ)
    if cores is not None:
        environment |= {"OMP_NUM_THREADS": str(len(cores)), "OMP_WAIT_POLICY": "PASSIVE"}
    with open(log, "a", encoding="utf-8") as file:
        code = children.run(command, cores, stdout=file, stderr=file, env=environment)
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()[-1:]
        raise UserError(f"`hafs {command[0]}` failed with exit code {code}: {''.join(last)} (see {log})")
