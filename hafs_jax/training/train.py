"""Training one SAE on a store: resolves the config, starts or resumes its run, and returns it finished."""

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from hafs_jax.config import TrainConfig
from hafs_jax.fast.plan import resolve_products, this_machine
from hafs_jax.method.penalties import PENALTIES
from hafs_jax.runs import Run, baseline_tau
from hafs_jax.store.reader import Store
from hafs_jax.training.budget import budget, check_memory
from hafs_jax.training.loop import Member, Stores, Terminated, TrainingStopped, fit
from hafs_jax.training.runlog import OnMetrics
from hafs_jax.training.step import margin

LOG = logging.getLogger(__name__)

__all__ = ["Terminated", "TrainingStopped", "open_stores", "prepare", "resolve", "train"]


def resolve(
    config: TrainConfig, store: Store, runs: Path, target: Store | None = None, force: bool = False
) -> tuple[TrainConfig, str]:
    """The config with everything filled in that comes from elsewhere, and a line saying what.

    That is what the stores say, the baseline's FVU, and the form of the products, which is chosen for this machine. A
    run that is there already, and is not replaced by `force`, keeps the products that it began with.
    """
    notes = []
    if config.tokens is None:
        config = dataclasses.replace(config, tokens=int(config.passes * len(store)))
        notes.append(f"{config.passes:g} passes over {len(store):,} rows")
    if config.sae.n_latents is None:
        F = config.sae.expansion * store.manifest.d_model
        config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, n_latents=F))
    config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, transcode=target is not None))
    config = dataclasses.replace(config, products=_products(config, Run(runs / config.run_name), force))
    penalty = config.penalty
    if penalty.kind != "none" and PENALTIES[penalty.kind].has_margin and penalty.mu0 is None:
        d_out = (target or store).manifest.d_model
        penalty = dataclasses.replace(penalty, mu0=margin(config, d_out))
        notes.append(f"mu0 {penalty.mu0:.4f} from the noise floor")
    if penalty.kind != "none" and penalty.gate and penalty.tau is None:
        tau, source = baseline_tau(runs, config, store.manifest.fingerprint)
        penalty = dataclasses.replace(penalty, tau=tau)
        notes.append(f"tau {tau:.4f} = {penalty.tau_factor:g} x the final FVU of {source}")
    return dataclasses.replace(config, penalty=penalty), "; ".join(notes)


def _products(config: TrainConfig, run: Run, force: bool) -> str:
    if config.products == "auto" and run.config_path.exists() and not force:
        begun_with = run.config().products
        if begun_with != "auto":  # what runs of earlier versions say
            return begun_with
    return resolve_products(config, this_machine())


def open_stores(store: Path, target: Path | None = None) -> Stores:
    """The stores of a training; `UserError` where one is missing or damaged."""
    return Stores(Store(store), None if target is None else Store(target))


def prepare(config: TrainConfig, stores: Stores, runs: Path, force: bool = False) -> tuple[Member, bool]:
    """The run of a resolved config, with its folder and config.json written, and whether it has finished already.

    Raises `UserError` where the folder holds another run, which `force` replaces, or memory does not suffice.
    """
    run = Run(runs / config.run_name)
    if force or not run.finished():
        check_memory(config, stores)  # before the folder holds this config
    if force and run.folder.exists():
        shutil.rmtree(run.folder)
    record: dict[str, Any] = _record(stores.train, run)
    if stores.target is not None:
        record["target"] = _record(stores.target, run)
    if run.config_path.exists():
        run.check_same(config, record)
        if run.finished():
            LOG.info(f"{run.folder.name}: already trained ({run.folder}); pass --force to train it again")
            return Member(config, run), True
    run.write_config(config, record)
    return Member(config, run), False


def train(
    config: TrainConfig,
    store_folder: Path | str,
    runs: Path | str,
    force: bool = False,
    target_folder: Path | str | None = None,
    *,
    on_metrics: OnMetrics | None = None,
    progress: bool | None = None,
) -> Run:
    """Trains to the end, or goes on where an earlier call was stopped, and returns the finished run.

    `target_folder` is a second store, aligned with the first, whose rows a transcoder reconstructs.

    `on_metrics(step, values)` is called on every logged step, with the values that metrics.jsonl gets. It does not
    change the training. What it raises passes through and ends the training as a kill would: the run's folder holds the
    last checkpoint, from which the next call goes on. `progress` True shows a progress bar and False hides it; by
    default it is shown where the logger "hafs_jax" takes INFO.

    Raises `UserError` for a config that does not fit the store or the memory and for a folder that holds another run,
    `Terminated` after SIGTERM or SIGINT (checkpointed), `TrainingStopped` when too many batches were not finite.
    """
    stores = open_stores(Path(store_folder), None if target_folder is None else Path(target_folder))
    runs = Path(runs)
    config, notes = resolve(config, stores.train, runs, stores.target, force)
    member, finished = prepare(config, stores, runs, force)
    if not finished:
        LOG.info(f"{member.run.folder.name}: {describe(config, stores)}" + (f"; {notes}" if notes else ""))
        call = None if on_metrics is None else (lambda _, step, values: on_metrics(step, values))
        fit([member], stores, member.run.checkpoints, on_metrics=call, progress=progress)
    return member.run


def describe(config: TrainConfig, stores: Stores, members: int = 1, together: str | None = None) -> str:
    """The size of a training of `members` SAEs in one program, and the memory that it needs, in words."""
    out = "" if stores.target is None else f" D_out={stores.d_out}"
    return (
        f"{config.sae.architecture} D={stores.train.manifest.d_model}{out} F={config.sae.n_latents} k={config.sae.k}, "
        f"{config.steps} steps x {config.batch_size} rows; memory about {budget(config, stores, members, together)}"
    )


def _record(store: Store, run: Run) -> dict[str, Any]:
    return {"folder": os.path.relpath(store.folder, run.folder), "fingerprint": store.manifest.fingerprint}
