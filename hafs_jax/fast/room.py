"""The free memory of a device, and whether a compiled step has room in it."""

from pathlib import Path
from typing import Any

import jax

from hafs_jax.base.errors import UserError, arg
from hafs_jax.fast.plan import target


def available_bytes() -> int | None:
    """Free bytes of the accelerator, or of the host where the CPU is the device; None where the system does not say."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        return None if limit is None else limit - statistics.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else None


def check_room(compiled: Any, members: int = 1) -> None:
    """Raises `UserError` where what a compiled step allocates is more than the accelerator has free.

    XLA has planned these bytes: its temporary memory, and its results but for those that take the place of arguments.
    The arguments are on the device already. `estimate` says before compiling about how much it will be. On a CPU
    nothing is checked: other processes use its memory too.
    """
    planned = compiled.memory_analysis()
    if target() == "cpu" or planned is None:
        return
    needed = planned.temp_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
    free = available_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"the compiled step needs {size(needed)} beside what is on {jax.local_devices()[0]} already; found "
            f"{size(free)} free; {remedies(members)}"
        )


def remedies(members: int = 1) -> str:
    """What to change where a training of `members` SAEs in one program does not fit."""
    fewer = f"{arg('most_together')}, " if members > 1 else ""
    pool = "" if target() == "cpu" else ", or give JAX more of it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    return (
        f"lower {fewer}{arg('batch_size')}, {arg('sae.expansion')} or {arg('sae.n_latents')}, or split the latents "
        f"over more devices with {arg('mesh')}{pool}"
    )


def size(count: int) -> str:
    """A number of bytes for people, in kB, MB or GB."""
    if count < 1e6:
        return f"{count / 1e3:,.0f} kB"
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
