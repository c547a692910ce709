"""Training steps a second: ours, sae_lens's trainer's, dictionary_learning's, and what the matrix products allow.

All take the same batch, first weights, sizes and threads, in float32, one after the other in one process. Before any
clock starts, losses and gradients of ours and theirs are compared on a part of the batch.

The dense limit is five products of B x D x F, measured in the same rounds: encoder, decoder, and the gradients with
respect to both matrices and to the latents. A step that skips zeros is held to the peers alone. ReLU is timed twice:
from random weights, where half of the latents are active and nothing can be skipped, and with biases that leave k, as a
training does but in its first steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks import peers
from benchmarks.harness import Row, interleaved
from benchmarks.workloads import (
    DISPATCH,
    L1,
    B,
    D,
    K,
    config_of,
    five_products,
    our_steps,
    planted_rows,
    random_weights,
)
from hafs_jax.config import TrainConfig
from hafs_jax.loss import Weights, loss_and_gradients
from hafs_jax.nested import fixed_ends
from hafs_jax.penalty import tangent

_CHECKED = 64  # rows on which losses and gradients are compared
_TOO_FAR = 2e-3  # largest relative difference of a loss or a gradient


@dataclass(frozen=True)
class Case:
    """What is compared at one size, and how far ours is to be ahead of each."""

    architecture: str
    n_latents: int
    variant: str = "baseline"
    sparse: bool = False  # of relu: whether the biases leave k latents active
    of_limit: float | None = None
    sae_lens: float | None = None
    dictionary_learning: float | None = None
    quick: bool = False  # whether the quick run has it too


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
    """Tokens a second of each case's step against the peers' and the limit."""
    for case in [case for case in CASES if case.quick or not quick]:
        yield from _rows(case, rounds=2 if quick else 5, peers_too=not quick or case.n_latents < 10_000)


def _rows(case: Case, rounds: int, peers_too: bool) -> Iterator[Row]:
    products = "sparse" if case.sparse else "auto"
    config = config_of(case.architecture, case.n_latents, case.variant, products=products)
    rows_BD = planted_rows(B, seed=0)
    weights = random_weights(config, rows_BD, l0=K if case.sparse else None)
    check_same(config, weights, rows_BD[:_CHECKED])
    runs: dict[str, Callable[[], Any]] = {"ours": our_steps(config, rows_BD, weights=weights)}
    targets: dict[str, float | None] = {"sae_lens": case.sae_lens}
    runs["sae_lens"] = sae_lens_step(config, weights, rows_BD)
    if peers_too:
        targets["dictionary_learning"] = case.dictionary_learning
        runs["dictionary_learning"] = dictionary_learning_step(config, weights, rows_BD)
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


def sae_lens_step(config: TrainConfig, weights: peers.Weights, rows_BD: np.ndarray) -> Callable[[], Any]:
    """One step of sae_lens's SAETrainer."""
    sae = peers.training_sae(config.sae.architecture, weights, **_sae_lens_settings(config))
    settings: Any = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=len(rows_BD),
        lr=config.optimizer.learning_rate,
        lr_end=config.optimizer.learning_rate,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=1000,
        feature_sampling_window=2000,
    )
    trainer, rows = SAETrainer(settings, sae, iter(())), torch.from_numpy(rows_BD)
    return lambda: trainer._train_step(sae=sae, sae_in=rows)


def dictionary_learning_step(config: TrainConfig, weights: peers.Weights, rows_BD: np.ndarray) -> Callable[[], Any]:
    """One update of dictionary_learning's trainer."""
    special: dict[str, Any] = {"l1_penalty": L1} if config.sae.architecture == "relu" else {"k": config.sae.k}
    if config.sae.architecture == "matryoshka":
        special["group_fractions"] = peers.group_fractions(fixed_ends(config.sae))
    trainer = peers.trainer(config.sae.architecture, weights, steps=10**6, lr=config.optimizer.learning_rate, **special)
    rows = torch.from_numpy(rows_BD)
    return lambda: trainer.update(1, rows)


def check_same(config: TrainConfig, weights: peers.Weights, rows_BD: np.ndarray) -> None:
    """Raises `RuntimeError` where our loss or a gradient is not sae_lens's; the penalty is not part of it."""
    at = Weights(jnp.int32(config.sae.k), jnp.float32(L1), jnp.zeros(config.sae.F, bool))
    params, acts = {name: jnp.asarray(value) for name, value in weights.items()}, jnp.asarray(rows_BD)
    ours = jax.jit(loss_and_gradients, static_argnums=6)
    (loss, _), grads = ours(params, acts, acts, at, jnp.float32(1.0), jax.random.key(0), config)
    sae = peers.training_sae(config.sae.architecture, weights, **_sae_lens_settings(config))
    dead = torch.zeros(config.sae.F, dtype=torch.bool)
    step = TrainStepInput(torch.from_numpy(rows_BD), {"l1": L1}, dead, 0, False)
    theirs = sae.training_forward_pass(step).loss
    theirs.backward()
    # Matryoshka's prefixes: it adds them up, ours is a mean
    terms = len(config.sae.prefixes) if config.sae.architecture == "matryoshka" else 1
    found = {"loss": (terms * np.asarray(loss), theirs.detach().numpy())}
    their_grads = peers.gradients(sae, "sae_lens", config.sae.architecture)
    found |= {
        name: (terms * np.asarray(grads[name]), their_grads[name]) for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    }
    if config.sae.architecture == "relu":  # theirs is L1 x decoder norm: it has a part along the decoder's rows
        tangents = [np.asarray(tangent(jnp.asarray(grad_FD), params["W_dec"])) for grad_FD in found["W_dec"]]
        found["W_dec"] = (tangents[0], tangents[1])
    for name, (mine, other) in found.items():
        off = float(np.linalg.norm(mine - other) / max(float(np.linalg.norm(other)), 1e-30))
        if off > _TOO_FAR:
            raise RuntimeError(f"{config.sae.architecture}: {name} differs from sae_lens's by {off:.1e} of its norm")


def _sae_lens_settings(config: TrainConfig) -> dict[str, Any]:
    if config.sae.architecture == "relu":
        return {"l1_coefficient": L1, "l1_warm_up_steps": 0}
    widths = {"matryoshka_widths": list(fixed_ends(config.sae))} if config.sae.architecture == "matryoshka" else {}
    return {"k": config.sae.k, **widths}
