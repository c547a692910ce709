"""The stage of token properties on a planted store: which properties count, its ceiling, floors and absorption."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.tokens.model_probe import ModelProbes
from hafs_evaluate.tokens.token_results import TokenMeasures, token_latents
from hafs_evaluate.tokens.trials import plan
from hafs_jax.store.manifest import CONTEXT, ROW
from hafs_jax.store.reader import Store
from tests.support.stores import save_store

LETTERS = "bcdfghklmnprstvw"
WITH, WITHOUT = [f"{letter}aking" for letter in LETTERS], [f"{letter}ol{vowel}" for vowel in "ao" for letter in LETTERS]
WORDS = [*WITH, *WITHOUT]
DOCUMENTS, D = 12, 60  # D: a direction for -ing, one for each word, and more


class Words:
    """A tokenizer of WORDS."""

    all_special_ids = ()

    def get_vocab(self) -> dict[str, int]:
        return {f"Ġ{word}": index for index, word in enumerate(WORDS)}


class PlantedSAE:
    """Latents that are sums of coordinates of an activation."""

    def __init__(self, W_FD: np.ndarray) -> None:
        self.W_dec = torch.tensor(W_FD, dtype=torch.float32)
        self.W_enc, self.b_dec = self.W_dec.T, torch.zeros(D)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_enc - 0.5)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.W_dec


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A row for each word in each document: 1 along coordinate 0 where it ends in -ing, 1 along one of its own."""
    token, document = (axis.ravel() for axis in np.meshgrid(np.arange(len(WORDS)), np.arange(DOCUMENTS)))
    order = np.random.default_rng(0).permutation(len(token))
    rows = np.zeros(len(token), ROW)
    rows["token"], rows["document"], rows["context"], rows["position"] = token, document, document, 1 + token
    rows = rows[order]
    acts = np.zeros((len(rows), D), np.float32)
    acts[:, 0] = rows["token"] < len(WITH)
    acts[np.arange(len(rows)), 1 + rows["token"]] = 1
    acts += 0.01 * np.random.default_rng(1).normal(size=acts.shape)
    table = np.zeros(DOCUMENTS, CONTEXT)
    table["length"], table["start"] = len(WORDS) + 1, np.arange(DOCUMENTS) * (len(WORDS) + 1)
    table["document"] = np.arange(DOCUMENTS)
    tokens = np.zeros(DOCUMENTS * (len(WORDS) + 1), np.int32)
    folder = tmp_path_factory.mktemp("store")
    documents = [{"document": number} for number in range(DOCUMENTS)]
    return Store(save_store(folder / "s", acts, rows, table, tokens, documents, [300, len(rows) - 300]))


@pytest.fixture(scope="module")
def measures(stores: Store, tmp_path_factory: pytest.TempPathFactory) -> TokenMeasures:
    """With two lexicons of one's own: of what the activations know, and of what they don't."""
    folder = tmp_path_factory.mktemp("lexicons")
    (folder / "drawn.txt").write_text("\n".join(WORDS[::2]))
    (folder / "again.txt").write_text("\n".join(WITH))
    return TokenMeasures(EvalConfig(lexicons=(str(folder),), token_f1=0.9), stores, stores, Words, print)


def test_a_property_counts_where_the_models_own_probe_finds_it(measures: TokenMeasures) -> None:
    found = measures.language_model()
    assert found["rows"] == len(WORDS) * DOCUMENTS and found["documents"] == DOCUMENTS
    assert found["probe_f1"]["suffix_ing"] == pytest.approx(1.0, abs=0.01)
    assert found["left_out"]["again"] == "the same rows as suffix_ing"
    assert found["left_out"]["digits"] == "0 tokens in a half, expected 4"
    assert "suffix_ing" in found["ceiling"]["properties"] and "suffix_ing" in found["neurons"]["properties"]
    ceiling, drawn = found["ceiling"]["properties"]["suffix_ing"], found["ceiling"]["properties"]["drawn"]
    assert ceiling["balanced_accuracy"] > 0.99 and ceiling["f1"] > 0.99
    assert drawn["balanced_accuracy"] < 0.7  # known by heart, of each word: nothing carries over
    for floor in ("neurons", "pca"):
        assert found[floor]["properties"]["suffix_ing"]["top_1"]["balanced_accuracy"] > 0.99
    assert found["neurons"]["mean"]["recall"] == found["neurons"]["mean"]["recall_top_1"]


def test_a_property_that_the_model_does_not_know_is_left_out(stores: Store, measures: TokenMeasures) -> None:
    strict = TokenMeasures(
        EvalConfig(lexicons=measures.config.lexicons, token_f1=1.0), stores, stores, Words, lambda text: None
    )
    noisy = strict.acts_ND + 3 * np.random.default_rng(2).normal(size=strict.acts_ND.shape).astype(np.float32)
    strict.__dict__["acts_ND"] = noisy
    found = strict.language_model()
    assert found["left_out"]["suffix_ing"].startswith("the model's probe has an F1 of 0.")
    assert found["ceiling"]["properties"] == {} and found["ceiling"]["mean"]["transfer_top_1"] is None
    sae = strict.sae(PlantedSAE(np.eye(D)[:1]), found)
    assert sae["properties"] == {} and sae["mean"]["transfer_top_1"] is sae["mean"]["absorbed"] is None


def test_a_latent_for_the_property_and_latents_for_its_words_are_told_apart(measures: TokenMeasures) -> None:
    of_model = measures.language_model()
    general = measures.sae(PlantedSAE(np.eye(D)[:1]), of_model)["properties"]["suffix_ing"]
    assert general["top_1"] == {"balanced_accuracy": 1.0, "f1": 1.0, "recall": 1.0, "seen": 1.0}
    assert (general["needed"], general["absorbed"]) == (1, 0.0)
    W_FD = np.eye(D)[1 : 1 + len(WITH)]
    W_FD[:, 0] = 1

    class OfWords(PlantedSAE):
        """Each fires on its word alone, and writes what the words share beside its own."""

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x[:, 1 : 1 + len(WITH)] - 0.5)

    found = measures.sae(OfWords(2 * W_FD), of_model)
    own = found["properties"]["suffix_ing"]
    assert own["top_1"]["balanced_accuracy"] == pytest.approx(0.5) and own["top_1"]["seen"] > 0.55
    assert own["needed"] is None
    assert own["absorbed"] == pytest.approx(1 - 1 / len(WITH))  # on all words but the best latent's
    assert found["mean"]["recall"] == found["mean"]["recall_top_1"]
    assert 0 <= found["mean"]["enough_share"] < 1


def test_absorption_is_measured_in_other_documents_than_the_latent_was_chosen_in(measures: TokenMeasures) -> None:
    """A latent for each half of the documents: the one of the half that it was chosen in is silent in the other."""
    trials = measures.trials
    (each,) = (one for one in trials.properties if one.name == "suffix_ing")
    is_positive, half = each.is_positive_U[trials.cell_N], trials.cell_N >= len(trials.rows_U) // 2
    latents = csr_array(np.stack([is_positive & ~half, is_positive & half], 1).astype(np.float32))
    assert measures._absorbed(latents, np.eye(D)[[0, 0]], np.zeros(D))["suffix_ing"] == 1.0


def test_latents_of_a_store_are_what_the_sae_encodes(stores: Store) -> None:
    latents = token_latents(PlantedSAE(np.eye(D)[:7]), stores, 500)
    acts = np.concatenate([batch.acts_BD for batch in stores.batches(100, 500)])
    assert latents.shape == (500, 7)
    np.testing.assert_allclose(latents.toarray(), np.maximum(acts[:, :7] - 0.5, 0), atol=1e-6)


def test_a_lexicon_that_changes_makes_results_anew(stores: Store, tmp_path: Path) -> None:
    def settings() -> list:
        return TokenMeasures(EvalConfig(lexicons=(str(tmp_path),)), stores, stores, Words, print).settings

    (tmp_path / "gems.txt").write_text("ruby")
    first = settings()
    assert first == settings()
    (tmp_path / "gems.txt").write_text("opal")
    assert first != settings()


def test_probes_answer_for_the_documents_that_they_were_not_fitted_on() -> None:
    """Activations that name the row's document: a probe that had seen it would know its rows."""
    generator = np.random.default_rng(0)
    token, document = np.repeat(np.arange(40), 10), np.tile(np.arange(10), 40)
    acts = generator.normal(size=(400, 3)).astype(np.float32)
    acts[:, 0] += 5 * (token < 20)
    trials = plan(token, document, {"low": np.arange(40) < 20})
    said, f1 = ModelProbes(acts, trials).answers()["low"]
    half = trials.cell_N >= 40
    shifted = acts.copy()
    shifted[half, 0] *= -1  # now each half says the opposite of the other
    opposite, worse = ModelProbes(shifted, trials).answers()["low"]
    assert f1 > 0.95 and worse < 0.1 and (said == (token < 20)).mean() > 0.95 and opposite.shape == (400,)
