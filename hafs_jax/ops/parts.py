"""Arrays of a host as arrays of all devices, those of other processes included, and back."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` of what all processes have: each gives its devices their parts. Its leaves are not donated.

    `shardings` is one for all leaves, or a tree of them.
    """
    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda leaf: _put(leaf, shardings), tree)
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: Sharding) -> jax.Array:
    if sharding.is_fully_addressable or getattr(leaf, "sharding", None) == sharding:
        return jax.device_put(leaf, sharding)
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def own_rows(sharding: Sharding, total: int) -> range:
    """Those of the `total` rows of batches [S, B, D] that this process's devices have, from the first to the last."""
    places = sharding.addressable_devices_indices_map((1, total, 1)).values()
    parts = [index[1].indices(total)[:2] for index in places if index is not None]
    return range(min(start for start, _ in parts), max(stop for _, stop in parts))


def put_rows(own_SBD: np.ndarray, sharding: Sharding, rows: range, total: int) -> jax.Array:
    """The batches [S, B, D], of whose `total` rows this process has those of `rows`, and other processes the rest."""
    if sharding.is_fully_addressable:
        return jax.device_put(own_SBD, sharding)
    S, _, D = own_SBD.shape

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[1].indices(total)
        return own_SBD[index[0], start - rows.start : stop - rows.start, index[2]]

    return jax.make_array_from_callback((S, total, D), sharding, part)


def whole(array: Any) -> np.ndarray:
    """The array on this host. Where other processes have parts of it, all call this, and each part travels alone.

    No device gets more of the array than one more part.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    sharding = cast(NamedSharding, array.sharding)
    (axis,) = [number for number, name in enumerate(sharding.spec) if name is not None]
    names = sharding.spec[axis]
    sizes = [sharding.mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,))]
    part = _part(sharding.mesh, sharding.spec, names)
    parts = [np.asarray(part(array, np.int32(number))) for number in range(int(np.prod(sizes)))]
    bits = np.concatenate(parts, axis)
    return bits.astype(f"u{array.dtype.itemsize}").view(array.dtype)


@functools.lru_cache(maxsize=8)
def _part(mesh: Any, spec: PartitionSpec, names: Any) -> Any:
    """A program that gives all devices one of the parts of an array, as the bits of its numbers."""

    def of_device(own: jax.Array, number: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(own, f"uint{8 * own.dtype.itemsize}").astype(jnp.uint32)
        return jax.lax.psum(jnp.where(jax.lax.axis_index(names) == number, bits, 0), names)

    everywhere = PartitionSpec()
    return jax.jit(
        jax.shard_map(of_device, mesh=mesh, in_specs=(spec, everywhere), out_specs=everywhere, check_vma=False)
    )
