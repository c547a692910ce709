"""The cost of the orthogonality penalty on top of a training step, and of its gradient alone in three forms.

ours         random chunks of m latents, cost F m D; at every step (the default), or every fourth and reused in between
naive Gram   all pairs, F x F cosines, cost F^2 D: the simplest implementation
OrtSAE       the squared largest cosine in its published chunks of 8,192 latents (arXiv 2509.22033)

The suite also measures the error of the gradient from one random partition against the gradient over all pairs.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Row, interleaved
from benchmarks.workloads import D, K, config_of, our_steps, planted_rows
from hafs_jax.config import PenaltyConfig, TrainConfig
from hafs_jax.fast.hinge import hinge_and_gradient, penalty_and_gradient
from hafs_jax.fast.plan import choose
from hafs_jax.method.penalties import Structure, first_groups
from hafs_jax.method.sae import init_params
from hafs_jax.presets import preset

_MOST = 1.05  # target: a step with the penalty takes at most this many times one without
_BATCH = 2_048
_MU0 = 0.1


def measure(quick: bool) -> Iterator[Row]:
    """Rows with milliseconds per step with and without the penalty, and of the penalty's gradient alone, by F."""
    rounds = 3 if quick else 7
    for architecture, F in (("topk", 16_384),) if quick else (("relu", 4_608), ("topk", 4_608), ("topk", 16_384)):
        for every in (4,) if quick else (1, 4):
            has_target = every > 1 and F >= 16_384
            more = 1 if quick or not has_target else 3  # a difference of 5% needs more rounds
            yield _on_top(architecture, F, every, more * rounds, _MOST if has_target else None)
    for F in (1_024, 4_096) if quick else (1_024, 4_096, 16_384):
        yield from _alone(F, rounds)
    for F in (1_024,) if quick else (1_024, 4_096):
        yield _spread(F, draws=20)


def _on_top(architecture: str, F: int, every: int, rounds: int, target: float | None) -> Row:
    rows_BD, steps = planted_rows(_BATCH, seed=0), 4
    with_penalty = config_of(architecture, F, "strict", penalty={"mu0": _MU0, "every_steps": every})
    configs = {"ours": with_penalty, "theirs": config_of(architecture, F)}
    runs = {name: our_steps(config, rows_BD, steps) for name, config in configs.items()}
    times = interleaved(runs, rounds, warm_ups=1)
    ours, theirs = (times[name].median / steps * 1e3 for name in ("ours", "theirs"))
    name = f"{architecture} step with the penalty, F={F:,}" + (f", every {every} steps" if every > 1 else "")
    sizes = {"B": _BATCH, "D": D, "F": F, "k": K}
    return Row(name, "without it", ours, theirs, "ms", ours / theirs, target, "<=", sizes)


def _alone(F: int, rounds: int) -> Iterator[Row]:
    strict, ortsae = preset("strict").penalty, preset("ortsae").penalty
    W_dec = init_params(config_of("topk", F).sae, D, jax.random.key(0))["W_dec"]
    runs = {
        "ours": _gradient(config_of("topk", F), strict, W_dec),
        "naive Gram": _naive_gram(W_dec),
        "OrtSAE, chunks of 8,192": _gradient(config_of("topk", F), ortsae, W_dec),
    }
    times = interleaved(runs, rounds, warm_ups=1)
    ours = times.pop("ours").median * 1e3
    for peer, found in times.items():
        theirs, sizes = found.median * 1e3, {"D": D, "F": F, "chunk": strict.chunk_size, "every": strict.every_steps}
        yield Row(f"penalty's gradient, F={F:,}", peer, ours, theirs, "ms", theirs / ours, None, sizes=sizes)


def _spread(F: int, draws: int) -> Row:
    """The root mean squared error of a step's penalty gradient over the norm of the exact one, for random unit rows."""
    strict = preset("strict").penalty
    W_dec = init_params(config_of("topk", F).sae, D, jax.random.key(0))["W_dec"]
    structure = Structure(first_groups(strict, config_of("topk", F).sae), jnp.zeros(F))
    plan = choose(config_of("topk", F))

    def gradient(chunk_size: int, key: jax.Array) -> jax.Array:
        settings = dataclasses.replace(strict, chunk_size=chunk_size)
        return hinge_and_gradient(W_dec, jnp.float32(0.0), structure, _MU0, settings, key, plan)[1]

    exact = gradient(F, jax.random.key(0))
    size = float(jnp.sum(exact**2))
    estimate = jax.jit(lambda key: jnp.sum((gradient(strict.chunk_size, key) - exact) ** 2))
    found = float(np.mean([estimate(key) for key in jax.random.split(jax.random.key(1), draws)]))
    cosines = W_dec @ W_dec.T
    above = jnp.maximum(cosines - _MU0, 0.0) * (1 - jnp.eye(F))
    squares = float(jnp.sum((4 / F * above) ** 2 * (1 - cosines**2)))  # |u_j - cos u_i|^2 is 1 - cos^2
    N, n = F - 1, strict.chunk_size - 1
    formula = N * (N - n) / n * (squares - size / N) / (N - 1)
    ours, theirs, sizes = (found / size) ** 0.5, (formula / size) ** 0.5, {"D": D, "F": F, "chunk": strict.chunk_size}
    name = f"error of the penalty's gradient, F={F:,}"
    return Row(name, "its formula", ours, theirs, "of its norm", ours / theirs, 1.1, "<=", sizes)


def _gradient(config: TrainConfig, settings: PenaltyConfig, W_dec: jax.Array) -> Callable[[], Any]:
    structure = Structure(first_groups(settings, config.sae), jnp.zeros(config.sae.F))
    plan = choose(config)
    gradient = jax.jit(
        lambda W, key: penalty_and_gradient(W, jnp.float32(0.5), structure, _MU0, settings, key, plan)[1]
    )
    return lambda: jax.block_until_ready(gradient(W_dec, jax.random.key(0)))


def _naive_gram(W_dec: jax.Array) -> Callable[[], Any]:
    def value(W: jax.Array) -> jax.Array:
        over = jax.nn.relu(W @ W.T - jnp.eye(len(W)) - _MU0)
        return jnp.sum(over**2) / len(W)

    gradient = jax.jit(jax.grad(value))
    return lambda: jax.block_until_ready(gradient(W_dec))
