"""Which latents are about a text. Imports torch, not jax."""

import torch
from jaxtyping import Float
from torch import Tensor


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
