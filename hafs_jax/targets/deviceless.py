"""The training step, compiled for a GPU on a machine that has none."""

from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from hafs_jax.base.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.fast.mesh import BATCHES, mesh_for, state_shardings
from hafs_jax.method.sae import InputScale
from hafs_jax.presets import with_fields
from hafs_jax.targets.gpus import Gpu
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, init_state, shared_config

_ANY = 0.1  # for numbers that a training resolves from data, which no program depends on

Arguments = tuple[Any, Any, Any, Any, TrainConfig]
"""What a program of steps takes: state, batches, scale, hyperparameters and config, as shapes with shardings."""


class NoCompiler(UserError):
    """There is no compiler for the target on this machine."""


def devices_of(gpu: Gpu, count: int = 1) -> list[Any]:
    """Stand-ins for `count` GPUs of one host. Raises `NoCompiler` where the CUDA wheels are not installed."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=gpu.name, target_config=gpu.target_config, topology=f"1x1x{count}"
        )
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        if any(word in str(error).lower() for word in ("unknown backend", "cuda", "not found", "no pjrt", "plugin")):
            raise NoCompiler(
                f"target {gpu.name}: expected JAX's compiler for CUDA, found none; pip install 'hafs-jax[gpu-check]' "
                "(5.6 GB, Linux, no GPU needed)"
            ) from error
        raise
    return list(topology.devices)


def arguments_on(
    devices: list[Any],
    config: TrainConfig,
    d_model: int,
    d_out: int | None = None,
    steps: int = 1,
    dtype: str = "bfloat16",
) -> Arguments:
    """The arguments of `steps` steps on `devices`, whose rows are of `dtype` in the store."""
    config = _resolved(config)
    mesh, config = mesh_for(config, devices), shared_config(config)
    hyper = hyperparameters(config)
    state = jax.eval_shape(lambda: init_state(config, d_model, jax.random.key(0), hyper, d_out))
    state = jax.tree.map(_placed, state, state_shardings(state, mesh))
    widths = [d_model] if d_out is None else [d_model, d_out]
    rows, everywhere = NamedSharding(mesh, BATCHES), NamedSharding(mesh, PartitionSpec())
    batches = tuple(jax.ShapeDtypeStruct((steps, config.batch_size, D), dtype, sharding=rows) for D in widths)

    def scale_of(D: int, target: InputScale | None = None) -> InputScale:
        number: Any = jax.ShapeDtypeStruct((), np.float32, sharding=everywhere)
        mean_D: Any = jax.ShapeDtypeStruct((D,), np.float32, sharding=everywhere)
        return InputScale(mean_D, number, number, target)

    scale = scale_of(d_model, None if d_out is None else scale_of(d_out))
    hyper = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=everywhere), hyper)
    return state, batches if d_out is not None else batches[0], scale, hyper, config


def compiled_for(devices: list[Any], arguments: Arguments) -> Any:
    """The compiled program of the arguments' steps."""
    spread = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
    platform = "cpu" if devices[0].platform == "cpu" else "gpu"
    program: Any = compile_steps(spread, platform=platform)
    return program.lower(*arguments).compile()


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _resolved(config: TrainConfig) -> TrainConfig:
    """The config with any numbers for those that come from data and do not change the program."""
    changes: dict[str, Any] = {}
    if config.penalty.kind != "none":
        missing = [name for name in ("tau", "mu0") if getattr(config.penalty, name) is None]
        changes = {"penalty": dict.fromkeys(missing, _ANY)} if missing else {}
    if config.tokens is None:
        changes["tokens"] = 10_000 * config.batch_size
    return with_fields(config, changes)
