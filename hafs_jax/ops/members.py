"""Reductions over the SAEs that one program trains together, along a mapped axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def largest_of_members(value: Array, axis: str | None) -> Array:
    """The largest value of a number or flag over the SAEs along `axis`; the value itself if `axis` is None.

    A branch on this value stays a branch. On a value that may differ between the SAEs, `vmap` would compute every
    branch and select.
    """
    return value if axis is None else jax.lax.pmax(value.astype(jnp.int32), axis).astype(value.dtype)
