"""One training step of each other library on a batch, by its own trainer, and its loss and gradients in our units.

- sae_lens: `SAETrainer._train_step`.
- dictionary_learning: `update` of its trainer.
- sparsify: the lines of `Trainer.fit` that train one `SparseCoder` on one batch. `fit` has no function for a step, and
  it needs a language model.

All have their default settings. So sparsify's optimizer is signum, which keeps one moment; Adam keeps two. On a GPU all
use bfloat16 by torch's autocast, as they do themselves.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import peers
from benchmarks.workloads import L1, Weights, resolved
from hafs_jax.config import TrainConfig
from hafs_jax.fast.objective import loss_and_gradients
from hafs_jax.fast.plan import choose
from hafs_jax.method.loss import Weights as At
from hafs_jax.method.matryoshka import fixed_ends
from hafs_jax.method.penalties import tangent

_TOO_FAR = 2e-3  # largest relative difference of a loss or a gradient

Step = Callable[[], Any]


def sae_lens_step(config: TrainConfig, weights: Weights, rows_BD: np.ndarray, device: str = "cpu") -> Step:
    """One step of sae_lens's SAETrainer."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = peers.training_sae(config.sae.architecture, weights, device=device, **_sae_lens_settings(config))
    settings: Any = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=len(rows_BD),
        lr=config.optimizer.learning_rate,
        lr_end=config.optimizer.learning_rate,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        device=device,
        autocast=device != "cpu",
    )
    trainer, rows = SAETrainer(settings, sae, iter(())), torch.from_numpy(rows_BD).to(device)
    return lambda: trainer._train_step(sae=sae, sae_in=rows)


def dictionary_learning_step(config: TrainConfig, weights: Weights, rows_BD: np.ndarray, device: str = "cpu") -> Step:
    """One update of dictionary_learning's trainer."""
    settings = _dictionary_learning_settings(config)
    rate = config.optimizer.learning_rate
    trainer = peers.trainer(config.sae.architecture, weights, steps=10**6, lr=rate, device=device, **settings)
    on_cpu = device == "cpu"
    rows = torch.from_numpy(rows_BD).to(device, torch.float32 if on_cpu else torch.bfloat16)

    def run() -> None:
        with nullcontext() if on_cpu else torch.autocast(device, torch.bfloat16):
            trainer.update(1, rows)

    return run


def sparsify_step(config: TrainConfig, weights: Weights, rows_BD: np.ndarray, device: str = "cpu") -> Step:
    """One step of sparsify's `Trainer.fit` for one SparseCoder; by default it has no auxiliary loss."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    coder = peers.sparse_coder(weights, config.sae.k, device)
    rate = 5e-3 / (config.sae.F / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD([{"params": coder.parameters(), "lr": rate}]), momentum=0.95)
    optimizer.train()
    since_fired_F = torch.zeros(config.sae.F, dtype=torch.long, device=device)
    fired_F = torch.zeros(config.sae.F, dtype=torch.bool, device=device)
    rows = torch.from_numpy(rows_BD).to(device)

    def run() -> None:
        coder.set_decoder_norm_to_unit_norm()
        total_variance = (rows - rows.mean(0)).pow(2).sum()
        out = coder(x=rows, y=rows, dead_mask=None, total_variance=total_variance)
        fired_F[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired_F.add_(len(rows))
        since_fired_F[fired_F] = 0
        fired_F.zero_()

    return run


STEPS = {"sae_lens": sae_lens_step, "dictionary_learning": dictionary_learning_step, "sparsify": sparsify_step}


def peers_of(architecture: str) -> tuple[str, ...]:
    """The other libraries that have an architecture: sparsify has TopK alone."""
    return tuple(STEPS) if architecture == "topk" else ("sae_lens", "dictionary_learning")


def check_same(config: TrainConfig, weights: Weights, rows_BD: np.ndarray, names: Iterable[str]) -> None:
    """Raises `RuntimeError` if our loss or a gradient, without the penalty, differs from that of one of `names`.

    Of W_dec's gradient only the part that turns the unit rows is compared, since a training step keeps only that part.
    The L1 cost of sae_lens is multiplied by the decoder norm, so its gradient also has a part along the rows.
    """
    at = At(jnp.int32(config.sae.k), jnp.float32(L1), jnp.zeros(config.sae.F, bool))
    params, acts = {name: jnp.asarray(value) for name, value in weights.items()}, jnp.asarray(rows_BD)
    ours = jax.jit(loss_and_gradients, static_argnums=(6, 7))
    variance, key = jnp.float32(1.0), jax.random.key(0)
    (loss, _), grads = ours(params, acts, acts, at, variance, key, config, choose(resolved(config)))
    mine = {"loss": np.asarray(loss), **{name: np.asarray(value) for name, value in grads.items()}}
    for peer in names:
        factor, their_loss, their_grads = _LOSSES[peer](config, weights, torch.from_numpy(rows_BD))
        other = {name: factor * value for name, value in {"loss": np.asarray(their_loss), **their_grads}.items()}
        for name, left in mine.items():
            right = other[name]
            if name == "W_dec":
                left, right = (np.asarray(tangent(jnp.asarray(grad), params["W_dec"])) for grad in (left, right))
            off = float(np.linalg.norm(left - right) / max(float(np.linalg.norm(right)), 1e-30))
            if off > _TOO_FAR:
                raise RuntimeError(f"{config.sae.architecture}: {name} differs from {peer}'s by {off:.1e} of its norm")


def _sae_lens_loss(config: TrainConfig, weights: Weights, rows: torch.Tensor) -> tuple[float, float, Weights]:
    from sae_lens.saes.sae import TrainStepInput

    architecture = config.sae.architecture
    sae = peers.training_sae(architecture, weights, **_sae_lens_settings(config))
    loss = sae.training_forward_pass(TrainStepInput(rows, {"l1": L1}, torch.zeros(config.sae.F).bool(), 0, False)).loss
    loss.backward()
    # for Matryoshka it sums the losses of the prefixes; ours is their mean
    return 1 / _terms(config), float(loss.detach()), peers.gradients(sae, "sae_lens", architecture)


def _dictionary_learning_loss(
    config: TrainConfig, weights: Weights, rows: torch.Tensor
) -> tuple[float, float, Weights]:
    settings = _dictionary_learning_settings(config)
    if "l1_penalty" in settings:
        settings["sparsity_warmup_steps"] = None
    trainer = peers.trainer(config.sae.architecture, weights, **settings)
    loss = trainer.loss(rows, step=0)
    loss.backward()
    # for Matryoshka it divides the mean over the prefixes by their number again
    return (
        _terms(config),
        float(loss.detach()),
        peers.gradients(trainer.ae, "dictionary_learning", config.sae.architecture),
    )


def _sparsify_loss(config: TrainConfig, weights: Weights, rows: torch.Tensor) -> tuple[float, float, Weights]:
    coder = peers.sparse_coder(weights, config.sae.k)
    fvu = coder(rows).fvu
    fvu.backward()
    mean_square = float((rows - rows.mean(0)).pow(2).sum() / len(rows))
    return mean_square, float(fvu.detach()), peers.gradients(coder, "sparsify", "topk")


_LOSSES: dict[str, Callable[[TrainConfig, Weights, torch.Tensor], tuple[float, float, Weights]]] = {
    "sae_lens": _sae_lens_loss,
    "dictionary_learning": _dictionary_learning_loss,
    "sparsify": _sparsify_loss,
}
"""For each library (config, weights, rows [B, D]) -> the factor to our units, its loss and its gradients."""


def _terms(config: TrainConfig) -> int:
    return len(config.sae.prefixes) if config.sae.architecture == "matryoshka" else 1


def _sae_lens_settings(config: TrainConfig) -> dict[str, Any]:
    if config.sae.architecture == "relu":
        return {"l1_coefficient": L1, "l1_warm_up_steps": 0}
    widths = {"matryoshka_widths": list(fixed_ends(config.sae))} if config.sae.architecture == "matryoshka" else {}
    return {"k": config.sae.k, **widths}


def _dictionary_learning_settings(config: TrainConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"l1_penalty": L1} if config.sae.architecture == "relu" else {"k": config.sae.k}
    if config.sae.architecture == "matryoshka":
        settings["group_fractions"] = peers.group_fractions(fixed_ends(config.sae))
    return settings
