"""Adam's update of the decoder: a row's gradient, moments and norm stay in registers, so memory is passed over once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from hafs_jax.fast.kernels.calls import THREADS, blocks_of_columns, call, spread

_MOST_BLOCKS = 2  # of columns, whose gradients, moments and parameters one program's registers hold


def _inverse_root(squares: Array) -> Array:
    """1 / sqrt(squares), and a number where they are 0. Pallas has no square root for Mosaic."""
    return jax.lax.rsqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def takes(D: int, interpret: bool) -> bool:
    """Whether a row of D numbers fits a program's threads as it lies; to widen the matrices would cost more."""
    blocks = blocks_of_columns(D)
    return blocks <= _MOST_BLOCKS and D % (blocks if interpret else THREADS * blocks) == 0


def adam_of_rows(
    W_FD: Float[Array, "F D"],
    gradient_FD: Float[Array, "F D"],
    mu_FD: Float[Array, "F D"],
    nu_FD: Float[Array, "F D"],
    scalars_S: Float[Array, " S"],
    decays: tuple[float, float],
    epsilon: float,
    interpret: bool,
    turns: bool,
) -> tuple[Float[Array, "F D"], Float[Array, "F D"], Float[Array, "F D"]]:
    """The rows after one update, of norm 1, and their moments; all unchanged where the last of the scalars is 0.

    `scalars_S` are what the gradient is multiplied with, the learning rate, the bias corrections of both moments (what
    each is multiplied with), and 0 or 1. With `turns` what a row's gradient has along the row is taken out first. A row
    that becomes zeros stays so.
    """
    (F, D), (beta1, beta2) = W_FD.shape, decays
    width = D // blocks_of_columns(D)
    columns = [pl.ds(start, width) for start in range(0, D, width)]

    def kernel(scalars_ref: Any, *refs: Any) -> None:
        W_ref, gradient_ref, mu_ref, nu_ref, *out_refs = refs
        row = pl.program_id(0)

        def of_row(ref: Any) -> list[Array]:
            return [spread(ref[row, part], interpret) for part in columns]

        def total(parts: list[Array]) -> Array:
            return sum((jnp.sum(part) for part in parts[1:]), jnp.sum(parts[0]))

        @pl.when(scalars_ref[4] > 0)
        def _() -> None:
            clip, rate, mean, square = (scalars_ref[n] for n in range(4))
            W, gradient = of_row(W_ref), of_row(gradient_ref)
            if turns:
                along = total([g * w for g, w in zip(gradient, W, strict=True)])
                gradient = [g - along * w for g, w in zip(gradient, W, strict=True)]
            gradient = [clip * g for g in gradient]
            mu = [beta1 * m + (1 - beta1) * g for m, g in zip(of_row(mu_ref), gradient, strict=True)]
            nu = [beta2 * v + (1 - beta2) * g * g for v, g in zip(of_row(nu_ref), gradient, strict=True)]
            roots = [square * v * _inverse_root(square * v) for v in nu]
            W = [w - rate * (mean * m / (root + epsilon)) for w, m, root in zip(W, mu, roots, strict=True)]
            inverse = _inverse_root(total([w * w for w in W]))
            W = [inverse * w for w in W]
            for ref, parts in zip(out_refs, (W, mu, nu), strict=True):
                for part, value in zip(columns, parts, strict=True):
                    ref[row, part] = value

    out = (jax.ShapeDtypeStruct((F, D), jnp.float32),) * 3
    arrays = (scalars_S, W_FD, gradient_FD, mu_FD, nu_FD)
    return call("adam_of_rows", kernel, F, out, arrays, interpret, in_place={1: 0, 3: 1, 4: 2})
