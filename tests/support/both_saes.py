"""Random SAEs of SAELens's own classes, what they compute, and what the trainer computes from the same weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from sae_lens import SAE as TorchSAE
from sae_lens.registry import get_sae_class

from hafs_evaluate.exchange.dictionary_classes import library_class
from hafs_jax.config import SAEConfig
from hafs_jax.method.architectures import ARCHITECTURES, OperatingPoint
from hafs_jax.method.sae import SAE, InputScale, init_params
from hafs_jax.saelens_format import TENSORS

B, D, D_OUT, F, K = 60, 5, 7, 11, 3
SAELENS = tuple(TENSORS)
CLASSES = {  # our architecture -> dictionary_learning's class
    name: library_class(architecture.saelens.sae, name)
    for name, architecture in ARCHITECTURES.items()
    if architecture.saelens is not None
}


def rows(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 2.0, (B, D)).astype(np.float32)


def input_scale(transcode: bool = False) -> InputScale:
    random = np.random.default_rng(9)
    target = InputScale(jnp.asarray(random.normal(size=D_OUT), jnp.float32), jnp.float32(3.0), jnp.float32(D_OUT))
    mean_D = jnp.asarray(random.normal(size=D), jnp.float32)
    return InputScale(mean_D, jnp.float32(0.4), jnp.float32(D), target if transcode else None)


def saelens_folder(folder: Path, architecture: str, unit: bool = False, seed: int = 0, **cfg: Any) -> Path:
    """A random SAE of SAELens's own class, saved by SAELens; decoder rows of norms .5 to 2 unless `unit`."""
    kind, config = get_sae_class(architecture)
    cfg |= {"k": K} if architecture == "topk" else {}
    cfg |= {"d_out": D_OUT, "apply_b_dec_to_input": False} if "transcoder" in architecture else {}
    sae = kind(config(**{"d_in": D, "d_sae": F, "normalize_activations": "none", **cfg}))
    random = torch.Generator().manual_seed(seed)
    state = {name: 0.7 * torch.randn(value.shape, generator=random) for name, value in sae.state_dict().items()}
    norms = torch.ones(F) if unit else torch.linspace(0.5, 2.0, F)
    state["W_dec"] = torch.nn.functional.normalize(state["W_dec"], dim=1) * norms[:, None]
    sae.load_state_dict(state)
    sae.save_model(folder)
    return folder


def of_saelens(folder: Path, acts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SAELens's latents and reconstruction."""
    sae = TorchSAE.load_from_disk(folder)
    with torch.no_grad():
        latents = sae.encode(torch.tensor(acts))
        return latents.numpy(), sae.decode(latents).numpy()


def of_trainer(
    params: dict[str, Any], architecture: str, scale: InputScale, acts: np.ndarray, threshold: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """The trainer's own latents, in scaled units, and its reconstruction in raw units."""
    transcode = scale.target is not None
    config = SAEConfig(architecture=architecture, n_latents=F, k=K, transcode=transcode)
    assert set(params) == set(init_params(config, D, jax.random.key(0), D_OUT if transcode else None))
    params = {name: jnp.asarray(value) for name, value in params.items()}
    sae = SAE(config, D, D_OUT if transcode else None)
    encoding, recon = sae.apply({"params": params}, scale(jnp.asarray(acts)), OperatingPoint(K, threshold))
    out = scale.target or scale
    return np.asarray(encoding.latents_BF), np.asarray(recon) / float(out.scale) + np.asarray(out.mean_D)


def assert_same(found: np.ndarray, expected: np.ndarray, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape and np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() / np.abs(expected).max() < relative
