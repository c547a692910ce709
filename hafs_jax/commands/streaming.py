"""`hafs train --stream`: an extraction beside the training, as one command with one display."""

import contextlib
import os
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from hafs_jax.base.errors import UserError
from hafs_jax.base.process import children

_POLL_SECONDS = 0.1
_MOST_RESTARTS = 3


@contextlib.contextmanager
def extraction(out: Path, profile: str, flags: str) -> Iterator[None]:
    """Runs `hafs extract FLAGS` as a child. Inside, its stores are there, or a first window.

    Until then what the child prints is passed on; later only its error is. A child that is killed is started again.
    """
    child = _Extraction(out, profile, flags)
    with children.stopping():
        child.start()
        child.wait_for_stores()
        try:
            yield
        except UserError as error:
            if (said := child.failure()) is not None:
                raise UserError(f"{said} (the extraction); {error}") from None
            raise
        child.thread.join()


class _Extraction:
    """A child that extracts, and what it says."""

    def __init__(self, out: Path, profile: str, flags: str) -> None:
        self.command = ["extract", "--out", str(out), "--profile", profile, *shlex.split(flags)]
        self.noted = out / "auto.json"  # which an extraction writes anew when its stores are there
        self.before = _state(self.noted)
        self.said: deque[str] = deque(maxlen=20)
        self.is_shown, self.code = True, 0
        self.thread = threading.Thread(target=self._run, name="extraction", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def wait_for_stores(self) -> None:
        """Returns when the stores are there. Ends the command as the child ended where it failed before."""
        while _state(self.noted) == self.before:
            if not self.thread.is_alive():
                if self.code:
                    raise SystemExit(self.code)
                break
            time.sleep(_POLL_SECONDS)
        self.is_shown = False

    def failure(self) -> str | None:
        """The error with which the child ended; None where it did not."""
        if self.thread.is_alive() or not self.code:
            return None
        return next((line for line in reversed(self.said) if line.strip()), f"it ended with code {self.code}")

    def _run(self) -> None:
        for _ in range(1 + _MOST_RESTARTS):
            self.code = self._once()
            if self.code >= 0:  # it has ended by itself
                return

    def _once(self) -> int:
        reader, writer = os.pipe()
        passing = threading.Thread(target=self._pass_on, args=(reader,), daemon=True)
        passing.start()
        try:
            return children.run(self.command, stdout=writer, stderr=writer)
        finally:
            os.close(writer)
            passing.join()

    def _pass_on(self, reader: int) -> None:
        with os.fdopen(reader, "r", errors="replace", newline="") as pipe:
            line = ""
            while piece := pipe.read(1):
                if self.is_shown:
                    sys.stderr.write(piece)
                    sys.stderr.flush()
                if piece in "\r\n":
                    self.said.append(line)
                    line = ""
                else:
                    line += piece


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
