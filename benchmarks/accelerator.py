"""On an accelerator alone: the dense bfloat16 step against its five products, and TopK over 131,072 latents.

Needs no other library than ours and JAX. Yields nothing on a CPU. No accelerator has been at hand yet: what it would
print is not known. The batch repeats, so that latents would count as dead soon; here none ever does.
"""

from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.harness import Row, interleaved
from benchmarks.workloads import config_of, five_products, our_steps, planted_rows
from hafs_jax.sae import init_params

_D = 2_048
_STEPS = 4
_NONE_DEAD = {"dead_after_tokens": 10**9}


def measure(quick: bool) -> Iterator[Row]:
    """Tokens a second; the dense step is to reach 65% of what its products alone do in the same rounds."""
    if jax.default_backend() == "cpu":
        return
    rounds = 5 if quick else 20
    B, F = 8_192, 32_768
    config = config_of("relu", F, sae={"n_latents": F, "compute_dtype": "bfloat16", "encoder_scale": 1.0}, batch_size=B)
    rows_BD = planted_rows(B, seed=0, d_model=_D)
    weights = {name: np.array(value) for name, value in init_params(config.sae, _D, jax.random.key(0)).items()}
    runs = {"ours": our_steps(config, rows_BD, _STEPS), "theirs": five_products(rows_BD, weights, "bfloat16")}
    times = interleaved(runs, rounds)
    (ours, spread), (theirs, _) = times["ours"].rate(_STEPS * B), times["theirs"].rate(B)
    sizes = {"B": B, "D": _D, "F": F, "dtype": "bfloat16"}
    yield Row(
        "relu step", "its five products", ours, theirs, "tokens/s", ours / theirs, 0.65, sizes=sizes, spread=spread
    )
    F, found = 131_072, {}
    for products in ("dense", "sparse"):
        wide = {"n_latents": F, "compute_dtype": "bfloat16", "k": 64}
        config = config_of("topk", F, sae=wide, sparsity=_NONE_DEAD, batch_size=B, products=products)
        found[products] = interleaved({"ours": our_steps(config, rows_BD, 1)}, rounds)["ours"].rate(B)
    (ours, spread), (theirs, _) = found["sparse"], found["dense"]
    sizes = {"B": B, "D": _D, "F": F, "k": 64, "dtype": "bfloat16"}
    name = f"topk step, F={F:,}, kept entries alone"
    yield Row(name, "our dense products", ours, theirs, "tokens/s", ours / theirs, None, sizes=sizes, spread=spread)
