"""Commands that a command starts. They end with it, however it ends. Standard library only.

A child holds the reading end of a pipe, whose writing end only its parent holds: the pipe's end tells it that the
parent is gone, also after a SIGKILL. It then gets a SIGTERM from itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from hafs_jax.base.process import signals

_VARIABLE = "HAFS_PARENT_PIPE"

_children: set[subprocess.Popen] = set()
_lock = threading.Lock()
_stopped = False


def run(command: Sequence[str], cores: set[int] | None = None, **options: Any) -> int:
    """Runs `hafs COMMAND` as a child and returns its exit code. `options` are those of `subprocess.Popen`.

    Its threads run on `cores` [all]. Where this process is stopped meanwhile, see `stopping`.
    """
    reader, writer = os.pipe()
    environment = {**(options.pop("env", None) or os.environ), _VARIABLE: str(reader)}
    try:
        with _lock:  # a pipe's end that another child inherits would hold it open
            if _stopped:
                return 128 + signal.SIGTERM
            process = subprocess.Popen(
                [sys.executable, "-m", "hafs_jax", *command], env=environment, pass_fds=[reader], **options
            )
            _children.add(process)
        os.close(reader)
        reader = -1
        if cores is not None:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)  # the threads that it will start inherit it
        try:
            return process.wait()
        except BaseException:
            _end([process])
            raise
        finally:
            _children.discard(process)
    finally:
        for end in (reader, writer):
            if end >= 0:
                os.close(end)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Where the block is left by an exception, such as a signal's, all children are ended: they save what they have."""
    try:
        yield
    except BaseException:
        global _stopped
        with _lock:
            _stopped, running = True, list(_children)
        _end(running)
        _stopped = False
        raise


def _end(processes: list[subprocess.Popen]) -> None:
    with signals.patient():
        for process in processes:
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


def end_with_parent() -> None:
    """In a child: from now on, the end of its parent is a SIGTERM to it. Nothing in a process that is no child."""
    number = os.environ.pop(_VARIABLE, "")
    if not number.isdigit():
        return
    pipe = int(number)
    with contextlib.suppress(OSError):
        os.set_inheritable(pipe, False)

    def watch() -> None:
        with contextlib.suppress(OSError):
            if os.read(pipe, 1) == b"":
                os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
