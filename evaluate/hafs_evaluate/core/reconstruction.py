"""Core metrics of an SAE on stored activations: reconstruction and sparsity. Imports torch, not jax.

These are the fields of SAE-Bench 0.6.0's core output that need no language model (`core.splice` has the others;
tests/evaluate/core/test_reconstruction.py maps each of SAE-Bench's names to ours). Three of SAE-Bench's own figures are
wrong and are corrected here:

- its explained variance does not subtract the mean;
- its MSE is divided by the batch size;
- its L1 adds the latents without taking absolute values.

No figure depends on the batch size. Sums are float64, while the SAE computes in its own dtype.

Notation: x_i is a stored row, y_i its reconstruction, f_i its latents, mean_i the mean over all n rows, and m the mean
of those rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hafs_evaluate.core.encode import TorchSAE, batch_rows, encode_store
from hafs_evaluate.core.weights import weight_metrics
from hafs_jax.base.errors import UserError
from hafs_jax.store.reader import Store

DENSE = 0.1  # a latent is dense when it fires on more than this share of the rows
COMMON = 0.01  # and common when it fires on more than this share


@dataclass(frozen=True)
class Moments:
    """Mean and variation of a store's first `rows` rows, in float64: what FVU divides by, the same for all SAEs.

    The arrays over sources (S) hold the same for the rows of each text source alone.
    """

    rows: int
    mean_D: Float[np.ndarray, "D"]
    variation: float  # sum_i |x_i - m|^2
    rows_S: Int[np.ndarray, "S"]
    variation_S: Float[np.ndarray, "S"]  # about the source's own mean


@dataclass(frozen=True)
class Sums:
    """Sums over n rows, from which the metrics below follow."""

    rows: int  # n
    variation: float  # sum_i |x_i - m|^2, m the mean of these n rows
    residual: float  # sum_i |x_i - y_i|^2
    residual_share: float  # sum_i |x_i - y_i|^2 / |x_i - m|^2, m the mean of all rows
    cosine: float  # sum_i x_i.y_i / (|x_i| |y_i|), 0 where either is 0
    norm_in: float  # sum_i |x_i|
    norm_out: float  # sum_i |y_i|
    norm_ratio: float  # sum_i |y_i| / |x_i|, 0 where x_i is 0
    squared_out: float  # sum_i |y_i|^2
    dot: float  # sum_i x_i.y_i
    active: float  # sum_i (number of latents in f_i that are not 0)
    absolute: float  # sum_i |f_i|_1


ROW_SUMS = tuple(field.name for field in fields(Sums) if field.name not in ("rows", "variation"))
"""The sums to which each row adds a number of its own (`_row_sums`)."""


@dataclass(frozen=True)
class CoreResult:
    """The core metrics of one SAE."""

    values: dict[str, Any]  # what core.json holds
    latents: dict[str, np.ndarray]  # what core_latents.npz holds: [F] arrays, one figure of each latent


def fvu(sums: Sums) -> float | None:
    """sum_i |x_i - y_i|^2 / sum_i |x_i - m|^2, the share of variance left unexplained; None where rows do not vary."""
    return sums.residual / sums.variation if sums.variation > 0 else None


def explained_variance(sums: Sums) -> float | None:
    """1 - FVU: 1 for a perfect reconstruction, 0 where every y_i is m."""
    unexplained = fvu(sums)
    return None if unexplained is None else 1 - unexplained


def explained_variance_by_row(sums: Sums) -> float:
    """mean_i (1 - |x_i - y_i|^2 / |x_i - m|^2): SAE-Bench's legacy figure, dominated by rows that lie near the mean."""
    return 1 - sums.residual_share / sums.rows


def mse(sums: Sums) -> float:
    """mean_i |x_i - y_i|^2, summed over the D dimensions as SAELens does."""
    return sums.residual / sums.rows


def cosine(sums: Sums) -> float:
    """mean_i x_i.y_i / (|x_i| |y_i|); a row with x_i = 0 or y_i = 0 counts as 0."""
    return sums.cosine / sums.rows


def norm_in(sums: Sums) -> float:
    """mean_i |x_i|."""
    return sums.norm_in / sums.rows


def norm_out(sums: Sums) -> float:
    """mean_i |y_i|."""
    return sums.norm_out / sums.rows


def l2_ratio(sums: Sums) -> float:
    """mean_i |y_i| / |x_i|; below 1 the reconstructions are too short (shrinkage)."""
    return sums.norm_ratio / sums.rows


def relative_reconstruction_bias(sums: Sums) -> float | None:
    """sum_i |y_i|^2 / sum_i x_i.y_i (arXiv 2404.16014, equation 10); 1 is unbiased. None where every y_i is 0."""
    return sums.squared_out / sums.dot if sums.dot != 0 else None


def l0(sums: Sums) -> float:
    """mean_i of the number of latents in f_i that are not 0."""
    return sums.active / sums.rows


def l1(sums: Sums) -> float:
    """mean_i sum_j |f_ij|, over the latents j."""
    return sums.absolute / sums.rows


RECONSTRUCTION: tuple[Callable[[Sums], float | None], ...] = (
    fvu,
    explained_variance,
    explained_variance_by_row,
    mse,
    cosine,
    norm_in,
    norm_out,
    l2_ratio,
    relative_reconstruction_bias,
)
"""The metrics in core.json's `reconstruction`, over all rows."""

BY_SOURCE = (fvu, mse, cosine, l0)
"""The metrics in core.json's `by_source`, over the rows of one text source."""


def density_metrics(density_F: Float[np.ndarray, "F"]) -> dict[str, float]:
    """Figures of the latents' densities d_j, the share of rows on which latent j is positive:

    - dead_fraction: share of the latents with d_j = 0; alive_fraction: share of the others;
    - common_fraction, dense_fraction: share of the latents with d_j > 0.01, and with d_j > 0.1;
    - common_share, dense_share: sum of d_j over those latents / sum of d_j over all latents.
    """
    total = density_F.sum()
    common_F, dense_F = density_F > COMMON, density_F > DENSE
    return {
        "dead_fraction": float((density_F == 0).mean()),
        "alive_fraction": float((density_F > 0).mean()),
        "common_fraction": float(common_F.mean()),
        "dense_fraction": float(dense_F.mean()),
        "common_share": float(density_F[common_F].sum() / total) if total > 0 else 0.0,
        "dense_share": float(density_F[dense_F].sum() / total) if total > 0 else 0.0,
    }


def store_moments(store: Store, max_rows: int | None = None) -> Moments:
    """The moments of the store's first `max_rows` rows (default: all), in two passes: the mean, then the variation."""
    sources, d_model = len(store.manifest.sources), store.manifest.d_model
    rows_S, sum_SD = np.zeros(sources), np.zeros((sources, d_model))
    for _, acts_BD, table_B in store.batches(batch_rows(d_model), max_rows):
        for source in np.unique(table_B["source"]):
            is_of_source_B = table_B["source"] == source
            rows_S[source] += is_of_source_B.sum()
            sum_SD[source] += acts_BD[is_of_source_B].sum(0, dtype=np.float64)
    if not rows_S.sum():
        raise UserError(f"{store.folder}: expected held-out rows, found none; extract more text")
    mean_D = sum_SD.sum(0) / rows_S.sum()
    mean_SD = sum_SD / np.maximum(rows_S, 1)[:, None]
    variation, variation_S = 0.0, np.zeros(sources)
    for _, acts_BD, table_B in store.batches(batch_rows(d_model), max_rows):
        variation += float(np.square(acts_BD - mean_D).sum())  # float32 - float64 is float64
        own_B = np.square(acts_BD - mean_SD[table_B["source"]]).sum(1)
        variation_S += np.bincount(table_B["source"], own_B, sources)
    return Moments(int(rows_S.sum()), mean_D, variation, rows_S.astype(np.int64), variation_S)


@torch.no_grad()
def core_metrics(sae: TorchSAE, store: Store, moments: Moments, max_rows: int | None = None) -> CoreResult:
    """Every core metric of `sae` on the store's first `max_rows` rows (default: all).

    `moments` are those of the same rows. `by_source` has the figures of each text source; there FVU is about the
    source's own mean.
    """
    manifest, n_latents = store.manifest, sae.W_dec.shape[0]
    mean_D = torch.from_numpy(moments.mean_D).to(sae.device)
    sums = {name: np.zeros(len(manifest.sources)) for name in ROW_SUMS}
    fired_F = np.zeros(n_latents, np.int64)
    fired_CF = np.zeros((len(store.contexts()), -(-n_latents // 8)), np.uint8)  # a bit: fired in the context
    for batch in encode_store(sae, store, max_rows):
        acts_BD = torch.from_numpy(batch.acts_BD).to(sae.device).double()
        recon_BD = sae.decode(batch.latents_BF).double()
        for name, values_B in _row_sums(acts_BD, recon_BD, batch.latents_BF, mean_D).items():
            sums[name] += np.bincount(batch.rows_B["source"], values_B.cpu().numpy(), len(manifest.sources))
        is_active_BF = (batch.latents_BF > 0).cpu().numpy()
        fired_F += is_active_BF.sum(0)
        _mark_contexts(fired_CF, is_active_BF, batch.rows_B["context"])
    contexts_F = sum(
        (np.unpackbits(part, axis=1, count=n_latents).sum(0, dtype=np.int64) for part in _chunks(fired_CF, 4096)),
        start=np.zeros(n_latents, np.int64),
    )
    density_F = fired_F / moments.rows
    overall = Sums(moments.rows, moments.variation, **{name: float(values.sum()) for name, values in sums.items()})
    if overall.variation <= 0:
        raise UserError(f"{store.folder}: its {moments.rows} held-out rows do not vary, so FVU has no meaning")
    weights, arrays = weight_metrics(sae)
    by_source = {}
    for index, source in enumerate(manifest.sources):
        if moments.rows_S[index]:
            of_source = {name: float(values[index]) for name, values in sums.items()}
            own = Sums(int(moments.rows_S[index]), float(moments.variation_S[index]), **of_source)
            by_source[source.name] = {metric.__name__: metric(own) for metric in BY_SOURCE} | {"rows": own.rows}
    values = {
        "rows": moments.rows,
        "reconstruction": {metric.__name__: metric(overall) for metric in RECONSTRUCTION},
        "sparsity": {"l0": l0(overall), "l1": l1(overall), **density_metrics(density_F), "n_latents": n_latents},
        **weights,
        "by_source": by_source,
    }
    arrays["density"] = density_F
    with np.errstate(invalid="ignore"):
        arrays["rows_a_context"] = fired_F / contexts_F  # rows / contexts on which it fires; NaN where it never does
    return CoreResult(values, arrays)


def _row_sums(
    acts_BD: Float[Tensor, "B D"], recon_BD: Float[Tensor, "B D"], latents_BF: Float[Tensor, "B F"], mean_D: Tensor
) -> dict[str, Float[Tensor, "B"]]:
    """What each row adds to each of ROW_SUMS, float64; activations and reconstructions are float64."""
    residual_B = (acts_BD - recon_BD).square().sum(1)
    norm_in_B, norm_out_B = acts_BD.norm(dim=1), recon_BD.norm(dim=1)
    dot_B = (acts_BD * recon_BD).sum(1)
    return {
        "residual": residual_B,
        "residual_share": residual_B / (acts_BD - mean_D).square().sum(1),
        "cosine": _over(dot_B, norm_in_B * norm_out_B),
        "norm_in": norm_in_B,
        "norm_out": norm_out_B,
        "norm_ratio": _over(norm_out_B, norm_in_B),
        "squared_out": norm_out_B.square(),
        "dot": dot_B,
        "active": (latents_BF != 0).sum(1).double(),
        "absolute": latents_BF.abs().sum(1, dtype=torch.float64),
    }


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-300), 0.0)


def _mark_contexts(
    fired_CF: np.ndarray, is_active_BF: Bool[np.ndarray, "B F"], context_B: Int[np.ndarray, "B"]
) -> None:
    """Sets the bits of `fired_CF`, eight latents a byte, of the latents that fire on a row of the context."""
    order = np.argsort(context_B, kind="stable")
    contexts, starts = np.unique(context_B[order], return_index=True)
    fired_CF[contexts] |= np.bitwise_or.reduceat(np.packbits(is_active_BF, axis=1)[order], starts, axis=0)


def _chunks(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]
