"""The way of the decoder's rows to the devices that compute their chunks, and of the gradients back.

A chunk of the penalty's random partition holds latents from all over the dictionary, and a device owns latents of one
part of it. Chunks are divided among the devices in order. Each sends its rows to where their chunks are, in a *lane*
for each device, a fixed number of rows at once. Which row goes where is known to all, since all draw the same
partition. What travels is one in `devices` of the decoder for each device, there and back, however many there are.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hafs_jax.ops.axes import Axes

_SPREAD = 8  # standard deviations above the mean of a lane's rows: one turn is then enough, all but surely


def lane_rows(owned: int, devices: int) -> int:
    """The rows that travel at once from one device to another, of `owned` rows that go to random places."""
    mean = owned / devices
    return min(owned, math.ceil(mean + _SPREAD * math.sqrt(mean)))


class Lanes:
    """The exchange for one partition.

    `places_F` is the place of each latent among the chunks' places, `shape` the number and size of the chunks.
    """

    def __init__(
        self, places_F: Int[Array, " F"], shape: tuple[int, ...], owned: int, axes: Axes, lane: int | None = None
    ) -> None:
        self._axes, self._size = axes, shape[1]
        self._count = -(-shape[0] // axes.devices)  # of chunks on each device; the last ones may be empty
        self._lane = lane_rows(owned, axes.devices) if lane is None else lane
        places_O = jax.lax.dynamic_slice_in_dim(places_F, axes.first_owned(owned), owned)
        here = self._count * self._size
        self._to_O, self._at_O = places_O // here, places_O % here
        onto_ON = (self._to_O[:, None] == jnp.arange(axes.devices)[None]).astype(jnp.int32)
        self._slot_O = jnp.sum((jnp.cumsum(onto_ON, axis=0) - onto_ON) * onto_ON, axis=1)  # its place in its lane
        self._turns = axes.largest(jnp.max(self._slot_O) // self._lane + 1)

    def own_chunks(self, of_chunks: Array) -> Array:
        """This device's part of an array whose first axis is all chunks, with zeros for those that there are not."""
        missing = self._count * self._axes.devices - len(of_chunks)
        padded = jnp.pad(of_chunks, [(0, missing), *[(0, 0)] * (of_chunks.ndim - 1)])
        return jax.lax.dynamic_slice_in_dim(padded, self._axes.first_owned(self._count), self._count)

    def to_chunks(self, rows_OD: Float[Array, "O D"]) -> Float[Array, "C M D"]:
        """The rows of this device's chunks, of rows that each device owns. A place without a latent has zeros."""

        def turn(number: Array, found_PD: Array) -> Array:
            sent_NXD = self._lanes(number, rows_OD)
            got_NXD, at_NX = self._axes.exchanged(sent_NXD), self._places(number)
            return found_PD.at[at_NX.reshape(-1)].set(got_NXD.reshape(-1, rows_OD.shape[1]), mode="drop")

        nothing_PD = jnp.zeros((self._count * self._size, rows_OD.shape[1]))
        return self._each_turn(turn, nothing_PD).reshape(self._count, self._size, -1)

    def to_owners(self, rows_CMD: Float[Array, "C M D"]) -> Float[Array, "O D"]:
        """The rows that this device owns, of rows of each device's chunks."""
        rows_PD = rows_CMD.reshape(-1, rows_CMD.shape[-1])

        def turn(number: Array, found_OD: Array) -> Array:
            at_NX = self._places(number)
            got_NXD = self._axes.exchanged(rows_PD.at[at_NX].get(mode="fill", fill_value=0.0))
            slot_O = self._slot_O - number * self._lane
            is_now_O = (slot_O >= 0) & (slot_O < self._lane)
            return jnp.where(is_now_O[:, None], got_NXD[self._to_O, jnp.where(is_now_O, slot_O, 0)], found_OD)

        return self._each_turn(turn, jnp.zeros((len(self._to_O), rows_PD.shape[1])))

    def _each_turn(self, turn: Callable[[Array, Array], Array], start: Array) -> Array:
        return jax.lax.fori_loop(0, self._turns, turn, start)

    def _lanes(self, number: Array, rows_OD: Array) -> Float[Array, "N X D"]:
        """What this device sends to each in a turn."""
        slot_O = self._slot_of(number)
        lanes = jnp.zeros((self._axes.devices, self._lane, rows_OD.shape[1]), rows_OD.dtype)
        return lanes.at[self._to_O, slot_O].set(rows_OD, mode="drop")

    def _places(self, number: Array) -> Int[Array, "N X"]:
        """Where in its chunks what this device gets in a turn belongs; beyond them where a lane is not full."""
        slot_O = self._slot_of(number)
        none = self._count * self._size
        lanes = jnp.full((self._axes.devices, self._lane), none, jnp.int32)
        return self._axes.exchanged(lanes.at[self._to_O, slot_O].set(self._at_O.astype(jnp.int32), mode="drop"))

    def _slot_of(self, number: Array) -> Int[Array, " O"]:
        """The place in its lane of each row that travels in a turn; out of bounds for the others."""
        slot_O = self._slot_O - number * self._lane
        return jnp.where(slot_O < 0, self._lane, slot_O)
