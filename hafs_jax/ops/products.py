"""Matrix products of the SAE: inputs in the compute dtype, sums in float32, forward and backward."""

from functools import partial
from typing import cast

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
    return _product(_by_rows(left, dtype), _by_rows(right, dtype), over=0)


def _forward(left: Array, right: Array, dtype: str) -> tuple[Array, tuple[Array, Array]]:
    kind = jnp.dtype(dtype)
    return matmul(left, right, dtype), (left.astype(kind), right.astype(kind))


def _backward(dtype: str, inputs: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    left, right = inputs
    cotangent = _by_rows(cotangent, dtype)
    onto_left = _product(cotangent, _by_rows(right, dtype), over=1)
    onto_right = _product(_by_rows(left.T, dtype), cotangent, over=0)
    return onto_left, onto_right


matmul.defvjp(_forward, _backward)


def _product(left: Float[Array, "M K"], right: Array, over: int) -> Float[Array, "M N"]:
    """left @ right, or left @ right.T where the sum goes over right's axis 1, in float32."""
    product = jax.lax.dot_general(left, right, (((1,), (over,)), ((), ())), preferred_element_type=jnp.float32)
    return product if left.dtype == jnp.float32 else _laid_out(product)


def _by_rows(matrix: Array, dtype: str) -> Array:
    """The matrix in `dtype`. In bfloat16 on a CPU it is laid out by rows.

    XLA's CPU kernels for bfloat16 (AMX) take operands by rows and sum over the left one's columns. XLA converts other
    products to float32, which is six times slower. It cannot run a product whose result it transposes at all, so the
    result is held by rows too.
    """
    matrix = matrix.astype(dtype)
    return matrix if dtype == "float32" else _laid_out(matrix)


def _laid_out(matrix: Array) -> Array:
    """The matrix, laid out by rows where the program is lowered for a CPU."""

    def by_rows(matrix: Array) -> Array:
        return cast(Array, with_layout_constraint(matrix, Layout((0, 1))))

    return cast(Array, jax.lax.platform_dependent(matrix, cpu=by_rows, default=lambda matrix: matrix))


def blocks_of(rows: int, width: int, block_bytes: int) -> int:
    """The fewest equal blocks of rows, of which one float32 array [rows of a block, width] takes at most `block_bytes`.

    One block where the number of rows has no divisor from there to four times as many.
    """
    wanted = -(-4 * rows * width // block_bytes)
    return next((parts for parts in range(wanted, 4 * wanted) if rows % parts == 0), 1)


def row_blocks(rows_BD: Float[Array, "B D"], P: int) -> Float[Array, "P N D"]:
    """The rows in P equal blocks. Block p is every P-th row from p on: a batch split over devices stays where it is."""
    return rows_BD.reshape(-1, P, rows_BD.shape[-1]).swapaxes(0, 1)


def whole_rows(blocks_PND: Float[Array, "P N D"]) -> Float[Array, "B D"]:
    """The rows that `row_blocks` put into blocks."""
    return blocks_PND.swapaxes(0, 1).reshape(-1, blocks_PND.shape[-1])
