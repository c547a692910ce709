"""Orbax's writing of a checkpoint: what the disk refuses is one line, and what was written outlasts a power loss."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.places import sync_folder, sync_tree

_OF_THE_SYSTEM = re.compile(r"\[os_error_code='(\d+)'|\[OS error (\d+):")
"""How TensorStore names the system's error, wherever in its message."""


@contextlib.contextmanager
def saving(folder: Path, step: int) -> Iterator[None]:
    """Around the writing of the checkpoint `step` in `folder`. Raises `UserError` where the disk refuses it."""
    _hush()
    try:
        yield
        if (folder / str(step)).exists():
            sync_tree(folder / str(step))
            sync_folder(folder)
    except (OSError, ValueError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(
            f"{folder}: {reason} (checkpoint {step}); free space or put the disk right, and repeat the command"
        ) from error


def _hush() -> None:
    """Keeps what Orbax, asyncio and tensorstore say of a refused write, before and long after they raise it, quiet."""
    for name in ("absl", "asyncio"):
        if _of_a_write not in (filters := logging.getLogger(name)).filters:
            filters.addFilter(_of_a_write)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def _of_a_write(record: logging.LogRecord) -> bool:
    """Whether a record is shown: not one of an exception that the disk has caused."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, OSError | ValueError) and _reason(error) is not None)


class _Hook:
    """An unraisablehook that is silent on callbacks of tensorstore that come after the failed save's event loop."""

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self._before = before

    def __call__(self, raised: Any) -> None:
        if not (isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"):
            self._before(raised)


def _reason(error: Exception) -> str | None:
    """What the disk said; None where something else is wrong."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if found := _OF_THE_SYSTEM.search(str(error)):
        return os.strerror(int(found[1] or found[2]))
    return "no space left on the disk" if "RESOURCE_EXHAUSTED" in str(error) else None
