"""The dashboard of single latents, for a person: what each one fires on, with, and for. Imports torch, not jax.

`show_latents` gathers what latents.json and latents_others.json hold. Its parts come from `firing`, `contexts`,
`neighbours`, `attribution` and `selectivity`. The language model is needed for the promoted tokens alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hafs_evaluate.core.encode import TorchSAE
from hafs_evaluate.core.fired import FiredRows
from hafs_evaluate.latents.attribution import attributions, random_effect
from hafs_evaluate.latents.contexts import Context, read_contexts, rows_at
from hafs_evaluate.latents.firing import Firing, Scan, documents_of, observe, scan
from hafs_evaluate.latents.neighbours import nearest, partners, rounded, sharing
from hafs_evaluate.latents.sample import draw
from hafs_evaluate.latents.selectivity import selectivity
from hafs_evaluate.latents.settings import LatentsConfig
from hafs_evaluate.latents.token_text import TokenText
from hafs_jax.base.files import write_record
from hafs_jax.store.reader import Store

SHADE_DIGITS = 3  # significant digits of an activation in a context, which the page only shades by
OBSERVED = 1 << 26  # most counts of pairs, and most maxima over documents, that are held at once: 256 MiB each
OTHER_BEFORE, OTHER_AFTER = 12, 6  # tokens shown around the peak of a latent that is not shown in full


def show_latents(
    sae: TorchSAE,
    store: Store,
    model: Any,
    config: LatentsConfig | None = None,
    sample_C: Int[np.ndarray, "C"] | None = None,
) -> dict[str, Any]:
    """What latents.json holds of one SAE, but for the run's name, and as `others` what latents_others.json holds.

    `store` is of the SAE's hook point. `model` is a `LanguageModel`, or only its tokenizer; without the model,
    `promoted` and `suppressed` stay empty. `sample_C` are the latents to show in full [drawn from this SAE's own
    densities]. Arrays over all F latents come first, then `latents`, a dashboard of each latent of the sample:

    - `histogram`: rows by activation, in equal bins from 0 to the highest;
    - `promoted`, `suppressed`, `logit_effect`: see `attributions`; `random_logit_effect` is what chance gives;
    - `contexts`, `random_contexts`: around the rows of its highest activations, and around rows at even quantiles of
      its activation (`firing.spread_rows`), highest first;
    - `neighbours`: the nearest dictionary vectors;
    - `selectivity`, `partners`, `shares_with`: what `selectivity`, `partners` and `sharing` return.

    `others` has the same of every other latent, with fewer and shorter contexts and without `shares_with`. Of a
    dictionary with more than `config.others` further ones, those come first to which links of the sample lead. Where
    the counts of all pairs do not fit into memory, the others lack what `observe` gives.

    `stability.write_matches` adds `matches`, which needs the other runs.
    """
    config = config or LatentsConfig()
    rows = FiredRows(sae, store, config.max_rows)
    found = scan(rows, config.examples)
    if sample_C is None:
        sample_C = draw([found.density_F], config.latents)
    n_latents = len(found.density_F)
    fits = n_latents * max(n_latents, len(documents_of(store, config.max_rows))) <= OBSERVED and config.others > 0
    observed_C = np.arange(n_latents) if fits else sample_C
    fired = observe(
        rows,
        observed_C,
        found.max_activation_F[observed_C],
        max(config.random_examples, config.other_random_examples),
        config.seed,
    )
    parts = _Parts(sae, store, model, config, found, observed_C, fired)
    chosen = sample_C.tolist()
    others = parts.others(chosen)
    entries = parts.entries(chosen, others)
    return {
        "rows_scanned": found.rows,
        "random_logit_effect": random_effect(model, sae.W_dec.shape[1], config.promoted),
        "density": [rounded(value) for value in found.density_F],
        "max_activation": [rounded(value) for value in found.max_activation_F],
        "nearest_cosine": [rounded(value) for value in parts.cosine_Fn[:, 0]],
        "token": _commonest(store, found.top_rows_FN, parts.text),
        "latents": entries[: len(chosen)],
        "others": entries[len(chosen) :],
    }


class _Parts:
    """All that was found of an SAE, from which the entries of latents are made."""

    def __init__(
        self,
        sae: TorchSAE,
        store: Store,
        model: Any,
        config: LatentsConfig,
        found: Scan,
        observed_C: Int[np.ndarray, "C"],
        fired: Firing,
    ) -> None:
        self.sae, self.store, self.model, self.config, self.found, self.fired = sae, store, model, config, found, fired
        self.W_dec = sae.W_dec.detach()
        self.text = TokenText(getattr(model, "tokenizer", model))
        self.place_of = {index: place for place, index in enumerate(observed_C.tolist())}
        self.index_Fn, self.cosine_Fn = nearest(self.W_dec, config.neighbours)
        counts = fired.together_CF, fired.count_F, fired.rows, config.partner_rows, config.partners
        self.partners_C = partners(observed_C, *counts)
        self.documents = store.documents()
        looked_at = [self.documents[number] for number in fired.documents_N.tolist()]
        self.selectivity_C = selectivity(fired.maximum_CN, fired.mass_CN, fired.rows_N, looked_at)

    def others(self, chosen: list[int]) -> list[int]:
        """The latents that are shown in short, ascending."""
        linked = dict.fromkeys(self.index_Fn[chosen].ravel().tolist())
        linked |= dict.fromkeys(other["index"] for index in chosen for other in self.partners_C[self.place_of[index]])
        rest = np.random.default_rng(0).permutation(len(self.index_Fn)).tolist()
        ordered = [index for index in dict.fromkeys([*linked, *rest]) if index not in set(chosen)]
        return sorted(ordered[: self.config.others])

    def entries(self, chosen: list[int], others: list[int]) -> list[dict[str, Any]]:
        """The entries of the latents `chosen`, in full, then of `others`, in short."""
        config, shown = self.config, np.array([*chosen, *others], np.int64)
        is_full = np.arange(len(shown)) < len(chosen)
        rows = [
            [*self._top_rows(index, full), *self._random_rows(index, full)]
            for index, full in zip(shown.tolist(), is_full.tolist(), strict=True)
        ]
        width = max(map(len, rows), default=0)
        rows_CN = np.array([own + [-1] * (width - len(own)) for own in rows], np.int64).reshape(len(shown), width)
        before, after = (
            np.where(is_full, *pair)
            for pair in ((config.tokens_before, OTHER_BEFORE), (config.tokens_after, OTHER_AFTER))
        )
        contexts = read_contexts(self.sae, self.store, shown, rows_CN, before, after)
        written = attributions(self.W_dec[shown], self.model, config.promoted)
        places = [self.place_of[index] for index in chosen]
        together_CF, count_F = self.fired.together_CF[places], self.fired.count_F
        shares = sharing(self.W_dec, shown[is_full], together_CF, count_F, config.shared_cosine, config.shares)
        found = []
        for place, (index, full) in enumerate(zip(shown.tolist(), is_full.tolist(), strict=True)):
            entry = self._entry(index, contexts[place], len(self._top_rows(index, full)), written[place])
            found.append(entry | ({"shares_with": shares[place]} if full else {}))
        return found

    def _top_rows(self, index: int, full: bool) -> list[int]:
        wanted = self.config.examples if full else self.config.other_examples
        return [row for row in self.found.top_rows_FN[index].tolist() if row >= 0][:wanted]

    def _random_rows(self, index: int, full: bool) -> list[int]:
        if index not in self.place_of:
            return []
        wanted = self.config.random_examples if full else self.config.other_random_examples
        rows = [row for row in self.fired.random_rows_CR[self.place_of[index]].tolist() if row >= 0]
        take = min(wanted, len(rows))
        return [rows[int((n + 0.5) * len(rows) / take)] for n in range(take)]

    def _entry(self, index: int, contexts: Sequence[Context], n_top: int, written: dict[str, Any]) -> dict[str, Any]:
        shown = [_shown(context, self.documents, self._sources, self.text) for context in contexts]
        nearest = [
            {"index": other, "cosine": rounded(cosine)}
            for other, cosine in zip(self.index_Fn[index].tolist(), self.cosine_Fn[index].tolist(), strict=True)
        ]
        place = self.place_of.get(index)
        return {
            "index": index,
            "density": rounded(self.found.density_F[index]),
            "max_activation": rounded(self.found.max_activation_F[index]),
            "nearest": nearest[0],
            "neighbours": nearest,
            "selectivity": None if place is None else self.selectivity_C[place],
            "partners": [] if place is None else self.partners_C[place],
            "histogram": None if place is None else self.fired.histogram_CH[place].tolist(),
            "top_tokens": _token_shares([context["tokens"][context["peak"]] for context in shown[:n_top]]),
            **written,
            "contexts": shown[:n_top],
            "random_contexts": shown[n_top:],
        }

    @property
    def _sources(self) -> list[str]:
        return [source.name for source in self.store.manifest.sources]


def write_latents(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a latents.json, without the spaces and line breaks that would double its size."""
    write_record(path, dict(values), indent=None)


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


def _shown(
    context: Context, documents: Sequence[dict[str, Any]], sources: list[str], text: TokenText
) -> dict[str, Any]:
    """A context as latents.json has it; `documents` and `sources` by number."""
    return {
        "source": sources[context.source],
        "document": context.document,
        "title": (documents[context.document].get("labels") or {}).get("title"),
        "peak": context.peak,
        "tokens": text.each(context.token_ids.tolist()),
        "values": [rounded(value, SHADE_DIGITS) if value else 0.0 for value in context.values.tolist()],
    }
