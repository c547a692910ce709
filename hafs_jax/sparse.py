"""The SAE's products without the zeros: only the encoder's forward product is dense. Pure functions.

Of the five products of B x D x F in a step, four multiply by latents of which k in F are not zero: the decoder's, its
gradient with respect to the latents, and the gradients of both matrices. Here they are sums over the B k kept entries;
values and gradients are those of the dense form (`sae.SAE`), which tests hold them to.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from hafs_jax.architectures import ARCHITECTURES
from hafs_jax.config import TrainConfig
from hafs_jax.products import matmul, row_blocks
from hafs_jax.selection import Entries

_LEAST_RATIO = {"float32": 64.0, "bfloat16": math.inf}  # F / k from which it is the faster on a CPU: see `pays`
_UNROLLED = 4  # entries added per turn of the loop
_CHUNK = 4096  # entries whose rows are gathered at a time


class Kept(struct.PyTreeNode):
    """The latents that are active in a batch, row by row; an empty slot has the value 0."""

    values_N: Float[Array, " N"]
    rows_N: Int[Array, " N"]
    latents_N: Int[Array, " N"]

    def firing(self, n_latents: int) -> Float[Array, " F"]:
        """In how many of the rows each latent fires."""
        return jnp.zeros(n_latents).at[self.latents_N].add(self.values_N > 0)

    def within(self, start: Array | int, end: Array | int) -> "Kept":
        """The latents numbered `start` up to `end`; the others' slots are empty."""
        inside_N = (self.latents_N >= start) & (self.latents_N < end)
        return self.replace(values_N=jnp.where(inside_N, self.values_N, 0.0))


def pays(config: TrainConfig) -> bool:
    """Whether a training of `config` multiplies by kept entries alone: as its `products` says, or by measurement.

    `auto` takes dense products but where `benchmarks/products.py` measured the kept entries to be faster: on a CPU, in
    float32, from F / k = 64 on. In bfloat16 they were not at any ratio up to 256; off the CPU nothing was measured.
    """
    asks_for_all = config.penalty.sharing == "cofiring" or config.sparsity.pre_activation > 0
    if ARCHITECTURES[config.sae.architecture].keep is None or asks_for_all or config.dictionary_shards > 1:
        return False
    if config.products != "auto":
        return config.products == "sparse"
    ratio = config.sae.F / config.sae.largest_k
    return jax.default_backend() == "cpu" and ratio >= _LEAST_RATIO[config.sae.compute_dtype]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def encode(
    acts_BD: Float[Array, "B D"], W_enc: Float[Array, "D F"], bias_F: Float[Array, " F"], k: Array, config: TrainConfig
) -> Kept:
    """The kept entries of relu(acts @ W_enc + bias), as the config's architecture keeps them."""
    return _encode(acts_BD, W_enc, bias_F, k, config)


def _encode(acts_BD: Array, W_enc: Array, bias_F: Array, k: Array, config: TrainConfig) -> Kept:
    architecture = ARCHITECTURES[config.sae.architecture]
    keep = architecture.keep
    assert keep is not None

    def of_rows(acts_ND: Array) -> Kept:
        product_NF = matmul(acts_ND, W_enc, config.sae.compute_dtype)
        entries: Entries = keep(product_NF, bias_F, config.sae, k)
        values_N = product_NF[entries.rows_N, entries.columns_N] + bias_F[entries.columns_N]
        return Kept(jnp.where(entries.real_N, values_N, 0.0), entries.rows_N, entries.columns_N)

    blocks_PND = row_blocks(acts_BD, W_enc.shape[1]) if architecture.keeps_by_row else acts_BD[None]
    P, N, _ = blocks_PND.shape
    if P == 1:
        return of_rows(acts_BD)
    kept = jax.lax.map(of_rows, blocks_PND)
    kept = kept.replace(rows_N=kept.rows_N * P + jnp.arange(P, dtype=jnp.int32)[:, None])
    return jax.tree.map(lambda values: values.reshape(P, N, -1).swapaxes(0, 1).reshape(-1), kept)


def _encode_forward(
    acts_BD: Array, W_enc: Array, bias_F: Array, k: Array, config: TrainConfig
) -> tuple[Kept, tuple[Array, Array, Kept]]:
    kept = _encode(acts_BD, W_enc, bias_F, k, config)
    return kept, (acts_BD, W_enc, kept)


def _encode_backward(
    config: TrainConfig, saved: tuple[Array, Array, Kept], cotangent: Kept
) -> tuple[Array, Array, Array, None]:
    acts_BD, W_enc, kept = saved
    B, F, dtype = len(acts_BD), W_enc.shape[1], config.sae.compute_dtype
    pulls_N = jnp.where(kept.values_N > 0, cotangent.values_N, 0.0)
    onto_acts = _gather_add(kept.rows_N, pulls_N, kept.latents_N, W_enc.T, B, dtype)  # dropped where nobody asks
    onto_W_enc = _gather_add(kept.latents_N, pulls_N, kept.rows_N, acts_BD, F, dtype).T
    return onto_acts, onto_W_enc, jnp.zeros(F).at[kept.latents_N].add(pulls_N), None


encode.defvjp(_encode_forward, _encode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def decode(kept: Kept, W_dec: Float[Array, "F D"], rows: int, dtype: str) -> Float[Array, "B D"]:
    """latents @ W_dec for the kept entries of `rows` rows, factors in `dtype` and sums in float32."""
    return _gather_add(kept.rows_N, kept.values_N, kept.latents_N, W_dec, rows, dtype)


def _decode_forward(kept: Kept, W_dec: Array, rows: int, dtype: str) -> tuple[Array, tuple[Kept, Array]]:
    return decode(kept, W_dec, rows, dtype), (kept, W_dec)


def _decode_backward(
    rows: int, dtype: str, saved: tuple[Kept, Array], cotangent_BD: Array
) -> tuple[Kept, Float[Array, "F D"]]:
    kept, W_dec = saved
    pulls_N = _dots(cotangent_BD, kept.rows_N, W_dec, kept.latents_N, dtype)
    onto_W_dec = _gather_add(kept.latents_N, kept.values_N, kept.rows_N, cotangent_BD, len(W_dec), dtype)
    return Kept(pulls_N, None, None), onto_W_dec  # type: ignore[arg-type]  # whole numbers have no gradient


decode.defvjp(_decode_forward, _decode_backward)


def _gather_add(
    into_N: Int[Array, " N"],
    weights_N: Float[Array, " N"],
    from_N: Int[Array, " N"],
    source: Float[Array, "M D"],
    size: int,
    dtype: str,
) -> Float[Array, "size D"]:
    """out[into[n]] += weights[n] * source[from[n]] for each n.

    On a CPU one row after the other: XLA's scatter there takes three times as long and materialises what it adds.
    """
    weights_N, source = weights_N.astype(dtype).astype(jnp.float32), source.astype(dtype)
    out = jnp.zeros((size, source.shape[1]), jnp.float32)
    if jax.default_backend() != "cpu":
        return out.at[into_N].add(weights_N[:, None] * source[from_N].astype(jnp.float32))

    def add(n: Array, out: Array) -> Array:
        row_1D = jax.lax.dynamic_slice_in_dim(source, from_N[n], 1).astype(jnp.float32)
        sum_1D = jax.lax.dynamic_slice_in_dim(out, into_N[n], 1) + weights_N[n] * row_1D
        return jax.lax.dynamic_update_slice_in_dim(out, sum_1D, into_N[n], 0)

    return jax.lax.fori_loop(0, len(into_N), add, out, unroll=_UNROLLED)


def _dots(
    left: Float[Array, "L D"], left_N: Int[Array, " N"], right: Float[Array, "R D"], right_N: Array, dtype: str
) -> Float[Array, " N"]:
    """left[left_N[n]] . right[right_N[n]] for each n, `_CHUNK` of them at a time."""
    left, right = left.astype(dtype), right.astype(dtype)
    N = len(left_N)
    chunks = -(-N // _CHUNK)
    padded = [jnp.pad(ids_N, (0, chunks * _CHUNK - N)).reshape(chunks, _CHUNK) for ids_N in (left_N, right_N)]

    def dots(ids: tuple[Array, Array]) -> Array:
        return jnp.sum(left[ids[0]].astype(jnp.float32) * right[ids[1]].astype(jnp.float32), axis=1)

    return jax.lax.map(dots, tuple(padded)).reshape(-1)[:N]
