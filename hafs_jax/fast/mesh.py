"""The devices of a training as a mesh, and how its arrays lie on them.

Rows of a batch are split over the mesh's axis `data`. Parameters, moments and averages are split by latents over all
devices, and what is counted for each latent over its axis `latent` (see `hafs_jax.ops.axes`). Everything else is on
each device. On one device nothing is split.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hafs_jax.base.errors import UserError, arg
from hafs_jax.config import TrainConfig
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.method.latent_axes import latent_axis
from hafs_jax.ops.axes import DATA, LATENT, OWNERS, Axes

BATCHES = PartitionSpec(None, DATA, None)  # [S, B, D]
EVERYWHERE = PartitionSpec()
OWNED = PartitionSpec(OWNERS)  # of an array whose first axis is the latents

_COUNTED = {"steps_since_fired_F", "rate_F", "groups_F"}  # fields of the state


def mesh_for(config: TrainConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a resolved config on `devices` (None: on all that there are).

    Raises `UserError` where it does not divide the devices, the batch or the latents, and where the method is not
    written for split latents.
    """
    devices = all_devices() if devices is None else devices
    axes = parse(config.mesh, len(devices))
    F = config.sae.F
    if config.batch_size % axes.data:
        raise UserError(
            f"{arg('batch_size', config.batch_size)}: expected a multiple of {axes.data}, by which "
            f"{_named(config, axes)} divides the batch"
        )
    if F % axes.devices:
        more = -(-F // axes.devices) * axes.devices
        raise UserError(
            f"{arg('sae.n_latents', F)}: expected a multiple of {axes.devices}, since each device of "
            f"{_named(config, axes)} keeps a part of the latents; set {arg('sae.n_latents', more)}"
        )
    if axes.latent > 1 and not ARCHITECTURES[config.sae.architecture].splits:
        raise UserError(
            f"{_named(config, axes)}: architecture {config.sae.architecture} is not declared to work on a part of the "
            "latents (`Architecture.splits`); set latent=1"
        )
    if axes.latent > 1 and config.penalty.sharing == "cofiring":
        raise UserError(
            f"{_named(config, axes)}: {arg('penalty.sharing', 'cofiring')} reads all latents of a row; set latent=1"
        )
    return make_mesh(axes, devices)


def all_devices() -> list[Any]:
    """The devices of a training, in the order of the mesh."""
    return jax.devices()


def parse(text: str, devices: int) -> Axes:
    """The axes that a `mesh` names, on so many devices; `UserError` where it is none or has another number of them."""
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else []:
        found = re.fullmatch(rf"({DATA}|{LATENT})=([1-9][0-9]{{0,5}})", part.strip())
        if found is None or found[1] in sizes:
            raise UserError(f"{arg('mesh', text)}: expected sizes of its axes such as data=2,latent=4, found {part!r}")
        sizes[found[1]] = int(found[2])
    known = next(iter(sizes.values()), 1)
    if len(sizes) < 2 and devices % known:
        raise UserError(f"{arg('mesh', text)}: expected a divisor of the {devices} devices, found {known}")
    axes = Axes(**{DATA: devices // sizes.get(LATENT, 1), LATENT: devices // known if DATA in sizes else 1, **sizes})
    if axes.devices != devices:
        raise UserError(
            f"{arg('mesh', text)}: expected {devices} devices, as there are, found {axes.data} x {axes.latent}"
        )
    return axes


def make_mesh(axes: Axes, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the devices (None: all), neighbours along `latent`."""
    grid = np.array(all_devices() if devices is None else devices).reshape(axes.data, axes.latent)
    return Mesh(grid, (DATA, LATENT), axis_types=(AxisType.Auto, AxisType.Auto))


def axes_of(mesh: Mesh) -> Axes:
    return Axes(mesh.shape[DATA], mesh.shape[LATENT])


def state_shardings(state: Any, mesh: Mesh, stacked: bool = False) -> Any:
    """A sharding for every leaf of a training state, by the leaf's name; moments lie as their parameter does.

    The leaves of `stacked` states have a leading axis for the SAEs.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        axis = latent_axis(path)
        if axis is None:
            return NamedSharding(mesh, EVERYWHERE)
        names = {getattr(entry, "name", None) for entry in path}
        over = LATENT if names & _COUNTED else OWNERS
        return NamedSharding(mesh, PartitionSpec(*([None] * (axis + stacked)), over))

    return jax.tree_util.tree_map_with_path(of, state)


def split(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function of whole arrays that each device of the mesh computes its part of, with its parts of the arrays.

    What it returns with `EVERYWHERE` must be the same on all. On one device it is the function itself.
    """
    if mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _named(config: TrainConfig, axes: Axes) -> str:
    return arg("mesh", config.mesh or f"{DATA}={axes.data}")
