"""The exception for a user's mistake, and how every command line of the project reports it. Standard library only.

A message names an option by `arg`. In Python it then reads `force=True`, and on a command line `--force`.
"""

import contextlib
import errno
import re
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hafs_jax.base.process import signals

_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ESTALE, errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.EMFILE, errno.ENFILE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
}
"""The errors of reading and writing that a user can correct."""


_MOST_LETTERS = 2_000  # of an error on the command line
_BEGIN, _END = "\x02", "\x03"  # around an option's name in a message, with a NUL between the name and its value
_OPTION = re.compile(f"{_BEGIN}([^\0{_END}]*)(?:\0([^{_END}]*))?{_END}")
_QUOTED = re.compile(r"^'([\w.,=+-]+)'$")  # a string that a shell takes without quotes
_FLAGS: ContextVar[dict[str, str] | None] = ContextVar("flags", default=None)


def arg(name: str, value: Any = ...) -> str:
    """An option as a `UserError` names it, with a value or without: `sae.k=3` in Python, `--sae.k 3` in a command.

    `name` is dotted where the option lies in a part of a config.
    """
    shown = "" if value is ... else f"\0{value!r}"
    return f"{_BEGIN}{name}{shown}{_END}"


def note_flags(flags: Mapping[str, str]) -> None:
    """Says which options the command at work has, and how each is written on its line. Nothing outside of a command."""
    if (known := _FLAGS.get()) is not None:
        known |= flags


class UserError(Exception):
    """Bad input. The message says what was expected, what was found, where, and what to do, on one line."""

    def __str__(self) -> str:
        return _OPTION.sub(lambda found: found[1] + ("" if found[2] is None else f"={found[2]}"), super().__str__())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def on_command_line(self, flags: Mapping[str, str]) -> str:
        """The message with each option that is one of `flags` written as its flag."""

        def written(found: re.Match) -> str:
            name, value = found[1], found[2]
            base, bracket, place = name.partition("[")
            if base not in flags:
                return name if value is None else f"{name}={value}"
            flag = flags[base]
            if value is None or value == "True":
                return flag
            if value == "False":
                return "--no-" + flag.removeprefix("--")
            if value == "None":
                value = "none"
            plain = _QUOTED.match(value)
            return f"{flag} {plain[1] if plain else value}" + (f" ({bracket}{place})" if bracket else "")

        return _OPTION.sub(written, super().__str__())


def in_one_line(text: str) -> str:
    """The text with what is no printable character as its escape: a name that a user gave may hold a line end.

    Of a text that is longer than a line can tell, the middle is left out.
    """
    if len(text) > _MOST_LETTERS:
        text = f"{text[: _MOST_LETTERS // 2]}...{text[-_MOST_LETTERS // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit code 2; any other exception is our bug and passes.

    So is what the disk refuses of a named file: a file where a folder is expected, a name that is too long, no space.
    """
    flags: dict[str, str] = {}
    token = _FLAGS.set(flags)
    try:
        yield
    except UserError as error:
        print(f"error: {in_one_line(error.on_command_line(flags))}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _DISK:
            raise
        path = "the disk" if error.filename is None else str(error.filename)
        shown = path if len(path) <= 300 else f"{path[:140]}...{path[-140:]}"
        print(f"error: {in_one_line(shown)}: {error.strerror}; put that right, or give another path", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(signals.line(), file=sys.stderr)
        signals.said()
        raise SystemExit(128 + (stop.number if isinstance(stop, signals.Stopped) else 2)) from None
    finally:
        _FLAGS.reset(token)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around the use of a file that is open: what the disk refuses then names no file, and names `path` after this."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns what the disk refuses (it is full, say) into a `UserError`; any other OSError is our bug and passes.

    `out` is named where the error itself names no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or out
        raise UserError(f"{where}: {error.strerror}; put that right and repeat the command, or change --out") from None
