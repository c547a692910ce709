"""The loss of a batch and its gradient, the penalty apart. Pure functions.

    L = reconstruction + sparsity + aux

in units of FVU: the batch's residual over the store's variance. For relu that is the usual |x - x_hat|^2 + l1 |f|_1,
divided by the constant variance; a Matryoshka's reconstruction is the mean over its prefixes.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from hafs_jax.config import TrainConfig
from hafs_jax.fast import entries as sparse
from hafs_jax.method.architectures import ARCHITECTURES, Encoding, OperatingPoint, l1
from hafs_jax.method.matryoshka import prefix_changes, prefix_ends, prefix_errors, prefix_shares
from hafs_jax.method.sae import SAE, pre_bias
from hafs_jax.ops.products import Params, blocks_of, matmul, row_blocks, whole_rows
from hafs_jax.ops.selection import kth_largest_of_rows
from hafs_jax.training.state import largest_of_members

Metrics = dict[str, Array]


class Weights(struct.PyTreeNode):
    """What the loss at one step is weighted with; constants of differentiation."""

    k: Int[Array, ""]
    coefficient: Float[Array, ""]
    is_dead_F: Bool[Array, " F"]


class Forward(struct.PyTreeNode):
    """What a forward pass leaves beside the loss."""

    residual_BD: Float[Array, "B D"]
    parts: Metrics
    firing_F: Float[Array, " F"]  # rows in which each latent fires
    smallest: Float[Array, ""]  # active latent, where the architecture learns from it; infinite where none is
    encoding: Encoding | None  # None where the zeros are skipped, and of a batch in blocks


def loss_and_gradients(
    params: Params,
    acts_BD: Float[Array, "B D"],
    target_BD: Float[Array, "B D_out"],
    weights: Weights,
    variance: Float[Array, ""],
    key: Key[Array, ""],
    config: TrainConfig,
    axis: str | None = None,
) -> tuple[tuple[Float[Array, ""], Forward], Params]:
    """The loss of scaled activations but for the penalty, with its parts, and the loss's gradient.

    `key` samples a Matryoshka's prefixes; `axis` is `train_step`'s.
    """
    rows = (acts_BD, target_BD)

    def dense() -> tuple[tuple[Array, Forward], Params]:
        return _in_blocks(partial(_forward_dense, weights=weights, variance=variance, key=key), params, rows, config)

    if not sparse.pays(config):
        (loss, forward), grads = dense()
    else:
        bias_F = pre_bias(params, config.sae)
        kept = sparse.find(acts_BD, params["W_enc"], bias_F, weights.k, config)
        kept = kept.replace(filled=largest_of_members(kept.filled, axis))

        def by_kept() -> tuple[tuple[Array, Forward], Params]:
            run = partial(_forward_sparse, kept=kept, weights=weights, variance=variance, key=key, config=config)
            return jax.value_and_grad(_loss, has_aux=True)(params, run, *rows)

        if ARCHITECTURES[config.sae.architecture].keeps_any_number:
            (loss, forward), grads = jax.lax.cond(largest_of_members(~kept.whole, axis), dense, by_kept)
        else:
            (loss, forward), grads = by_kept()
    if config.sparsity.aux > 0:
        aux, grads = add_aux(grads, params, acts_BD, forward.residual_BD, weights.is_dead_F, config, axis)
        forward.parts["loss_aux"] += aux
        loss += aux
    return (loss, forward), grads


def _loss(params: Params, run: Callable[..., Forward], *rows: Float[Array, "B _"]) -> tuple[Float[Array, ""], Forward]:
    """The loss but for the penalty and the auxiliary reconstruction, with its parts, of a forward pass `run`."""
    forward = run(params, *rows)
    parts = forward.parts
    parts.setdefault("loss_sparsity", jnp.zeros(()))
    parts.setdefault("loss_aux", jnp.zeros(()))
    return parts["loss_reconstruction"] + parts["loss_sparsity"] + parts["loss_aux"], forward


def _in_blocks(
    run: Callable[..., Forward], params: Params, rows: tuple[Array, Array], config: TrainConfig
) -> tuple[tuple[Float[Array, ""], Forward], Params]:
    """`_loss` of all rows and its gradient, by blocks of rows where the batch is large and no row needs the others.

    Losses are means over rows, so those of equal blocks are averaged. Without `encoding`, if there are several.
    """
    run = partial(run, config=config)
    P = blocks_of_rows(config, len(rows[0]))
    blocks = [row_blocks(of, P) for of in rows]
    if P == 1:
        (loss, forward), grads = jax.value_and_grad(_loss, has_aux=True)(params, run, *rows)
        return (loss, forward.replace(encoding=None) if sparse.pays(config) else forward), grads

    def share(params: Params, *block: Array) -> tuple[Array, Forward]:
        loss, forward = _loss(params, run, *block)
        return loss / P, forward.replace(encoding=None)

    def add(grads: Params, block: list[Array]) -> tuple[Params, tuple[Array, Forward]]:
        found, more = jax.value_and_grad(share, has_aux=True)(params, *block)
        return jax.tree.map(jnp.add, grads, more), found

    grads, (losses, forwards) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), blocks)
    forward = Forward(
        whole_rows(forwards.residual_BD),
        {name: jnp.mean(parts) for name, parts in forwards.parts.items()},
        firing_F=jnp.sum(forwards.firing_F, axis=0),
        smallest=jnp.min(forwards.smallest),
        encoding=None,
    )
    return (jnp.sum(losses), forward), grads


def blocks_of_rows(config: TrainConfig, batch_size: int) -> int:
    """In how many blocks a dense step takes a batch."""
    apart = ARCHITECTURES[config.sae.architecture].by_row and config.penalty.sharing != "cofiring"
    return blocks_of(batch_size, config.sae.F) if apart else 1


def _forward_dense(
    params: Params,
    acts_BD: Array,
    target_BD: Array,
    weights: Weights,
    variance: Array,
    key: Key[Array, ""],
    config: TrainConfig,
) -> Forward:
    """Every architecture's terms, by products with all latents."""
    architecture, settings = ARCHITECTURES[config.sae.architecture], config.sparsity
    sae = SAE(config.sae, acts_BD.shape[1], target_BD.shape[1])
    at = OperatingPoint(weights.k)
    encoding = cast(Encoding, sae.apply({"params": params}, acts_BD, at, method="encode"))
    latents_BF, parts = encoding.latents_BF, cast(Metrics, {})
    if architecture.nested:
        changes = prefix_changes(latents_BF, params, config.sae, key)
    else:
        changes = [matmul(latents_BF, params["W_dec"], config.sae.compute_dtype)]
    errors_G, residual_BD = prefix_errors(changes, target_BD, params["b_dec"])
    parts["fvu"], parts["loss_reconstruction"] = errors_G[-1] / variance, jnp.mean(errors_G) / variance
    if architecture.extra is not None:
        parts["loss_reconstruction"] += architecture.extra(encoding, params, config.sae, target_BD) / variance
    if architecture.cost is not None:
        paying = encoding
        if architecture.nested:
            paying = encoding.replace(latents_BF=latents_BF * prefix_shares(config.sae, key)[None])
        cost = jnp.mean(architecture.cost(paying, params, config.sae))
        parts["loss_sparsity"] = weights.coefficient * cost / variance
    if settings.pre_activation > 0:
        short = pre_activation_loss(params, encoding.pre_BF, weights.is_dead_F)
        parts["loss_aux"] = settings.pre_activation * short / variance
    active_BF = latents_BF > 0
    return Forward(
        residual_BD,
        parts,
        firing_F=jnp.sum(active_BF, axis=0, dtype=jnp.float32),
        smallest=jnp.min(jnp.where(active_BF, latents_BF, jnp.inf)) if architecture.learns_threshold else jnp.zeros(()),
        encoding=encoding,
    )


def _forward_sparse(
    params: Params,
    acts_BD: Array,
    target_BD: Array,
    weights: Weights,
    variance: Array,
    key: Key[Array, ""],
    kept: sparse.Kept,
    config: TrainConfig,
) -> Forward:
    """The same of an architecture that `sparse` knows, by products with the latents that it keeps."""
    architecture, W_dec, dtype = ARCHITECTURES[config.sae.architecture], params["W_dec"], config.sae.compute_dtype
    kept = sparse.encode(kept, acts_BD, params, config.sae)
    if architecture.nested:
        changes = _changes_by_band(kept, W_dec, prefix_ends(config.sae, key), len(acts_BD), dtype)
    else:
        changes = [sparse.decode(kept, W_dec, len(acts_BD), dtype)]
    errors_G, residual_BD = prefix_errors(changes, target_BD, params["b_dec"])
    parts = {"fvu": errors_G[-1] / variance, "loss_reconstruction": jnp.mean(errors_G) / variance}
    assert architecture.cost in (None, l1)
    if architecture.cost is not None:
        paid_N = kept.values_N * (prefix_shares(config.sae, key)[kept.latents_N] if architecture.nested else 1.0)
        parts["loss_sparsity"] = weights.coefficient * jnp.sum(paid_N) / len(acts_BD) / variance
    return Forward(
        residual_BD,
        parts,
        firing_F=kept.firing(config.sae.F),
        smallest=jnp.min(jnp.where(kept.values_N > 0, kept.values_N, jnp.inf)),
        encoding=None,
    )


def _changes_by_band(
    kept: sparse.Kept, W_dec: Float[Array, "F D"], ends_G: Int[Array, " G"], rows: int, dtype: str
) -> list[Float[Array, "B D"]]:
    """`prefix_changes` for the kept entries of B = `rows` rows: each is added to its band's copy of its row."""
    band_N = jnp.searchsorted(ends_G, kept.latents_N, side="right")
    banded = kept.replace(rows_N=(band_N * rows + kept.rows_N).astype(jnp.int32))
    return list(sparse.decode(banded, W_dec, len(ends_G) * rows, dtype).reshape(len(ends_G), rows, -1))


def add_aux(
    grads: Params,
    params: Params,
    acts_BD: Float[Array, "B D"],
    residual_BD: Float[Array, "B D_out"],
    is_dead_F: Bool[Array, " F"],
    config: TrainConfig,
    axis: str | None = None,
) -> tuple[Float[Array, ""], Params]:
    """`sparsity.aux` |e - e_hat|^2 / |e|^2 and `grads` with its gradient added.

    e is the residual (a constant), e_hat its reconstruction by the top `aux_k` dead latents (Gao et al. 2024, arXiv
    2406.04093, appendix A.2). While no latent is dead that is 0, and `grads` are not touched. Only the dead latents'
    columns of the encoder and rows of the decoder are multiplied, as far as there is `_rooms` for them; a large batch
    is taken in blocks of rows. SAEs that are trained together along `axis` all do what the one with the most dead
    latents needs.
    """
    aux_k, dtype, F = config.sparsity.aux_k, config.sae.compute_dtype, len(is_dead_F)
    dead = jnp.sum(is_dead_F)
    weight = jnp.where(dead > 0, config.sparsity.aux, 0.0) / jnp.maximum(jnp.sum(residual_BD**2), 1e-20)

    def revived(params: Params, is_dead_M: Array, acts_ND: Array, target_ND: Array) -> Array:
        pre_NM = matmul(acts_ND, params["W_enc"], dtype) + pre_bias(params, config.sae)[None]
        dead_NM = jnp.where(is_dead_M[None], jax.nn.relu(pre_NM), 0.0)
        if aux_k < dead_NM.shape[1]:
            smallest_N = kth_largest_of_rows(jax.lax.stop_gradient(dead_NM), aux_k)
            dead_NM = jnp.where(dead_NM >= smallest_N[:, None], dead_NM, 0.0)
        return weight * jnp.sum((target_ND - matmul(dead_NM, params["W_dec"], dtype)) ** 2)

    def add(
        sums: tuple[Array, Params], room: int, is_dead_F: Array, params: Params, *rows: Array
    ) -> tuple[Array, Params]:
        """The sums with a block's error and gradient added, for which only `room` latents are looked at."""
        loss, grads = sums
        if room == F:
            error, more = jax.value_and_grad(revived)(params, is_dead_F, *rows)
            return loss + error, jax.tree.map(jnp.add, grads, more)
        ids_M = jnp.nonzero(is_dead_F, size=room, fill_value=F)[0]
        of_dead = {name: (..., ids_M) if name == "W_enc" else ids_M for name in ("W_enc", "b_enc", "W_dec")}
        some = {name: params[name].at[at].get(mode="clip") for name, at in of_dead.items()}
        error, more = jax.value_and_grad(revived)({**some, "b_dec": params["b_dec"]}, ids_M < F, *rows)
        added = {name: grads[name].at[at].add(more[name], mode="drop") for name, at in of_dead.items()}
        return loss + error, {**grads, **added, "b_dec": grads["b_dec"] + more["b_dec"]}

    def added(sums: tuple[Array, Params], room: int, wanted: Array) -> tuple[Array, Params]:
        """The sums and, if `wanted`, those of all blocks: a loop of as many turns, whose sums stay where they are."""
        P = blocks_of(len(acts_BD), room)
        rows_NPD = [rows_BD.reshape(-1, P, rows_BD.shape[1]) for rows_BD in (acts_BD, residual_BD)]  # every P-th row

        def turn(block: Array, sums: tuple[Array, Params]) -> tuple[Array, Params]:
            rows_ND = (jax.lax.dynamic_index_in_dim(rows, block, axis=1, keepdims=False) for rows in rows_NPD)
            # Without the barrier XLA computes what is the same in all turns ahead of them, even where there are none.
            held, held_dead_F, _ = jax.lax.optimization_barrier((params, is_dead_F, block))
            return add(sums, room, held_dead_F, held, *rows_ND)

        return jax.lax.fori_loop(0, jnp.where(wanted, P, 0), turn, sums)

    most = largest_of_members(dead, axis)
    sums, enough = (jnp.zeros(()), grads), 0
    for room in _rooms(F):
        sums = added(sums, room, (most > enough) & (most <= room))
        enough = room
    return sums


def _rooms(n_latents: int) -> list[int]:
    """For how many dead latents there are programs: 32, 128, 512, ... as far as half of all, and all."""
    powers = (32 * 4**n for n in range(16))
    return [*itertools.takewhile(lambda room: room <= n_latents // 2, powers), n_latents]


def pre_activation_loss(params: Params, pre_BF: Float[Array, "B F"], is_dead_F: Bool[Array, " F"]) -> Float[Array, ""]:
    """Mean over rows of the sum over dead latents of relu(threshold - pre), the threshold 0 where none is learned.

    Anthropic's "update on the SAE training" (January 2025), here for dead latents alone: what never reaches its
    threshold has no other gradient. The threshold is a constant of it.
    """
    threshold_F = jax.lax.stop_gradient(params.get("threshold", jnp.zeros_like(params["b_enc"])))
    short_BF = jnp.where(is_dead_F[None], jax.nn.relu(threshold_F[None] - pre_BF), 0.0)
    return jnp.mean(jnp.sum(short_BF, axis=1))
