"""Our update of the optimizer, in place, against optax's update of the same gradients followed by a selection."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import Row, interleaved
from benchmarks.workloads import D, config_of
from hafs_jax.config import TrainConfig
from hafs_jax.fast.adam import optimizer, plain_update, update
from hafs_jax.fast.plan import choose
from hafs_jax.method.sae import init_params
from hafs_jax.ops.products import Params

_STEPS, _RATE = 4, 1e-5
Update = Callable[[Params, optax.OptState, Params, jax.Array, jax.Array, jax.Array, TrainConfig], Any]


def measure(quick: bool) -> Iterator[Row]:
    """Rows with milliseconds per update, the norm of the gradient included, and megabytes of temporary memory."""
    for F in (4_608,) if quick else (4_608, 16_384):
        config = config_of("topk", F)
        programs = {"ours": _program(config, _ours), "theirs": _program(config, _selected)}
        _check_same(config, *programs.values())
        runs = {name: _runs(config, program) for name, program in programs.items()}
        times = interleaved(runs, 3 if quick else 7)
        ours, theirs = (times[name].median / _STEPS * 1e3 for name in programs)
        temporary = [program.memory_analysis().temp_size_in_bytes / 1e6 for program in programs.values()]
        sizes, peer = {"D": D, "F": F}, "optax's update, selected"
        yield Row(f"the optimizer's update, F={F:,}", peer, ours, theirs, "ms", theirs / ours, None, sizes=sizes)
        name = f"temporary memory of the optimizer's update, F={F:,}"
        yield Row(name, peer, *temporary, "MB", temporary[0] / temporary[1], None, "<=", sizes)


def _ours(
    params: Params, state: optax.OptState, grads: Params, norm: Any, rate: jax.Array, ok: jax.Array, config: TrainConfig
) -> tuple[Params, optax.OptState]:
    return update(params, state, grads, norm, rate, ok, config, choose(config))


def _selected(
    params: Params, state: optax.OptState, grads: Params, _: Any, rate: jax.Array, ok: jax.Array, config: TrainConfig
) -> tuple[Params, optax.OptState]:
    """The update without regard for memory: the new values are computed and then selected where `ok`."""
    new = plain_update(params, state, grads, rate, config)
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, (params, state))


def _program(config: TrainConfig, one: Update) -> Any:
    """The compiled program of `_STEPS` updates: (params, state), gradients -> (params, state)."""

    def updates(old: tuple[Params, optax.OptState], grads: Params) -> tuple[Params, optax.OptState]:
        def body(_: Any, old: tuple[Params, optax.OptState]) -> tuple[Params, optax.OptState]:
            norm = optax.global_norm(grads)
            return one(*old, grads, norm, jnp.float32(_RATE), jnp.isfinite(norm), config)

        return jax.lax.fori_loop(0, _STEPS, body, old)

    return jax.jit(updates, donate_argnums=0).lower(*_start(config)).compile()


def _start(config: TrainConfig) -> tuple[tuple[Params, optax.OptState], Params]:
    params = init_params(config.sae, D, jax.random.key(0))
    grads = {name: 1e-3 * jax.random.normal(jax.random.key(1), value.shape) for name, value in params.items()}
    return (params, optimizer(config, D).init(params)), grads


def _runs(config: TrainConfig, program: Any) -> Callable[[], Any]:
    old, grads = _start(config)
    state = [old]

    def run() -> None:
        state[0] = program(state[0], grads)
        jax.block_until_ready(state[0])

    return run


def _check_same(config: TrainConfig, ours: Any, theirs: Any) -> None:
    """Raises `RuntimeError` if the two give different parameters or moments."""
    for mine, other in zip(*(jax.tree.leaves(program(*_start(config))) for program in (ours, theirs)), strict=True):
        if not np.allclose(mine, other, rtol=1e-4, atol=1e-7):
            raise RuntimeError(f"the update in place differs from optax's by {np.abs(mine - other).max():.1e}")
