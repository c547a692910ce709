"""Matrix products with inputs in the compute dtype and sums in float32, forward and backward; batches in blocks."""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

Params = dict[str, Array]
"""W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D] and the architecture's own parameters, all in float32.

Both matrices hold a latent in a row, so that what belongs to it lies together: sums over active entries read and write
rows, and both are split over devices along the same axis. Exports and `hafs_jax.load` have W_enc [D, F].
"""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(left: Float[Array, "M K"], right: Float[Array, "K N"], dtype: str) -> Float[Array, "M N"]:
    """left @ right, with both cast to `dtype` and the sums accumulated in float32.

    The two products of its gradient cast their inputs too, the cotangent included, as torch does in mixed precision.
    JAX's own gradient would keep the cotangent in float32 and so multiply in float32. That costs most of the time that
    bfloat16 saves.
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


def by_rows(left: Float[Array, "M K"], right: Float[Array, "N K"], dtype: str) -> Float[Array, "M N"]:
    """left @ right.T, rounded as `matmul` rounds; not for differentiation."""
    return _product(_by_rows(left, dtype), _by_rows(right, dtype), over=1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def affine(
    acts_BD: Float[Array, "B D"],
    centre_D: Float[Array, " D"],
    W_FD: Float[Array, "F D"],
    bias_F: Float[Array, " F"],
    dtype: str,
) -> Float[Array, "B F"]:
    """(acts - centre) @ W.T + bias, with the product's factors in `dtype` and sums in float32, as `matmul` has them.

    The gradient for the centre is that of the bias times W. So it needs no product for the gradient of the rows.
    """
    return by_rows(acts_BD - centre_D[None], W_FD, dtype) + bias_F[None]


def _affine_forward(
    acts_BD: Array, centre_D: Array, W_FD: Array, bias_F: Array, dtype: str
) -> tuple[Array, tuple[Array, Array]]:
    rows_BD = (acts_BD - centre_D[None]).astype(dtype)
    return affine(acts_BD, centre_D, W_FD, bias_F, dtype), (rows_BD, W_FD)


def _affine_backward(dtype: str, saved: tuple[Array, Array], cotangent_BF: Array) -> tuple[Array, Array, Array, Array]:
    rows_BD, W_FD = saved
    factor_BF = _by_rows(cotangent_BF, dtype)
    if dtype != "float32":  # the sum too reads the rounded numbers, as torch's does: half the bytes, one pass to cast
        factor_BF = jax.lax.optimization_barrier(factor_BF)
    onto_bias_F = jnp.sum(factor_BF.astype(jnp.float32), axis=0)
    onto_acts_BD = _product(factor_BF, _by_rows(W_FD, dtype), over=0)  # XLA leaves it out where nobody reads it
    onto_W_FD = _product(_by_rows(factor_BF.T, dtype), _by_rows(rows_BD, dtype), over=0)
    return onto_acts_BD, -(onto_bias_F @ W_FD), onto_W_FD, onto_bias_F


affine.defvjp(_affine_forward, _affine_backward)


def _product(left: Float[Array, "M K"], right: Array, over: int) -> Float[Array, "M N"]:
    """left @ right for `over` = 0 and left @ right.T for `over` = 1, the axis of `right` that is summed; in float32."""
    product = jax.lax.dot_general(left, right, (((1,), (over,)), ((), ())), preferred_element_type=jnp.float32)
    return product if left.dtype == jnp.float32 else _laid_out(product)


def _by_rows(matrix: Array, dtype: str) -> Array:
    """The matrix in `dtype`. In bfloat16 on a CPU it is laid out by rows.

    XLA's CPU kernels for bfloat16 (AMX) need operands that are laid out by rows, and sum over the columns of the left
    one. XLA converts any other product to float32, which is six times slower. It cannot run a product at all if it
    transposes the result, so the result is laid out by rows too.
    """
    matrix = matrix.astype(dtype)
    return matrix if dtype == "float32" else _laid_out(matrix)


def _laid_out(matrix: Array) -> Array:
    """The matrix, laid out by rows if the program is lowered for a CPU."""

    def by_rows(matrix: Array) -> Array:
        return cast(Array, with_layout_constraint(matrix, Layout((0, 1))))

    return cast(Array, jax.lax.platform_dependent(matrix, cpu=by_rows, default=lambda matrix: matrix))


def blocks_of(rows: int, width: int, block_bytes: int) -> int:
    """The smallest number of equal blocks for which a float32 array [rows per block, width] fits into `block_bytes`.

    The number has to divide `rows`. If it would be four times the least that fits, or more, it is 1 instead.
    """
    wanted = -(-4 * rows * width // block_bytes)
    return next((parts for parts in range(wanted, 4 * wanted) if rows % parts == 0), 1)


def row_blocks(rows_BD: Float[Array, "B D"], P: int) -> Float[Array, "P N D"]:
    """The rows in P equal blocks. Block p has every P-th row from p on.

    So a batch that is split over devices need not be moved between them.
    """
    return rows_BD.reshape(-1, P, rows_BD.shape[-1]).swapaxes(0, 1)


def joined_rows(blocks_PND: Float[Array, "P N D"]) -> Float[Array, "B D"]:
    """The rows of the blocks in their original order: the inverse of `row_blocks`."""
    return blocks_PND.swapaxes(0, 1).reshape(-1, blocks_PND.shape[-1])
