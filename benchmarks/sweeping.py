"""Four SAEs trained in one program on the same batches, against four separate trainings of the same steps."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Row, interleaved
from benchmarks.workloads import config_of, our_steps, planted_rows
from hafs_jax.fast.plan import this_machine
from hafs_jax.method.sae import InputScale, init_params
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, shared_config, state_of
from hafs_jax.training.sweeps import automatic

_MEMBERS, _STEPS = 4, 8  # SAEs; steps per dispatch, the default
_D = 576


def measure(quick: bool) -> Iterator[Row]:
    """Rows with tokens x SAEs per second. Target: three times the separate rate on a GPU, the same rate on a CPU."""
    on_cpu = this_machine().platform == "cpu"
    sizes = ((1_024, 256),) if quick else ((1_024, 256), (4_096, 1_024))
    for F, B in sizes if on_cpu else ((4_096, 2_048),):
        rows_BD = planted_rows(B, seed=0)
        config = config_of("relu", F, batch_size=B)
        together = automatic()
        runs = {"ours": _together(config, rows_BD, together), "theirs": _apart(config, rows_BD)}
        times = interleaved(runs, 3 if quick else 9)
        amount = _MEMBERS * _STEPS * B
        (ours, spread), (theirs, _) = times["ours"].rate(amount), times["theirs"].rate(amount)
        name = f"{_MEMBERS} SAEs together ({together}), F={F:,}"
        target, found = 1.0 if on_cpu else 3.0, {"B": B, "D": _D, "F": F, "members": _MEMBERS}
        yield Row(
            name, "one by one", ours, theirs, "tokens/s x SAEs", ours / theirs, target, sizes=found, spread=spread
        )


def _together(config: Any, rows_BD: np.ndarray, together: str) -> Callable[[], Any]:
    hyper = hyperparameters(config)
    members = [
        state_of(config, init_params(config.sae, _D, jax.random.key(seed)), jax.random.key(seed), hyper)
        for seed in range(_MEMBERS)
    ]
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (members, [hyper] * _MEMBERS)]
    first, hypers = stacked if together == "vmap" else (tuple(members), (hyper,) * _MEMBERS)
    state = [first]
    scale = InputScale(jnp.zeros(_D), jnp.float32(1.0), jnp.float32(_D))
    batches, steps = jnp.asarray(np.stack([rows_BD] * _STEPS)), compile_steps(None, together)

    def run() -> None:
        state[0], metrics = steps(state[0], batches, scale, hypers, shared_config(config))
        jax.block_until_ready(metrics)

    return run


def _apart(config: Any, rows_BD: np.ndarray) -> Callable[[], Any]:
    runs = [our_steps(config, rows_BD, _STEPS) for _ in range(_MEMBERS)]

    def run() -> None:
        for member in runs:
            member()

    return run
