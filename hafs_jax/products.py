"""Matrix products of the SAE: inputs in the compute dtype, sums in float32, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

Params = dict[str, Array]
"""W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D] and what the architecture adds, all float32."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(left: Float[Array, "M K"], right: Float[Array, "K N"], dtype: str) -> Float[Array, "M N"]:
    """left @ right with both cast to `dtype` and the products accumulated in float32.

    The gradient's two products are of the same kind: the cotangent is cast too, as mixed precision is done in torch.
    JAX's own gradient keeps it in float32, and so multiplies in float32, which costs most of what bfloat16 saves.
    """
    kind = jnp.dtype(dtype)
    return jnp.matmul(left.astype(kind), right.astype(kind), preferred_element_type=jnp.float32)


def _forward(left: Array, right: Array, dtype: str) -> tuple[Array, tuple[Array, Array]]:
    kind = jnp.dtype(dtype)
    return matmul(left, right, dtype), (left.astype(kind), right.astype(kind))


def _backward(dtype: str, inputs: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    left, right = inputs
    cotangent = cotangent.astype(dtype)
    onto_left = jax.lax.dot_general(
        cotangent, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )  # cotangent @ right.T, without writing right.T
    return onto_left, jnp.matmul(_row_major(left.T), cotangent, preferred_element_type=jnp.float32)


matmul.defvjp(_forward, _backward)


def _row_major(matrix: Array) -> Array:
    """The same values; on a CPU, bfloat16 is laid out by rows.

    XLA's CPU kernels for bfloat16 (AMX) take no operand that is contracted over its rows: such a product it converts to
    float32, six times slower.
    """
    if matrix.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return matrix
    return with_layout_constraint(matrix, Layout((0, 1)))
