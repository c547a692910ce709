"""Random and damaged inputs: how many of each kind the tests try, and what damage is.

`pytest --fuzz-cases 50000 -o timeout=0 -o faulthandler_timeout=0` tries about twenty times as many as the default, and
lets each test take as long. A case's random numbers depend on its kind and number alone, which the output of a failed
test ends with.
"""

import random
from collections.abc import Callable, Iterator

CASES = {
    "damaged files": 300,
    "text records": 300,
    "npy files": 200,
    "model folders": 160,
    "SAE files": 600,
    "flags of extract": 100,
    "flags of import": 120,
}
"""How many cases of each kind are tried by default."""

TOTAL = sum(CASES.values())
Fuzz = Callable[..., Iterator[random.Random]]
"""What the fixture `fuzz` is: `fuzz(kind)` yields the random numbers of one case after another."""

INSERTED = (b"9" * 5000, b"[" * 20_000, b"\0", b"\xff", b"-", b"NaN", b"{", b'"', b"\n", b"null")


def count(kind: str, total: int = TOTAL) -> int:
    """How many cases of a kind are tried where `total` of all kinds are: at least one."""
    return max(1, round(CASES[kind] * total / TOTAL))


def numbers(kind: str, case: int) -> random.Random:
    """The random numbers of one case."""
    return random.Random(f"{kind} {case}")


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
