"""From activations to latents: the one way in which the evaluations run an SAE. Imports torch, not jax.

`encode` takes a batch, `encode_store` passes over a store, `encode_rows` takes an array that may be too large for one
batch. All three move the activations to the SAE's device and dtype, and keep no gradients.
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
    n_latents, width = sae.W_dec.shape
    manifest = store.manifest
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
            yield EncodedBatch(block.first + index_B, acts_BD, block.rows_B[index_B], encode(sae, acts_BD))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as a float32 array in main memory, whatever its dtype and device; without its gradient."""
    return tensor.detach().float().cpu().numpy()
