"""Where the project's notes go: to `logging` from the library, to the terminal from the command line.

Each package logs under its own name ("hafs_extract", "hafs_jax", "hafs_evaluate") and prints nothing by itself. A
Python user turns the notes on or off as with any library: `logging.basicConfig(level=logging.INFO)` shows them, and
`logging.getLogger("hafs_jax").setLevel(logging.WARNING)` silences them. Standard library only.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

PACKAGES = ("hafs_extract", "hafs_jax", "hafs_evaluate")
"""The loggers of the project; every module's logger is a child of one of them."""


@contextmanager
def shown(notes: Literal["stdout", "stderr"] = "stderr") -> Iterator[None]:
    """While inside, the notes of all packages are shown as plain lines: those at INFO on `notes`, warnings on stderr.

    A command wraps its work in this. A level that the user has set on a package's logger is kept. The root logger's
    handlers do not get the notes meanwhile: some libraries add one when they are imported, which would show them twice.
    """
    handler = _Plain(notes)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    unset = [logger for logger in loggers if logger.level == logging.NOTSET]
    propagating = [logger for logger in loggers if logger.propagate]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    for logger in unset:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        for logger in propagating:
            logger.propagate = True
        for logger in unset:
            logger.setLevel(logging.NOTSET)


def bar_options(logger: logging.Logger, progress: bool | None = None) -> dict[str, Any]:
    """How tqdm shows a bar of the module that owns `logger`: hidden unless the logger takes INFO or `progress` is True.

    `progress` False hides it in any case. Where stderr is a file, the bar is written every 15 seconds; in a notebook it
    is a widget, which is drawn anew (`tqdm.auto`).
    """
    hidden = not logger.isEnabledFor(logging.INFO) if progress is None else not progress
    drawn = sys.stderr.isatty() or "ipykernel" in sys.modules
    return {"disable": hidden, "mininterval": 0.5 if drawn else 15.0}


class _Plain(logging.Handler):
    """Writes the message alone, to the stream that is `sys.stdout` or `sys.stderr` at that moment."""

    def __init__(self, notes: str) -> None:
        super().__init__()
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else getattr(sys, self._notes)
        print(self.format(record), file=stream, flush=True)
