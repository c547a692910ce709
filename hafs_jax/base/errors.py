"""The exception that means a user's mistake, and how every command line of the project reports it."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Bad input. The message says what was expected, what was found, where, and what to do, on one line."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a `UserError` into one line on stderr and exit code 2; any other exception is our bug and passes."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None
