"""Training one SAE on a store: resolves the config, starts or resumes its run, and returns it finished."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.files import sha256_of
from hafs_jax.base.options import to_dict
from hafs_jax.base.process import signals
from hafs_jax.config import TrainConfig
from hafs_jax.fast.adam import check_optimizer
from hafs_jax.fast.mesh import mesh_for
from hafs_jax.fast.plan import check_kernels, resolve_products, this_machine
from hafs_jax.health import checks
from hafs_jax.method.penalties import PENALTIES
from hafs_jax.ops import hosts
from hafs_jax.ops.devices import check_devices
from hafs_jax.runs import Run, baseline_tau, store_record
from hafs_jax.store import given
from hafs_jax.store.manifest import MANIFEST
from hafs_jax.store.reader import Store
from hafs_jax.store.rolling.windows import rolling_at
from hafs_jax.store.stream import Stream
from hafs_jax.training.budget import budget, check_memory
from hafs_jax.training.checkpoint import check_path
from hafs_jax.training.data import input_scale
from hafs_jax.training.heldout import heldout_rows
from hafs_jax.training.loop import Member, Stores, Terminated, TrainingStopped, fit, given_params
from hafs_jax.training.rows.rolling import batches_of
from hafs_jax.training.runlog import OnMetrics, check_sinks
from hafs_jax.training.step import margin

LOG = logging.getLogger(__name__)

_LONGEST_NAME = 240  # bytes; file systems allow 255, and files beside the run's folder have longer names

__all__ = ["Terminated", "TrainingStopped", "open_stores", "prepare", "resolve", "train"]


def resolve(
    config: TrainConfig, store: Store | Stream, runs: Path, target: Store | None = None, force: bool = False
) -> tuple[TrainConfig, str]:
    """The config with everything filled in that comes from elsewhere, and a line saying what.

    That is what the stores say, the baseline's FVU, and the form of the products, which is chosen for this machine. A
    run that is there already, and is not replaced by `force`, keeps the products that it began with.
    """
    run = run_of(config, runs)
    notes = []
    if config.tokens is None:
        config = _with_tokens(config, store)
        notes.append(f"{config.passes:g} passes: {config.tokens:,} rows")
    if config.steps >= 2**31:
        raise UserError(f"{arg('tokens', config.tokens)}: expected fewer than 2^31 steps, found {config.steps:,}")
    if config.sae.n_latents is None:
        F = config.sae.expansion * store.manifest.d_model
        config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, n_latents=F))
    config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, transcode=target is not None))
    config = dataclasses.replace(config, products=_products(config, run, force))
    check_kernels(config, this_machine())
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


def _with_tokens(config: TrainConfig, store: Store | Stream) -> TrainConfig:
    """The config with the rows that its passes over the store are; `UserError` where they fill no batch."""
    if isinstance(store, Stream):
        raise UserError(f"expected {arg('tokens')}, the rows to train on: an iterator does not say how many it has")
    rolling = rolling_at(store.folder)
    rows = len(store) if rolling is None else rolling.rows
    tokens = int(config.passes * rows)
    if tokens < config.batch_size:
        raise UserError(
            f"store {store.folder} holds {rows:,} rows, and {arg('passes', config.passes)} over it are fewer "
            f"than {arg('batch_size', config.batch_size)}; give more rows or set a smaller {arg('batch_size')}"
        )
    return dataclasses.replace(config, tokens=tokens)


def run_of(config: TrainConfig, runs: Path) -> Run:
    """The run of a config in the folder `runs`; `UserError` where its name is too long for a file system."""
    if (length := len(config.run_name.encode())) > _LONGEST_NAME:
        raise UserError(
            f"run name {config.run_name[:40]}...: expected at most {_LONGEST_NAME} bytes, found {length}; choose a "
            f"shorter {arg('tag')}"
        )
    return Run(runs / config.run_name)


def _products(config: TrainConfig, run: Run, force: bool) -> str:
    if config.products == "auto" and run.begun() and not force:
        begun_with = run.config().products
        if begun_with != "auto":  # what runs of earlier versions say
            return begun_with
    return resolve_products(config, this_machine())


def open_stores(store: Path, target: Path | None = None) -> Stores:
    """The stores of a training; `UserError` where one is missing or damaged."""
    return Stores(Store(store), None if target is None else Store(target))


def prepare(config: TrainConfig, stores: Stores, runs: Path, force: bool = False) -> tuple[Member, bool]:
    """The run of a resolved config, with its folder and config.json written, and whether it has finished already.

    Raises `UserError` where the folder holds another run, which `force` replaces, or the training cannot start (see
    `check_start`). The folder is then as it was. Only for who has locked the run, unless it has finished.
    """
    run = run_of(config, runs)
    record: dict[str, Any] = store_record(stores.train.folder, stores.train.manifest, run)
    if isinstance(stores.train, Stream):
        record["folder"] = str(stores.train.folder)
    if stores.target is not None:
        record["target"] = store_record(stores.target.folder, stores.target.manifest, run)
    if run.begun() and not force:
        run.check_same(config, record)
        if run.finished():
            LOG.info(f"{run.folder.name}: already trained ({run.folder}); force trains it again")
            return Member(config, run), True
    check_start(config, stores, run)
    hosts.exchange()  # all have seen the folder as it was
    if hosts.first():
        if force:
            run.remove()
            signals.resumed_by("run the same command without --force")  # which would begin anew once more
        run.write_config(config, record)
    return Member(config, run), False


def check_start(config: TrainConfig, stores: Stores, run: Run) -> None:
    """Raises `UserError` where a training of the resolved config could not start; it writes nothing."""
    if hosts.count() > 1 and rolling_at(stores.train.folder) is not None:
        raise UserError(f"{stores.train.folder}: a store in windows is for one process; extract it without window_gb")
    if stores.target is not None and rolling_at(stores.train.folder) is not None:
        raise UserError(f"{stores.train.folder}: a store in windows has no target; extract it without window_gb")
    check_path(run.checkpoints)
    check_sinks(config)
    check_optimizer(config, mesh_for(config).size)
    batches_of(stores.train, config.batch_size, 0, stores.target)
    scale = input_scale(stores.train, stores.target)
    if config.evaluate_every_steps:
        heldout_rows(config, stores, rows=1)
    check_memory(config, stores)
    if config.init_from is not None:
        given_params(config, stores, scale)


@contextmanager
def locked_unless_finished(config: TrainConfig, runs: Path, force: bool) -> Iterator[None]:
    """Locks the config's run, unless it has finished and stays as it is. Of several processes the first does."""
    run = run_of(config, runs)
    if not hosts.first() or (run.finished() and not force):
        yield
        return
    with run.locked():
        yield


def train(
    config: TrainConfig,
    data: Any,
    runs: Path | str | None = None,
    force: bool = False,
    target: Any = None,
    *,
    on_metrics: OnMetrics | None = None,
    progress: bool | None = None,
) -> Run:
    """Trains to the end, or goes on where an earlier call was stopped, and returns the finished run.

    `data` is one of

    - a store's folder, from `hafs extract`, `hafs import` or `write_array_store`;
    - an array of numpy, JAX or torch, [rows, D] or of any leading shape, a .npy or .safetensors file, or a list of
      these. It becomes a store in `runs`/data-<hash>, which the same array finds again: shuffled, a twentieth of its
      rows held out, and rows of over three times the median norm left out (`write_array_store` has options);
    - an iterator, or an object that gives iterators, of batches [..., D] of any size. Nothing is stored. Its first
      `config.heldout_rows` rows give the mean and scale and are the held-out rows; the rows after them are trained on
      in their order, so that shuffling is yours. Training ends after `config.tokens` rows, which must be given. An
      object that gives new iterators is read from its start again where it ends before. To resume, give an iterator
      that begins at its start again: the rows that were trained on are read past.

    `runs` is the folder that gets the run's folder: by default `runs` beside the folder `store` of a store, as the
    command line has it, else ./runs. The same call resumes an interrupted run, to the same bits on a CPU.
    `target` are rows that a transcoder reconstructs: a second store, aligned with the first, or a second array.

    `on_metrics(step, values)` is called on every logged step, with the values that metrics.jsonl gets. It does not
    change the training. What it raises passes through and ends the training as a kill would: the run's folder holds the
    last checkpoint, from which the next call goes on. `progress` True shows a progress bar and False hides it; by
    default it is shown where the logger "hafs_jax" takes INFO.

    Raises `UserError` for data that cannot be trained on, a config that does not fit the data, the devices or the
    memory, for a folder that holds another run, and where another process trains this run or replaces the store;
    `Terminated` after SIGTERM or SIGINT (checkpointed), `TrainingStopped` when too many batches were not finite.
    """
    check_devices()
    hosts.check_met()
    folder = Path(runs) if runs is not None else _default_runs(data)
    if hosts.count() > 1 and given.store_folder(data) is None:
        raise UserError(f"expected a store's folder for several processes, found a {type(data).__name__}")
    hosts.check_shared(folder)
    with ExitStack() as stack:
        with hosts.together():
            stores = _stores_of(config, data, target, folder)
            hosts.check_same({"config": to_dict(config), "force": force, **_fingerprints(stores)})
            stack.enter_context(stores.held())
            stack.enter_context(locked_unless_finished(config, folder, force))
            config, notes = resolve(config, stores.train, folder, stores.target, force)
            hosts.check_same({"config": to_dict(config)})  # what each found for itself
            member, finished = prepare(config, stores, folder, force)
        if not finished:
            LOG.info(f"{member.run.folder.name}: {describe(config, stores)}" + (f"; {notes}" if notes else ""))
            call = None if on_metrics is None else (lambda _, step, values: on_metrics(step, values))
            fit([member], stores, member.run.checkpoints, on_metrics=call, progress=progress)
            warn(member.run)
    return member.run


def _fingerprints(stores: Stores) -> dict[str, str]:
    """What tells the manifests of the stores from others."""
    opened = {"store": stores.train, "target": stores.target}
    return {name: sha256_of(store.folder / MANIFEST) for name, store in opened.items() if isinstance(store, Store)}


def _default_runs(data: Any) -> Path:
    store = given.store_folder(data)
    return store.parents[1] / "runs" if store is not None and store.parent.name == "store" else Path("runs")


def _stores_of(config: TrainConfig, data: Any, target: Any, runs: Path) -> Stores:
    """The stores that `data` and `target` are, name or become; a stream of an iterator."""
    if (store := given.store_folder(data)) is not None:
        if target is not None and (second := given.store_folder(target)) is None:
            raise UserError(f"target: expected a store's folder, as the data are, found a {type(target).__name__}")
        return open_stores(store, None if target is None else second)
    if given.is_array(data):
        if target is not None and not given.is_array(target):
            raise UserError(f"target: expected an array, as the data are, found a {type(target).__name__}")
        return open_stores(*given.array_store(data, target, runs))
    if target is not None:
        raise UserError("target: expected none with an iterator; give both as arrays or stores")
    return Stores(given.stream(data, config.heldout_rows))


def warn(run: Run) -> None:
    """Logs a warning for each check of health that a finished run does not pass."""
    for passed, said in checks(run):
        if not passed:
            LOG.warning(f"LOOK {run.name}: {said}")


def describe(config: TrainConfig, stores: Stores, members: int = 1, together: str | None = None) -> str:
    """The size of a training of `members` SAEs in one program, and the memory that it needs, in words."""
    out = "" if stores.target is None else f" D_out={stores.d_out}"
    return (
        f"{config.sae.architecture} D={stores.train.manifest.d_model}{out} F={config.sae.n_latents} k={config.sae.k}, "
        f"{config.steps} steps x {config.batch_size} rows; memory about {budget(config, stores, members, together)}"
    )
