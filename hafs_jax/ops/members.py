"""SAEs that are trained together in one program, along a mapped axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def largest_of_members(value: Array, axis: str | None) -> Array:
    """The largest of a number or flag over the SAEs that are trained together along `axis`; itself without one.

    A branch on this value stays a branch. On a value that differs between them, `vmap` takes every branch and selects.
    """
    return value if axis is None else jax.lax.pmax(value.astype(jnp.int32), axis).astype(value.dtype)
