"""What an SAE's weights tell without any data: dictionary geometry, norms, alignments. Imports torch, not jax."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hafs_evaluate.core.encode import TorchSAE, to_numpy

CHUNK_FLOATS = 1 << 24  # cosines computed at once: 64 MiB


def frobenius_excess(W_dec: Float[Tensor, "F D"]) -> float:
    """(|U^T U|_F^2 - F) / (F (F-1) / D), where U [F, D] is W_dec with its rows normalised.

    It is the mean squared cosine of two different dictionary vectors, divided by 1/D, which random ones have.
    """
    unit_FD = torch.nn.functional.normalize(W_dec.double(), dim=1)
    n_latents, d_model = unit_FD.shape
    squares = float((unit_FD.T @ unit_FD).square().sum())
    return (squares - n_latents) / (n_latents * (n_latents - 1) / d_model)


@torch.no_grad()
def nearest_vectors(W_dec: Float[torch.Tensor, "F D"]) -> tuple[np.ndarray, np.ndarray]:
    """For each dictionary vector, the index of the other one with the highest cosine, and that cosine: ([F], [F])."""
    unit_FD = torch.nn.functional.normalize(W_dec.float(), dim=1)
    index_parts, cosine_parts = [], []
    chunk = max(1, CHUNK_FLOATS // len(unit_FD))
    for start in range(0, len(unit_FD), chunk):
        cosine_CF = unit_FD[start : start + chunk] @ unit_FD.T
        cosine_CF.diagonal(start).fill_(-2.0)  # never its own neighbour
        best = cosine_CF.max(1)
        index_parts.append(best.indices.cpu())
        cosine_parts.append(best.values.clamp(-1, 1).cpu())
    return torch.cat(index_parts).numpy(), torch.cat(cosine_parts).numpy()


def weight_metrics(sae: TorchSAE) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of the weights alone: ({"geometry": ..., "weights": ...}, arrays with one figure of each latent).

    Notation: u_i is row i of W_dec and e_i column i of W_enc, both normalised; means are over the latents i.

    geometry:
    - max_coherence, mean_coherence: maximum and mean over i of max_{j != i} u_i.u_j (signed);
    - frobenius_excess: see there.

    weights:
    - encoder_bias_mean: mean of b_enc; encoder_norm_mean: mean of |W_enc column i|;
    - encoder_decoder_cosine_mean: mean of e_i.u_i; encoder_nearest_cosine_mean: mean of max_{j != i} e_i.e_j;
    - decoder_norm_mean, _min, _max: of |W_dec row i|; decoder_bias_norm: |b_dec|;
    - threshold_mean: mean JumpReLU threshold, None for other architectures.
    """
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    biases = (getattr(sae, name, None) for name in ("b_enc", "b_mag"))  # a gated SAE's b_enc is None
    bias_F = next((bias for bias in biases if bias is not None), None)
    bias_F = torch.zeros(len(W_dec)) if bias_F is None else bias_F.detach()
    threshold_F = getattr(sae, "threshold", None)
    norm_F = W_dec.double().norm(dim=1)
    aligned_F = torch.nn.functional.cosine_similarity(W_enc.double().T, W_dec.double(), dim=1)
    decoder_nearest_F = nearest_vectors(W_dec)[1].astype(np.float64)
    encoder_nearest_F = nearest_vectors(W_enc.T)[1].astype(np.float64)
    encoder_norm_F = W_enc.double().norm(dim=0)
    values = {
        "geometry": {
            "max_coherence": float(decoder_nearest_F.max()),
            "mean_coherence": float(decoder_nearest_F.mean()),
            "frobenius_excess": frobenius_excess(W_dec),
        },
        "weights": {
            "encoder_bias_mean": float(bias_F.double().mean()),
            "encoder_norm_mean": float(encoder_norm_F.mean()),
            "encoder_decoder_cosine_mean": float(aligned_F.mean()),
            "encoder_nearest_cosine_mean": float(encoder_nearest_F.mean()),
            "decoder_norm_mean": float(norm_F.mean()),
            "decoder_norm_min": float(norm_F.min()),
            "decoder_norm_max": float(norm_F.max()),
            "decoder_bias_norm": float(sae.b_dec.detach().double().norm()),
            "threshold_mean": None if threshold_F is None else float(threshold_F.detach().double().mean()),
        },
    }
    arrays = {
        "encoder_bias": to_numpy(bias_F),
        "encoder_norm": encoder_norm_F.cpu().numpy(),
        "encoder_decoder_cosine": aligned_F.cpu().numpy(),
        "decoder_nearest_cosine": decoder_nearest_F,
        "encoder_nearest_cosine": encoder_nearest_F,
    }
    return values, arrays
