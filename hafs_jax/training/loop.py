"""The training loop: it feeds the compiled step, logs, measures on held-out rows and checkpoints; one SAE or many."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hafs_jax.base.errors import UserError
from hafs_jax.base.memory import give_back_memory
from hafs_jax.base.process.signals import deferred
from hafs_jax.config import TrainConfig
from hafs_jax.fast.mesh import BATCHES, EVERYWHERE, OWNED, axes_of, mesh_for, split, state_shardings
from hafs_jax.fast.room import check_room
from hafs_jax.method.penalties import coherence
from hafs_jax.method.sae import InputScale
from hafs_jax.ops import hosts
from hafs_jax.ops.parts import own_rows, put
from hafs_jax.ops.products import Params
from hafs_jax.runs import Run, RunSummary
from hafs_jax.saelens_format import read_start
from hafs_jax.store.holding import reading
from hafs_jax.store.manifest import MANIFEST
from hafs_jax.store.reader import Store
from hafs_jax.store.stream import Stream
from hafs_jax.training.checkpoint import Checkpoints
from hafs_jax.training.data import Part, first_rows, geometric_median, input_scale, prefetch
from hafs_jax.training.heldout import Heldout
from hafs_jax.training.programs import TOGETHER, compile_steps
from hafs_jax.training.rows.rolling import RollingBatches, batches_of
from hafs_jax.training.runlog import NoLog, OnRunMetrics, Progress, RunLog
from hafs_jax.training.state import TrainState, hyperparameters, init_state, seed_key, shared_config, state_of

_MEDIAN_ROWS = 16_384  # for the geometric median
_COHERENCE_LATENTS = 4_096  # of which coherence is measured while training


class TrainingStopped(Exception):
    """Training cannot go on (too many batches were not finite). The last good checkpoint is kept."""


class Terminated(Exception):
    """A signal asked the run to stop; it has been checkpointed. `args[0]` is the signal's number."""


@dataclass(frozen=True)
class Stores:
    """The activations of a training: the rows, a transcoder's target rows, the held-out ones where there are any."""

    train: Store | Stream
    target: Store | None = None

    @property
    def d_out(self) -> int:
        return (self.target or self.train).manifest.d_model

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the stores: `UserError` where a process replaces one, or has replaced it since it was opened."""
        with reading((store for store in (self.train, self.target) if isinstance(store, Store)), "a training"):
            yield

    def heldout(self, rows: int) -> tuple[np.ndarray, ...] | None:
        """The first `rows` rows of the stores' `heldout` siblings, or of a stream's head; None where there are none."""
        if isinstance(self.train, Stream):
            return (first_rows(self.train, rows),)
        folders = [store.folder.parent / "heldout" for store in (self.train, self.target) if store is not None]
        if not all((folder / MANIFEST).exists() for folder in folders):
            return None
        return tuple(first_rows(Store(folder), rows) for folder in folders)


@dataclass(frozen=True)
class Member:
    """One SAE of a training: its resolved config and its run's folder."""

    config: TrainConfig
    run: Run


def fit(
    members: list[Member],
    stores: Stores,
    folder: Path,
    together: str | None = None,
    on_metrics: OnRunMetrics | None = None,
    progress: bool | None = None,
) -> list[str]:
    """Trains the members to the end on the same batches, writes their runs, and returns a line on each that failed.

    The members' configs differ in swept numbers alone. Several train in one program, as `together` says ("vmap" or
    "map", see `compile_steps`). Their common checkpoints lie in `folder` until each has its own.
    `on_metrics` is called on every logged step of each member; `progress` shows or hides the bar (see `bar_options`).
    Raises `Terminated`; `TrainingStopped` where no member can go on; `UserError` where the devices do not fit.
    """
    return _Fit(members, stores, folder, together, on_metrics, progress).run()


class _Fit:
    """One attempt at a training."""

    def __init__(
        self,
        members: list[Member],
        stores: Stores,
        folder: Path,
        together: str | None,
        on_metrics: OnRunMetrics | None,
        progress: bool | None,
    ) -> None:
        self.members, self.stores, self.folder, self.how = members, stores, folder, TOGETHER[together]
        self.on_metrics, self.progress = on_metrics, progress
        self.config = shared_config(members[0].config)
        self.mesh = mesh_for(members[0].config)
        seed = members[0].config.seed if self.config.data_seed is None else self.config.data_seed
        rows = own_rows(NamedSharding(self.mesh, BATCHES), self.config.batch_size)
        self.part = Part(rows, self.config.batch_size, hosts.index(), hosts.count())
        self.batches = batches_of(
            stores.train, self.config.batch_size, seed, stores.target, self.config.steps, self.part
        )
        self.rolling = self.batches if isinstance(self.batches, RollingBatches) else None
        self.failed: dict[int, str] = {}

    def run(self) -> list[str]:
        how = self.how
        scale = input_scale(self.stores.train, self.stores.target)
        hypers = [hyperparameters(member.config) for member in self.members]
        of_one = jax.eval_shape(lambda: _fresh(self.members[0].config, self.stores, hypers[0]))
        like = of_one if how.members is None else jax.tree.map(partial(_stacked, len(self.members)), of_one)
        spread = state_shardings(like, self.mesh, stacked=how.members is not None)
        like = jax.tree.map(_placed, like, spread)
        scale = put(scale, NamedSharding(self.mesh, EVERYWHERE))  # where a checkpoint's comes back to
        with ExitStack() as stack:
            checkpoints = stack.enter_context(Checkpoints(self.folder, state=like))
            resumed = checkpoints.resume(like, scale)
            if resumed is not None:
                joined, scale = resumed
            else:
                each = zip([member.config for member in self.members], hypers, strict=True)
                first = [first_state(config, self.stores, scale, hyper, self.mesh) for config, hyper in each]
                joined = put(how.join(first), spread)
                del first
            state = how.for_program(joined, len(self.members))
            del joined, resumed  # else it stays beside what training makes of it
            program = compile_steps(state_shardings(of_one, self.mesh) if how.members == "map" else spread, how.members)
            self._train(state, scale, how.hyper(hypers), program, checkpoints, stack)
        return list(self.failed.values())

    def _train(
        self, state: Any, scale: InputScale, hyper: Any, program: Any, checkpoints: Checkpoints, stack: ExitStack
    ) -> None:
        """Runs the program over the batches from the state's step on, to the end of training.

        From the first step on there is state to save: `stack` then holds signals back, until it is saved.
        """
        config, how = self.config, self.how
        own = [how.one(state, index) for index in range(len(self.members))]
        step, bad = int(own[0].step), [int(one.gate.bad) for one in own]
        del own
        heldout = [Heldout(member.config, member.run, self.stores, step) for member in self.members]
        log_of = RunLog if hosts.first() else NoLog
        logs = [log_of(member.run, member.config, step, self.on_metrics) for member in self.members]
        label = self.members[0].run.name if how.members is None else f"{len(self.members)} SAEs"
        progress = Progress(label, config.steps, config.batch_size, step, self.progress if hosts.first() else False)

        unread: list[tuple[Any, int]] = []  # metrics that may still be computed, and the step before them

        def read() -> None:
            """Waits for the metrics that are unread, checks and logs them."""
            nonlocal bad
            while unread:
                stacked, before = unread.pop()
                metrics = {name: value.reshape(len(value), -1) for name, value in jax.device_get(stacked).items()}
                self._check_finite(metrics, bad)
                bad = [int(count) for count in metrics["bad_batches"][-1]]
                self._log(metrics, before, state, scale, logs, heldout)
                progress.advance(int(metrics["step"][-1, 0]), metrics)

        def save() -> None:
            for log in logs:
                log.sync()  # what a checkpoint goes on from is on disk before it
            checkpoints.save(how.for_checkpoint(state), scale)

        def waiting() -> None:
            if stopped and hosts.count() == 1:  # of several, one alone can't save: they stop after the next dispatch
                read()
                save()
                raise Terminated(stopped[0])

        blocks = prefetch(
            self.batches.dispatches(step, config.steps, config.steps_per_dispatch),
            NamedSharding(self.mesh, BATCHES),
            waiting=waiting,
            part=self.part,
        )
        compiled: set[int] = set()  # numbers of steps in a call
        stopped: list[int] | None = None
        try:
            for block in blocks:
                if (steps := len(jax.tree.leaves(block)[0])) not in compiled:
                    progress.compiling()
                    check_room(program.lower(state, block, scale, hyper, config).compile(), len(self.members))
                    give_back_memory()  # compiling took hundreds of MB, which would stay
                    compiled.add(steps)
                stopped = stack.enter_context(deferred()) if stopped is None else stopped
                state, stacked = program(state, block, scale, hyper, config)
                before, step = step, step + steps
                read()  # of the dispatch before, while the device computes this one
                unread.append((stacked, before))
                signal = hosts.agreed(stopped)
                if not (signal or self._needs_state(before, step)):
                    continue
                read()
                if step == config.steps or all(measure.hopeless for measure in heldout):
                    break
                if _passed(before, step, config.checkpoint_every_steps) or signal:
                    save()
                    if self.rolling is not None:
                        self.rolling.saved(step)
                if signal:
                    raise Terminated(signal)
            self._finish(state, scale, logs, heldout, checkpoints)
            if self.rolling is not None:
                self.rolling.finished()
        finally:
            if self.rolling is not None:
                self.rolling.close()
            blocks.close()
            progress.close()
            for log in logs:
                log.close()

    def _measured(self, before: int, step: int) -> tuple[bool, bool]:
        """Whether coherence, and whether the held-out rows, are due at the end of the steps after `before`."""
        config, at_end = self.config, step == self.config.steps
        every = config.evaluate_every_steps
        coherent = _passed(before, step, config.coherence_every_steps) or at_end
        return coherent, bool(every) and (_passed(before, step, every) or at_end)

    def _needs_state(self, before: int, step: int) -> bool:
        """Whether the state at that end is measured or saved: else the next dispatch may take its place at once."""
        return any(self._measured(before, step)) or _passed(before, step, self.config.checkpoint_every_steps)

    def _log(
        self,
        metrics: dict[str, np.ndarray],
        before: int,
        state: Any,
        scale: InputScale,
        logs: list[RunLog],
        heldout: list[Heldout],
    ) -> None:
        """Logs a dispatch, the steps after `before`, with what is measured at its end where that is due.

        `state` is that at its end where this is so, and else maybe a later one.
        """
        config, step = self.config, int(metrics["step"][-1, 0])
        at_end = step == config.steps
        measured, held = self._measured(before, step)
        for index, (member, log) in enumerate(zip(self.members, logs, strict=True)):
            extra: dict[str, float] = {}
            if (measured or held) and index not in self.failed:
                own = self.how.one(state, index)
                if measured:
                    found = _coherence(own.params["W_dec"], None if at_end else _COHERENCE_LATENTS, self.mesh)
                    extra |= {name: float(value) for name, value in found.items()}
                if held:
                    extra |= heldout[index].measure(own, scale, member.config, self.mesh)
            own_metrics = {name: values[:, index] for name, values in metrics.items()}
            for row, at in enumerate(own_metrics["step"]):
                if at % config.log_every_steps == 0 or (at == step and (at_end or held)):
                    log.write(own_metrics, row, extra if at == step else {})

    def _finish(
        self, state: Any, scale: InputScale, logs: list[RunLog], heldout: list[Heldout], checkpoints: Checkpoints
    ) -> None:
        """Writes the last checkpoint of each SAE that did not fail, into its own run, and then its run.json."""
        for index, (member, log) in enumerate(zip(self.members, logs, strict=True)):
            if index in self.failed:
                continue
            own = self.how.one(state, index)
            log.sync()
            if self.how.members is None:
                checkpoints.save(own, scale)
            else:
                with Checkpoints(member.run.checkpoints, state=own) as own_checkpoints:
                    own_checkpoints.save(own, scale)
            if hosts.first():
                member.run.write_result(self._summary(member, log, own, heldout[index]))
        hosts.exchange()  # run.json is there

    def _check_finite(self, metrics: dict[str, np.ndarray], before: list[int]) -> None:
        step = int(metrics["step"][-1, 0])
        for index, member in enumerate(self.members):
            bad = int(metrics["bad_batches"][-1, index])
            if index in self.failed or bad <= self.config.max_bad_fraction * max(step, 100):
                continue
            first = int(metrics["step"][np.argmax(metrics["bad_batches"][:, index] > before[index]), index])
            self.failed[index] = (
                f"{member.run.folder.name}: {bad} of the first {step} batches gave a loss that is not finite, the "
                f"latest from step {first}: more than max_bad_fraction={self.config.max_bad_fraction}; the last good "
                f"checkpoint is in {self.folder}; check the store (`hafs verify STORE`), then lower "
                "optimizer.learning_rate"
            )
        if len(self.failed) == len(self.members):
            raise TrainingStopped("; ".join(self.failed.values()))

    def _summary(self, member: Member, log: RunLog, state: TrainState, heldout: Heldout) -> RunSummary:
        config = member.config
        gated = config.penalty.kind != "none" and config.penalty.gate
        return RunSummary(
            name=member.run.name,
            variant=config.variant,
            architecture=config.sae.architecture,
            seed=config.seed,
            k=config.sae.k,
            tag=config.tag,
            arm=config.arm_name,
            n_latents=config.sae.F,
            d_model=self.stores.train.manifest.d_model,
            d_out=self.stores.d_out,
            steps=int(state.step),
            tokens=int(state.step) * config.batch_size,
            seconds=log.seconds,
            stopped_early=int(state.step) < config.steps,
            trained_together=len(self.members),
            tau=config.penalty.tau if gated else None,
            tau_reached=bool(state.gate.reached) if gated else None,
            best=heldout.best,
            final=log.last,
            store_fingerprint=self.stores.train.manifest.fingerprint,
            logged_steps=log.steps,
        )


def first_state(
    config: TrainConfig, stores: Stores, scale: InputScale, hyper: Any, mesh: Mesh | None = None
) -> TrainState:
    """The state at the start of training: fresh, or from the SAELens folder that `config.init_from` names.

    On a mesh of several devices no array is whole on one of them.
    """
    given = given_params(config, stores, scale)
    if mesh is None or mesh.size == 1:
        return _fresh(config, stores, hyper, {name: jnp.asarray(value) for name, value in given.items()})
    start = partial(_fresh, config, stores, hyper)
    shape = jax.eval_shape(start)
    spread = state_shardings(shape, mesh)
    on_devices = {name: put(value, spread.params[name]) for name, value in given.items()}
    return cast(TrainState, jax.jit(start, out_shardings=spread)(on_devices))


def _fresh(config: TrainConfig, stores: Stores, hyper: Any, given: Params | None = None) -> TrainState:
    """A new state, with the parameters that are `given`."""
    state = init_state(config, stores.train.manifest.d_model, seed_key(config.seed), hyper, stores.d_out)
    return state_of(config, {**state.params, **given}, state.key, hyper) if given else state


def given_params(config: TrainConfig, stores: Stores, scale: InputScale) -> dict[str, np.ndarray]:
    """The first parameters that are not made of the seed; `UserError` where those of `config.init_from` do not fit."""
    d_model = stores.train.manifest.d_model
    if config.init_from is not None:
        source, architecture = Path(config.init_from), config.sae.architecture
        params, _ = read_start(source, architecture, d_model, config.sae.F, scale)
        shapes = jax.eval_shape(lambda: _fresh(config, stores, hyperparameters(config))).params
        for name, value in params.items():
            expected = shapes[name].shape if name in shapes else None
            if value.shape != expected:
                raise UserError(
                    f"{config.init_from}: expected {name} of shape {expected} for this config, found {value.shape}"
                )
        return params
    target, into = stores.target or stores.train, scale.target or scale
    mean_D = np.asarray(into.mean_D)
    if config.sae.centre == "origin":
        return {"b_dec": -mean_D * np.asarray(into.scale)}
    if config.sae.centre == "geometric_median":
        median_D = geometric_median(first_rows(target, _MEDIAN_ROWS)).astype(np.float32)
        return {"b_dec": (median_D - mean_D) * np.asarray(into.scale)}
    return {}


def _stacked(count: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _passed(before: int, now: int, every: int) -> bool:
    return before // every < now // every


@partial(jax.jit, static_argnames=("most", "mesh"))
def _coherence(W_dec: jax.Array, most: int | None, mesh: Mesh) -> dict[str, jax.Array]:
    of_device = partial(coherence, most=most, axes=axes_of(mesh))
    return cast(dict[str, jax.Array], split(of_device, mesh, OWNED, EVERYWHERE)(W_dec))
