"""Sparse products against dense ones, by F / capacity: the measurements behind `fast.plan.resolve_products`."""

from collections.abc import Iterator

from benchmarks.harness import Row, interleaved
from benchmarks.workloads import D, config_of, our_steps, planted_rows, random_weights
from hafs_jax.fast.forms import FORMS, capacity

_BATCH, _K, _STEPS = 512, 32, 4
_RATIOS = (8, 16, 24, 32, 48, 64, 128, 256)
_OTHERS = ("topk", "matryoshka", "relu", "matryoshka_relu")
_OTHERS_RATIO = 32


def measure(quick: bool) -> Iterator[Row]:
    """Rows with tokens per second of a training step, with sparse products and with dense ones.

    BatchTopK is measured by F / capacity and dtype, the other architectures at the ratio of the rule for two cores.
    ReLU has biases that leave k latents active.
    """
    for dtype in ("float32", "bfloat16"):
        for ratio in _RATIOS[1::2] if quick else _RATIOS:
            yield _row("batchtopk", ratio, dtype, quick)
    if not quick:
        for architecture in _OTHERS:
            yield _row(architecture, _OTHERS_RATIO, "float32", quick)


def _row(architecture: str, ratio: int, dtype: str, quick: bool) -> Row:
    rows_BD, any_number = planted_rows(_BATCH, seed=0), FORMS[architecture].any_number
    per_row = capacity(config_of(architecture, ratio * _K).sae)
    sae = {"n_latents": ratio * per_row, "k": _K, "compute_dtype": dtype}
    runs = {}
    for products in ("sparse", "dense"):
        config = config_of(architecture, ratio * per_row, sae=sae, products=products)
        weights = random_weights(config, rows_BD, l0=_K if any_number else None)
        runs[products] = our_steps(config, rows_BD, _STEPS, weights)
    times = interleaved(runs, 3 if quick else 7, warm_ups=1)
    (ours, spread), (theirs, _) = (times[name].rate(_STEPS * _BATCH) for name in ("sparse", "dense"))
    sizes = {"B": _BATCH, "D": D, "F": ratio * per_row, "k": _K, "capacity": per_row, "dtype": dtype}
    name = f"sparse products of {architecture}, F / capacity = {ratio}, {dtype}"
    return Row(name, "dense products", ours, theirs, "tokens/s", ours / theirs, None, sizes=sizes, spread=spread)
