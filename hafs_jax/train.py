"""The training loop: opens the store, resumes or starts, feeds the compiled step, checkpoints, writes the result."""

import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from extract.format.errors import UserError
from extract.format.files import write_json
from extract.format.store import Store
from hafs_jax import shardings
from hafs_jax.checkpoint import Checkpoints
from hafs_jax.config import TrainConfig
from hafs_jax.data import Batches, input_scale, prefetch
from hafs_jax.penalty import coherence
from hafs_jax.runlog import RunLog
from hafs_jax.runs import Run, baseline_tau
from hafs_jax.state import hyperparameters, init_state
from hafs_jax.step import compile_steps, margin


class TrainingStopped(Exception):
    """Training cannot go on (too many batches were not finite). The last good checkpoint is kept."""


class Terminated(Exception):
    """A signal asked the run to stop; it has been checkpointed. `args[0]` is the signal's number."""


def resolve(config: TrainConfig, store: Store, runs: Path) -> tuple[TrainConfig, str]:
    """The config with everything filled in that comes from the store and the baseline, and a line saying what."""
    notes = []
    if config.tokens is None:
        config = dataclasses.replace(config, tokens=int(config.passes * len(store)))
        notes.append(f"{config.passes:g} passes over {len(store):,} rows")
    if config.sae.n_latents is None:
        F = config.sae.expansion * store.manifest.d_model
        config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, n_latents=F))
    penalty = config.penalty
    if penalty.kind == "hinge" and penalty.mu0 is None:
        penalty = dataclasses.replace(penalty, mu0=margin(config, store.manifest.d_model))
        notes.append(f"mu0 {penalty.mu0:.4f} from the noise floor")
    if penalty.gate and penalty.tau is None:
        tau, source = baseline_tau(runs, config, store.manifest.fingerprint)
        penalty = dataclasses.replace(penalty, tau=tau)
        notes.append(f"tau {tau:.4f} = {penalty.tau_factor:g} x the final FVU of {source}")
    return dataclasses.replace(config, penalty=penalty), "; ".join(notes)


def train(config: TrainConfig, store_folder: Path, runs: Path, force: bool = False) -> Run:
    """Trains to the end, or goes on where an earlier call was stopped, and returns the finished run.

    Raises `UserError` for a config that does not fit the store or a folder that holds another run, `Terminated` after
    SIGTERM or SIGINT (checkpointed), `TrainingStopped` when too many batches were not finite.
    """
    store = Store(store_folder)
    run = Run(runs / config.run_name)
    if force and run.folder.exists():
        shutil.rmtree(run.folder)
    config, notes = resolve(config, store, runs)
    relative = os.path.relpath(store_folder, run.folder)
    record = {"folder": relative, "fingerprint": store.manifest.fingerprint}
    if run.config_path.exists():
        run.check_same(config, record)
        if run.finished():
            print(f"{run.folder.name}: already trained ({run.folder}); pass --force to train it again")
            return run
    batches = Batches(store, config.batch_size, config.seed)
    run.write_config(config, record)
    print(
        f"{run.folder.name}: {config.sae.architecture} D={store.manifest.d_model} F={config.sae.n_latents} "
        f"k={config.sae.k}, {config.steps} steps x {config.batch_size} rows" + (f"; {notes}" if notes else "")
    )
    _loop(config, store, batches, run)
    return run


def _loop(config: TrainConfig, store: Store, batches: Batches, run: Run) -> None:
    mesh = shardings.make_mesh(config.dictionary_shards)
    if config.batch_size % mesh.shape["data"]:
        raise UserError(f"batch_size={config.batch_size}: expected a multiple of the {mesh.shape['data']} data shards")
    hyper, scale = hyperparameters(config), input_scale(store)
    state = init_state(config, store.manifest.d_model, jax.random.key(config.seed), hyper)
    state_shardings = shardings.state_shardings(state, mesh)
    state = jax.device_put(state, state_shardings)
    train_steps = compile_steps(state_shardings)
    with Checkpoints(run.checkpoints) as checkpoints, _stop_signals() as stopped:
        if checkpoints.latest_step() is not None:
            state, scale = checkpoints.restore(state, scale)
        step, bad = int(state.step), int(state.gate.bad)
        log = RunLog(
            run.metrics_path,
            config.steps * config.batch_size,
            config.batch_size,
            step,
            run.folder.name,
            config.tensorboard,
        )
        blocks = prefetch(
            batches.dispatches(step, config.steps, config.steps_per_dispatch), NamedSharding(mesh, shardings.BATCHES)
        )
        try:
            for block in blocks:
                state, stacked = train_steps(state, block, scale, hyper, config)
                metrics = jax.device_get(stacked)
                before, step = step, int(metrics["step"][-1])
                _check_finite(metrics, bad, config, run)
                bad = int(metrics["bad_batches"][-1])
                extra = {}
                every = config.coherence_every_steps
                if before // every < step // every or step == config.steps:
                    extra = {name: float(value) for name, value in _coherence(state.params["W_dec"]).items()}
                for index, at in enumerate(metrics["step"]):
                    if at % config.log_every_steps == 0 or at == config.steps:
                        log.write(metrics, index, extra if at == step else {})
                log.advance(step, metrics)
                if before // config.checkpoint_every_steps < step // config.checkpoint_every_steps:
                    checkpoints.save(state, scale)
                if stopped and step < config.steps:
                    checkpoints.save(state, scale)
                    raise Terminated(stopped[0])
            checkpoints.save(state, scale)
        finally:
            blocks.close()
            log.close()
        write_json(run.result_path, _result(config, store, run, log, state))


def _result(config: TrainConfig, store: Store, run: Run, log: RunLog, state: Any) -> dict[str, Any]:
    gated = config.penalty.kind == "hinge" and config.penalty.gate
    return {
        "name": run.folder.name,
        "variant": config.variant,
        "architecture": config.sae.architecture,
        "seed": config.seed,
        "steps": config.steps,
        "tokens": config.steps * config.batch_size,
        "seconds": log.seconds,
        "d_model": store.manifest.d_model,
        "n_latents": config.sae.n_latents,
        "k_or_target_l0": config.sae.k,
        "tau": config.penalty.tau if gated else None,
        "tau_reached": bool(state.gate.reached) if gated else None,
        "final": log.last,
        "store_fingerprint": store.manifest.fingerprint,
    }


def _check_finite(metrics: dict[str, np.ndarray], bad_before: int, config: TrainConfig, run: Run) -> None:
    bad, step = int(metrics["bad_batches"][-1]), int(metrics["step"][-1])
    if bad > config.max_bad_fraction * max(step, 100):
        first = int(metrics["step"][np.argmax(metrics["bad_batches"] > bad_before)])
        raise TrainingStopped(
            f"{bad} of the first {step} batches gave a loss that is not finite, the latest from step {first}: more "
            f"than max_bad_fraction={config.max_bad_fraction}; the last good checkpoint is in {run.checkpoints}; check "
            "the store (`python -m extract verify STORE`), then lower --optimizer.learning-rate"
        )


_coherence = jax.jit(coherence)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """While inside, SIGTERM and SIGINT append their number to the list instead of ending the process."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
