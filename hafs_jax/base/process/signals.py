"""SIGINT, SIGTERM and SIGHUP: a command ends with one line and exit code 128 + the signal. Standard library only.

- A signal raises `Stopped` in the main thread. Where nothing comes of that within some seconds, since the thread is in
  a long call into C or a library has discarded the exception, the process is ended from outside: all that is written
  survives a kill.
- Inside of `deferred` there is state to save. The signal is noted, and who holds the state saves it and ends.
- A second Ctrl-C ends the process at once, wherever it is.

A signal that was ignored when the command began (nohup, a job in the background of a script) stays ignored. In Python,
without a command, only `deferred` changes handlers, and a second Ctrl-C raises KeyboardInterrupt.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN = "run the same command again"
LINE = f"interrupted; {AGAIN} to resume"

_PATIENCE_SECONDS = 3.0  # between a signal and the end from outside
_DOUBLE_SECONDS = 0.2  # one Ctrl-C may come twice: from the terminal, and from a program that passes it on


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end. `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Command:
    """What is known of signals in a process that is a command."""

    def __init__(self) -> None:
        self.received: list[int] | None = None  # of the `deferred` that is entered
        self.patient = 0  # how many blocks want to end in their own time
        self.again = AGAIN
        self.first: tuple[int, float] | None = None  # the first signal, and when it came
        self.is_raised = self.is_said = self.is_done = False

    def handle(self, number: int, _: FrameType | None) -> None:
        """The handler, which Python runs in the main thread between two of its instructions."""
        if self.received is not None:
            self.received.append(number)
        elif not self.is_raised and not self.is_done:
            self.stop(number)

    def stop(self, number: int) -> NoReturn:
        self.is_raised = True
        raise Stopped(number)

    def watch(self, pipe: int) -> None:
        """Reads signals as they come, also while the main thread is in C, and ends the process where that is due."""
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in NUMBERS:
                    self._came(number)

    def _came(self, number: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = number, now
            threading.Thread(target=self._see_to_the_end, name="signals-end", daemon=True).start()
        elif number == signal.SIGINT and now - self.first[1] > _DOUBLE_SECONDS:
            self._end(f"ended at once; {self.again} to resume")

    def _see_to_the_end(self) -> None:
        waited = 0.0
        while waited < _PATIENCE_SECONDS:
            time.sleep(0.05)
            waited = 0.0 if self.patient or self.received is not None else waited + 0.05
        self._end(line())

    def _end(self, line: str) -> NoReturn:
        assert self.first is not None
        if not self.is_said:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{line}\n".encode())
        os._exit(128 + self.first[0])


_command: _Command | None = None


def of_a_command() -> None:
    """Handles the signals of this process as those of a command, from now on. Nothing outside of the main thread."""
    global _command
    if _command is not None or threading.current_thread() is not threading.main_thread():
        return
    _command = _Command()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_command.watch, args=(reader,), name="signals", daemon=True).start()
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _command.handle)
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """In a fork: a signal to it is none to the command."""
    signal.set_wakeup_fd(-1)
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def resumed_by(again: str) -> None:
    """Notes how the work of this command is resumed, where that is not by `AGAIN`."""
    if _command is not None:
        _command.again = again


def again() -> str:
    """How the work of this command is resumed, in words."""
    return AGAIN if _command is None else _command.again


def line() -> str:
    """What a command says that was interrupted."""
    return LINE.replace(AGAIN, again())


def said() -> None:
    """Notes that the line of a stopped command was written, so that it is not written twice."""
    if _command is not None:
        _command.is_said = True


def done() -> None:
    """Notes that the command has done its work: a signal only ends what is left of the process."""
    if _command is not None:
        _command.is_done = True


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """While inside, a stopped command ends in its own time: it waits for children that save their state."""
    if _command is None:
        yield
        return
    _command.patient += 1
    try:
        yield
    finally:
        _command.patient -= 1


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
    """While inside, the signals append their numbers to the list that it gives, and whoever has entered it ends.

    Where it ends without an exception all the same, the signal is raised after it. Python lets only the main thread
    handle signals: in another one the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
    elif _command is not None:
        outer, _command.received = _command.received, received
        try:
            yield received
        finally:
            _command.received = outer
        if received:
            _command.stop(received[0])
    else:
        with _own_handlers(received):
            yield received


@contextlib.contextmanager
def _own_handlers(received: list[int]) -> Iterator[None]:
    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.getsignal(number) for number in NUMBERS}
    taken = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
    if received:
        signal.raise_signal(received[0])
