"""Training steps: our rate against sae_lens's, dictionary_learning's, sparsify's, and the limit of the products.

All use the same batch, initial weights, sizes and threads, in float32, one after the other in one process. Before the
timing, losses and gradients of ours and theirs are compared on a part of the batch.

The limit of a dense step is its five products of B x D x F, measured in the same rounds: encoder, decoder, and the
gradients for both matrices and for the latents. A step that skips zeros is compared with the other libraries alone.
ReLU is timed twice:

- from random weights, where half of the latents are active and nothing can be skipped;
- with biases that leave k latents active, as in a training except for its first steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Row, interleaved
from benchmarks.peer_steps import STEPS, check_same, peers_of
from benchmarks.workloads import DISPATCH, B, D, K, config_of, five_products, our_steps, planted_rows, random_weights

_CHECKED = 64  # rows on which losses and gradients are compared


@dataclass(frozen=True)
class Case:
    """One comparison, with the targets for the ratios of our rate to the limit's and to each library's."""

    architecture: str
    n_latents: int
    variant: str = "baseline"
    sparse: bool = False  # for relu: whether biases leave only k latents active
    of_limit: float | None = None
    sae_lens: float | None = None
    dictionary_learning: float | None = None
    quick: bool = False  # whether --quick measures it too


CASES = (
    Case("relu", 4_608, "baseline", of_limit=0.9, sae_lens=2.0, dictionary_learning=1.5),
    Case("relu", 4_608, "adaptive", of_limit=0.9, sae_lens=2.0, dictionary_learning=1.5, quick=True),
    Case("relu", 4_608, "baseline", sparse=True, sae_lens=2.0, dictionary_learning=1.5),
    Case("relu", 4_608, "adaptive", sparse=True, sae_lens=2.0, dictionary_learning=1.5, quick=True),
    Case("relu", 16_384, "baseline", sparse=True, sae_lens=2.0, dictionary_learning=1.5),
    Case("topk", 4_608, sae_lens=2.5, dictionary_learning=2.5, quick=True),
    Case("batchtopk", 4_608, sae_lens=2.5, dictionary_learning=2.5),
    Case("matryoshka", 4_608, sae_lens=2.5, dictionary_learning=2.5),
    Case("topk", 16_384, sae_lens=6.0, dictionary_learning=6.0, quick=True),
    Case("batchtopk", 16_384, sae_lens=6.0, dictionary_learning=6.0),
)


def measure(quick: bool) -> Iterator[Row]:
    """Rows with tokens per second of each case's step, against the other libraries and the limit."""
    for case in [case for case in CASES if case.quick or not quick]:
        yield from _rows(case, rounds=2 if quick else 5, all_peers=not quick or case.n_latents < 10_000)


def _rows(case: Case, rounds: int, all_peers: bool) -> Iterator[Row]:
    products = "sparse" if case.sparse else "auto"
    config = config_of(case.architecture, case.n_latents, case.variant, products=products)
    rows_BD = planted_rows(B, seed=0)
    weights = random_weights(config, rows_BD, l0=K if case.sparse else None)
    check_same(config, weights, rows_BD[:_CHECKED], peers_of(case.architecture))
    runs: dict[str, Callable[[], Any]] = {"ours": our_steps(config, rows_BD, weights=weights)}
    targets: dict[str, float | None] = {}
    for peer in peers_of(case.architecture) if all_peers else ("sae_lens",):
        targets[peer] = {"sae_lens": case.sae_lens, "dictionary_learning": case.dictionary_learning}.get(peer)
        runs[peer] = STEPS[peer](config, weights, rows_BD)
    if case.of_limit is not None:
        targets["its five products"] = case.of_limit
        runs["its five products"] = five_products(rows_BD, weights)
    times = interleaved(runs, rounds, warm_ups=1)
    ours, spread = times["ours"].rate(DISPATCH * B)
    name = f"{case.architecture} step, F={case.n_latents:,}" + (", adaptive" if case.variant == "adaptive" else "")
    name += f", L0 {K}" if case.sparse else ""
    sizes = {"B": B, "D": D, "F": case.n_latents, "k": config.sae.k, "dtype": "float32"}
    for peer, target in targets.items():
        theirs = times[peer].rate(B)[0]
        yield Row(name, peer, ours, theirs, "tokens/s", ours / theirs, target, sizes=sizes, spread=spread)
