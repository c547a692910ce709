"""The machine's limits: the rates of a large matrix product in each dtype and of a large copy, by JAX and by torch."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.harness import Row, interleaved
from hafs_jax.ops.products import matmul

B, D, F = 2_048, 576, 4_608
_COPIED = 1 << 28  # bytes


def measure(quick: bool) -> Iterator[Row]:
    """Rows with GFLOP/s of a product [B, D] @ [D, F] and GB/s of a copy, which counts bytes read and bytes written."""
    rounds = 5 if quick else 15
    random = np.random.default_rng(0)
    left, right = (random.standard_normal(shape, dtype=np.float32) for shape in ((B, D), (D, F)))
    for dtype in ("float32", "bfloat16"):
        cases = {"ours": jax_product(left, right, dtype), "theirs": _torch_product(left, right, dtype)}
        yield _row(f"matrix product, {dtype}", interleaved(cases, rounds), 2 * B * D * F / 1e9, "GFLOP/s")
    source = np.ones(_COPIED // 4, np.float32)
    ours, theirs, torch_source = np.empty_like(source), torch.empty(len(source)), torch.from_numpy(source)
    cases = {"ours": lambda: np.copyto(ours, source), "theirs": lambda: theirs.copy_(torch_source)}
    yield _row("copy", interleaved(cases, rounds), 2 * _COPIED / 1e9, "GB/s")


def jax_product(left: np.ndarray, right: np.ndarray, dtype: str) -> Callable[[], Any]:
    """A case that multiplies two arrays, which are already in `dtype` on the device."""
    arrays = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
    product = jax.jit(lambda left, right: matmul(left, right, dtype))
    return lambda: jax.block_until_ready(product(*arrays))


def _torch_product(left: np.ndarray, right: np.ndarray, dtype: str) -> Callable[[], Any]:
    pair = [torch.from_numpy(array).to(getattr(torch, dtype)) for array in (left, right)]
    return lambda: pair[0] @ pair[1]


def _row(name: str, times: Any, amount: float, unit: str) -> Row:
    ours, spread = times["ours"].rate(amount)
    theirs, _ = times["theirs"].rate(amount)
    return Row(name, "torch", ours, theirs, unit, ours / theirs, None, sizes={"B": B, "D": D, "F": F}, spread=spread)
