"""What a penalty is given, at test size."""

import jax
import jax.numpy as jnp

from hafs_jax.config import PenaltyConfig, SAEConfig
from hafs_jax.method.penalties import Structure, first_groups

F, D, B = 22, 7, 9


def structure_of(config: PenaltyConfig = PenaltyConfig(), n_latents: int = F) -> Structure:
    """Groups of the config's sharing; every latent fires as often as its number says; a random batch."""
    active_BF = jax.random.uniform(jax.random.key(9), (B, n_latents)) < 0.4
    return Structure(first_groups(config, SAEConfig(n_latents=n_latents, k=1)), jnp.arange(n_latents) / 50.0, active_BF)
