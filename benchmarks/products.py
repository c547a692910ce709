"""From which ratio F / k on kept entries beat dense products: what `hafs_jax.sparse.pays` goes by."""

from collections.abc import Iterator

from benchmarks.harness import Row, interleaved
from benchmarks.steps import D, config_of, our_steps, planted_rows

_BATCH, _K, _STEPS = 512, 32, 4
_RATIOS = (16, 32, 64, 128, 256)


def measure(quick: bool) -> Iterator[Row]:
    """Rows a second of BatchTopK's training step, by ratio and dtype; 1 is where the two are equally fast."""
    rows_BD = planted_rows(_BATCH, seed=0)
    for dtype in ("float32", "bfloat16"):
        for ratio in _RATIOS[1::2] if quick else _RATIOS:
            F, runs = ratio * _K, {}
            for products in ("sparse", "dense"):
                sae = {"n_latents": F, "k": _K, "compute_dtype": dtype}
                runs[products] = our_steps(config_of("batchtopk", F, sae=sae, products=products), rows_BD, _STEPS)
            times = interleaved(runs, 3 if quick else 7, warm_ups=1)
            (ours, spread), (theirs, _) = (times[name].rate(_STEPS * _BATCH) for name in ("sparse", "dense"))
            sizes = {"B": _BATCH, "D": D, "F": F, "k": _K, "dtype": dtype}
            name = f"kept entries, F / k = {ratio}, {dtype}"
            yield Row(name, "dense products", ours, theirs, "tokens/s", ours / theirs, None, sizes=sizes, spread=spread)
