"""The dashboards of single latents: which are shown, what each holds, every option."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from hafs_evaluate.core.fired import FiredRows
from hafs_evaluate.latents import attribution
from hafs_evaluate.latents.attribution import attributions, random_effect
from hafs_evaluate.latents.dashboards import LatentsConfig, show_latents, write_latents
from hafs_evaluate.latents.firing import scan
from hafs_evaluate.latents.token_text import TokenText
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json
from tests.support.shuffled_store import D, F, everything, shuffled_store, tiny_tokenizer
from tests.support.torch_saes import random_sae


@pytest.fixture
def store(tmp_path):
    return shuffled_store(tmp_path / "store")


@pytest.fixture
def sae():
    return random_sae(D, F, "jumprelu", seed=3)


def tiny_model(d_model: int) -> SimpleNamespace:
    """A random GPT-NeoX as `hafs_extract.models.LanguageModel` holds it, the gain of its final norm not 1."""
    torch.manual_seed(0)
    sizes = {"hidden_size": d_model, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    hf = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=18, max_position_embeddings=8, rotary_pct=1.0, **sizes))
    hf.base_model.final_layer_norm.weight.data = torch.linspace(-1, 2, d_model)
    return SimpleNamespace(hf=hf, tokenizer=tiny_tokenizer())


def test_the_file_holds_what_the_parts_say(store, sae, tmp_path):
    tokenizer = tiny_tokenizer()
    path = tmp_path / "eval" / "run" / "latents.json"
    values = {"run": "run", **show_latents(sae, store, tokenizer, LatentsConfig(latents=6, examples=3))}
    write_latents(path, values)
    assert read_json(path, "latents") == values
    assert (values["run"], values["rows_scanned"]) == ("run", len(store))
    assert len(values["density"]) == len(values["max_activation"]) == len(values["nearest_cosine"]) == F
    found = scan(FiredRows(sae, store, 10**9), 3)
    values_NF, rows = everything(store, sae)
    for latent in values["latents"]:
        index = latent["index"]
        assert latent["density"] == pytest.approx(found.density_F[index], rel=1e-4)
        assert latent["nearest"]["index"] != index
        assert latent["promoted"] == latent["suppressed"] == []
        for context, number in zip(latent["contexts"], found.top_rows_FN[index], strict=False):
            row = rows[number]
            assert context["title"] == f"Title {row['document']}"
            assert context["source"] == ["a", "b"][row["source"]]
            assert context["tokens"][context["peak"]] == tokenizer.convert_ids_to_tokens(int(row["token"]))
            assert len(context["tokens"]) == len(context["values"])
            written = pytest.approx(values_NF[number, index], rel=5e-3)  # to three digits
            assert context["values"][context["peak"]] == written
        assert sum(share for _, share in latent["top_tokens"]) <= 1 + 1e-3
    before = path.read_bytes()
    write_latents(path, {"run": "run", **show_latents(sae, store, tokenizer, LatentsConfig(latents=6, examples=3))})
    assert path.read_bytes() == before


def test_the_file_has_random_contexts_partners_and_a_name_for_every_latent(store, tmp_path):
    sae, config = random_sae(D, F, "jumprelu", seed=3), LatentsConfig(examples=3, random_examples=2, partner_rows=2)
    config = dataclasses.replace(config, other_random_examples=2)
    values = show_latents(sae, store, tiny_tokenizer(), config)
    assert len(values["token"]) == F
    for latent in values["latents"]:
        assert values["token"][latent["index"]] == latent["top_tokens"][0][0]
        assert 1 <= len(latent["random_contexts"]) <= 2
        for context in latent["random_contexts"]:
            assert 0 < context["values"][context["peak"]] <= latent["max_activation"] * 1.01
    assert any(latent["partners"] for latent in values["latents"])
    assert any(latent["shares_with"] for latent in values["latents"])


def test_promoted_tokens_are_the_highest_logits_through_the_norms_gain_and_the_unembedding(monkeypatch):
    model, sae = tiny_model(12), random_sae(12, F, seed=1)
    monkeypatch.setattr(attribution, "CHUNK_FLOATS", 4 * 18)  # four vectors at a time
    expected = (sae.W_dec * torch.linspace(-1, 2, 12)) @ model.hf.get_output_embeddings().weight.detach().T
    found = attributions(sae.W_dec, model, 3)
    text = TokenText(model.tokenizer)
    assert len(found) == F
    for own, logits in zip(found, expected, strict=True):
        order = logits.argsort(descending=True)
        assert own["promoted"] == [text(index) for index in order[:3].tolist()]
        assert own["suppressed"] == [text(index) for index in order.flip(0)[:3].tolist()]
        assert own["promoted_logits"] == pytest.approx(logits[order[:3]].tolist(), rel=6e-3)
        up, down = logits[order[:3]].mean() - logits.mean(), logits.mean() - logits[order[-3:]].mean()
        assert own["logit_effect"] == pytest.approx(float(max(up, down) / logits.std()), rel=6e-3)


def test_a_latent_that_writes_a_token_stands_out_from_random_directions():
    model = tiny_model(12)
    model.hf.base_model.final_layer_norm.weight.data = torch.ones(12)
    W_VD = model.hf.get_output_embeddings().weight.detach()
    W_VD -= W_VD.mean(1, keepdim=True)  # in place, in the parameter itself: no other token reads this direction
    W_VD[5] = W_VD[4].norm() * torch.ones(12) / 12**0.5
    limit = random_effect(model, 12, 1)
    aligned, other = attributions(torch.stack([torch.ones(12), torch.eye(12)[0] - torch.eye(12)[1]]), model, 1)
    assert aligned["promoted"] == [TokenText(model.tokenizer)(5)]
    assert aligned["logit_effect"] > limit > other["logit_effect"]
    assert random_effect(model.tokenizer, 12, 1) is None


def test_the_others_have_a_short_record_and_links_come_first(store, sae):
    tokenizer = tiny_tokenizer()
    config = LatentsConfig(latents=3, examples=4, other_examples=2, partner_rows=2)
    found = show_latents(sae, store, tokenizer, config)
    sample = [latent["index"] for latent in found["latents"]]
    others = {latent["index"]: latent for latent in found["others"]}
    assert sorted([*sample, *others]) == list(range(F))
    assert all(len(latent["contexts"]) <= 2 and "shares_with" not in latent for latent in others.values())
    assert all(sum(latent["histogram"]) > 0 for latent in others.values() if latent["density"] > 0)
    few = show_latents(sae, store, tokenizer, dataclasses.replace(config, others=2))["others"]
    linked = {link["index"] for latent in found["latents"] for link in [*latent["neighbours"], *latent["partners"]]}
    assert len(few) == 2 and {latent["index"] for latent in few} <= linked


def test_a_given_sample_is_shown_and_neighbours_are_the_nearest(store, sae):
    found = show_latents(sae, store, tiny_tokenizer(), LatentsConfig(), np.array([1, 4]))
    assert [latent["index"] for latent in found["latents"]] == [1, 4]
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    for latent in [*found["latents"], *found["others"]]:
        cosine = unit @ unit[latent["index"]]
        cosine[latent["index"]] = -2
        expected = cosine.topk(6)
        assert [near["index"] for near in latent["neighbours"]] == expected.indices.tolist()
        assert [near["cosine"] for near in latent["neighbours"]] == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert latent["nearest"] == latent["neighbours"][0]


def test_a_model_fills_in_promoted_tokens(store, sae):
    model, config = tiny_model(D + 1), LatentsConfig(promoted=4)
    model.hf.base_model.final_layer_norm = torch.nn.LayerNorm(D)  # a model of the store's width, odd as that is
    model.hf.set_output_embeddings(torch.nn.Linear(D, 18, bias=False))
    values = show_latents(sae, store, model, config)
    assert all(len(latent["promoted"]) == len(latent["suppressed"]) == 4 for latent in values["latents"])
    assert all(set(latent["promoted"]).isdisjoint(latent["suppressed"]) for latent in values["latents"])


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"max_rows": 30}, lambda values: values["rows_scanned"]),
        ({"latents": 3}, lambda values: len(values["latents"])),
        ({"others": 2}, lambda values: len(values["others"])),
        ({"other_examples": 1}, lambda values: [len(latent["contexts"]) for latent in values["others"]]),
        ({"other_random_examples": 1}, lambda values: [len(latent["random_contexts"]) for latent in values["others"]]),
        ({"neighbours": 2}, lambda values: [len(latent["neighbours"]) for latent in values["latents"]]),
        ({"examples": 2}, lambda values: max(len(latent["contexts"]) for latent in values["latents"])),
        ({"tokens_before": 0}, lambda values: max(c["peak"] for n in values["latents"] for c in n["contexts"])),
        ({"tokens_after": 0}, lambda values: sum(len(c["tokens"]) for n in values["latents"] for c in n["contexts"])),
        ({"random_examples": 1}, lambda values: [len(latent["random_contexts"]) for latent in values["latents"]]),
        ({"seed": 1}, lambda values: [latent["random_contexts"] for latent in values["latents"]]),
        ({"partners": 1}, lambda values: [len(latent["partners"]) for latent in values["latents"]]),
        ({"partner_rows": 9}, lambda values: [latent["partners"] for latent in values["latents"]]),
        ({"shares": 1}, lambda values: [len(latent["shares_with"]) for latent in values["latents"]]),
        ({"shared_cosine": 0.7}, lambda values: [latent["shares_with"] for latent in values["latents"]]),
    ],
)
def test_every_option_changes_the_file(store, sae, change, measure):
    config = LatentsConfig(latents=F - 4, random_examples=3, partner_rows=2)
    tokenizer = tiny_tokenizer()
    default = show_latents(sae, store, tokenizer, config)
    changed = dataclasses.replace(config, **change)
    assert measure(show_latents(sae, store, tokenizer, changed)) != measure(default)


def test_a_bad_option_and_a_wrong_width_are_user_errors(store, tmp_path):
    with pytest.raises(UserError, match="examples=0: expected at least 1"):
        LatentsConfig(examples=0)
    with pytest.raises(UserError, match="tokens_after=-1: expected at least 0"):
        LatentsConfig(tokens_after=-1)
    with pytest.raises(UserError, match="expected activations of the SAE's width 6, found d_model=5"):
        show_latents(random_sae(6, F), store, tiny_tokenizer())
