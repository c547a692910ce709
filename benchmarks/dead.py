"""The cost of the auxiliary loss: a BatchTopK step with some latents dead against the same step with none."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import Row, interleaved
from benchmarks.workloads import DISPATCH, B, D, K, config_of, our_steps, planted_rows, random_weights

_CASES = ((4_608, (10, 300, 1_500)), (16_384, (800,)))
_SILENT = -1e6  # a bias with which a latent never fires


def measure(quick: bool) -> Iterator[Row]:
    """Rows with milliseconds per step. A large negative bias keeps dead latents dead, so their number is fixed."""
    rows_BD = planted_rows(B, seed=0)
    for F, numbers in _CASES[:1] if quick else _CASES:
        runs: dict[int, Callable[[], Any]] = {}
        for dead in (0, *numbers):
            config = config_of("batchtopk", F, sparsity={"dead_after_tokens": B if dead else 10**9})
            weights = random_weights(config, rows_BD)
            weights["b_enc"][:dead] = _SILENT
            runs[dead] = our_steps(config, rows_BD, weights=weights)
        times = interleaved({str(dead): run for dead, run in runs.items()}, 2 if quick else 5, warm_ups=1)
        without = 1e3 * times["0"].median / DISPATCH
        for dead in numbers:
            ours = 1e3 * times[str(dead)].median / DISPATCH
            sizes = {"B": B, "D": D, "F": F, "k": K, "aux_k": config.sparsity.aux_k, "dtype": "float32"}
            name = f"batchtopk step, F={F:,}, {dead:,} latents dead"
            yield Row(name, "none dead", ours, without, "ms", ours / without, None, "<=", sizes)
