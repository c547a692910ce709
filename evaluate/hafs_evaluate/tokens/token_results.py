"""The token properties of one workspace: which count, and how the language model, its floors and an SAE do on them.

All is measured on held-out rows, whose token ids the store holds. Of the language model only the tokenizer is needed.
`TokenMeasures` gives

- eval/llm/tokens.json: which properties count, the ceiling (the model's own probes, on the same children) and two
  floors: the model's own coordinates, and principal components, in the place of latents;
- eval/<run>/tokens.json: transfer to unseen children and absorption of one SAE.

Imports torch, not jax.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array, vstack

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.core.encode import TorchSAE, encode_store, to_numpy
from hafs_evaluate.hierarchy.absorption import MIN_COSINE, MIN_SHARE, MainLatents, absorbed_rows
from hafs_evaluate.tokens.model_probe import ModelProbes
from hafs_evaluate.tokens.properties import Vocabulary, children_of, lexicon_files, token_properties, vocabulary
from hafs_evaluate.tokens.transfer import CUTS, best_latents, transfer
from hafs_evaluate.tokens.trials import LEAST_CHILDREN, LEAST_ROWS, Plan, plan
from hafs_jax.base.files import sha256_of
from hafs_jax.base.options import to_dict
from hafs_jax.store.reader import Store

FORMAT = 2  # raise it when results of the same inputs would differ
KS = (1, 2, 3, 5, 10)  # latents that a detector may use
ENOUGH = 0.9  # of the ceiling's F1
PCA_ROWS = 20_000  # training rows from which the principal components are computed
ABSORBED_ROWS = 200  # of a property in each half of the documents, on which its absorption is measured
FLOOR_KS = (1, 2, 5)  # of the coordinates in the place of latents, which are dense and cost more


@dataclass
class TokenMeasures:
    """The properties of one workspace's held-out rows, each read when it is first needed."""

    config: EvalConfig
    train: Store
    heldout: Store
    tokenizer: Callable[[], Any]
    say: Callable[[str], None]  # tells the user

    @cached_property
    def settings(self) -> list[Any]:
        """What the results depend on besides the SAE, as JSON values."""
        config, manifest = self.config, self.heldout.manifest
        constants = [list(KS), list(CUTS), LEAST_CHILDREN, LEAST_ROWS, ENOUGH, PCA_ROWS, ABSORBED_ROWS]
        files = {name: sha256_of(path) for name, path in lexicon_files(config.lexicons).items()}
        own = [config.token_rows, config.token_f1, config.token_splits, config.token_seed]
        return [
            FORMAT,
            constants,
            own,
            files,
            manifest.fingerprint,
            self.train.manifest.fingerprint,
            to_dict(manifest.model),
            to_dict(manifest.tokenizer),
        ]

    def language_model(self) -> dict[str, Any]:
        """eval/llm/tokens.json; `transfer` says what the figures are."""
        trials, found = self.trials, self._probe_f1
        if not trials.properties:
            self.say("no property of tokens counts on the held-out rows: see eval/llm/tokens.json")
        found_ceiling = self.probes.ceiling(trials.properties)
        ceiling = found_ceiling["properties"]
        names = {"balanced_accuracy": "transfer_top_1", "f1": "f1_top_1", "recall": "recall"}
        mean = {
            name: float(np.mean([figures[key] for figures in ceiling.values()])) if ceiling else None
            for key, name in names.items()
        }
        floors = {
            "neurons": transfer(self.acts_ND, trials, FLOOR_KS, signed=True),
            "pca": transfer(self.acts_ND @ self._components, trials, FLOOR_KS, signed=True),
        }
        return {
            "rows": len(self.acts_ND),
            "documents": len(np.unique(self._rows["document"])),
            "probe_f1": found,
            "left_out": trials.left_out,
            "ceiling": {**found_ceiling, "mean": mean},
            **{name: _with_summary(of_floor, ceiling, FLOOR_KS) for name, of_floor in floors.items()},
        }

    def sae(self, sae: TorchSAE, of_model: dict[str, Any]) -> dict[str, Any]:
        """eval/<run>/tokens.json of one SAE: `transfer` and, of each property and as means over them,

        - `needed`: the least number of latents, of KS, whose f1 is 0.9 of the ceiling's; None where 10 are too few.
          The mean is `enough_share`, the share of the properties of which 10 are enough;
        - `absorbed`: of rows with the property on which the model's own probe finds it and the best latent is silent,
          those on which up to three others with a cosine of at least 0.1 to the class direction carry at least 0.4 of
          the row's projection on it, as a share of all rows on which the probe finds it. Latent, direction and probe
          come from the other half of the documents. It depends on geometry: a penalty on cosines lowers it by itself.

        `of_model` is what `language_model` gave.
        """
        latents = token_latents(sae, self.heldout, self.config.token_rows)
        found = _with_summary(transfer(latents, self.trials, KS), of_model["ceiling"]["properties"])
        absorbed = self._absorbed(latents, to_numpy(sae.W_dec), to_numpy(sae.b_dec))
        for name, figures in found["properties"].items():
            figures["absorbed"] = absorbed[name]
        known = [value for value in absorbed.values() if value is not None]
        found["mean"]["absorbed"] = float(np.mean(known)) if known else None
        return found

    @cached_property
    def acts_ND(self) -> Float[np.ndarray, "N D"]:
        """The activations of the held-out rows that are measured on."""
        batches = self.heldout.batches(1 << 14, self.config.token_rows)
        return np.concatenate([batch.acts_BD for batch in batches])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The texts of the tokens of which there are rows."""
        token_N = self._rows["token"]
        known = vocabulary(self.tokenizer(), int(token_N.max(initial=0)) + 1)
        is_used_V = np.zeros(len(known), bool)
        is_used_V[token_N] = True
        texts = tuple(text if used else None for text, used in zip(known.texts, is_used_V, strict=True))
        return Vocabulary(texts, known.is_fragment_V & is_used_V)

    @cached_property
    def trials(self) -> Plan:
        """The trials of the properties that count."""
        every, found = self._every_trial, self._probe_f1
        weak = {name: f"the model's probe has an F1 of {f1:.2f}" for name, f1 in found.items() if not self._counts(f1)}
        kept = tuple(each for each in every.properties if each.name not in weak)
        return replace(every, properties=kept, left_out={**every.left_out, **weak})

    @cached_property
    def probes(self) -> ModelProbes:
        """The model's own probes."""
        return ModelProbes(self.acts_ND, self._every_trial)

    def _counts(self, f1: float) -> bool:
        return f1 >= self.config.token_f1

    @cached_property
    def _rows(self) -> np.ndarray:
        """The rows' tokens and documents."""
        batches = self.heldout.batches(1 << 20, self.config.token_rows, raw=True)
        return np.concatenate([np.array(batch.rows_B) for batch in batches])

    @cached_property
    def _every_trial(self) -> Plan:
        words = self.vocabulary
        properties = token_properties(words, self.config.lexicons)
        config, rows = self.config, self._rows
        children_V = children_of(words)
        return plan(rows["token"], rows["document"], properties, children_V, config.token_splits, config.token_seed)

    @cached_property
    def _answers(self) -> dict[str, tuple[np.ndarray, float]]:
        return self.probes.answers()

    @cached_property
    def _probe_f1(self) -> dict[str, float]:
        return {name: f1 for name, (_, f1) in self._answers.items()}

    @cached_property
    def _components(self) -> Float[np.ndarray, "D D"]:
        """The principal components of training rows, those of the largest variance first."""
        acts_ND = np.concatenate([batch.acts_BD for batch in self.train.batches(1 << 14, PCA_ROWS)])
        covariance_DD = np.atleast_2d(np.cov(acts_ND, rowvar=False, dtype=np.float64))
        return np.linalg.eigh(covariance_DD)[1][:, ::-1].astype(np.float32)

    def _absorbed(
        self, latents: csr_array, W_dec_FD: Float[np.ndarray, "F D"], b_dec_D: Float[np.ndarray, "D"]
    ) -> dict[str, float | None]:
        best, properties = best_latents(latents, self.trials), self.trials.properties
        if not properties:
            return {}
        directions = [self.probes.class_directions(properties, half).astype(np.float32) for half in (0, 1)]
        half_N = self.trials.cell_N >= len(self.trials.rows_U) // 2
        found: dict[str, float | None] = {}
        for number, (each, of_halves) in enumerate(zip(properties, best, strict=True)):
            said_N = self._answers[each.name][0] & each.is_positive_U[self.trials.cell_N]
            absorbed: list[np.ndarray] = []
            for half, main in enumerate(of_halves):
                direction_D = directions[half][number]
                rows = np.flatnonzero(said_N & (half_N != half))[:ABSORBED_ROWS]
                projection_n = (self.acts_ND[rows] - b_dec_D) @ direction_D
                rows, projection_n = rows[projection_n > 0], projection_n[projection_n > 0]
                mains = MainLatents(np.array([main]), np.zeros(1))
                inputs = latents[rows].toarray()
                absorbed.append(absorbed_rows(inputs, projection_n, W_dec_FD, direction_D, mains)[1])
            every = np.concatenate(absorbed)
            found[each.name] = float(every.mean()) if len(every) else None
        return found


def token_latents(sae: TorchSAE, store: Store, max_rows: int | None = None) -> csr_array:
    """The latents of the store's first `max_rows` rows [all], [N, F] float32, without what is not above 0."""
    parts = []
    for batch in encode_store(sae, store, max_rows):
        latents_BF = to_numpy(batch.latents_BF)
        parts.append(csr_array(np.where(latents_BF > 0, latents_BF, 0)))
    return csr_array(vstack(parts))


def _with_summary(found: dict[str, Any], ceiling: dict[str, Any], ks: Sequence[int] = KS) -> dict[str, Any]:
    """`transfer`'s result with `needed` of each property, `enough_share`, and the recall of top_1 as `recall`."""
    for name, figures in found["properties"].items():
        wanted = ENOUGH * ceiling[name]["f1"]
        figures["needed"] = next((k for k in ks if figures[f"top_{k}"]["f1"] >= wanted), None)
    needed = [figures["needed"] for figures in found["properties"].values()]
    share = sum(k is not None for k in needed) / len(needed) if needed and ks == KS else None
    mean = {**found["mean"], "recall": found["mean"]["recall_top_1"], "enough_share": share}
    return {**found, "mean": mean, "settings": {"ks": list(ks), "min_cosine": MIN_COSINE, "min_share": MIN_SHARE}}
