"""Single latents over a store: what each fires on, with, and for. Torch; no jax; writes latents.json.

Needs no language model but for the promoted tokens; the parts are in `windows`, `firing`, `neighbours`, `selectivity`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hafs_evaluate.core.weights import nearest_vectors
from hafs_evaluate.latents.contexts import Window, read_windows, rows_at
from hafs_evaluate.latents.firing import observe, scan
from hafs_evaluate.latents.neighbours import partners, rounded, sharing
from hafs_evaluate.latents.selectivity import selectivity
from hafs_evaluate.latents.token_text import TokenText
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_text
from hafs_jax.base.options import option
from hafs_jax.store.reader import Store

SHADE_DIGITS = 3  # of an activation in a context: the page shades by it
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")  # Llama and most others; GPT-2; GPT-NeoX; Phi


@dataclass(frozen=True)
class LatentsConfig:
    """What latents.json holds."""

    max_rows: int = option(131_072, "rows scanned; a store is shuffled, so that its first rows are a sample of it")
    latents: int = option(200, "latents shown, spread evenly over the live ones' density ranks [latents]")
    most_active: int = option(20, "of those, how many are the ones with the highest activation [latents]")
    examples: int = option(20, "top contexts a latent, each from another document [contexts]")
    random_examples: int = option(8, "contexts a latent drawn where it fires, each from another document [contexts]")
    seed: int = option(0, "seed of that draw")
    tokens_before: int = option(24, "tokens shown before the peak [tokens]")
    tokens_after: int = option(12, "tokens shown after the peak [tokens]")
    promoted: int = option(10, "promoted and suppressed tokens a latent, each [tokens]")
    partners: int = option(5, "latents that it fires with, a latent [latents]")
    partner_rows: int = option(10, "rows on which a partner fires with it, at least [rows]")
    shares: int = option(5, "latents whose dictionary vectors share its direction, a latent [latents]")
    shared_cosine: float = option(0.2, "cosine from which two dictionary vectors share direction")

    def __post_init__(self) -> None:
        for name, least in {"max_rows": 1, "examples": 1, "partner_rows": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: expected at least {least}")
        for name in ("latents", "most_active", "random_examples", "seed", "tokens_before", "tokens_after", "promoted"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: expected 0 or more")
        for name in ("partners", "shares"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: expected 0 or more")
        if not 0 < self.shared_cosine <= 1:
            raise UserError(f"shared_cosine={self.shared_cosine}: expected more than 0 and at most 1")


def write_latents(
    sae: Any, store: Store, model: Any, path: Path, *, run: str, config: LatentsConfig | None = None
) -> dict[str, Any]:
    """Writes latents.json for one SAE to `path` and returns what it wrote.

    `sae` is a `sae_lens.SAE` for the store's hook point. `model` is a `LanguageModel` or only its tokenizer; without
    the model, `promoted` and `suppressed` stay empty. A latent's promoted tokens are the highest entries of its
    dictionary vector through the final norm's gain and the unembedding, and its suppressed the lowest: direct logit
    attribution, with the later layers and the final norm's data-dependent scale left out.

    Of each latent shown: `contexts` are those of its highest activations and `random_contexts` of rows drawn from all
    on which it fires, one of each equal share by activation, highest first; `selectivity`, `partners` and `shares_with`
    are what the functions of those names say. `matches` is added by `across`, which needs the other runs.
    """
    config = config or LatentsConfig()
    _check_width(sae, store)
    text = TokenText(getattr(model, "tokenizer", model))
    found = scan(sae, store, config.max_rows, config.examples)
    chosen = choose_latents(found.density_F, found.max_activation_F, config.latents, config.most_active)
    fired = observe(sae, store, chosen, config.max_rows, config.random_examples, config.seed)
    shown_rows_CN = np.concatenate([found.top_rows_FN[chosen], fired.random_rows_CR], axis=1)
    windows = read_windows(sae, store, chosen, shown_rows_CN, config.tokens_before, config.tokens_after)
    top_C = (found.top_rows_FN[chosen] >= 0).sum(1).tolist()
    nearest_F, cosine_F = nearest_vectors(sae.W_dec.detach())
    through_CV = _logits(sae.W_dec.detach()[chosen], model) if hasattr(model, "hf") else None
    documents = store.documents()
    together, count_F = fired.together_CF, fired.count_F
    partners_C = partners(chosen, together, count_F, fired.rows, config.partner_rows, config.partners)
    shares_C = sharing(sae.W_dec.detach(), chosen, together, count_F, config.shared_cosine, config.shares)
    looked_at = [documents[number] for number in fired.documents_N.tolist()]
    selective_C = selectivity(fired.maximum_CN, fired.mass_CN, fired.rows_N, looked_at)
    titles = [(entry.get("labels") or {}).get("title") for entry in documents]
    sources = [source.name for source in store.manifest.sources]
    latents = []
    for slot, index in enumerate(chosen.tolist()):
        contexts = [_shown(window, titles, sources, text) for window in windows[slot]]
        contexts, random_contexts = contexts[: top_C[slot]], contexts[top_C[slot] :]
        latents.append(
            {
                "index": index,
                "density": rounded(found.density_F[index]),
                "max_activation": rounded(found.max_activation_F[index]),
                "nearest": {"index": int(nearest_F[index]), "cosine": rounded(cosine_F[index])},
                "selectivity": selective_C[slot],
                "partners": partners_C[slot],
                "shares_with": shares_C[slot],
                "top_tokens": _token_shares([context["tokens"][context["peak"]] for context in contexts]),
                **_attribution(None if through_CV is None else through_CV[slot], config.promoted, text),
                "contexts": contexts,
                "random_contexts": random_contexts,
            }
        )
    values = {
        "run": run,
        "rows_scanned": found.rows,
        "density": [rounded(value) for value in found.density_F],
        "max_activation": [rounded(value) for value in found.max_activation_F],
        "nearest_cosine": [rounded(value) for value in cosine_F],
        "token": _commonest(store, found.top_rows_FN, text),
        "latents": latents,
    }
    write_text(path, json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
    return values


def choose_latents(density_F: np.ndarray, max_activation_F: np.ndarray, latents: int, most_active: int) -> np.ndarray:
    """Indices of the latents to show, ascending: the most active, then the live rest at evenly spaced density ranks."""
    live = np.flatnonzero(density_F > 0)
    active = live[np.argsort(-max_activation_F[live], kind="stable")][: min(most_active, latents)]
    rest = np.setdiff1d(live, active)
    rest = rest[np.argsort(density_F[rest], kind="stable")]
    wanted = min(latents - len(active), len(rest))
    middles = ((np.arange(wanted) + 0.5) * len(rest) / max(wanted, 1)).astype(np.int64)
    return np.sort(np.concatenate([active, rest[middles]]))


def _check_width(sae: Any, store: Store) -> None:
    width = sae.W_dec.shape[1]
    if width != store.manifest.d_model:
        raise UserError(
            f"{store.folder}: expected activations of the SAE's width {width}, found d_model="
            f"{store.manifest.d_model}; evaluate the SAE on a store of its own hook point"
        )


def _logits(vectors_CD: torch.Tensor, model: Any) -> torch.Tensor:
    """The vectors through the final norm's gain, where the model has one, and the unembedding, [C, V] float32."""
    vectors = vectors_CD.float().cpu()
    final_norm = next((norm for name, norm in model.hf.base_model.named_children() if name in FINAL_NORMS), None)
    if final_norm is not None:
        vectors = vectors * final_norm.weight.detach().float().cpu()
    return vectors @ model.hf.get_output_embeddings().weight.detach().float().cpu().T


def _attribution(logits_V: torch.Tensor | None, n: int, text: TokenText) -> dict[str, list[Any]]:
    """The `n` tokens of the highest and the lowest logits, and those logits; empty where there are none."""
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
    """Of every latent, the commonest token of its top rows (of several the better row's): names those not shown."""
    rows = rows_at(store, top_rows_FN[top_rows_FN >= 0])
    found: list[str | None] = []
    for top_N in top_rows_FN:
        shares = _token_shares([text(int(rows[number]["token"])) for number in top_N.tolist() if number >= 0])
        found.append(shares[0][0] if shares else None)
    return found


def _token_shares(tokens: list[str]) -> list[list[Any]]:
    """[token, share of the list], most frequent first and then by first appearance, at most 5."""
    counts: dict[str, int] = {}
    for token in tokens:
        counts[token] = counts.get(token, 0) + 1
    return [[token, rounded(n / len(tokens))] for token, n in sorted(counts.items(), key=lambda item: -item[1])[:5]]


def _shown(window: Window, titles: list[str | None], sources: list[str], text: TokenText) -> dict[str, Any]:
    return {
        "source": sources[window.source],
        "document": window.document,
        "title": titles[window.document],
        "peak": window.peak,
        "tokens": [text(int(token)) for token in window.token_ids],
        "values": [rounded(value, SHADE_DIGITS) for value in window.values],
    }
