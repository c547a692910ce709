"""Continuations of a text with one latent changed. Imports torch, not jax."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hafs_evaluate.core.encode import TorchSAE, encode
from hafs_evaluate.explore.reading import left_out
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import Manifest


@dataclass(frozen=True)
class Edit:
    """A change of one latent i: x becomes x + d W_dec[i], and what the SAE leaves unexplained of x stays as it is.

    With `mode` add, d = value; with clamp, d = value - a_i(x), so that the latent's part of the reconstruction is
    value W_dec[i]. `value` is in the model's units. Where d is 0, x stays the same to the bit.
    """

    sae: TorchSAE
    latent: int
    mode: str
    value: float

    @torch.no_grad()
    def __call__(self, acts_LD: Float[Tensor, "L D"]) -> Float[Tensor, "L D"]:
        x_LD = acts_LD.to(self.sae.device, torch.float32)
        change_L = torch.full((len(x_LD),), self.value, device=x_LD.device)
        if self.mode == "clamp":
            change_L = change_L - encode(self.sae, x_LD)[:, self.latent].float()
        vector_D = self.sae.W_dec[self.latent].detach().float()
        edited_LD = x_LD + change_L[:, None] * vector_D
        return torch.where(change_L[:, None] == 0, acts_LD, edited_LD.to(acts_LD.device, acts_LD.dtype))


def splice_of(edit: Edit, manifest: Manifest) -> Callable[[Tensor], Tensor]:
    """The edit as a splice of one continuation's forward passes, the first of which holds the whole text.

    It leaves alone what the SAE was not trained on: BOS, and positions of too high a norm.
    """
    begun = False

    def splice(acts_BLD: Tensor) -> Tensor:
        nonlocal begun
        untouched_L = left_out(acts_BLD[0], manifest, starts_with_bos=manifest.tokenizer.prepend_bos and not begun)
        begun = True
        return torch.where(untouched_L[None, :, None], acts_BLD, edit(acts_BLD[0])[None])

    return splice


@torch.no_grad()
def continuation(
    model: Any,
    manifest: Manifest,
    ids_L: Int[Tensor, "L"],
    edit: Edit | None,
    new_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[int]:
    """The ids of at most `new_tokens` tokens that follow, one after the other; it ends after an end-of-text token.

    Temperature 0 takes the likeliest token. Two continuations of one seed draw with the same noise, so that they part
    only where their logits do. The model keeps the attention's keys and values where the hook point is on the residual
    stream; elsewhere it reads the whole text anew for each token.
    """
    if model.missing_head:
        raise UserError(f"model {model.info.name!r} has no output head, so that it cannot continue a text")
    random = torch.Generator().manual_seed(seed)
    ends = _end_tokens(model)
    logits_of = _cached if model.compiles((manifest.hook_point,)) else _uncached
    step = logits_of(model, manifest, edit)
    tokens_L = ids_L
    room = new_tokens if model.max_context_length is None else model.max_context_length - len(ids_L)
    if room <= 0:
        raise UserError(f"the text fills all {len(ids_L)} tokens that the model reads: shorten it to continue it")
    for _ in range(min(new_tokens, room)):
        logits_V = step(tokens_L)
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            noise_V = torch.empty(len(logits_V)).exponential_(generator=random)
            token = int((logits_V / temperature - noise_V.log()).argmax())  # Gumbel noise: a draw from the softmax
        yield token
        if token in ends:
            return
        tokens_L = torch.cat([tokens_L, torch.tensor([token])])


Step = Callable[[Tensor], Tensor]  # from all tokens so far to the next one's logits, float32 on the CPU


def _cached(model: Any, manifest: Manifest, edit: Edit | None) -> Step:
    splice = splice_of(edit, manifest) if edit else _same
    cache: Any = None
    read = 0

    def step(tokens_L: Tensor) -> Tensor:
        nonlocal cache, read
        with model.spliced(splice, manifest.hook_point):
            found = model.hf(tokens_L[None, read:].to(model.device), past_key_values=cache, use_cache=True)
        cache, read = found.past_key_values, len(tokens_L)
        return found.logits[0, -1].float().cpu()

    return step


def _uncached(model: Any, manifest: Manifest, edit: Edit | None) -> Step:
    def step(tokens_L: Tensor) -> Tensor:
        splice = splice_of(edit, manifest) if edit else _same
        return model.logits(tokens_L[None], splice, manifest.hook_point)[0, -1].float().cpu()

    return step


def _same(acts: Tensor) -> Tensor:
    return acts


def _end_tokens(model: Any) -> set[int]:
    """The tokens after which the model has nothing more to say."""
    known = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    known = known if isinstance(known, list) else [known]
    return {token for token in [*known, model.tokenizer.eos_token_id] if token is not None}
