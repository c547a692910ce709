"""On an accelerator: the dense bfloat16 step, TopK over 131,072 latents, and the dense step's wait for its data.

Our side needs no other library than JAX. sae_lens, dictionary_learning and sparsify with its fused kernels take part
if they are installed and torch has the device. Losses and gradients are compared first, at a small size on the CPU. On
a CPU the suite has no rows. It has not been run on an accelerator yet. The batch repeats, so that latents would soon
count as dead; the config prevents that.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import loading
from benchmarks.harness import Row, interleaved
from benchmarks.workloads import config_of, five_products, our_steps, planted_rows
from hafs_jax.config import TrainConfig
from hafs_jax.method.sae import init_params

_D, _B, _DENSE_F, _WIDE_F, _K = 2_048, 8_192, 32_768, 131_072, 64
_STEPS = 4
_PRODUCTS_TARGET = 0.65
_CHECKED = 64
_BYTES = 2 << 30  # size of the store that the loader reads
_NONE_DEAD = {"dead_after_tokens": 10**9}

Runs = dict[str, Callable[[], Any]]


def measure(quick: bool) -> Iterator[Row]:
    """Rows with tokens per second. The dense step's target is 0.65 of the rate of its products in the same rounds."""
    if jax.default_backend() == "cpu":
        return
    rounds = 5 if quick else 20
    dense, wide = _config("relu", _DENSE_F), _config("topk", _WIDE_F, products="sparse")
    rows_BD = planted_rows(_B, seed=0, d_model=_D)
    products = five_products(rows_BD, _weights(dense, _D), "bfloat16")
    yield from _rows(dense, rows_BD, _STEPS, rounds, {"its five products": products}, _PRODUCTS_TARGET)
    by_dense = our_steps(_config("topk", _WIDE_F, products="dense"), rows_BD, 1)
    yield from _rows(wide, rows_BD, 1, rounds, {"our dense products": by_dense})
    del products, by_dense  # the other libraries need their memory
    with tempfile.TemporaryDirectory(prefix="hafs-loading-") as temporary:
        store = loading.make_store(Path(temporary), _BYTES, _D)
        sizes = {"MB": _BYTES >> 20, "D": _D, "B": _B, "dtype": "bfloat16"}
        yield loading.waiting(store, 2 if quick else 6, sizes, _B, n_latents=_DENSE_F, compute_dtype="bfloat16")
    for config, steps in ((dense, _STEPS), (wide, 1)):
        for peer in _installed(config):
            yield from _rows(config, rows_BD, steps, rounds, {peer: _peer_step(peer, config, rows_BD)})


def _config(architecture: str, n_latents: int, **fields: Any) -> TrainConfig:
    sae = {"n_latents": n_latents, "compute_dtype": "bfloat16", "k": _K, "encoder_scale": 1.0}
    return config_of(architecture, n_latents, sae=sae, sparsity=_NONE_DEAD, batch_size=_B, **fields)


def _rows(
    config: TrainConfig, rows_BD: np.ndarray, steps: int, rounds: int, others: Runs, target: float | None = None
) -> Iterator[Row]:
    """Rows that compare `steps` of our steps in one call with one step of each of `others`."""
    times = interleaved({"ours": our_steps(config, rows_BD, steps), **others}, rounds)
    ours, spread = times["ours"].rate(steps * _B)
    name = f"{config.sae.architecture} step, F={config.sae.F:,}"
    sizes = {"B": _B, "D": _D, "F": config.sae.F, "k": config.sae.k, "dtype": config.sae.compute_dtype}
    for other in others:
        theirs, _ = times[other].rate(_B)
        yield Row(name, other, ours, theirs, "tokens/s", ours / theirs, target, sizes=sizes, spread=spread)


def _installed(config: TrainConfig) -> list[str]:
    """The installed libraries that have the architecture, if torch has the device, once the check has passed.

    The check compares their losses and gradients with ours.
    """
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    from benchmarks.peer_steps import check_same, peers_of

    names = [peer for peer in peers_of(config.sae.architecture) if importlib.util.find_spec(peer)]
    if not names or not torch.cuda.is_available():
        return []
    with jax.default_device(jax.devices("cpu")[0]):
        small = config_of(config.sae.architecture, 512)
        check_same(small, _weights(small, 48), planted_rows(_CHECKED, seed=0, d_model=48), names)
    return names


def _peer_step(peer: str, config: TrainConfig, rows_BD: np.ndarray) -> Callable[[], Any]:
    """A step of another library on torch's device, which returns when the device is done."""
    import torch

    from benchmarks.peer_steps import STEPS

    step = STEPS[peer](config, _weights(config, rows_BD.shape[1]), rows_BD, "cuda")

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


def _weights(config: TrainConfig, d_model: int) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in init_params(config.sae, d_model, jax.random.key(0)).items()}
