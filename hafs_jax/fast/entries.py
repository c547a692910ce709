"""The SAE's products without the zeros: only the encoder's forward product is dense. Pure functions.

Of the five products of B x D x F in a step, four multiply by latents of which few are not zero: the decoder's, its
gradient with respect to the latents, and the gradients of both matrices. Here they are sums over the active entries, of
which there are B k or, with ReLU, as many as there happen to be; values and gradients are those of the dense form
(`sae.SAE`), in bfloat16 up to its rounding, which tests hold them to.
"""

import os
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hafs_jax.config import SAEConfig, TrainConfig
from hafs_jax.method.architectures import ARCHITECTURES, slots
from hafs_jax.ops.products import Params, blocks_of, matmul, row_blocks
from hafs_jax.ops.selection import Entries, where_true

_LEAST_RATIO, _LEAST_RATIO_AMX = 11, 85  # F / slots, per core and one more, from which it pays: see `pays`
_UNROLLED = 4  # entries added per turn of the loop
_CHUNK = 4096  # entries whose rows are gathered at a time


class Kept(struct.PyTreeNode):
    """The latents that are active in a batch, row by row; an empty slot has the value 0."""

    values_N: Float[Array, " N"]
    rows_N: Int[Array, " N"]
    latents_N: Int[Array, " N"]
    filled: Int[Array, ""]  # from this slot on all are empty
    whole: Bool[Array, ""]  # whether there was a slot for each active latent

    def firing(self, n_latents: int) -> Float[Array, " F"]:
        """In how many of the rows each latent fires."""
        return jnp.zeros(n_latents).at[self.latents_N].add(self.values_N > 0)


def pays(config: TrainConfig) -> bool:
    """Whether a training of `config` multiplies by kept entries alone: as its `products` says, or by measurement.

    `auto` takes dense products but where `benchmarks/products.py` measured the kept entries to be faster or, with AMX,
    about as fast, by F over slots: on a CPU of one core from 22 on, of two from 33; in bfloat16 with AMX 170 and 255.
    Dense products run on all cores and the sums over kept entries on one, so with more cores the ratio is taken to rise
    as it does from one to two. ReLU has more slots than k, and goes by them only where a controller brings L0 to k. Off
    the CPU nothing was measured.
    """
    architecture = ARCHITECTURES[config.sae.architecture]
    asks_for_all = config.penalty.sharing == "cofiring" or config.sparsity.pre_activation > 0
    if architecture.keep is None or asks_for_all or config.dictionary_shards > 1:
        return False
    if config.products != "auto":
        return config.products == "sparse"
    ratio = config.sae.F / slots(config.sae)
    comes_to_k = config.sparsity.match_l0 or not architecture.keeps_any_number
    fast_products = config.sae.compute_dtype == "bfloat16" and _has_amx()
    least = (_LEAST_RATIO_AMX if fast_products else _LEAST_RATIO) * (_cores() + 1)
    return comes_to_k and jax.default_backend() == "cpu" and ratio >= least


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _has_amx() -> bool:
    """Whether Linux says that the processor multiplies tiles of bfloat16."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def find(
    acts_BD: Float[Array, "B D"], W_enc: Float[Array, "D F"], bias_F: Float[Array, " F"], k: Array, config: TrainConfig
) -> Kept:
    """The kept entries of relu(acts @ W_enc + bias), as the config's architecture keeps them; not differentiable.

    Where the architecture allows it, a large batch is taken in blocks of rows.
    """
    architecture = ARCHITECTURES[config.sae.architecture]
    keep = architecture.keep
    assert keep is not None

    def of_rows(acts_ND: Array) -> Kept:
        product_NF = matmul(acts_ND, W_enc, config.sae.compute_dtype)
        entries: Entries = keep(product_NF, bias_F, config.sae, k)
        values_N = product_NF[entries.rows_N, entries.columns_N] + bias_F[entries.columns_N]
        values_N = jnp.where(entries.real_N, values_N, 0.0)
        filled = jnp.max(jnp.where(entries.real_N, jnp.arange(1, len(values_N) + 1, dtype=jnp.int32), 0))
        return Kept(values_N, entries.rows_N, entries.columns_N, filled, entries.whole)

    P = blocks_of(len(acts_BD), W_enc.shape[1]) if architecture.by_row else 1
    if P == 1:
        return of_rows(acts_BD)
    kept = jax.lax.map(of_rows, row_blocks(acts_BD, P))
    rows_PN = kept.rows_N * P + jnp.arange(P, dtype=jnp.int32)[:, None]
    kept = Kept(kept.values_N.reshape(-1), rows_PN.reshape(-1), kept.latents_N.reshape(-1), kept.filled, kept.whole)
    if architecture.keeps_any_number:  # each block ends in empty slots, which are to come after all others
        order_N, filled = where_true(kept.values_N > 0, len(kept.values_N)), jnp.sum(kept.values_N > 0, dtype=jnp.int32)
        values_N = jnp.where(jnp.arange(len(order_N)) < filled, kept.values_N[order_N], 0.0)
        return Kept(values_N, kept.rows_N[order_N], kept.latents_N[order_N], filled, jnp.all(kept.whole))
    return kept.replace(filled=jnp.int32(len(kept.values_N)), whole=jnp.all(kept.whole))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def encode(kept: Kept, acts_BD: Float[Array, "B D"], params: Params, config: SAEConfig) -> Kept:
    """`kept`, which is `find`'s, with the gradient for `params` of relu(acts @ W_enc + pre_bias) at its entries."""
    return kept


def _encode_forward(
    kept: Kept, acts_BD: Array, params: Params, config: SAEConfig
) -> tuple[Kept, tuple[Kept, Array, Params]]:
    return kept, (kept, acts_BD, params)


def _encode_backward(
    config: SAEConfig, saved: tuple[Kept, Array, Params], cotangent: Kept
) -> tuple[None, None, dict[str, Array | None]]:
    kept, acts_BD, params = saved
    pulls = kept.replace(values_N=jnp.where(kept.values_N > 0, cotangent.values_N, 0.0))
    onto_bias_F = jnp.zeros(config.F).at[kept.latents_N].add(pulls.values_N)
    grads: dict[str, Array | None] = {**dict.fromkeys(params), "b_enc": onto_bias_F}  # None: 0
    if not config.transcode:
        grads["b_dec"] = -(params["W_enc"] @ onto_bias_F)
        acts_BD = acts_BD - params["b_dec"][None]  # so that b_enc - b_dec @ W_enc needs no pass over W_enc of its own
    grads["W_enc"] = _onto_latents(pulls, acts_BD, config.F, config.compute_dtype).T
    return None, None, grads


encode.defvjp(_encode_forward, _encode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def decode(kept: Kept, W_dec: Float[Array, "F D"], rows: int, dtype: str) -> Float[Array, "B D"]:
    """latents @ W_dec for the kept entries of `rows` rows, factors in `dtype` and sums in float32."""
    return _onto_rows(kept, W_dec, rows, dtype)


def _decode_forward(kept: Kept, W_dec: Array, rows: int, dtype: str) -> tuple[Array, tuple[Kept, Array]]:
    return decode(kept, W_dec, rows, dtype), (kept, W_dec)


def _decode_backward(
    rows: int, dtype: str, saved: tuple[Kept, Array], cotangent_BD: Array
) -> tuple[Kept, Float[Array, "F D"]]:
    kept, W_dec = saved
    pulls_N = _dots(kept, cotangent_BD, W_dec, dtype)
    onto_W_dec = _onto_latents(kept, cotangent_BD, len(W_dec), dtype)
    return Kept(pulls_N, None, None, None, None), onto_W_dec  # type: ignore[arg-type]  # whole numbers have no gradient


decode.defvjp(_decode_forward, _decode_backward)


def _onto_rows(kept: Kept, source_FD: Float[Array, "F D"], rows: int, dtype: str) -> Float[Array, "B D"]:
    """To each of B = `rows` rows the sum of its kept values times their latents' rows of `source`."""
    return _gather_add(kept.rows_N, kept.values_N, kept.latents_N, source_FD, rows, kept.filled, dtype)


def _onto_latents(kept: Kept, source_BD: Float[Array, "B D"], latents: int, dtype: str) -> Float[Array, "F D"]:
    """To each of F = `latents` latents the sum of its kept values times their rows of `source`."""
    return _gather_add(kept.latents_N, kept.values_N, kept.rows_N, source_BD, latents, kept.filled, dtype)


def _gather_add(
    into_N: Int[Array, " N"],
    weights_N: Float[Array, " N"],
    from_N: Int[Array, " N"],
    source: Float[Array, "M D"],
    size: int,
    filled: Int[Array, ""],
    dtype: str,
) -> Float[Array, "size D"]:
    """out[into[n]] += weights[n] * source[from[n]] for each n up to `filled`, from where on the weights are 0.

    On a CPU one row after the other: XLA's scatter there takes three times as long and materialises what it adds.
    """
    weights_N, source = weights_N.astype(dtype).astype(jnp.float32), source.astype(dtype)
    zero = jnp.minimum(jnp.abs(weights_N[0]), 0.0)  # not a constant, of which XLA fills one array and copies it
    out = jnp.full((size, source.shape[1]), zero)
    if jax.default_backend() != "cpu":
        return out.at[into_N].add(weights_N[:, None] * source[from_N].astype(jnp.float32))
    into_N, weights_N, from_N = (_filled_up(array, _UNROLLED) for array in (into_N, weights_N, from_N))

    def add(turn: Array, out: Array) -> Array:
        for n in (turn * _UNROLLED + i for i in range(_UNROLLED)):
            row_1D = jax.lax.dynamic_slice_in_dim(source, from_N[n], 1).astype(jnp.float32)
            sum_1D = jax.lax.dynamic_slice_in_dim(out, into_N[n], 1) + weights_N[n] * row_1D
            out = jax.lax.dynamic_update_slice_in_dim(out, sum_1D, into_N[n], 0)
        return out

    return jax.lax.fori_loop(0, -(-filled // _UNROLLED), add, out)


def _dots(kept: Kept, of_rows: Float[Array, "B D"], of_latents: Float[Array, "F D"], dtype: str) -> Float[Array, " N"]:
    """of_rows[row] . of_latents[latent] for each filled slot, `_CHUNK` of them at a time; 0 for the others.

    The sum is a product with ones: as a sum over a row, which XLA's CPU takes one after the other, it is twice as long.
    """
    of_rows, of_latents = of_rows.astype(dtype), of_latents.astype(dtype)
    rows_N, latents_N = _filled_up(kept.rows_N, _CHUNK), _filled_up(kept.latents_N, _CHUNK)
    ones_D = jnp.ones(of_rows.shape[1])

    def dots(chunk: Array, out_N: Array) -> Array:
        left, right = (jax.lax.dynamic_slice_in_dim(ids_N, chunk * _CHUNK, _CHUNK) for ids_N in (rows_N, latents_N))
        products_ND = of_rows[left].astype(jnp.float32) * of_latents[right].astype(jnp.float32)
        found = jnp.matmul(products_ND, ones_D, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(out_N, found, chunk * _CHUNK, 0)

    out_N = jnp.zeros(len(rows_N))
    return jax.lax.fori_loop(0, -(-kept.filled // _CHUNK), dots, out_N)[: len(kept.values_N)]


def _filled_up(array_N: Array, unit: int) -> Array:
    """The array with zeros behind it, so that its length is a multiple of `unit`."""
    return jnp.pad(array_N, (0, -len(array_N) % unit))
