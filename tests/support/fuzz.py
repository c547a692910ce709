"""Damaged inputs for the fuzz tests. HAFS_FUZZ=20 makes each try twenty times as many cases."""

import os
import random

INSERTED = (b"9" * 5000, b"[" * 20_000, b"\0", b"\xff", b"-", b"NaN", b"{", b'"', b"\n", b"null")


def cases(count: int) -> int:
    """How many cases a test that tries `count` by default shall try."""
    return round(count * float(os.environ.get("HAFS_FUZZ", "1")))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The data with some bytes changed, cut out, doubled or replaced, or cut short."""
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 1, 4, 40)))
    return rng.choice(
        (
            data[:start] + rng.randbytes(stop - start) + data[stop:],
            data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :],
            data[:start],
            data[:start] + data[stop:],
            data[:stop] + data[start:],
            data[:start] + rng.choice(INSERTED) + data[stop:],
        )
    )
