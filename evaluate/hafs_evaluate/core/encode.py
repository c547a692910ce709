"""From activations to latents: the one way in which the evaluations run an SAE. Imports torch, not jax.

`encode` takes a batch, `encode_store` passes over a store, `encode_rows` takes an array that may be too large for one
batch, `PairEncoder` takes rows and one latent of each. All move the activations to the SAE's device and dtype, and keep
no gradients.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import to_float32
from hafs_jax.store.reader import Store

BATCH_FLOATS = 1 << 24  # floats that a batch's activations and latents may take together: 64 MiB; 128 MiB is 20% slower

PAIRS = 512  # pairs of a row and a latent that are computed at once, so that they stay in the cache


class TorchSAE(Protocol):
    """What the evaluations need of an SAE; a `sae_lens.SAE` has it."""

    @property
    def W_enc(self) -> Tensor: ...  # [D, F]
    @property
    def W_dec(self) -> Tensor: ...  # [F, D]
    @property
    def b_dec(self) -> Tensor: ...  # [D]
    @property
    def device(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def encode(self, x: Tensor, /) -> Tensor: ...
    def decode(self, latents: Tensor, /) -> Tensor: ...


class EncodedBatch(NamedTuple):
    """Rows of a store, all of one shard, with their latents."""

    numbers_B: Int[np.ndarray, "B"]  # each row's number, counted through all shards
    acts_BD: Float[np.ndarray, "B D"]  # float32
    rows_B: np.ndarray  # of the store's ROW: token, document, context, position and source of each row
    latents_BF: Float[Tensor, "B F"]  # in the SAE's dtype, on its device


def batch_rows(d_model: int, n_latents: int = 0) -> int:
    """The most rows whose activations, latents and one comparison of the latents stay within BATCH_FLOATS."""
    return max(1, BATCH_FLOATS // (d_model + 2 * n_latents))


@torch.no_grad()
def encode(sae: TorchSAE, acts_BD: Float[Tensor, "*B D"] | Float[np.ndarray, "*B D"]) -> Float[Tensor, "*B F"]:
    """The SAE's latents of one batch of activations, in the SAE's dtype and on its device."""
    return sae.encode(torch.as_tensor(acts_BD).to(sae.device, sae.dtype))


def encode_rows(sae: TorchSAE, acts_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N F"]:
    """The SAE's latents of all rows, float32, batch by batch."""
    n_latents, d_model = sae.W_dec.shape
    latents_NF = np.empty((len(acts_ND), n_latents), np.float32)
    step = batch_rows(d_model, n_latents)
    for start in range(0, len(acts_ND), step):
        latents_NF[start : start + step] = to_numpy(encode(sae, acts_ND[start : start + step]))
    return latents_NF


@torch.no_grad()
def encode_store(
    sae: TorchSAE,
    store: Store,
    max_rows: int | None = None,
    keep: Callable[[np.ndarray], Int[np.ndarray, "K"]] | None = None,
) -> Iterator[EncodedBatch]:
    """The store's first `max_rows` rows (default: all) with their latents, in stored order, in batches of bounded size.

    `keep` maps the ROW table of a whole shard to the indices of the rows to take, ascending (default: all rows). Only
    those are read and encoded. Raises `UserError` where the SAE has another width than the store.
    """
    n_latents = sae.W_dec.shape[0]
    for numbers_B, acts_BD, rows_B in store_rows(sae, store, n_latents, max_rows, keep):
        yield EncodedBatch(numbers_B, acts_BD, rows_B, encode(sae, acts_BD))


def store_rows(
    sae: TorchSAE,
    store: Store,
    n_latents: int,
    max_rows: int | None = None,
    keep: Callable[[np.ndarray], Int[np.ndarray, "K"]] | None = None,
) -> Iterator[tuple[Int[np.ndarray, "B"], Float[np.ndarray, "B D"], np.ndarray]]:
    """The first three parts of an `EncodedBatch`, of the rows that `encode_store` takes; `n_latents` bounds a batch."""
    width, manifest = sae.W_dec.shape[1], store.manifest
    if width != manifest.d_model:
        raise UserError(
            f"{store.folder}: expected activations of the SAE's width {width}, found d_model={manifest.d_model};"
            " evaluate the SAE on a store of its own hook point"
        )
    step = batch_rows(width, n_latents)
    for block in store.batches(step if keep is None else max(1, len(store)), max_rows, raw=True):
        kept = np.arange(len(block.rows_B)) if keep is None else keep(block.rows_B)
        for start in range(0, len(kept), step):
            index_B = kept[start : start + step]
            acts_BD = to_float32(block.acts_BD[index_B], manifest.dtype)
            yield block.first + index_B, acts_BD, block.rows_B[index_B]


class PairEncoder:
    """Activations of pairs of a row and a latent.

    Of SAEs whose latents depend on their own pre-activation alone, nothing but these pre-activations is computed. The
    sums are in another order than in `encode`, so that a value may differ in its last bits.
    """

    def __init__(self, sae: TorchSAE) -> None:
        from sae_lens import JumpReLUSAE, StandardSAE

        self._sae: Any = sae
        self._W_enc_FD = sae.W_enc.T.contiguous() if type(sae) in (JumpReLUSAE, StandardSAE) else None

    @torch.no_grad()
    def __call__(
        self, acts_BD: Float[np.ndarray, "B D"], row_P: Int[np.ndarray, "P"], latent_P: Int[np.ndarray, "P"]
    ) -> Float[np.ndarray, "P"]:
        """The activation of each pair's latent on its row of `acts_BD`, float32."""
        sae, W_enc_FD = self._sae, self._W_enc_FD
        if W_enc_FD is None:
            return to_numpy(encode(sae, acts_BD))[row_P, latent_P]
        inputs_BD = sae.process_sae_in(torch.as_tensor(acts_BD).to(sae.device, sae.dtype))
        threshold_F, value_P = getattr(sae, "threshold", None), np.zeros(len(row_P), np.float32)
        for start in range(0, len(row_P), PAIRS):
            part = slice(start, start + PAIRS)
            row_p, latent_p = (torch.as_tensor(index[part], device=sae.device).long() for index in (row_P, latent_P))
            pre_p = (inputs_BD[row_p] * W_enc_FD[latent_p]).sum(1) + sae.b_enc[latent_p]
            latents_p = sae.activation_fn(pre_p)
            value_P[part] = to_numpy(latents_p if threshold_F is None else latents_p * (pre_p > threshold_F[latent_p]))
        return value_P


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as a float32 array in main memory, whatever its dtype and device; without its gradient."""
    return tensor.detach().float().cpu().numpy()
