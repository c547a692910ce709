"""Arrays of any library as numpy's, in main memory. Tensors of torch are known by what they can do: no torch here."""

from typing import Any

import numpy as np

from hafs_jax.base.errors import UserError
from hafs_jax.base.foreign import reason

_NUMBERS = ("float", "bfloat", "int", "uint")  # how the names of the dtypes begin that are taken


def host_array(values: Any, what: str) -> np.ndarray:
    """The array, tensor or list in float32; `UserError`, which says that `what` was expected, where it is no numbers.

    A float64 that is too large becomes infinity.
    """
    if isinstance(values, (list, tuple)):
        values = [host_array(part, what) if hasattr(part, "shape") else part for part in values]
    try:
        if callable(getattr(values, "detach", None)):
            check_dtype(values.dtype, what)
            dense = values.to_dense() if getattr(values, "is_sparse", False) else values
            values = dense.detach().float().cpu().numpy()  # numpy has no bfloat16
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list, a tensor without values
        raise UserError(
            f"expected {what}, found a {type(values).__name__} that is no array ({reason(error)[:150]})"
        ) from None
    check_dtype(array.dtype, what)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def check_dtype(dtype: Any, what: str) -> None:
    """Raises `UserError` unless the dtype, of whichever library, is one of real numbers."""
    name = str(dtype).removeprefix("torch.")
    if not name.startswith(_NUMBERS):
        raise UserError(f"expected {what}, found values of dtype {name}; convert them to float32")
