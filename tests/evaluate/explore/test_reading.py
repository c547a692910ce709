"""What the explorer shows of a text is what the extraction stored and what the training's own SAE computes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hafs_evaluate.core.loading import load_sae
from hafs_evaluate.explore.explorer import Explorer
from hafs_evaluate.explore.reading import latents_of, read_text, strongest_by_token, strongest_on_text
from hafs_evaluate.explore.requests import MAX_TOKENS, CompareRequest, LatentRequest, ReadRequest
from hafs_evaluate.workspace import FinishedRun, export
from hafs_extract.cli import main as extract
from hafs_extract.models import load_for_manifest
from hafs_jax import load, preset, train, with_fields
from hafs_jax.base.errors import UserError
from hafs_jax.store.reader import Store
from tests.evaluate.explore.conftest import RUNS
from tests.support.tiny_models import save_jsonl, sentence
from tests.support.torch_saes import random_sae
from tests.support.workspaces import D, F

TEXT = "rivers carried salt and iron"


def test_activations_and_latents_are_those_of_extraction_and_training(model_folder: Path, tmp_path: Path) -> None:
    texts = [sentence(number, 12) for number in range(40)]
    save_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    given = ["--model", str(model_folder), "--text", str(tmp_path / "text.jsonl"), "--context-length", "48"]
    given += ["--hook-point", "blocks.3.hook_resid_post", "--heldout-fraction", "0.2", "--dtype", "float32"]
    assert not extract(["extract", "--out", str(tmp_path), "--profile", "offline", "--model-dtype", "float32", *given])
    store = Store(tmp_path / "offline" / "store" / "train")
    fields = {"tokens": 320, "batch_size": 32, "sae": {"n_latents": 30, "k": 4}, "tensorboard": False}
    run = train(with_fields(preset("baseline", "batchtopk"), fields), store.folder, tmp_path / "offline" / "runs")
    model = load_for_manifest(store.manifest, device="cpu")
    sae = load_sae(export(FinishedRun(run.name, run.folder)), store.manifest)
    trained = load(run.folder)

    contexts, rows, acts = store.contexts(), [], []
    for block in store.batches(len(store)):
        rows.append(block.rows_B)
        acts.append(block.acts_BD)
    stored, stored_acts = np.concatenate(rows), np.concatenate(acts)
    compared = 0
    for text in texts:
        reading = read_text(model, store.manifest, text)
        ids = reading.ids_L.tolist()
        number = next((n for n in range(len(contexts)) if contexts[n].tolist() == ids), None)
        if number is None:  # a held-out text
            continue
        own = np.flatnonzero(stored["context"] == number)
        own = own[np.argsort(stored["position"][own])]
        assert stored["position"][own].tolist() == np.flatnonzero(~reading.is_left_out_L.numpy()).tolist()
        read = reading.acts_LD[~reading.is_left_out_L]
        np.testing.assert_allclose(read, stored_acts[own], rtol=1e-4, atol=1e-4)
        latents = latents_of(sae, reading)
        assert not latents[reading.is_left_out_L].any()
        np.testing.assert_allclose(latents[~reading.is_left_out_L], trained.encode(read), rtol=1e-4, atol=1e-4)
        assert (latents > 0).any()
        compared += 1
    assert compared > 20


def test_a_long_text_is_cut_and_says_how_many_tokens_were(explorer: Explorer) -> None:
    most = explorer.model.max_context_length
    assert most < MAX_TOKENS
    answer = explorer.read(ReadRequest("a" * 100, ()))
    assert len(answer["tokens"]) == most and answer["cut"] == 100 - (most - 1)
    assert explorer.read(ReadRequest("a" * (most - 1), ()))["cut"] == 0
    assert len(read_text(explorer.model, explorer.manifest, "a" * 100, most=7).ids_L) == 7


def test_an_empty_text_is_refused(explorer: Explorer) -> None:
    with pytest.raises(UserError, match="the text is empty: type a word"):
        explorer.read(ReadRequest("", RUNS))


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "naïve 😀", "שלום עולם", "\u202eabc\x00", "<|endoftext|>", " "]
)
def test_any_text_is_read_as_plain_text(explorer: Explorer, text: str) -> None:
    answer = explorer.read(ReadRequest(text, RUNS))
    reading = explorer._reading(text)
    assert explorer.model.tokenizer.decode(reading.ids_L[1:]) == text
    assert reading.ids_L.tolist().count(explorer.model.bos_token_id) == 1  # a special token that is typed is text
    assert answer["kinds"] == ["bos", *["text"] * (len(answer["tokens"]) - 1)]
    assert all(token.isprintable() for token in answer["tokens"])
    json.dumps(answer, allow_nan=False)


def test_what_the_training_left_out_has_no_latents(explorer: Explorer, run) -> None:
    norms = explorer._reading(TEXT).acts_LD[1:].norm(dim=1)
    limit = float(norms.median())
    manifest = dataclasses.replace(
        explorer.manifest, norm_filter=dataclasses.replace(explorer.manifest.norm_filter, max_norm=limit)
    )
    reading = read_text(explorer.model, manifest, TEXT)
    assert reading.is_left_out_L.tolist() == [True, *(norms > limit).tolist()]
    latents = latents_of(run.sae, reading)
    assert not latents[reading.is_left_out_L].any() and latents[~reading.is_left_out_L].any()


def test_the_strongest_latents_are_the_highest() -> None:
    latents = torch.tensor([[0.0, 0.0, 0.0], [1.0, 3.0, 0.0], [5.0, 2.0, 0.0]])
    assert strongest_by_token(latents, 2) == [[], [(1, 3.0), (0, 1.0)], [(0, 5.0), (1, 2.0)]]
    assert strongest_by_token(latents, 9)[1] == [(1, 3.0), (0, 1.0)]
    assert strongest_on_text(latents, 5) == [(0, 5.0, 2), (1, 3.0, 1)]


def test_a_reading_names_what_it_lists(explorer: Explorer) -> None:
    found = explorer.read(ReadRequest(TEXT, RUNS, top=3))
    for name in RUNS:
        values = latents_of(explorer._run(name).sae, explorer._reading(TEXT))
        of_run = found["runs"][name]
        assert of_run["l0"] == (values > 0).sum(1).tolist() and of_run["l0"][0] == 0
        for place, row in enumerate(of_run["by_token"]):
            assert [value for _, value in row] == pytest.approx(
                values[place].sort(descending=True).values[: len(row)].tolist(), rel=1e-4
            )
            assert {index for index, _ in row} <= of_run["labels"].keys() & of_run["max"].keys()


def test_a_latent_is_shown_with_its_figures_and_neighbours(explorer: Explorer, run) -> None:
    assert len(run.dashboards) == 5 + 4  # in full and in short
    shown = sorted(run.dashboards)[0]
    answer = explorer.latent(LatentRequest(RUNS[0], shown, TEXT, RUNS))
    values = latents_of(run.sae, explorer._reading(TEXT))[:, shown]
    assert answer["live"]["activations"] == pytest.approx(values.tolist(), rel=1e-4)
    assert answer["dashboard"]["contexts"] and answer["density"] == run.values["density"][shown]
    W_dec = run.sae.W_dec
    nearest = answer["neighbours"][0]
    cosines = torch.nn.functional.cosine_similarity(W_dec[shown][None], W_dec)
    cosines[shown] = -2
    assert (nearest["index"], nearest["cosine"]) == (
        int(cosines.argmax()),
        pytest.approx(float(cosines.max()), rel=1e-4),
    )
    assert len(answer["promoted"]) == len(answer["suppressed_logits"]) == 10
    assert list(answer["matches"]) == [RUNS[1]]
    hidden = next(index for index in range(F) if index not in run.dashboards)
    answer = explorer.latent(LatentRequest(RUNS[0], hidden))
    assert answer["dashboard"] is None and answer["live"] is None
    with pytest.raises(
        UserError, match=f"latent {F}: baseline-s0 has {F} latents; expected an index from 0 to {F - 1}"
    ):
        explorer.latent(LatentRequest(RUNS[0], F))
    with pytest.raises(UserError, match="no run 'baseline-s1' here; did you mean 'baseline-s0'"):
        explorer.latent(LatentRequest("baseline-s1", 0))


def test_compared_latents_are_matched_by_cosine(explorer: Explorer, run) -> None:
    other = random_sae(D, F, seed=1).W_dec
    for pair in explorer.compare(CompareRequest(TEXT, RUNS, top=5))["pairs"]:
        cosines = torch.nn.functional.cosine_similarity(run.sae.W_dec[pair["index"]][None], other)
        assert pair["match"]["index"] == int(cosines.argmax())
        assert pair["peak"] == max(pair["activations"][0]) == pair["activations"][0][pair["place"]]
        assert pair["match_peak"] == max(pair["activations"][1])
        if pair["correlation"] is not None:
            assert pair["correlation"] == pytest.approx(np.corrcoef(pair["activations"])[0, 1], abs=1e-3)
    same = explorer.compare(CompareRequest(TEXT, (RUNS[0], RUNS[1])))["pairs"]
    assert len(same) > 5
