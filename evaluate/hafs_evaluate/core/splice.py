"""What the language model loses when an SAE stands in for its activations: cross-entropy and KL.

The definitions are those of SAE-Bench 0.6.0's core output. On held-out contexts the language model runs in three ways:

- clean;
- spliced: the SAE's reconstruction takes the place of the activations at the hook point;
- ablated: those activations are zero at every position, as in SAE-Bench and SAELens.

The splice leaves two kinds of positions as they are, since the SAE never saw such rows: BOS, and positions whose
activation has a norm above the store's `norm_filter.max_norm`. All figures are means over the positions after BOS,
those of high norm included.

Imports torch, not jax.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from hafs_evaluate.core.encode import TorchSAE, encode
from hafs_jax.base.errors import UserError
from hafs_jax.base.log import bar_options
from hafs_jax.store.reader import Store

LOG = logging.getLogger(__name__)

CHUNK_FLOATS = 1 << 24  # log-probabilities computed at once: 64 MiB


@dataclass
class Losses:
    """Sums over the positions that count, of one way of running the model, in nats."""

    ce: float = 0.0  # cross-entropy of the next token
    kl: float = 0.0  # KL(clean || this way) of the next token's distribution


def ce_score(clean: float, spliced: float, ablated: float) -> float | None:
    """(ce_ablated - ce_spliced) / (ce_ablated - ce_clean): 1 is no loss, 0 is as bad as zero ablation.

    The arguments are the three ways' mean cross-entropies. None where ablation costs nothing.
    """
    return (ablated - spliced) / (ablated - clean) if ablated != clean else None


def kl_score(spliced: float, ablated: float) -> float | None:
    """1 - kl_spliced / kl_ablated: 1 is no loss, 0 is as bad as zero ablation. None where ablation changes nothing.

    The arguments are the mean KL(clean || spliced) and KL(clean || ablated) of the next token's distribution.
    """
    return 1 - spliced / ablated if ablated != 0 else None


def choose_contexts(store: Store, contexts: int, seed: int) -> np.ndarray:
    """Numbers of `contexts` contexts drawn without replacement, longest first. Each has a token to predict."""
    lengths = store.contexts().table["length"]
    shortest = 3 if store.manifest.tokenizer.prepend_bos else 2
    usable = np.flatnonzero(lengths >= shortest)
    if not len(usable):
        raise UserError(f"{store.folder}: expected contexts of at least {shortest} tokens, found none; extract again")
    chosen = np.random.default_rng(seed).permutation(usable)[:contexts]
    return chosen[np.lexsort((chosen, -lengths[chosen]))]


@torch.no_grad()
def splice_metrics(
    model: Any,
    store: Store,
    saes: Mapping[str, TorchSAE],
    contexts: int = 64,
    seed: int = 0,
    batch_contexts: int = 4,
) -> dict[str, dict[str, Any]]:
    """The `model` part of core.json for each of `saes`, by name. `model` is a `LanguageModel`.

    The clean and the ablated model run once per batch for all SAEs. Log-probabilities are float32, their sums float64.
    `tokens` counts all positions. `tokens_untouched` counts those that the splice leaves as they are, which are
    `tokens_bos` and `tokens_over_norm`.
    """
    manifest, texts = store.manifest, store.contexts()
    chosen = choose_contexts(store, contexts, seed)
    ce_clean, ablated, spliced = 0.0, Losses(), {name: Losses() for name in saes}
    counts = dict.fromkeys(("tokens", "tokens_bos", "tokens_over_norm", "predicted", "compared"), 0)
    passes = (2 + len(saes)) * sum(len(texts[int(index)]) for index in chosen)
    with tqdm(total=passes, desc="splicing", unit="tok", unit_scale=True, **bar_options(LOG)) as bar:
        for start in range(0, len(chosen), batch_contexts):
            batch = [texts[int(index)] for index in chosen[start : start + batch_contexts]]
            tokens_BL, is_text_BL = _padded(batch)
            tokens_BL, is_text_BL = tokens_BL.to(model.device), is_text_BL.to(model.device)
            is_bos_BL = torch.zeros_like(is_text_BL)
            is_bos_BL[:, 0] = manifest.tokenizer.prepend_bos
            step = int(is_text_BL.sum())
            untouched_BL = is_bos_BL.clone()

            def record(acts_BLD: Tensor, untouched_BL: Tensor = untouched_BL) -> Tensor:
                if manifest.norm_filter.max_norm is not None:
                    untouched_BL |= acts_BLD.float().norm(dim=-1) > manifest.norm_filter.max_norm
                return acts_BLD

            target = _Target(model.logits(tokens_BL, record, manifest.hook_point), tokens_BL, is_text_BL & ~is_bos_BL)
            ce_clean += target.clean_ce()
            bar.update(step)
            target.add(ablated, model.logits(tokens_BL, torch.zeros_like, manifest.hook_point))
            bar.update(step)
            for name, sae in saes.items():
                target.add(spliced[name], model.logits(tokens_BL, _splice(sae, untouched_BL), manifest.hook_point))
                bar.update(step)
            counts["tokens"] += step
            counts["tokens_bos"] += int((is_bos_BL & is_text_BL).sum())
            counts["tokens_over_norm"] += int((untouched_BL & is_text_BL & ~is_bos_BL).sum())
            counts["predicted"] += target.predicted
            counts["compared"] += target.compared
    predicted, compared = counts.pop("predicted"), counts.pop("compared")
    ce_clean, ce_ablated, kl_ablated = ce_clean / predicted, ablated.ce / predicted, ablated.kl / compared
    return {
        name: {
            "ce_clean": ce_clean,
            "ce_spliced": losses.ce / predicted,
            "ce_ablated": ce_ablated,
            "ce_score": ce_score(ce_clean, losses.ce / predicted, ce_ablated),
            "kl_spliced": losses.kl / compared,
            "kl_ablated": kl_ablated,
            "kl_score": kl_score(losses.kl / compared, kl_ablated),
            **counts,
            "tokens_untouched": counts["tokens_bos"] + counts["tokens_over_norm"],
            "contexts": len(chosen),
        }
        for name, losses in spliced.items()
    }


class _Target:
    """The clean model's predictions on a batch, with which those of the other ways are compared."""

    def __init__(
        self, logits_BLV: Float[Tensor, "B L V"], tokens_BL: Int[Tensor, "B L"], is_counted_BL: Bool[Tensor, "B L"]
    ) -> None:
        """`is_counted_BL` marks the positions whose next-token distribution counts.

        Those of them that have a next token in the context have a cross-entropy too.
        """
        self._at = is_counted_BL.nonzero(as_tuple=True)
        has_next_BL = torch.zeros_like(is_counted_BL)
        has_next_BL[:, :-1] = is_counted_BL[:, 1:]
        next_BL = torch.roll(tokens_BL, -1, dims=1)
        self._next_N, self._has_next_N = next_BL[self._at].long(), has_next_BL[self._at]
        self.compared, self.predicted = len(self._next_N), int(self._has_next_N.sum())
        self._log_p_NV = torch.log_softmax(logits_BLV[self._at].float(), dim=-1)
        self._p_NV = self._log_p_NV.exp()
        self._rows = max(1, CHUNK_FLOATS // logits_BLV.shape[-1])

    def clean_ce(self) -> float:
        """The clean model's summed cross-entropy, in nats."""
        return self._ce(self._log_p_NV, slice(None))

    def add(self, losses: Losses, logits_BLV: Float[Tensor, "B L V"]) -> None:
        """Adds this batch's cross-entropy and KL(clean || logits), in nats, to `losses`."""
        for start in range(0, self.compared, self._rows):
            part = slice(start, start + self._rows)
            log_q = torch.log_softmax(logits_BLV[tuple(index[part] for index in self._at)].float(), dim=-1)
            losses.ce += self._ce(log_q, part)
            losses.kl += float(torch.linalg.vecdot(self._p_NV[part], self._log_p_NV[part] - log_q).double().sum())

    def _ce(self, log_q_NV: Float[Tensor, "N V"], part: slice) -> float:
        chosen_N = log_q_NV.gather(1, self._next_N[part, None])[:, 0].double()
        return -float(chosen_N[self._has_next_N[part]].sum())


def _splice(sae: TorchSAE, untouched_BL: Bool[Tensor, "B L"]) -> Callable[[Tensor], Tensor]:
    """The function from activations to what takes their place: reconstructions, but for the untouched positions."""

    def spliced(acts_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        recon_BLD = sae.decode(encode(sae, acts_BLD))
        return torch.where(untouched_BL[..., None], acts_BLD, recon_BLD.to(acts_BLD.device, acts_BLD.dtype))

    return spliced


def _padded(contexts: list[np.ndarray]) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """The contexts, padded on the right (causal attention hides that from them), and which positions are text."""
    tokens_BL = np.zeros((len(contexts), max(map(len, contexts))), np.int64)
    is_text_BL = np.zeros(tokens_BL.shape, bool)
    for row, context in enumerate(contexts):
        tokens_BL[row, : len(context)] = context
        is_text_BL[row, : len(context)] = True
    return torch.from_numpy(tokens_BL), torch.from_numpy(is_text_BL)
