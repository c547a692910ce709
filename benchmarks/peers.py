"""The training classes of other libraries with our weights, and trainings by them with our config.

They are sae_lens's training SAEs, dictionary_learning's trainers and sparsify's sparse coder. Each library is imported
where it is used, since any of them may be absent.

Weights have our names: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D], and an architecture's threshold, r_mag and
b_mag [F].
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.workloads import Weights
from hafs_jax.config import TrainConfig

SAE_LENS: dict[str, str] = {
    "relu": "Standard",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "matryoshka": "MatryoshkaBatchTopK",
}
"""Our architecture -> sae_lens's <name>TrainingSAE and <name>TrainingSAEConfig."""

DICTIONARY_LEARNING: dict[str, tuple[str, str]] = {
    "relu": ("standard", "StandardTrainer"),
    "topk": ("top_k", "TopKTrainer"),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
    "jumprelu": ("jumprelu", "JumpReluTrainer"),
    "gated": ("gdm", "GatedSAETrainer"),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
}
"""Our architecture -> dictionary_learning's module and class of its trainer."""

_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
_NAMES: dict[tuple[str, str], dict[str, str]] = {
    ("sae_lens", "jumprelu"): {**_PLAIN, "threshold": "threshold"},
    ("sae_lens", "gated"): {**_PLAIN, "b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"},
    ("sparsify", "topk"): {**_PLAIN, "W_enc": "encoder.weight", "b_enc": "encoder.bias"},
    ("dictionary_learning", "relu"): {**_LINEAR, "b_dec": "bias"},
    ("dictionary_learning", "topk"): _LINEAR,
    ("dictionary_learning", "batchtopk"): _LINEAR,
    ("dictionary_learning", "jumprelu"): {**_PLAIN, "threshold": "threshold"},
    ("dictionary_learning", "gated"): {
        **{name: _LINEAR[name] for name in ("W_enc", "W_dec")},
        **{"b_enc": "gate_bias", "b_dec": "decoder_bias", "r_mag": "r_mag", "b_mag": "mag_bias"},
    },
}  # a matrix named "...weight" belongs to torch's Linear; other encoders are the transposes of ours


def training_sae(architecture: str, weights: Weights, device: str = "cpu", **settings: Any) -> Any:
    """sae_lens's training SAE of an architecture, in float32; `settings` are fields of its config."""
    import sae_lens

    F, D = weights["W_enc"].shape
    name = SAE_LENS[architecture]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D, d_sae=F, dtype="float32", device=device, **settings)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    _put(sae, "sae_lens", architecture, weights)
    return sae


def trainer(
    architecture: str, weights: Weights, steps: int = 10, warmup_steps: int = 0, device: str = "cpu", **settings: Any
) -> Any:
    """dictionary_learning's trainer of an architecture; `settings` are further arguments of its class."""
    F, D = weights["W_enc"].shape
    module, name = DICTIONARY_LEARNING[architecture]
    size = {"activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "", "device": device}
    made = getattr(dictionary_learning(f"trainers.{module}"), name)(
        steps=steps, warmup_steps=warmup_steps, **size, **settings
    )
    _put(made.ae, "dictionary_learning", architecture, weights)
    return made


def sparse_coder(weights: Weights, k: int, device: str = "cpu") -> Any:
    """sparsify's SparseCoder, whose activation is TopK, in float32."""
    with contextlib.redirect_stdout(io.StringIO()):  # on import it prints whether triton is there
        from sparsify import SparseCoder, SparseCoderConfig
    F, D = weights["W_enc"].shape
    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=k), device, torch.float32)
    _put(coder, "sparsify", "topk", weights)
    return coder


def dictionary_learning(module: str) -> Any:
    """A module of dictionary_learning. If nnsight is absent, an empty module takes its place: only buffers need it."""
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        stub: Any = types.ModuleType("nnsight")
        stub.LanguageModel = object
        sys.modules["nnsight"] = stub
    return importlib.import_module(f"dictionary_learning.{module}")


def values(module: nn.Module, library: str, architecture: str) -> Weights:
    """The weights of another library's module, under our names."""
    return {name: _array(value.detach(), flip) for name, value, flip in _parameters(module, library, architecture)}


def gradients(module: nn.Module, library: str, architecture: str) -> Weights:
    """The gradients in another library's module after a backward pass, under our names; zeros where there is none."""
    found = _parameters(module, library, architecture)
    return {
        name: _array(torch.zeros_like(value) if value.grad is None else value.grad, flip) for name, value, flip in found
    }


def fit_sae_lens(
    config: TrainConfig, weights: Weights, widths: tuple[int, ...], batches: Iterator[torch.Tensor]
) -> Any:
    """The SAE that sae_lens's SAETrainer trains by our config, as it saves it for inference, in float64.

    `widths` are the lengths of Matryoshka's prefixes.
    """
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    architecture, at, B = config.sae.architecture, _steps_of(config), config.batch_size
    l1 = {"l1_coefficient": config.sparsity.coefficient, "l1_warm_up_steps": at["sparsity"]}
    l0 = {"l0_coefficient": config.sparsity.coefficient, "l0_warm_up_steps": at["sparsity"]}
    by_k = {"k": config.sae.k}
    special: dict[str, dict[str, Any]] = {
        "relu": l1,
        "gated": l1,
        "jumprelu": {**l0, "jumprelu_bandwidth": config.sae.bandwidth},
        "matryoshka": {**by_k, "matryoshka_widths": list(widths)},
    }
    sae = training_sae(architecture, weights, **special.get(architecture, by_k))
    trainer_config: Any = SAETrainerConfig(
        total_training_samples=config.steps * B,
        train_batch_size_samples=B,
        lr=config.optimizer.learning_rate,
        lr_end=config.optimizer.learning_rate,
        lr_warm_up_steps=at["warmup"],
        lr_decay_steps=at["decay"],
        dead_feature_window=at["dead"] - 1,  # it counts a latent as dead after more steps than this
        feature_sampling_window=config.steps + 1,
    )
    SAETrainer(trainer_config, sae, batches).fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return sae_lens.SAE.load_from_disk(folder).to(torch.float64)


def fit_dictionary_learning(
    config: TrainConfig, weights: Weights, widths: tuple[int, ...], batches: Iterable[torch.Tensor], variance: float
) -> Any:
    """The dictionary that dictionary_learning's trainer trains by our config, in float64.

    `widths` are the lengths of Matryoshka's prefixes. The sparsity penalty of its JumpReLU is by default 1 for rows of
    mean squared norm 1. For rows of mean squared norm `variance` that corresponds to `variance`.
    """
    architecture, at, steps = config.sae.architecture, _steps_of(config), config.steps
    by_k = {"k": config.sae.k, "threshold_beta": config.sparsity.threshold_decay, "threshold_start_step": 0}
    by_l1 = {"l1_penalty": config.sparsity.coefficient, "sparsity_warmup_steps": at["sparsity"]}
    by_l0 = {"sparsity_penalty": variance, "target_l0": config.sae.k, "sparsity_warmup_steps": at["sparsity"]}
    special: dict[str, dict[str, Any]] = {
        "relu": by_l1,
        "gated": by_l1,
        "jumprelu": {**by_l0, "bandwidth": config.sae.bandwidth},
        "matryoshka": {**by_k, "group_fractions": group_fractions(widths)},
    }
    if architecture == "jumprelu":  # its encoder does not subtract b_dec
        weights = {**weights, "b_enc": weights["b_enc"] - weights["W_enc"] @ weights["b_dec"]}
    made = trainer(
        architecture,
        weights,
        steps=steps,
        warmup_steps=at["warmup"],
        decay_start=steps - at["decay"],
        lr=config.optimizer.learning_rate,
        **special.get(architecture, by_k),
    )
    made.scheduler = torch.optim.lr_scheduler.LambdaLR(  # its own warm-up lags one step behind ours
        made.optimizer, lambda step: min(1.0, (step + 1) / at["warmup"]) * min(1.0, (steps - step) / at["decay"])
    )
    made.dead_feature_threshold = config.sparsity.dead_after_tokens
    first = int("k" in special.get(architecture, by_k))  # their update number 0 would replace b_dec
    for step, rows in enumerate(batches):
        made.update(first + step, rows)
    return made.ae.double()


def group_fractions(widths: tuple[int, ...]) -> list[float]:
    """dictionary_learning's groups as fractions of F, such that the prefixes have the lengths `widths`.

    It rounds the size of each group down except the last.
    """
    inner = [(end - start + 0.5) / widths[-1] for start, end in zip((0, *widths), widths[:-1], strict=False)]
    return [*inner, 1 - sum(inner)]


def _steps_of(config: TrainConfig) -> dict[str, int]:
    """The lengths of our schedules and counters in steps."""
    return {
        "warmup": round(config.optimizer.warmup * config.steps),
        "decay": round(config.optimizer.decay * config.steps),
        "sparsity": round(config.sparsity.coefficient_fractions[1] * config.steps),
        "dead": -(-config.sparsity.dead_after_tokens // config.batch_size),
    }


def _parameters(module: nn.Module, library: str, architecture: str) -> list[tuple[str, nn.Parameter, bool]]:
    """For each parameter of the module: our name, the parameter, and whether it is the transpose of ours."""
    names = _NAMES.get((library, architecture), _PLAIN)
    own = dict(module.named_parameters())
    assert set(own) == set(names.values()), f"{library} {architecture}: {sorted(own)}"
    return [(name, own[theirs], theirs.endswith("weight") != (name == "W_enc")) for name, theirs in names.items()]


def _put(module: nn.Module, library: str, architecture: str, weights: Weights) -> None:
    for name, parameter, flip in _parameters(module, library, architecture):
        value = np.asarray(weights[name], np.float32)
        parameter.data = torch.tensor(value.T if flip else value).contiguous().to(parameter.device)


def _array(value: torch.Tensor, flip: bool) -> np.ndarray:
    return (value.T if flip else value).cpu().numpy().copy()
