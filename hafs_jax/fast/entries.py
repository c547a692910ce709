"""Sparse products: the SAE's products with its active latents alone. Pure functions.

The plain twin is the dense products in `hafs_jax.method.sae`. A step has five products of B x D x F. The encoder's
forward product is dense. The other four multiply by latents most of which are zero:

- the decoder's forward product;
- its gradient for the latents;
- the gradients of both matrices.

Here these are sums over the active entries. There are B k of them, or with ReLU a number that varies. Values and
gradients are those of the dense form, in bfloat16 up to its rounding; tests hold them to it.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hafs_jax.config import SAEConfig, TrainConfig
from hafs_jax.fast.forms import capacity, form_of
from hafs_jax.fast.plan import Plan
from hafs_jax.method.sae import centre
from hafs_jax.ops.products import Params, blocks_of, by_rows, row_blocks
from hafs_jax.ops.selection import Entries, where_true

_UNROLLED = 4  # entries added per iteration of the loop
_CHUNK = 4096  # entries whose rows are gathered at once


class SparseLatents(struct.PyTreeNode):
    """The active latents of a batch as a list of N entries, row by row. Entries of value 0 are padding."""

    values_N: Float[Array, " N"]
    rows_N: Int[Array, " N"]
    latents_N: Int[Array, " N"]
    count: Int[Array, ""]  # all entries from this number on are padding
    complete: Bool[Array, ""]  # whether all active latents fitted into the capacity
    per_row: int | None = struct.field(pytree_node=False, default=None)  # entries of each row, where all have as many

    def firing(self, n_latents: int) -> Float[Array, " F"]:
        """The number of rows in which each latent fires."""
        counts_F = jnp.zeros(n_latents, jnp.int32).at[self.latents_N].add((self.values_N > 0).astype(jnp.int32))
        return counts_F.astype(jnp.float32)


def active_latents(
    acts_BD: Float[Array, "B D"],
    params: Params,
    k: Array,
    config: TrainConfig,
    plan: Plan,
) -> SparseLatents:
    """The entries of relu(`pre_activations`) that the config's architecture makes active; not differentiable.

    If a row's latents do not depend on the other rows, a large batch is taken in blocks of rows.
    """
    form, axes = form_of(config.sae), plan.axes
    select = form.select
    assert select is not None

    if plan.kernels != "off" and form.takes_top_k:
        from hafs_jax.fast.kernels.top import largest

        select = partial(
            cast(Callable[..., Entries], select), top_k=partial(largest, interpret=plan.kernels == "interpreted")
        )

    centre_D, bias_F = centre(params, config.sae), params["b_enc"]
    W_FD = params["W_enc"].astype(config.sae.compute_dtype)  # here, lest it is cast for each block of rows
    per_row = capacity(config.sae) if form.by_row and not form.any_number and axes.latent == 1 else None

    def of_rows(acts_ND: Array) -> SparseLatents:
        product_NF = by_rows(acts_ND - centre_D[None], W_FD, config.sae.compute_dtype)
        entries: Entries = select(product_NF, bias_F, config.sae, k, axes)
        values_N = product_NF[entries.rows_N, entries.columns_N] + bias_F[entries.columns_N]
        values_N = jnp.where(entries.real_N, values_N, 0.0)
        count = jnp.max(jnp.where(entries.real_N, jnp.arange(1, len(values_N) + 1, dtype=jnp.int32), 0))
        return SparseLatents(values_N, entries.rows_N, entries.columns_N, count, entries.complete, per_row)

    P = blocks_of(len(acts_BD), len(bias_F), plan.block_bytes) if form.by_row else 1
    if P == 1:
        found = of_rows(acts_BD)
        return _without_gaps(found) if axes.latent > 1 and form.by_row else found
    blocks = jax.lax.map(of_rows, row_blocks(acts_BD, P))
    rows_N = (blocks.rows_N * P + jnp.arange(P, dtype=jnp.int32)[:, None]).reshape(-1)
    values_N, latents_N, complete = blocks.values_N.reshape(-1), blocks.latents_N.reshape(-1), jnp.all(blocks.complete)
    found = SparseLatents(values_N, rows_N, latents_N, jnp.int32(len(values_N)), complete, per_row)
    return _without_gaps(found) if form.any_number or axes.latent > 1 else found


def _without_gaps(latents: SparseLatents) -> SparseLatents:
    """The same entries, with all padding after them.

    A block of rows ends in padding, and of a row's k largest entries most may lie on other devices.
    """
    values_N = latents.values_N
    order_N, count = where_true(values_N > 0, len(values_N)), jnp.sum(values_N > 0, dtype=jnp.int32)
    in_order_N = jnp.where(jnp.arange(len(order_N)) < count, values_N[order_N], 0.0)
    return SparseLatents(in_order_N, latents.rows_N[order_N], latents.latents_N[order_N], count, latents.complete)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def encode(
    latents: SparseLatents, acts_BD: Float[Array, "B D"], params: Params, config: SAEConfig, plan: Plan
) -> SparseLatents:
    """`latents` from `active_latents`, with the gradient of relu(`pre_activations`) for `params`."""
    return latents


def _encode_forward(
    latents: SparseLatents, acts_BD: Array, params: Params, config: SAEConfig, plan: Plan
) -> tuple[SparseLatents, tuple[SparseLatents, Array, Params]]:
    return latents, (latents, acts_BD, params)


def _encode_backward(
    config: SAEConfig, plan: Plan, saved: tuple[SparseLatents, Array, Params], cotangent: SparseLatents
) -> tuple[None, None, dict[str, Array | None]]:
    latents, acts_BD, params = saved
    gradient = latents.replace(values_N=jnp.where(latents.values_N > 0, cotangent.values_N, 0.0))
    F = len(params["b_enc"])
    onto_bias_F = _onto_biases(gradient, F, plan)
    grads: dict[str, Array | None] = {**dict.fromkeys(params), "b_enc": onto_bias_F}  # None means zero
    if not config.transcode:
        grads["b_dec"] = -plan.axes.sum_of_latents(onto_bias_F @ params["W_enc"])
    rows_BD = acts_BD - centre(params, config)[None]
    grads["W_enc"] = _onto_latents(gradient, rows_BD, F, config.compute_dtype, plan)
    return None, None, grads


encode.defvjp(_encode_forward, _encode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def decode(
    latents: SparseLatents, W_dec: Float[Array, "F D"], rows: int, dtype: str, plan: Plan
) -> Float[Array, "B D"]:
    """latents @ W_dec for the active latents of B = `rows` rows, with factors in `dtype` and sums in float32."""
    return _onto_rows(latents, W_dec, rows, dtype, plan)


def _decode_forward(
    latents: SparseLatents, W_dec: Array, rows: int, dtype: str, plan: Plan
) -> tuple[Array, tuple[SparseLatents, Array]]:
    return decode(latents, W_dec, rows, dtype, plan), (latents, W_dec)


def _decode_backward(
    rows: int, dtype: str, plan: Plan, saved: tuple[SparseLatents, Array], cotangent_BD: Array
) -> tuple[SparseLatents, Float[Array, "F D"]]:
    latents, W_dec = saved
    onto_values_N = _dots(latents, cotangent_BD, W_dec, dtype, plan)
    onto_W_dec = _onto_latents(latents, cotangent_BD, len(W_dec), dtype, plan)
    # integers and flags have no gradient
    onto = latents.replace(values_N=onto_values_N, rows_N=None, latents_N=None, count=None, complete=None)
    return onto, onto_W_dec


decode.defvjp(_decode_forward, _decode_backward)


def _onto_rows(
    latents: SparseLatents, source_FD: Float[Array, "F D"], rows: int, dtype: str, plan: Plan
) -> Float[Array, "B D"]:
    """For each of B = `rows` rows, the sum over its active latents of the value times the latent's row of `source`."""
    into_N, from_N, k = latents.rows_N, latents.latents_N, latents.per_row
    if plan.kernels != "off":
        per_row = k if k is not None and len(into_N) == rows * k else None
        return _by_kernels(into_N, latents.values_N, from_N, source_FD, rows, latents.count, dtype, plan, per_row)
    if k is not None and not plan.on_cpu and len(into_N) == rows * k:
        weights_BK = latents.values_N.astype(dtype).astype(jnp.float32).reshape(rows, k)
        picked_BKD = source_FD.astype(dtype)[from_N.reshape(rows, k)].astype(jnp.float32)
        sums_BD = jnp.sum(weights_BK[:, :, None] * picked_BKD, axis=1)
        return jnp.zeros_like(sums_BD).at[into_N[::k]].set(sums_BD, unique_indices=True)
    return _gather_add(into_N, latents.values_N, from_N, source_FD, rows, latents.count, dtype, plan)


def _onto_latents(
    latents: SparseLatents, source_BD: Float[Array, "B D"], F: int, dtype: str, plan: Plan
) -> Float[Array, "F D"]:
    """For each of F latents, the sum over the rows in which it is active of the value times that row of `source`."""
    into_N, from_N = latents.latents_N, latents.rows_N
    return _gather_add(into_N, latents.values_N, from_N, source_BD, F, latents.count, dtype, plan)


def _onto_biases(latents: SparseLatents, F: int, plan: Plan) -> Float[Array, " F"]:
    """For each of F latents, the sum of its values."""
    if plan.kernels != "off":
        into_N, ones = latents.latents_N, jnp.ones((1, 1))
        nowhere_N = jnp.zeros_like(into_N)
        return _by_kernels(into_N, latents.values_N, nowhere_N, ones, F, latents.count, "float32", plan)[:, 0]
    if plan.on_cpu:
        return jnp.zeros(F).at[latents.latents_N].add(latents.values_N)
    # XLA adds single numbers by compare-and-swap on a GPU, and four in a row by one instruction.
    fours_N4 = jnp.pad(latents.values_N[:, None], ((0, 0), (0, 3)))
    return jnp.zeros((F, 4)).at[latents.latents_N].add(fours_N4)[:, 0]


def _gather_add(
    into_N: Int[Array, " N"],
    weights_N: Float[Array, " N"],
    from_N: Int[Array, " N"],
    source: Float[Array, "M D"],
    size: int,
    count: Int[Array, ""],
    dtype: str,
    plan: Plan,
) -> Float[Array, "size D"]:
    """out[into[n]] += weights[n] * source[from[n]] for each n below `count`; the other weights are 0.

    On a CPU rows are added one after the other: XLA's scatter takes three times as long there, and it first writes all
    addends to memory.
    """
    if plan.kernels != "off":
        return _by_kernels(into_N, weights_N, from_N, source, size, count, dtype, plan)
    weights_N, source = weights_N.astype(dtype).astype(jnp.float32), source.astype(dtype)
    zero = jnp.minimum(jnp.abs(weights_N[0]), 0.0)  # of a constant XLA would fill one array and then copy it
    out = jnp.full((size, source.shape[1]), zero)
    if not plan.on_cpu:
        return out.at[into_N].add(weights_N[:, None] * source[from_N].astype(jnp.float32))
    into_N, weights_N, from_N = (_padded(array, _UNROLLED) for array in (into_N, weights_N, from_N))

    def add(iteration: Array, out: Array) -> Array:
        for n in (iteration * _UNROLLED + i for i in range(_UNROLLED)):
            row_1D = jax.lax.dynamic_slice_in_dim(source, from_N[n], 1).astype(jnp.float32)
            sum_1D = jax.lax.dynamic_slice_in_dim(out, into_N[n], 1) + weights_N[n] * row_1D
            out = jax.lax.dynamic_update_slice_in_dim(out, sum_1D, into_N[n], 0)
        return out

    return jax.lax.fori_loop(0, -(-count // _UNROLLED), add, out)


def _by_kernels(
    into_N: Int[Array, " N"],
    weights_N: Float[Array, " N"],
    from_N: Int[Array, " N"],
    source: Float[Array, "M D"],
    size: int,
    count: Int[Array, ""],
    dtype: str,
    plan: Plan,
    per_output: int | None = None,
) -> Float[Array, "size D"]:
    """`_gather_add` without atomics. `per_output`: the entries of each output, where they lie together."""
    from hafs_jax.fast.kernels.sums import equal_segments, segment_sums, sorted_by

    segments = sorted_by(into_N, size, count) if per_output is None else equal_segments(into_N, per_output)
    weights_N, source = weights_N.astype(dtype).astype(jnp.float32), source.astype(dtype)
    return segment_sums(segments, weights_N, from_N, source, plan.kernels == "interpreted", per_output)


def _dots(
    latents: SparseLatents, of_rows: Float[Array, "B D"], of_latents: Float[Array, "F D"], dtype: str, plan: Plan
) -> Float[Array, " N"]:
    """of_rows[row] . of_latents[latent] for each active entry, 0 for padding. A CPU takes `_CHUNK` entries at once.

    The sum over D is a product with ones: XLA's CPU adds the numbers of a row one after the other, which takes twice
    as long.
    """
    of_rows, of_latents = of_rows.astype(dtype), of_latents.astype(dtype)
    if plan.kernels != "off":
        from hafs_jax.fast.kernels.dots import entry_dots

        interpret = plan.kernels == "interpreted"
        return entry_dots(latents.rows_N, latents.latents_N, latents.count, of_rows, of_latents, interpret)
    if not plan.on_cpu:
        left_ND, right_ND = of_rows[latents.rows_N], of_latents[latents.latents_N]
        found_N = jnp.sum(left_ND.astype(jnp.float32) * right_ND.astype(jnp.float32), axis=1)
        return jnp.where(jnp.arange(len(found_N)) < latents.count, found_N, 0.0)
    rows_N, latents_N = _padded(latents.rows_N, _CHUNK), _padded(latents.latents_N, _CHUNK)
    ones_D = jnp.ones(of_rows.shape[1])

    def dots(chunk: Array, out_N: Array) -> Array:
        left, right = (jax.lax.dynamic_slice_in_dim(ids_N, chunk * _CHUNK, _CHUNK) for ids_N in (rows_N, latents_N))
        products_ND = of_rows[left].astype(jnp.float32) * of_latents[right].astype(jnp.float32)
        found = jnp.matmul(products_ND, ones_D, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(out_N, found, chunk * _CHUNK, 0)

    out_N = jnp.zeros(len(rows_N))
    return jax.lax.fori_loop(0, -(-latents.count // _CHUNK), dots, out_N)[: len(latents.values_N)]


def _padded(array_N: Array, unit: int) -> Array:
    """The array, padded with zeros to a length that is a multiple of `unit`."""
    return jnp.pad(array_N, (0, -len(array_N) % unit))
