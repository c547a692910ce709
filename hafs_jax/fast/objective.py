"""The loss and its gradient in their fast form. The plain twin is `hafs_jax.method.loss`.

It is faster by three means:

- sparse products skip latents that are zero;
- a large batch is taken in blocks of rows;
- the auxiliary loss multiplies by dead latents alone.
"""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from hafs_jax.config import TrainConfig
from hafs_jax.fast import entries
from hafs_jax.fast.entries import SparseLatents
from hafs_jax.fast.forms import form_of
from hafs_jax.fast.plan import Plan
from hafs_jax.method.architectures import ARCHITECTURES, l1
from hafs_jax.method.budgets import budget_bands
from hafs_jax.method.loss import Forward, Weights, forward, total
from hafs_jax.method.matryoshka import prefix_ends, prefix_errors, prefix_shares
from hafs_jax.method.revival import auxiliary_error, auxiliary_weight
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.members import largest_of_members
from hafs_jax.ops.products import Params, blocks_of, joined_rows, row_blocks

_OF_LATENTS = ("W_enc", "b_enc", "W_dec")  # the parameters of which a dead latent has a row


def loss_and_gradients(
    params: Params,
    acts_BD: Float[Array, "B D"],
    target_BD: Float[Array, "B D_out"],
    weights: Weights,
    variance: Float[Array, ""],
    key: Key[Array, ""],
    config: TrainConfig,
    plan: Plan,
    axis: str | None = None,
) -> tuple[tuple[Float[Array, ""], Forward], Params]:
    """The value of `hafs_jax.method.loss.loss` with what its forward pass returned, and its gradient.

    `plan` chooses between dense and sparse products. `key` samples the prefixes of a Matryoshka SAE. `axis` names the
    mapped axis of SAEs that are trained together. On several devices the gradient is this device's: of its own rows,
    for its own latents. All else is of the whole batch, but for the residual.
    """
    rows, axes = (acts_BD, target_BD), plan.axes

    def dense() -> tuple[tuple[Array, Forward], Params]:
        return _in_blocks(
            partial(forward, weights=weights, variance=variance, key=key, config=config, axes=axes),
            params,
            rows,
            config,
            plan,
        )

    if plan.products == "dense":
        (loss, found), grads = dense()
    else:
        latents = entries.active_latents(acts_BD, params, weights.k, config, plan)
        latents = latents.replace(count=largest_of_members(latents.count, axis))

        def sparse() -> tuple[tuple[Array, Forward], Params]:
            run = partial(_forward_sparse, latents=latents, weights=weights, variance=variance, key=key)
            return jax.value_and_grad(total, has_aux=True)(params, partial(run, config=config, plan=plan), *rows)

        form = form_of(config.sae)
        if form.any_number or (axes.devices > 1 and not form.by_row):
            complete = axes.everywhere(latents.complete)
            (loss, found), grads = jax.lax.cond(largest_of_members(~complete, axis), dense, sparse)
        else:
            (loss, found), grads = sparse()
    if config.sparsity.aux > 0:
        aux, grads = add_auxiliary(grads, params, acts_BD, found.residual_BD, weights.is_dead_F, config, plan, axis)
        found.parts["loss_aux"] += aux
        loss += aux
    return _of_all_rows(loss, found, axes), grads


def _of_all_rows(loss: Float[Array, ""], found: Forward, axes: Axes) -> tuple[Float[Array, ""], Forward]:
    """The loss and what was found in the whole batch, from what each device found in its rows."""
    means = axes.over_rows(jnp.stack([loss, *found.parts.values()])) if axes.data > 1 else [loss, *found.parts.values()]
    parts = dict(zip(found.parts, means[1:], strict=True))
    firing_F, smallest = axes.sum_of_rows(found.firing_F), axes.least(found.smallest)
    return means[0], found.replace(parts=parts, firing_F=firing_F, smallest=smallest)


def _in_blocks(
    run: Callable[..., Forward], params: Params, rows: tuple[Array, Array], config: TrainConfig, plan: Plan
) -> tuple[tuple[Float[Array, ""], Forward], Params]:
    """`total` and its gradient, summed over blocks of rows if the batch is large and its rows are independent.

    Losses are means over rows, so those of equal blocks are averaged. With several blocks, `encoding` is None.
    """
    P = blocks_of_rows(config, len(rows[0]), plan)
    blocks = [row_blocks(of, P) for of in rows]
    if P == 1:
        (loss, found), grads = jax.value_and_grad(total, has_aux=True)(params, run, *rows)
        return (loss, found if plan.products == "dense" else found.replace(encoding=None)), grads

    def share(params: Params, *block: Array) -> tuple[Array, Forward]:
        loss, found = total(params, run, *block)
        return loss / P, found.replace(encoding=None)

    def add(grads: Params, block: list[Array]) -> tuple[Params, tuple[Array, Forward]]:
        found, more = jax.value_and_grad(share, has_aux=True)(params, *block)
        return jax.tree.map(jnp.add, grads, more), found

    grads, (losses, forwards) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), blocks)
    joined = Forward(
        joined_rows(forwards.residual_BD),
        {name: jnp.mean(parts) for name, parts in forwards.parts.items()},
        firing_F=jnp.sum(forwards.firing_F, axis=0),
        smallest=jnp.min(forwards.smallest),
        encoding=None,
    )
    return (jnp.sum(losses), joined), grads


def blocks_of_rows(config: TrainConfig, batch_size: int, plan: Plan) -> int:
    """The number of blocks of rows in which a dense step takes a device's `batch_size` rows."""
    apart = form_of(config.sae).by_row and config.penalty.sharing != "cofiring"
    return blocks_of(batch_size, config.sae.F // plan.axes.latent, plan.block_bytes) if apart else 1


def _forward_sparse(
    params: Params,
    acts_BD: Array,
    target_BD: Array,
    weights: Weights,
    variance: Array,
    key: Key[Array, ""],
    latents: SparseLatents,
    config: TrainConfig,
    plan: Plan,
) -> Forward:
    """The same as `forward` for an architecture with a sparse form, by products with its active latents alone."""
    architecture, W_dec, dtype = ARCHITECTURES[config.sae.architecture], params["W_dec"], config.sae.compute_dtype
    latents, axes, F = entries.encode(latents, acts_BD, params, config.sae, plan), plan.axes, len(W_dec)
    if architecture.nested:
        ends_G = prefix_ends(config.sae, key)
        band_N = jnp.searchsorted(ends_G, axes.first_latent(F) + latents.latents_N, side="right")
        changes = _changes_by_band(latents, W_dec, band_N, len(ends_G), len(acts_BD), dtype, plan)
    elif architecture.budgets:
        band_N = budget_bands(len(latents.values_N), config.sae, weights.k)
        changes = _changes_by_band(latents, W_dec, band_N, len(config.sae.budgets), len(acts_BD), dtype, plan)
    else:
        changes = [entries.decode(latents, W_dec, len(acts_BD), dtype, plan)]
    changes = [axes.over_latents(change_BD) for change_BD in changes]
    errors_G, residual_BD = prefix_errors(changes, target_BD, params["b_dec"])
    parts = {"fvu": errors_G[-1] / variance, "loss_reconstruction": jnp.mean(errors_G) / variance}
    assert architecture.cost in (None, l1)
    if architecture.cost is not None:
        costs_N = latents.values_N
        if architecture.nested:
            costs_N = costs_N * axes.own_of_all(prefix_shares(config.sae, key))[latents.latents_N]
        cost = axes.over_latents(jnp.sum(costs_N))
        parts["loss_sparsity"] = weights.coefficient * cost / len(acts_BD) / variance
    return Forward(
        residual_BD,
        parts,
        firing_F=latents.firing(F),
        smallest=jnp.min(jnp.where(latents.values_N > 0, latents.values_N, jnp.inf)),
        encoding=None,
    )


def _changes_by_band(
    latents: SparseLatents,
    W_dec: Float[Array, "F D"],
    band_N: Int[Array, " N"],
    bands: int,
    rows: int,
    dtype: str,
    plan: Plan,
) -> list[Float[Array, "B D"]]:
    """What the active latents of each of `bands` bands add to the reconstruction of B = `rows` rows.

    One sum over the entries serves all bands: there is a copy of the B rows for each band, and each entry is added to
    its row in the copy of its band.
    """
    banded = latents.replace(rows_N=(band_N * rows + latents.rows_N).astype(jnp.int32), per_row=None)
    return list(entries.decode(banded, W_dec, bands * rows, dtype, plan).reshape(bands, rows, -1))


def add_auxiliary(
    grads: Params,
    params: Params,
    acts_BD: Float[Array, "B D"],
    residual_BD: Float[Array, "B D_out"],
    is_dead_F: Bool[Array, " F"],
    config: TrainConfig,
    plan: Plan,
    axis: str | None = None,
) -> tuple[Float[Array, ""], Params]:
    """The auxiliary loss, and `grads` with its gradient added.

    The auxiliary loss is `auxiliary_weight` times `auxiliary_error`. While no latent is dead it is 0, and `grads` are
    not touched. Only the dead latents' rows of W_enc and W_dec are multiplied, padded to the next of the
    `_capacities`. A large batch is taken in blocks of rows. SAEs that are trained together along `axis` all use the
    capacity that the one with the most dead latents needs.
    """
    F, axes = len(is_dead_F), plan.axes
    dead = axes.largest(jnp.sum(is_dead_F))  # all devices take the same branches, since they sum in them
    weight = auxiliary_weight(residual_BD, is_dead_F, config.sparsity.aux, axes)

    def revived(params: Params, is_dead_M: Array, acts_ND: Array, target_ND: Array) -> Array:
        return weight * auxiliary_error(params, is_dead_M, acts_ND, target_ND, config.sparsity.aux_k, config.sae, axes)

    def add(
        sums: tuple[Array, Params], capacity: int, is_dead_F: Array, params: Params, *rows: Array
    ) -> tuple[Array, Params]:
        """The sums with the error and gradient of one block added, computed for `capacity` latents."""
        loss, grads = sums
        if capacity == F:
            error, more = jax.value_and_grad(revived)(params, is_dead_F, *rows)
            return loss + error, jax.tree.map(jnp.add, grads, more)
        ids_M = jnp.nonzero(is_dead_F, size=capacity, fill_value=F)[0]
        ids_M = jnp.where(ids_M < F, ids_M, F + jnp.arange(capacity))  # no number twice, so that sums need no atomics
        some = {name: params[name].at[ids_M].get(mode="clip") for name in _OF_LATENTS}
        error, more = jax.value_and_grad(revived)({**some, "b_dec": params["b_dec"]}, ids_M < F, *rows)
        added = {name: grads[name].at[ids_M].add(more[name], mode="drop", unique_indices=True) for name in _OF_LATENTS}
        return loss + error, {**grads, **added, "b_dec": grads["b_dec"] + more["b_dec"]}

    def added(sums: tuple[Array, Params], capacity: int, wanted: Array | None) -> tuple[Array, Params]:
        """The sums with those of all blocks added, if `wanted` is None or true.

        It is a loop over the blocks, or over none, so that XLA updates the sums in place.
        """
        P = blocks_of(len(acts_BD), capacity, plan.block_bytes)
        rows_NPD = [rows_BD.reshape(-1, P, rows_BD.shape[1]) for rows_BD in (acts_BD, residual_BD)]  # every P-th row

        def add_block(block: Array, sums: tuple[Array, Params]) -> tuple[Array, Params]:
            rows_ND = (jax.lax.dynamic_index_in_dim(rows, block, axis=1, keepdims=False) for rows in rows_NPD)
            # Without the barrier XLA computes what is the same for all blocks ahead of the loop, even if it is empty.
            same_params, same_dead_F, _ = jax.lax.optimization_barrier((params, is_dead_F, block))
            return add(sums, capacity, same_dead_F, same_params, *rows_ND)

        return jax.lax.fori_loop(0, P if wanted is None else jnp.where(wanted, P, 0), add_block, sums)

    most, capacities = largest_of_members(dead, axis), _capacities(F, plan)
    sums, smallest = (jnp.zeros(()), grads), (0, *capacities[:-1])
    with jax.named_scope("dead_latents"):
        if not plan.on_cpu:  # one loop of no turn or one: a branch alone would copy the sums even where it adds nothing
            every = [partial(added, capacity=capacity, wanted=None) for capacity in capacities]
            chosen = sum((most > smaller).astype(jnp.int32) for smaller in smallest[1:])
            return jax.lax.fori_loop(0, jnp.minimum(most, 1), lambda _, sums: jax.lax.switch(chosen, every, sums), sums)
        for capacity, smaller in zip(capacities, smallest, strict=True):
            sums = added(sums, capacity, (most > smaller) & (most <= capacity))
    return sums


def _capacities(n_latents: int, plan: Plan) -> list[int]:
    """The numbers of dead latents for which the program has a loop, the last of them all.

    On a CPU 32, 128, 512, ... up to half of all. Elsewhere an eighth and a 64th of all: a small product takes no time
    there, and each loop makes the program larger.
    """
    if not plan.on_cpu:
        return sorted({-(-n_latents // 64), -(-n_latents // 8), n_latents})
    powers = (32 * 4**n for n in range(16))
    return [*itertools.takewhile(lambda power: power <= n_latents // 2, powers), n_latents]
