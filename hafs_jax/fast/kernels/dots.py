"""The product of two rows for each entry: the decoder's gradient for the active latents."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from hafs_jax.fast.kernels.calls import blocks_of_columns, call, spread, widened

_ENTRIES = 64  # that one program takes


def entry_dots(
    rows_N: Int[Array, " N"],
    latents_N: Int[Array, " N"],
    count: Int[Array, ""],
    of_rows: Float[Array, "B D"],
    of_latents: Float[Array, "F D"],
    interpret: bool,
) -> Float[Array, " N"]:
    """of_rows[row] . of_latents[latent] for each of the first `count` entries, in float32; 0 for the others."""
    N, of_rows, of_latents = len(rows_N), widened(of_rows), widened(of_latents)
    D, blocks = of_rows.shape[1], blocks_of_columns(of_rows.shape[1])
    width = D // blocks

    def kernel(count_ref, rows_ref, latents_ref, left_ref, right_ref, out_ref) -> None:  # type: ignore[no-untyped-def]
        def dot(n: Array, nothing: Array) -> Array:
            row, latent, sum_D = rows_ref[n], latents_ref[n], spread(jnp.zeros(width, jnp.float32), interpret)
            for columns in (pl.ds(block * width, width) for block in range(blocks)):
                left_D, right_D = (
                    spread(ref[at, columns], interpret).astype(jnp.float32)
                    for ref, at in ((left_ref, row), (right_ref, latent))
                )
                sum_D += left_D * right_D
            out_ref[n] = jnp.sum(sum_D)
            return nothing

        first = pl.program_id(0) * _ENTRIES
        jax.lax.fori_loop(first, jnp.minimum(first + _ENTRIES, count_ref[0]), dot, jnp.int32(0))

    arrays = (count.astype(jnp.int32)[None], rows_N, latents_N, of_rows, of_latents)
    out = jax.ShapeDtypeStruct((N,), jnp.float32)
    found_N = call("entry_dots", kernel, -(-N // _ENTRIES), out, arrays, interpret)
    return jnp.where(jnp.arange(N) < count, found_N, 0.0)
