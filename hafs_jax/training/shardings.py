"""Where arrays live on several devices: the one place that names the mesh's axes.

Rows of a batch are split over the axis `data`, latents over the axis `dictionary`; everything else is replicated. On
one device both axes have size 1 and nothing is split. The step itself is written as if for one device: the compiler
inserts the communication.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hafs_jax.base.errors import UserError
from hafs_jax.method.latent_axes import latent_axis

BATCHES = PartitionSpec(None, "data", None)  # [S, B, D]


def make_mesh(dictionary_shards: int) -> Mesh:
    """A mesh of all devices, `dictionary_shards` of them along the latents, the rest along the batch."""
    devices = jax.device_count()
    if devices % dictionary_shards:
        raise UserError(f"dictionary_shards={dictionary_shards}: expected a divisor of the {devices} devices")
    shape, names = (devices // dictionary_shards, dictionary_shards), ("data", "dictionary")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto, AxisType.Auto))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of the training state, by the leaf's name; Adam's moments follow their parameter."""

    def of(path: tuple, leaf: Any) -> NamedSharding:
        axis = latent_axis(path)
        spec = PartitionSpec() if axis is None else PartitionSpec(*([None] * axis), "dictionary")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of, state)
