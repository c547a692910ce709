"""A typed text as the SAEs see it: its tokens, the latents on each, and which are about it. Imports torch, not jax."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hafs_evaluate.core.encode import TorchSAE, encode
from hafs_evaluate.explore.requests import MAX_TOKENS
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import Manifest


@dataclass(frozen=True)
class Reading:
    """The L tokens of a text, BOS first where the model has one, and their activations at the SAEs' hook point."""

    ids_L: Int[Tensor, "L"]
    acts_LD: Float[Tensor, "L D"]  # in the model's dtype
    is_left_out_L: Bool[Tensor, "L"]  # of BOS and of norms that the training left out: no SAE has seen their like
    has_bos: bool
    cut: int  # tokens of the text's end that were not read


def read_text(model: Any, manifest: Manifest, text: str, most: int = MAX_TOKENS) -> Reading:
    """The text as the extraction would read it in a context of its own; of a long one, its first `most` tokens.

    `model` is the store's `LanguageModel`. `UserError` where the text has no token.
    """
    ids = model.tokenize([text])[0]
    if not len(ids):
        raise UserError("the text is empty: type a word")
    has_bos = manifest.tokenizer.prepend_bos
    most = min(most, model.max_context_length or most) - has_bos
    kept = torch.from_numpy(ids[:most]).long()
    ids_L = torch.cat([torch.tensor([model.bos_token_id]), kept]) if has_bos else kept
    acts_LD = model.activations(ids_L[None], manifest.hook_point)[0]
    return Reading(ids_L, acts_LD, left_out(acts_LD, manifest, starts_with_bos=has_bos), has_bos, len(ids) - len(kept))


def left_out(acts_LD: Float[Tensor, "L D"], manifest: Manifest, starts_with_bos: bool) -> Bool[Tensor, "L"]:
    """The positions that no SAE was trained on the like of: BOS, and norms above the store's `max_norm`."""
    is_left_out_L = torch.zeros(len(acts_LD), dtype=torch.bool, device=acts_LD.device)
    if starts_with_bos:
        is_left_out_L[0] = True
    if manifest.norm_filter.max_norm is not None:
        is_left_out_L |= acts_LD.float().norm(dim=-1) > manifest.norm_filter.max_norm
    return is_left_out_L


def latents_of(sae: TorchSAE, reading: Reading) -> Float[Tensor, "L F"]:
    """The SAE's latents on each token, float32, in the model's units; 0 on the positions that are left out."""
    latents_LF = encode(sae, reading.acts_LD).float().cpu()
    return latents_LF.masked_fill(reading.is_left_out_L.cpu()[:, None], 0.0)


def strongest_by_token(latents_LF: Float[Tensor, "L F"], top: int) -> list[list[tuple[int, float]]]:
    """Of each token, (index, activation) of its `top` strongest latents that fire, strongest first."""
    best = latents_LF.topk(min(top, latents_LF.shape[1]), dim=1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(i, v) for i, v in zip(indices, values, strict=True) if v > 0] for indices, values in rows]


def strongest_on_text(latents_LF: Float[Tensor, "L F"], top: int) -> list[tuple[int, float, int]]:
    """(index, highest activation, its place among the tokens) of the `top` latents of the highest activation."""
    peak_F, place_F = latents_LF.max(0)
    best = torch.sort(peak_F, descending=True, stable=True).indices[:top]
    return [(int(i), float(peak_F[i]), int(place_F[i])) for i in best if peak_F[i] > 0]


def text_scores(
    latents_TF: Float[Tensor, "T F"], density_F: Float[Tensor, "F"], max_F: Float[Tensor, "F"], rows: int
) -> tuple[Float[Tensor, "F"], Float[Tensor, "F"], Float[Tensor, "F"]]:
    """(score, strength, share) of each latent i on a text of T tokens, BOS and those that are left out not counted.

    score_i = strength_i x log2(share_i / density_i), where

    - strength_i is the mean over the tokens of min(a_i / max_i, 1);
    - share_i is the share of the tokens on which i fires;
    - density_i and max_i are its share and its highest activation on the `rows` rows of the store that the evaluation
      scanned; a density of 0 counts as 1 / rows. Of a latent that was silent there max_i is its maximum on the text.

    Strength alone would put first what fires on every text, and the logarithm alone what fires once in a million rows.
    A latent that fires less often here than elsewhere has a negative score, and one that is silent here 0.
    """
    own_F = latents_TF.amax(0)
    scale_F = torch.where(max_F > 0, max_F, own_F).clamp(min=torch.finfo(torch.float32).tiny)
    strength_F = (latents_TF / scale_F).clamp(max=1.0).mean(0)
    share_F = (latents_TF > 0).float().mean(0)
    floor = 1.0 / max(rows, 1)
    lift_F = torch.log2(share_F.clamp(min=floor) / density_F.clamp(min=floor))
    return torch.where(share_F > 0, strength_F * lift_F, 0.0), strength_F, share_F
