"""JAX's devices, of which there may be none, and the cache of what was compiled for them."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from hafs_jax.base.errors import UserError
from hafs_jax.ops.compiled import check_entries, is_checked


def check_devices() -> None:
    """Raises `UserError` where JAX finds no device to run on. The first call starts JAX's platforms and the cache."""
    use_compilation_cache()
    try:
        jax.devices()
    except RuntimeError as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split())
        raise UserError(
            f"JAX_PLATFORMS={wanted}: expected a device to run on, found none ({reason}); set JAX_PLATFORMS=cpu, or "
            "mend the driver or the installation of JAX for it"
        ) from None


def describe_devices() -> str:
    """The devices in words: "the CPU, 8 cores", "2 x NVIDIA H200"."""
    check_devices()
    devices = jax.devices()
    if devices[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shown = f"the CPU, {cores} core{'s' if cores > 1 else ''}"
        return shown if len(devices) == 1 else f"{shown} as {len(devices)} devices"
    return f"{len(devices)} x {devices[0].device_kind}" if len(devices) > 1 else str(devices[0].device_kind)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next process starts without compiling.

    All of them: a start compiles about a hundred small programs, which together take seconds. A folder that the user
    has given to JAX is kept, and so is what JAX_ENABLE_COMPILATION_CACHE=false says. Where the folder cannot be written
    there is no cache. Damaged entries are compiled anew (see `compiled`).
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        if check_entries() and not is_checked():
            compilation_cache.reset_cache()  # JAX remembers the one that it has used
        return
    if not check_entries():
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hafs-jax" / "jax"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(cache, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # what was compiled before had none, which JAX remembers
