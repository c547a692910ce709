"""The devices of a step as a grid, and all that they tell each other. No other module of the step names a collective.

The grid has `data` rows and `latent` columns of devices. A device works on the rows of the batch that belong to its
place along `data`, and on the latents that belong to its place along `latent`. What is kept between steps, parameters
and moments, is split over both: of F latents each device *owns* F / (data latent), in the order of latents.

The step is a program for one device that runs on all of them at once (`jax.shard_map`), with arrays of its own rows and
latents. Where it needs those of others it calls a method of `Axes`. On one device each returns what it was given.

Gradients are those of the mean over `data` of what the devices compute as their loss: each differentiates its own, and
`shared_gradients` takes the mean. So the methods that are differentiated say how a gradient passes them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from hafs_jax.ops.products import Params

Tree = TypeVar("Tree")

DATA, LATENT = "data", "latent"
OWNERS = (LATENT, DATA)  # the order in which devices own latents: those of one place along `latent` lie together


@dataclass(frozen=True)
class Axes:
    """The shape of the grid of devices: static, so a step is compiled for it."""

    data: int = 1
    latent: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.latent

    # Sums that are differentiated: of values, that come out the same on all devices of the axis.

    def over_latents(self, partial_sum: Array) -> Array:
        """The sum over `latent` of what each device sums over its own latents. Its gradient goes to each unchanged."""
        return partial_sum if self.latent == 1 else _summed(partial_sum, LATENT)

    def to_latents(self, value: Array) -> Array:
        """A value that all devices along `latent` have, on its way to their latents. Their gradients are added."""
        return value if self.latent == 1 else _spread(value, LATENT)

    def over_rows(self, mean: Array) -> Array:
        """The mean over `data` of what each device averages over its own rows, differentiated as its own mean is.

        The mean over `data` of the gradients is then that of the whole mean.
        """
        return mean if self.data == 1 else _averaged(mean, DATA)

    # The same without a gradient.

    def sum_of_rows(self, value: Array) -> Array:
        """The sum over `data`."""
        return value if self.data == 1 else jax.lax.psum(value, DATA)

    def sum_of_latents(self, value: Array) -> Array:
        """The sum over `latent`."""
        return value if self.latent == 1 else jax.lax.psum(value, LATENT)

    def sum_of_all(self, value: Array) -> Array:
        """The sum over all devices."""
        return value if self.devices == 1 else jax.lax.psum(value, OWNERS)

    def least(self, value: Array) -> Array:
        """The smallest over all devices."""
        return value if self.devices == 1 else jax.lax.pmin(value, OWNERS)

    def largest(self, value: Array) -> Array:
        """The largest over all devices."""
        return value if self.devices == 1 else jax.lax.pmax(value, OWNERS)

    def any_latent(self, flag: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether the flag holds on a device along `latent`."""
        return flag if self.latent == 1 else jax.lax.pmax(flag.astype(jnp.int32), LATENT).astype(bool)

    def everywhere(self, flag: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether the flag holds on all devices."""
        return flag if self.devices == 1 else jax.lax.pmin(flag.astype(jnp.int32), OWNERS).astype(bool)

    # Latents: all, those of a place along `latent`, those that a device owns.

    def first_latent(self, count: int) -> Int[Array, ""] | int:
        """The number of the first of this device's `count` latents."""
        return 0 if self.latent == 1 else jax.lax.axis_index(LATENT) * count

    def first_owned(self, count: int) -> Int[Array, ""] | int:
        """The number of the first of the `count` latents that this device owns."""
        return 0 if self.devices == 1 else jax.lax.axis_index(OWNERS) * count

    def own_of_all(self, value: Array) -> Array:
        """This device's part of an array whose first axis is all latents."""
        if self.latent == 1:
            return value
        count = len(value) // self.latent
        return jax.lax.dynamic_slice_in_dim(value, self.first_latent(count), count)

    def owned(self, value: Array) -> Array:
        """What this device owns of an array whose first axis is its latents."""
        if self.data == 1:
            return value
        count = len(value) // self.data
        return jax.lax.dynamic_slice_in_dim(value, jax.lax.axis_index(DATA) * count, count)

    def all_latents(self, value: Array) -> Array:
        """The array whose first axis is all latents, of this device's part."""
        return value if self.latent == 1 else jax.lax.all_gather(value, LATENT, tiled=True)

    def of_owners(self, owned: Array) -> Array:
        """The array whose first axis is this device's latents, of what each device along `data` owns."""
        return owned if self.data == 1 else jax.lax.all_gather(owned, DATA, tiled=True)

    def all_owned(self, value: Array) -> Array:
        """The array whose first axis is all latents, of what each device owns."""
        return value if self.devices == 1 else jax.lax.all_gather(value, OWNERS, tiled=True)

    def rows_of_owned(self, owned_OD: Float[Array, "O D"], ids_M: Int[Array, " M"]) -> Float[Array, "M D"]:
        """The rows of any M latents, of an array of which each device owns some."""
        if self.devices == 1:
            return owned_OD[ids_M]
        here_M = ids_M - self.first_owned(len(owned_OD))
        is_here_M = (here_M >= 0) & (here_M < len(owned_OD))
        return self.sum_of_all(jnp.where(is_here_M[:, None], owned_OD[jnp.where(is_here_M, here_M, 0)], 0.0))

    def rows_for_owned(self, rows_BD: Float[Array, "B D"], ids_F: Int[Array, " F"]) -> Float[Array, "O D"]:
        """For each latent that this device owns a row of the whole batch: `ids_F` has its number for this device's."""
        if self.data == 1:
            return rows_BD[ids_F]
        here_F = ids_F - jax.lax.axis_index(DATA) * len(rows_BD)
        is_here_F = (here_F >= 0) & (here_F < len(rows_BD))
        rows_FD = jnp.where(is_here_F[:, None], rows_BD[jnp.where(is_here_F, here_F, 0)], 0.0)
        return jax.lax.psum_scatter(rows_FD, DATA, tiled=True)

    def all_rows(self, value: Array) -> Array:
        """The array whose first axis is all rows of the batch, of this device's."""
        return value if self.data == 1 else jax.lax.all_gather(value, DATA, tiled=True)

    def beside(self, values_BK: Float[Array, "B K"]) -> Float[Array, "B LK"]:
        """For each row what all devices along `latent` have, in the order of latents."""
        return values_BK if self.latent == 1 else jax.lax.all_gather(values_BK, LATENT, axis=1, tiled=True)

    def exchanged(self, lanes_NXD: Array) -> Array:
        """Lane n of each device, to device n: all devices at once. What comes back has a lane of each device."""
        return lanes_NXD if self.devices == 1 else jax.lax.all_to_all(lanes_NXD, OWNERS, 0, 0)

    # Parameters and gradients.

    def shared_params(self, owned: Params, dtype: str) -> Params:
        """The parameters of this device's latents, in float32, from what the devices along `data` own.

        Both matrices travel in `dtype`, the dtype in which they are multiplied.
        """
        if self.data == 1:
            return owned

        def whole(name: str, value: Array) -> Array:
            if value.ndim == 2:  # the barriers keep XLA from moving the casts to the other side of the collective
                narrow = jax.lax.optimization_barrier(value.astype(dtype))
                gathered = jax.lax.all_gather(narrow, DATA, tiled=True)
                return jax.lax.optimization_barrier(gathered).astype(jnp.float32)
            return jax.lax.all_gather(value, DATA, tiled=True)

        return {name: value if name == "b_dec" else whole(name, value) for name, value in owned.items()}

    def shared_gradients(self, grads: Params) -> Params:
        """The mean over `data` of the gradients, of each latent's on the device that owns it."""
        if self.data == 1:
            return grads

        def mean(name: str, value: Array) -> Array:
            if name == "b_dec":
                return jax.lax.pmean(value, DATA)
            return jax.lax.psum_scatter(value, DATA, tiled=True) / self.data

        return {name: mean(name, value) for name, value in grads.items()}

    def norm(self, owned: Any) -> Float[Array, ""]:
        """The norm of all numbers of parameters or gradients, of which each device owns some and all have b_dec."""
        if self.devices == 1:
            return cast(Array, optax.global_norm(owned))
        squares = {name: jnp.sum(value**2) for name, value in owned.items()}
        of_all = squares.pop("b_dec", jnp.zeros(()))
        return jnp.sqrt(of_all + self.sum_of_all(sum(squares.values(), jnp.zeros(()))))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _summed(value: Array, name: str) -> Array:
    return jax.lax.psum(value, name)


_summed.defvjp(lambda value, name: (_summed(value, name), None), lambda name, _, cotangent: (cotangent,))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _averaged(value: Array, name: str) -> Array:
    return jax.lax.pmean(value, name)


_averaged.defvjp(lambda value, name: (_averaged(value, name), None), lambda name, _, cotangent: (cotangent,))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(value: Array, name: str) -> Array:
    return value


_spread.defvjp(lambda value, name: (value, None), lambda name, _, cotangent: (jax.lax.psum(cotangent, name),))
