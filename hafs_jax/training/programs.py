"""Compiled programs of training steps, and how the SAEs of one training share a program.

One SAE is trained alone. Several that differ in swept numbers alone are trained together: stacked, with batched
products ("vmap"), or by the one program in turn ("map").
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from hafs_jax.config import TrainConfig
from hafs_jax.fast.mesh import BATCHES, EVERYWHERE, axes_of, split
from hafs_jax.method.loss import Metrics
from hafs_jax.method.sae import InputScale
from hafs_jax.ops.axes import Axes
from hafs_jax.training.state import Hyperparameters, TrainState
from hafs_jax.training.step import Batch, train_step

_KEPT = 4  # kinds of programs: by shardings, way of sharing, platform


class Together(ABC):
    """How a training holds the states of its SAEs.

    The joined form is what a checkpoint holds and devices are given; the program's form is what the program takes.
    """

    members: str | None  # as `compile_steps` names it

    @abstractmethod
    def join(self, states: Sequence[TrainState]) -> Any:
        """The joined form of the SAEs' states."""

    @abstractmethod
    def hyper(self, hypers: Sequence[Hyperparameters]) -> Any:
        """The SAEs' hyperparameters as the program takes them."""

    def for_program(self, joined: Any, count: int) -> Any:
        """The program's form of the joined states of `count` SAEs."""
        return joined

    def for_checkpoint(self, state: Any) -> Any:
        """The joined form of what the program returned."""
        return state

    @abstractmethod
    def one(self, state: Any, index: int) -> TrainState:
        """One SAE's state, of the program's form."""


class Alone(Together):
    """One SAE: its state is the program's."""

    members = None

    def join(self, states: Sequence[TrainState]) -> TrainState:
        (state,) = states
        return state

    def hyper(self, hypers: Sequence[Hyperparameters]) -> Hyperparameters:
        (hyper,) = hypers
        return hyper

    def one(self, state: TrainState, index: int) -> TrainState:
        return state


class Stacked(Together):
    """Several SAEs whose arrays have a leading axis for them."""

    members = "vmap"

    def join(self, states: Sequence[TrainState]) -> TrainState:
        return cast(TrainState, _stacked(states))

    def hyper(self, hypers: Sequence[Hyperparameters]) -> Hyperparameters:
        return cast(Hyperparameters, _stacked(hypers))

    def one(self, state: TrainState, index: int) -> TrainState:
        return cast(TrainState, jax.tree.map(lambda leaf: leaf[index], state))


class InTurn(Stacked):
    """Several SAEs, joined as those that are stacked, of which the program takes a tuple."""

    members = "map"

    def hyper(self, hypers: Sequence[Hyperparameters]) -> Any:
        return tuple(hypers)

    def for_program(self, joined: TrainState, count: int) -> tuple[TrainState, ...]:
        return tuple(super(InTurn, self).one(joined, index) for index in range(count))

    def for_checkpoint(self, state: tuple[TrainState, ...]) -> TrainState:
        return self.join(state)

    def one(self, state: Any, index: int) -> TrainState:
        return cast(TrainState, state[index])


TOGETHER: dict[str | None, Together] = {how.members: how for how in (Alone(), Stacked(), InTurn())}


def _stacked(trees: Sequence[Any]) -> Any:
    """One tree whose leaves have a leading axis for those of `trees`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def compile_steps(
    state_shardings: Any = None, members: str | None = None, platform: str | None = None
) -> Callable[..., tuple[Any, Metrics]]:
    """The compiled program: (state, batches, scale, hyper, config) -> (state, metrics of [S]), S steps in one call.

    `batches` are a Batch with a leading axis of S. The state is donated. Its shardings are pinned to `state_shardings`,
    so that the state that comes out fits the program that it goes back into, and nothing compiles twice. Their mesh is
    that of the devices, each of which runs the step on its part. Without shardings there is one device.

    `members` says how SAEs are trained together on the same batches. Their metrics are of [S, members]. "vmap" batches
    their products: state and hyper have a leading axis. "map" runs the program for each of a tuple of them in turn.

    `platform` is what the program is for (none: where JAX runs). With "gpu" it can be lowered for a GPU on a machine
    that has none.

    Trainings of one kind share a program, whose keys are the shapes and the config. The last few kinds are kept.
    """
    leaves, tree = jax.tree.flatten(state_shardings)
    return _program(tuple(leaves), tree, members, platform)


@functools.lru_cache(maxsize=_KEPT)
def _program(shardings: tuple[Any, ...], tree: Any, members: str | None, platform: str | None) -> Callable[..., Any]:
    state_shardings = jax.tree.unflatten(tree, shardings)
    axis = "members" if members == "vmap" else None
    mesh = None if state_shardings is None else jax.tree.leaves(state_shardings)[0].mesh
    axes = Axes() if mesh is None else axes_of(mesh)

    def train_steps(
        state: TrainState, batches: Batch, scale: InputScale, hyper: Hyperparameters, config: TrainConfig
    ) -> tuple[TrainState, Metrics]:
        def of_device(
            state: TrainState, batches: Batch, scale: InputScale, hyper: Hyperparameters
        ) -> tuple[TrainState, Metrics]:
            def run(state: TrainState, hyper: Hyperparameters) -> tuple[TrainState, Metrics]:
                def body(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
                    return train_step(state, batch, scale, hyper, config, axis, platform, axes)

                return cast(tuple[TrainState, Metrics], jax.lax.scan(cast(Any, body), state, batches))

            if members == "vmap":
                return cast(tuple[TrainState, Metrics], jax.vmap(run, out_axes=(0, 1), axis_name=axis)(state, hyper))
            return run(state, hyper)

        if mesh is None:
            return of_device(state, batches, scale, hyper)
        specs = jax.tree.map(lambda of: of.spec, state_shardings)
        whole = split(of_device, mesh, (specs, BATCHES, EVERYWHERE, EVERYWHERE), (specs, EVERYWHERE))
        return cast(tuple[TrainState, Metrics], whole(state, batches, scale, hyper))

    out: dict[str, Any] = {} if state_shardings is None else {"out_shardings": (state_shardings, None)}
    program = jax.jit(train_steps, static_argnames="config", donate_argnames="state", **out)
    if members != "map":
        return program

    return _Turns(program)


@dataclass(frozen=True)
class _Turns:
    """One program for each of a tuple of states in turn, called and compiled as if it were one for all."""

    program: Any

    def __call__(
        self,
        states: tuple[TrainState, ...],
        batches: Batch,
        scale: InputScale,
        hypers: tuple[Hyperparameters, ...],
        config: TrainConfig,
    ) -> tuple[tuple[TrainState, ...], Metrics]:
        pairs = zip(states, hypers, strict=True)
        done = [self.program(state, batches, scale, hyper, config) for state, hyper in pairs]
        states, metrics = zip(*done, strict=True)
        return states, jax.tree.map(lambda *values: jnp.stack(values, axis=1), *metrics)

    def lower(
        self,
        states: tuple[TrainState, ...],
        batches: Batch,
        scale: InputScale,
        hypers: tuple[Hyperparameters, ...],
        config: TrainConfig,
    ) -> Any:
        return self.program.lower(states[0], batches, scale, hypers[0], config)
