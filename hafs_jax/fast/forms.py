"""What a step may skip for each architecture: how its active entries are found, and whether its rows are independent.

Each architecture has one record. Without a record, all its products are dense and all rows are taken at once, which is
always right.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from hafs_jax.config import SAEConfig
from hafs_jax.ops.axes import Axes
from hafs_jax.ops.selection import Entries, TopK, largest_of_all, largest_of_rows, positive

Select = Callable[[Float[Array, "B F"], Float[Array, " F"], SAEConfig, Int[Array, ""] | int, Axes], Entries]
"""(product_BF, bias_F, config, k, axes) -> the active entries of `activate(product + bias)`, padded to a fixed number.

On one device that is B * `capacity`.
"""


@dataclass(frozen=True)
class Form:
    """How an architecture can be computed faster."""

    select: Select | None = None  # finds the active entries; None: all products are dense
    any_number: bool = False  # the number of active entries varies, so it may exceed the capacity
    by_row: bool = False  # the latents of a row do not depend on the other rows of the batch
    takes_top_k: bool = False  # `select` takes `top_k`, the form of `jax.lax.top_k` by which it finds them


def _top_of_rows(
    product_BF: Array, bias_F: Array, config: SAEConfig, k: Array | int, axes: Axes, top_k: TopK | None = None
) -> Entries:
    return largest_of_rows(product_BF, bias_F, config.largest_k, k, axes, top_k)


def _top_of_batch(product_BF: Array, bias_F: Array, config: SAEConfig, k: Array | int, axes: Axes) -> Entries:
    B, own = len(product_BF) * axes.data, len(product_BF) * min(3 * config.largest_k // 2, product_BF.shape[1])
    here = None if axes.devices == 1 else own  # a device's rows may have more than their share of the batch's entries
    return largest_of_all(product_BF, bias_F, B * config.largest_k, B * k, axes, here)


def _positive(product_BF: Array, bias_F: Array, config: SAEConfig, k: Array | int, axes: Axes) -> Entries:
    return positive(product_BF, bias_F, len(product_BF) * min(capacity(config), product_BF.shape[1]))


FORMS: dict[str, Form] = {
    "batchtopk": Form(_top_of_batch),
    "topk": Form(_top_of_rows, by_row=True, takes_top_k=True),
    "hierarchical_topk": Form(_top_of_rows, by_row=True, takes_top_k=True),
    "relu": Form(_positive, any_number=True, by_row=True),
    "gated": Form(by_row=True),
    "matryoshka": Form(_top_of_batch),
    "matryoshka_relu": Form(_positive, any_number=True, by_row=True),
}


def form_of(config: SAEConfig) -> Form:
    """The form of the config's architecture, or the plain one if it has none."""
    return FORMS.get(config.architecture, Form())


def capacity(config: SAEConfig) -> int:
    """Entries reserved per row: k, or 1.5 k for architectures whose L0 is only approximately k."""
    k = config.largest_k
    return min(3 * k // 2 if form_of(config).any_number else k, config.F)
