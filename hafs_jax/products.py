"""Matrix products of the SAE: inputs in the compute dtype, sums in float32."""

import jax.numpy as jnp
from jaxtyping import Array

Params = dict[str, Array]
"""W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D] and what the architecture adds, all float32."""


def matmul(left: Array, right: Array, dtype: str) -> Array:
    """left @ right with both cast to `dtype` and the products accumulated in float32."""
    kind = jnp.dtype(dtype)
    return jnp.matmul(left.astype(kind), right.astype(kind), preferred_element_type=jnp.float32)
