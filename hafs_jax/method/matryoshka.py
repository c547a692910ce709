"""Matryoshka SAEs: nested prefixes of the dictionary, each of which reconstructs on its own. Pure functions.

A *prefix* is the first latents up to some number. A *band* is the part of a prefix that is not in the one before.
Source: Bussmann et al. 2025 (arXiv 2503.17547).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from hafs_jax.config import SAEConfig
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.products import Params, matmul

_PARETO = 0.5  # shape of the distribution of sampled lengths: short prefixes are more frequent


def prefix_ends(config: SAEConfig, key: Key[Array, ""]) -> Int[Array, " G"]:
    """The lengths of the prefixes, rising, the last of them F.

    They are the config's fractions of F or, with `sampled_prefixes`, drawn with `key` from a Pareto distribution of
    shape 0.5 truncated to 1..F.
    """
    F = config.F
    if not config.sampled_prefixes:
        return jnp.asarray(fixed_ends(config), jnp.int32)
    uniform = jax.random.uniform(key, (config.sampled_prefixes - 1,))
    lengths = (1.0 - uniform * (1.0 - F**-_PARETO)) ** (-1.0 / _PARETO)
    inner = jnp.sort(jnp.clip(lengths.astype(jnp.int32), 1, F))
    return jnp.concatenate([inner, jnp.full(1, F, jnp.int32)])


def fixed_ends(config: SAEConfig) -> tuple[int, ...]:
    """The lengths of the fixed prefixes: each fraction in `prefixes` times F, rounded, at least 1."""
    return tuple(max(1, round(fraction * config.F)) for fraction in config.prefixes)


def prefix_shares(config: SAEConfig, key: Key[Array, ""]) -> Float[Array, " F"]:
    """The fraction of the prefixes that contain each latent: 1 for the first band, 1 / G for the last of G.

    It is the weight of a latent's sparsity cost, since the loss is the mean over G nested SAEs, each with its own cost.
    At full weight L1 would exceed what a latent of the last band gains in its one prefix, and kill the band.
    """
    return jnp.mean(jnp.arange(config.F)[None] < prefix_ends(config, key)[:, None], axis=0, dtype=jnp.float32)


def bands(config: SAEConfig) -> Int[Array, " F"]:
    """The level of each latent: the number, from 0, of the first fixed prefix that contains it."""
    ends = jnp.asarray(fixed_ends(config), jnp.int32)
    return jnp.searchsorted(ends, jnp.arange(config.F), side="right").astype(jnp.int32)


def prefix_changes(
    latents_BF: Float[Array, "B F"], params: Params, config: SAEConfig, key: Key[Array, ""], axes: Axes = Axes()
) -> list[Float[Array, "B D"]]:
    """What each band of latents adds to the reconstruction.

    Bands of fixed prefixes are slices, which together cost one decoder product. Bands of sampled prefixes cost one
    decoder product each, and so do fixed ones if the latents are split over devices: those run one program, and the
    slices of each would be others.
    """
    if config.sampled_prefixes or axes.latent > 1:
        ends_G, count = prefix_ends(config, key), latents_BF.shape[1]
        band_F = jnp.searchsorted(ends_G, axes.first_latent(count) + jnp.arange(count), side="right")
        parts = [jnp.where((band_F == g)[None], latents_BF, 0.0) for g in range(len(ends_G))]
        return [axes.over_latents(matmul(part, params["W_dec"], config.compute_dtype)) for part in parts]
    ends = fixed_ends(config)
    slices = [slice(start, end) for start, end in zip((0, *ends), ends, strict=False)]
    return [matmul(latents_BF[:, s], params["W_dec"][s], config.compute_dtype) for s in slices]


def prefix_errors(
    changes: Sequence[Float[Array, "B D"]], target_BD: Float[Array, "B D"], b_dec: Float[Array, " D"]
) -> tuple[Float[Array, " G"], Float[Array, "B D"]]:
    """The mean over rows of |target - reconstruction|^2 for each prefix, and the residual of the last prefix."""
    residual_BD, errors = target_BD - b_dec[None], []
    for change_BD in changes:
        residual_BD = residual_BD - change_BD
        errors.append(jnp.mean(jnp.sum(residual_BD**2, axis=1)))
    return jnp.stack(errors), residual_BD
