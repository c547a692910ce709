"""Resampling of dead latents: they restart from the rows that the SAE reconstructs worst. Pure functions.

Rows are drawn in proportion to their squared loss, as in "Towards Monosemanticity" (Bricken et al. 2023).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, Key

from hafs_jax.config import TrainConfig
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.method.latent_axes import latent_axis
from hafs_jax.method.sae import unit_rows
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.members import largest_of_members
from hafs_jax.ops.products import Params

_ENCODER_SHARE = 0.2  # norm of a new encoder row, relative to the mean norm of the live ones


def resample(
    params: Params,
    opt_state: optax.OptState,
    steps_since_fired_F: Int[Array, " F"],
    dead_steps: int,
    rows: tuple[Array, Array],
    now: Bool[Array, ""],
    key: Key[Array, ""],
    config: TrainConfig,
    axis: str | None = None,
    axes: Axes = Axes(),
) -> tuple[Params, optax.OptState, Int[Array, " F"]]:
    """The parameters, optimizer state and counters with all dead latents reset if `now`, else unchanged.

    `rows` are the batch's scaled inputs [B, D] and residuals [B, D_out]. One of them is drawn for each dead latent:

    - its dictionary vector becomes the direction of the row's residual;
    - its encoder row becomes the same direction (for a transcoder, that of the row's input), with a fifth of the
      mean norm of the live rows;
    - its bias becomes 0, and the architecture's own parameters get their initial values;
    - its moments and its counter become 0.

    On several devices the parameters and moments are those of the latents that this device owns; the counters are of
    all its latents, and the rows its own.
    """

    def renew(params: Params, opt_state: Any, since_F: Array) -> tuple[Params, Any, Array]:
        acts_BD, residual_BD = rows
        is_dead_F = (since_F >= dead_steps) & now
        is_dead_O = axes.owned(is_dead_F)
        error_B = axes.all_rows(jnp.sum(residual_BD**2, axis=1))
        drawn = jax.random.categorical(key, 2.0 * jnp.log(error_B + 1e-20), shape=(config.sae.F,))
        drawn_F = axes.own_of_all(drawn)
        decoder_OD = unit_rows(axes.rows_for_owned(residual_BD, drawn_F))
        encoder_OD = unit_rows(axes.rows_for_owned(acts_BD, drawn_F)) if config.sae.transcode else decoder_OD
        norm_O = jnp.linalg.norm(params["W_enc"], axis=1)
        norms = axes.sum_of_all(jnp.sum(jnp.where(is_dead_O, 0.0, norm_O)))
        live = norms / jnp.maximum(axes.sum_of_all(jnp.sum(~is_dead_O)), 1)
        fresh = {"W_dec": decoder_OD, "W_enc": _ENCODER_SHARE * live * encoder_OD, "b_enc": jnp.zeros_like(norm_O)}
        for name, first in ARCHITECTURES[config.sae.architecture].params.items():
            fresh[name] = jnp.full_like(norm_O, first(config.sae))
        params = {
            name: jnp.where(_along(is_dead_O, _axis(name), value.ndim), fresh[name], value) if name in fresh else value
            for name, value in params.items()
        }

        def without_dead(path: tuple, leaf: Array) -> Array:
            axis = latent_axis(path)
            return leaf if axis is None else jnp.where(_along(is_dead_O, axis, leaf.ndim), 0, leaf)

        moments = jax.tree_util.tree_map_with_path(without_dead, opt_state)
        return params, moments, jnp.where(is_dead_F, 0, since_F)

    return jax.lax.cond(
        largest_of_members(now, axis), renew, lambda *same: same, params, opt_state, steps_since_fired_F
    )


def _axis(name: str) -> int:
    axis = latent_axis((jax.tree_util.DictKey(name),))
    assert axis is not None
    return axis


def _along(is_dead_F: Bool[Array, " F"], axis: int, ndim: int) -> Array:
    """The mask shaped to broadcast along `axis` of an array of `ndim` axes."""
    return jnp.expand_dims(is_dead_F, tuple(other for other in range(ndim) if other != axis))
