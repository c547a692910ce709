"""The first look for JAX's devices, which fails where JAX was asked for a platform that the machine has not."""

import os

import jax

from hafs_jax.base.errors import UserError


def check_devices() -> None:
    """Raises `UserError` where JAX finds no device to run on. The first call starts JAX's platforms."""
    try:
        jax.devices()
    except RuntimeError as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split())
        raise UserError(
            f"JAX_PLATFORMS={wanted}: expected a device to run on, found none ({reason}); set JAX_PLATFORMS=cpu, or "
            "mend the driver or the installation of JAX for it"
        ) from None
