"""What lets an architecture's step skip work: how its active entries are found, and whether rows stand alone.

One record an architecture. An architecture without a record is computed densely, all rows at once, which is always
right.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from hafs_jax.config import SAEConfig
from hafs_jax.ops.selection import Entries, largest_of_all, largest_of_rows, positive

Select = Callable[[Float[Array, "B F"], Float[Array, " F"], SAEConfig, Int[Array, ""] | int], Entries]
"""(product_BF, bias_F, config, k) -> the entries that `activate` leaves of product + bias, room for B * `capacity`."""


@dataclass(frozen=True)
class Form:
    """How an architecture may be computed faster."""

    select: Select | None = None  # finds the active entries; none: all products are dense
    any_number: bool = False  # how many are active is not fixed, so there may be no room for some
    by_row: bool = False  # what becomes of a row does not depend on the other rows of the batch


def _top_of_rows(product_BF: Array, bias_F: Array, config: SAEConfig, k: Array | int) -> Entries:
    return largest_of_rows(product_BF, bias_F, config.largest_k, k)


def _top_of_batch(product_BF: Array, bias_F: Array, config: SAEConfig, k: Array | int) -> Entries:
    B = len(product_BF)
    return largest_of_all(product_BF, bias_F, B * config.largest_k, B * k)


def _positive(product_BF: Array, bias_F: Array, config: SAEConfig, k: Array | int) -> Entries:
    return positive(product_BF, bias_F, len(product_BF) * capacity(config))


FORMS: dict[str, Form] = {
    "batchtopk": Form(_top_of_batch),
    "topk": Form(_top_of_rows, by_row=True),
    "relu": Form(_positive, any_number=True, by_row=True),
    "gated": Form(by_row=True),
    "matryoshka": Form(_top_of_batch),
    "matryoshka_relu": Form(_positive, any_number=True, by_row=True),
}


def form_of(config: SAEConfig) -> Form:
    """The form of the config's architecture; the plain one where it has none."""
    return FORMS.get(config.architecture, Form())


def capacity(config: SAEConfig) -> int:
    """Entries reserved per row: k, or 1.5 k for architectures whose L0 is only approximately k."""
    k = config.largest_k
    return min(3 * k // 2 if form_of(config).any_number else k, config.F)
