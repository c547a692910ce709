"""The exception for a user's mistake, and how every command line of the project reports it. Standard library only."""

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
}
"""The errors of reading and writing that a user can correct."""


class UserError(Exception):
    """Bad input. The message says what was expected, what was found, where, and what to do, on one line."""


def in_one_line(text: str) -> str:
    """The text with what is no printable character as its escape: a name that a user gave may hold a line end."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit code 2; any other exception is our bug and passes.

    So is what the disk refuses of a named file: a file where a folder is expected, a name that is too long, no space.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {in_one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _DISK or error.filename is None:
            raise
        path = str(error.filename)
        shown = path if len(path) <= 300 else f"{path[:140]}...{path[-140:]}"
        print(f"error: {in_one_line(shown)}: {error.strerror}; put that right, or give another path", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None


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
