"""What a dictionary vector writes into the logits by itself, and whether that is more than a random direction does.

Imports torch, not jax.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float

from hafs_evaluate.latents.neighbours import rounded
from hafs_evaluate.latents.token_text import TokenText

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")  # Llama and most others; GPT-2; GPT-NeoX; Phi
DIGITS = 3  # significant digits of a logit
CHUNK_FLOATS = 1 << 24  # logits computed at once: 64 MiB
RANDOM_DIRECTIONS = 512  # whose effects a latent's is compared with
CONFIDENCE = 0.95  # the quantile of their effects above which a latent's is more than chance


@torch.no_grad()
def attributions(vectors_CD: Float[torch.Tensor, "C D"], model: Any, n: int) -> list[dict[str, Any]]:
    """{promoted, promoted_logits, suppressed, suppressed_logits, logit_effect} of each vector u.

    They are the `n` highest and the `n` lowest entries of W_U (g * u), where g is the gain of the final norm and W_U
    the unembedding. This is direct logit attribution; it leaves out the later layers and the final norm's scale, which
    depends on the data. `logit_effect` is how far the mean of the promoted logits lies above the mean of all logits, or
    that of the suppressed ones below it, whichever is farther, in standard deviations over the vocabulary. Without a
    model the lists are empty and the effect None.
    """
    if not hasattr(model, "hf") or not n:
        empty: dict[str, Any] = {f"{name}{part}": [] for name in ("promoted", "suppressed") for part in ("", "_logits")}
        return [{**empty, "logit_effect": None} for _ in range(len(vectors_CD))]
    text, found = TokenText(model.tokenizer), []
    for logits_cV in _logits(vectors_CD, model):
        effect_c, high, low = _effects(logits_cV, n)
        for place, effect in enumerate(effect_c.tolist()):
            found.append(
                {
                    "promoted": [text(token) for token in high.indices[place].tolist()],
                    "promoted_logits": [rounded(value, DIGITS) for value in high.values[place].tolist()],
                    "suppressed": [text(token) for token in low.indices[place].tolist()],
                    "suppressed_logits": [rounded(value, DIGITS) for value in low.values[place].tolist()],
                    "logit_effect": rounded(effect, DIGITS),
                }
            )
    return found


@torch.no_grad()
def random_effect(model: Any, d_model: int, n: int) -> float | None:
    """The CONFIDENCE quantile of `logit_effect` over RANDOM_DIRECTIONS directions, uniform on the sphere."""
    if not hasattr(model, "hf") or not n:
        return None
    directions = torch.randn(RANDOM_DIRECTIONS, d_model, generator=torch.Generator().manual_seed(0))
    effects = torch.cat([_effects(logits_cV, n)[0] for logits_cV in _logits(directions, model)])
    return rounded(float(effects.quantile(CONFIDENCE)), DIGITS)


def _effects(logits_cV: Float[torch.Tensor, "c V"], n: int) -> tuple[torch.Tensor, Any, Any]:
    """(the effects [c], the n highest logits, the n lowest, the lowest first)."""
    n = min(n, logits_cV.shape[1])
    high, low = logits_cV.topk(n), logits_cV.topk(n, largest=False)
    mean_c, sd_c = logits_cV.mean(1), logits_cV.std(1).clamp_min(1e-12)
    above, below = high.values.mean(1) - mean_c, mean_c - low.values.mean(1)
    return torch.maximum(above, below) / sd_c, high, low


def _logits(vectors_CD: Float[torch.Tensor, "C D"], model: Any) -> Iterator[Float[torch.Tensor, "c V"]]:
    """Each vector times the final norm's gain, where the model has one, through the unembedding; float32, in chunks."""
    vectors_CD = vectors_CD.detach().float().cpu()
    final_norm = next((norm for name, norm in model.hf.base_model.named_children() if name in FINAL_NORMS), None)
    if final_norm is not None:
        vectors_CD = vectors_CD * final_norm.weight.detach().float().cpu()
    W_VD = model.hf.get_output_embeddings().weight.detach().float().cpu()
    for vectors_cD in vectors_CD.split(max(1, CHUNK_FLOATS // len(W_VD))):
        yield vectors_cD @ W_VD.T
