"""The dashboard of single latents, for a person: what each one fires on, with, and for. Imports torch, not jax.

`show_latents` gathers what latents.json holds. Its parts come from `firing`, `contexts`, `neighbours` and
`selectivity`. The language model is needed for the promoted tokens alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from hafs_evaluate.core.encode import TorchSAE
from hafs_evaluate.core.weights import nearest_vectors
from hafs_evaluate.latents.contexts import Context, read_contexts, rows_at
from hafs_evaluate.latents.firing import observe, scan
from hafs_evaluate.latents.neighbours import partners, rounded, sharing
from hafs_evaluate.latents.selectivity import selectivity
from hafs_evaluate.latents.token_text import TokenText
from hafs_jax.base.files import write_text
from hafs_jax.base.options import check, option
from hafs_jax.store.reader import Store

SHADE_DIGITS = 3  # significant digits of an activation in a context, which the page only shades by
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")  # Llama and most others; GPT-2; GPT-NeoX; Phi


@dataclass(frozen=True)
class LatentsConfig:
    """How many latents have a dashboard, and how much it shows of each."""

    max_rows: int = option(
        131_072, "rows read; the store is shuffled, so that its first rows are a random sample", least=1
    )
    latents: int = option(
        200, "latents shown, spread evenly over the density ranks of those that fire [latents]", least=0
    )
    most_active: int = option(20, "of those, how many are the ones with the highest activation [latents]", least=0)
    examples: int = option(20, "top contexts per latent, each from another document [contexts]", least=1)
    random_examples: int = option(
        8, "contexts per latent drawn from where it fires, each from another document [contexts]", least=0
    )
    seed: int = option(0, "seed of the draw of random contexts", least=0)
    tokens_before: int = option(24, "tokens shown before the peak [tokens]", least=0)
    tokens_after: int = option(12, "tokens shown after the peak [tokens]", least=0)
    promoted: int = option(10, "promoted tokens per latent, and as many suppressed ones [tokens]", least=0)
    partners: int = option(5, "latents that it fires with, per latent [latents]", least=0)
    partner_rows: int = option(10, "fewest rows on which a partner fires with it [rows]", least=1)
    shares: int = option(5, "latents whose dictionary vectors share its direction, per latent [latents]", least=0)
    shared_cosine: float = option(
        0.2, "least cosine at which two dictionary vectors share a direction", above=0, most=1
    )

    def __post_init__(self) -> None:
        check(self)


def show_latents(sae: TorchSAE, store: Store, model: Any, config: LatentsConfig | None = None) -> dict[str, Any]:
    """What latents.json holds of one SAE, but for the run's name.

    `store` is of the SAE's hook point. `model` is a `LanguageModel`, or only its tokenizer; without the model,
    `promoted` and `suppressed` stay empty. Arrays over all F latents come first, then `latents`, a dashboard of each
    latent shown:

    - `promoted`, `suppressed`: the tokens of the highest and of the lowest entries of W_U (g * u), where u is the
      dictionary vector, g the gain of the final norm and W_U the unembedding. This is direct logit attribution; it
      leaves out the later layers and the final norm's scale, which depends on the data.
    - `contexts`, `random_contexts`: around the rows of its highest activations, and around rows drawn from all on which
      it fires (`firing.spread_rows`), highest first.
    - `selectivity`, `partners`, `shares_with`: what `selectivity`, `partners` and `sharing` return.

    `stability.write_matches` adds `matches`, which needs the other runs.
    """
    config = config or LatentsConfig()
    text = TokenText(getattr(model, "tokenizer", model))
    found = scan(sae, store, config.max_rows, config.examples)
    chosen_C = choose_latents(found.density_F, found.max_activation_F, config.latents, config.most_active)
    fired = observe(sae, store, chosen_C, config.max_rows, config.random_examples, config.seed)
    shown_rows_CN = np.concatenate([found.top_rows_FN[chosen_C], fired.random_rows_CR], axis=1)
    contexts_C = read_contexts(sae, store, chosen_C, shown_rows_CN, config.tokens_before, config.tokens_after)
    n_top_C = (found.top_rows_FN[chosen_C] >= 0).sum(1).tolist()
    W_dec = sae.W_dec.detach()
    nearest_F, cosine_F = nearest_vectors(W_dec)
    logits_CV = _logits(W_dec[chosen_C], model) if hasattr(model, "hf") else None
    together_CF, count_F = fired.together_CF, fired.count_F
    partners_C = partners(chosen_C, together_CF, count_F, fired.rows, config.partner_rows, config.partners)
    shares_C = sharing(W_dec, chosen_C, together_CF, count_F, config.shared_cosine, config.shares)
    documents = store.documents()
    looked_at = [documents[number] for number in fired.documents_N.tolist()]
    selectivity_C = selectivity(fired.maximum_CN, fired.mass_CN, fired.rows_N, looked_at)
    titles = [(entry.get("labels") or {}).get("title") for entry in documents]
    sources = [source.name for source in store.manifest.sources]
    latents = []
    for place, index in enumerate(chosen_C.tolist()):
        contexts = [_shown(context, titles, sources, text) for context in contexts_C[place]]
        contexts, random_contexts = contexts[: n_top_C[place]], contexts[n_top_C[place] :]
        latents.append(
            {
                "index": index,
                "density": rounded(found.density_F[index]),
                "max_activation": rounded(found.max_activation_F[index]),
                "nearest": {"index": int(nearest_F[index]), "cosine": rounded(cosine_F[index])},
                "selectivity": selectivity_C[place],
                "partners": partners_C[place],
                "shares_with": shares_C[place],
                "top_tokens": _token_shares([context["tokens"][context["peak"]] for context in contexts]),
                **_attribution(None if logits_CV is None else logits_CV[place], config.promoted, text),
                "contexts": contexts,
                "random_contexts": random_contexts,
            }
        )
    return {
        "rows_scanned": found.rows,
        "density": [rounded(value) for value in found.density_F],
        "max_activation": [rounded(value) for value in found.max_activation_F],
        "nearest_cosine": [rounded(value) for value in cosine_F],
        "token": _commonest(store, found.top_rows_FN, text),
        "latents": latents,
    }


def write_latents(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a latents.json, without the spaces and line breaks that would double its size."""
    write_text(path, json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")


def choose_latents(
    density_F: Float[np.ndarray, "F"], max_activation_F: Float[np.ndarray, "F"], latents: int, most_active: int
) -> Int[np.ndarray, "C"]:
    """Indices of the latents to show, ascending, from those that fire at all.

    The `most_active` of the highest activation, and others at evenly spaced ranks of density, `latents` in all.
    """
    live = np.flatnonzero(density_F > 0)
    active = live[np.argsort(-max_activation_F[live], kind="stable")][: min(most_active, latents)]
    rest = np.setdiff1d(live, active)
    rest = rest[np.argsort(density_F[rest], kind="stable")]
    wanted = min(latents - len(active), len(rest))
    middles = ((np.arange(wanted) + 0.5) * len(rest) / max(wanted, 1)).astype(np.int64)
    return np.sort(np.concatenate([active, rest[middles]]))


def _logits(vectors_CD: Float[torch.Tensor, "C D"], model: Any) -> Float[torch.Tensor, "C V"]:
    """Each vector times the final norm's gain, where the model has one, through the unembedding, float32."""
    vectors = vectors_CD.float().cpu()
    final_norm = next((norm for name, norm in model.hf.base_model.named_children() if name in FINAL_NORMS), None)
    if final_norm is not None:
        vectors = vectors * final_norm.weight.detach().float().cpu()
    return vectors @ model.hf.get_output_embeddings().weight.detach().float().cpu().T


def _attribution(logits_V: torch.Tensor | None, n: int, text: TokenText) -> dict[str, list[Any]]:
    """The `n` tokens of the highest and of the lowest logits, with those logits; all empty without logits."""
    found: dict[str, list[Any]] = {}
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        scores_V = torch.empty(0) if logits_V is None else sign * logits_V
        found[name] = _best(scores_V, n, text)
        highest = scores_V.topk(min(n, len(scores_V))).values
        found[f"{name}_logits"] = [rounded(sign * float(value), SHADE_DIGITS) for value in highest]
    return found


def _best(scores_V: torch.Tensor, n: int, text: TokenText) -> list[str]:
    return [text(int(index)) for index in torch.sort(scores_V, descending=True, stable=True).indices[:n]]


def _commonest(store: Store, top_rows_FN: np.ndarray, text: TokenText) -> list[str | None]:
    """The commonest token of each latent's top rows, by which the page names a latent without a dashboard.

    Of several equally common ones it is that of the better row; None where the latent has no top row.
    """
    rows = rows_at(store, top_rows_FN[top_rows_FN >= 0])
    found: list[str | None] = []
    for top_N in top_rows_FN:
        shares = _token_shares([text(int(rows[number]["token"])) for number in top_N.tolist() if number >= 0])
        found.append(shares[0][0] if shares else None)
    return found


def _token_shares(tokens: list[str]) -> list[list[Any]]:
    """At most five [token, share of the list], most frequent first; of equally frequent ones, the first to appear."""
    counts: dict[str, int] = {}
    for token in tokens:
        counts[token] = counts.get(token, 0) + 1
    return [[token, rounded(n / len(tokens))] for token, n in sorted(counts.items(), key=lambda item: -item[1])[:5]]


def _shown(context: Context, titles: list[str | None], sources: list[str], text: TokenText) -> dict[str, Any]:
    """A context as latents.json has it; `titles` by document, `sources` by number."""
    return {
        "source": sources[context.source],
        "document": context.document,
        "title": titles[context.document],
        "peak": context.peak,
        "tokens": [text(int(token)) for token in context.token_ids],
        "values": [rounded(value, SHADE_DIGITS) for value in context.values],
    }
