"""Single latents: top rows against a naive computation, windows around them, token strings, the file."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from hafs_evaluate.latents import dashboards, firing
from hafs_evaluate.latents.contexts import read_windows
from hafs_evaluate.latents.dashboards import LatentsConfig, choose_latents, write_latents
from hafs_evaluate.latents.firing import scan
from hafs_evaluate.latents.token_text import TokenText, visible
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of, write_npy
from hafs_jax.store.manifest import (
    CONTEXT,
    ROW,
    Manifest,
    ModelInfo,
    NormFilter,
    ShardInfo,
    SourceInfo,
    TokenizerInfo,
    rows_name,
    shard_name,
    write_manifest,
)
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify
from tests.support.torch_saes import random_sae

D, F = 5, 11
LENGTH = 7  # tokens a context, BOS included


def make_store(folder: Path, documents: int = 9, contexts_each: int = 2, seed: int = 0) -> Store:
    """A shuffled store of two contexts a document, every fifth token's row dropped as a norm filter would."""
    random = np.random.default_rng(seed)
    n_contexts = documents * contexts_each
    table = np.zeros(n_contexts, CONTEXT)
    table["length"], table["start"] = LENGTH, np.arange(n_contexts) * LENGTH
    table["document"] = np.arange(n_contexts) // contexts_each
    table["source"] = table["document"] % 2
    tokens = random.integers(4, 18, n_contexts * LENGTH).astype(np.int32)
    tokens[table["start"]] = 1
    places = [(c, p) for c in range(n_contexts) for p in range(1, LENGTH) if (c * LENGTH + p) % 5]
    rows = np.zeros(len(places), ROW)
    for index, (context, position) in enumerate(random.permutation(places).tolist()):
        entry = table[context]
        token = tokens[entry["start"] + position]
        rows[index] = (token, entry["document"], context, position, entry["source"])
    acts = random.normal(size=(len(rows), D)).astype(np.float32)
    exact = acts.astype(np.float64)
    folder.mkdir(parents=True)
    write_npy(folder / "contexts.npy", table)
    write_npy(folder / "tokens.npy", tokens)
    lines = [{"document": n, "source": ["a", "b"][n % 2], "labels": {"title": f"Title {n}"}} for n in range(documents)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = []
    for shard, start in enumerate(range(0, len(rows), 40)):
        write_npy(folder / shard_name(shard), acts[start : start + 40])
        write_npy(folder / rows_name(shard), rows[start : start + 40])
        digests = sha256_of(folder / shard_name(shard)), sha256_of(folder / rows_name(shard))
        shards.append(ShardInfo(len(acts[start : start + 40]), *digests))
    write_manifest(
        folder,
        Manifest(
            format_version=1,
            split="heldout",
            profile={"requested": "test", "resolved": "test", "reason": "a test"},
            model=ModelInfo("tiny", None, "folder:tiny", "float32", 3, D),
            tokenizer=TokenizerInfo("tiny", 18, 1, True),
            hook_point="blocks.1.hook_resid_post",
            d_model=D,
            dtype="float32",
            context_length=LENGTH,
            seed=0,
            sources=tuple(
                SourceInfo(name, name, 1.0, 0, 0, int((rows["source"] == n).sum())) for n, name in enumerate("ab")
            ),
            norm_filter=NormFilter(None, 1.0, None, 0),
            rows=len(rows),
            shards=tuple(shards),
            files_sha256={name: sha256_of(folder / name) for name in ("contexts.npy", "tokens.npy", "documents.jsonl")},
            mean=tuple(exact.mean(0).tolist()),
            mean_squared_norm=float((exact**2).sum(1).mean()),
            variance=float(((exact - exact.mean(0)) ** 2).sum(1).mean()),
            config={},
        ),
    )
    assert verify(folder) == []
    return Store(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"word{n}" for n in range(14))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


def tiny_model(d_model: int) -> SimpleNamespace:
    """A random GPT-NeoX as `hafs_extract.models.LanguageModel` holds it, the gain of its final norm not 1."""
    torch.manual_seed(0)
    sizes = {"hidden_size": d_model, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    hf = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=18, max_position_embeddings=8, rotary_pct=1.0, **sizes))
    hf.base_model.final_layer_norm.weight.data = torch.linspace(-1, 2, d_model)
    return SimpleNamespace(hf=hf, tokenizer=tiny_tokenizer())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store")


@pytest.fixture
def sae():
    return random_sae(D, F, "jumprelu", seed=3)


def everything(store: Store, sae) -> tuple[np.ndarray, np.ndarray]:
    """(latents [N, F], rows [N]) of the whole store, in its order."""
    shards = range(len(store.shard_sizes))
    acts = np.concatenate([store.read(shard) for shard in shards])
    return sae.encode(torch.from_numpy(acts)).numpy(), np.concatenate([store.rows(shard) for shard in shards])


def naive_top(column: np.ndarray, documents: np.ndarray, n: int) -> list[int]:
    """Row numbers of the n best documents' best rows, one latent at a time and one row at a time."""
    found: list[int] = []
    for row in sorted(range(len(column)), key=lambda row: (-column[row], row)):
        if column[row] > 0 and documents[row] not in documents[found] and len(found) < n:
            found.append(row)
    return found


@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_scan_equals_a_naive_computation(store, sae, monkeypatch, batch_rows):
    monkeypatch.setattr(firing, "BATCH_FLOATS", batch_rows * (D + 2 * F))
    values_NF, rows = everything(store, sae)
    found = scan(sae, store, 10**9, examples=4)
    assert found.rows == len(store)
    np.testing.assert_allclose(found.density_F, (values_NF > 0).mean(0))
    np.testing.assert_allclose(found.max_activation_F, values_NF.max(0), rtol=1e-6)
    for latent in range(F):
        expected = naive_top(values_NF[:, latent], rows["document"], 4)
        assert [row for row in found.top_rows_FN[latent] if row >= 0] == expected
        np.testing.assert_allclose(found.top_values_FN[latent][: len(expected)], values_NF[expected, latent], rtol=1e-6)


def test_scan_shows_no_silent_row_and_no_document_twice(store, sae):
    values_NF, rows = everything(store, sae)
    found = scan(sae, store, 10**9, examples=20)
    for latent in range(F):
        shown = [row for row in found.top_rows_FN[latent] if row >= 0]
        assert shown == naive_top(values_NF[:, latent], rows["document"], 20)
        assert len(set(rows["document"][shown].tolist())) == len(shown) <= 9


def test_windows_encode_only_the_rows_that_they_show(store, sae, monkeypatch):
    encoded, encode = [], sae.encode
    monkeypatch.setattr(sae, "encode", lambda acts: (encoded.append(len(acts)), encode(acts))[1])
    windows = read_windows(sae, store, np.array([2]), np.array([[0]]), 1, 1)
    assert sum(encoded) <= len(windows[0][0].values) == 3


def test_of_equal_activations_the_earlier_row_wins(store, monkeypatch):
    same = SimpleNamespace(W_dec=torch.eye(F, D), device="cpu", dtype=torch.float32)
    same.encode = lambda acts: (acts[:, :1] > 0).float().expand(-1, F)  # 1 or 0: every active row ties
    monkeypatch.setattr(firing, "BATCH_FLOATS", 7 * (D + 2 * F))
    values_NF, rows = everything(store, same)
    found = scan(same, store, 10**9, examples=3)
    assert found.top_rows_FN[2].tolist() == naive_top(values_NF[:, 2], rows["document"], 3)


def test_max_rows_caps_the_scan_and_not_the_windows(store, sae):
    values_NF, rows = everything(store, sae)
    found = scan(sae, store, 43, examples=2)  # into the second shard
    assert found.rows == 43
    np.testing.assert_allclose(found.density_F, (values_NF[:43] > 0).mean(0))
    chosen = np.flatnonzero(found.density_F > 0)
    windows = read_windows(sae, store, chosen, found.top_rows_FN[chosen], 6, 6)
    past = {(int(row["context"]), int(row["position"])): n for n, row in enumerate(rows) if n >= 43}
    checked = 0
    for latent, some in zip(chosen, windows, strict=True):
        for window in some:
            for position in range(1, LENGTH):
                number = past.get((window.context, position))
                if number is not None and values_NF[number, latent] > 0:
                    assert window.values[position] == pytest.approx(values_NF[number, latent], rel=1e-5)
                    checked += 1
    assert checked > 5


@pytest.mark.parametrize(("before", "after"), [(6, 6), (2, 1), (0, 0)])
@pytest.mark.parametrize("batch_rows", [3, 1000])
def test_windows_hold_the_latents_value_on_every_token(store, sae, monkeypatch, before, after, batch_rows):
    values_NF, rows = everything(store, sae)
    at = {(int(row["context"]), int(row["position"])): number for number, row in enumerate(rows)}
    found = scan(sae, store, 10**9, examples=3)
    monkeypatch.setattr(firing, "BATCH_FLOATS", batch_rows * (D + 2 * F))
    chosen = np.array([10, 2, 7])
    windows = read_windows(sae, store, chosen, found.top_rows_FN[chosen], before, after)
    absent = 0
    for latent, some, numbers in zip(chosen, windows, found.top_rows_FN[chosen], strict=True):
        assert len(some) == (numbers >= 0).sum()
        for window, number in zip(some, numbers, strict=False):
            context, position = int(rows["context"][number]), int(rows["position"][number])
            places = range(max(0, position - before), min(LENGTH, position + after + 1))
            assert (window.context, window.document) == (context, rows["document"][number])
            assert window.token_ids.tolist() == store.contexts()[context][places.start : places.stop].tolist()
            assert places[window.peak] == position
            for place, value in zip(places, window.values, strict=True):
                row = at.get((context, place))
                absent += row is None
                assert value == pytest.approx(0 if row is None else values_NF[row, latent], rel=1e-5, abs=1e-7)
    assert absent > 0 or before == after == 0  # BOS and dropped rows were among them


def test_two_latents_share_a_context_without_mixing(store, sae):
    values_NF, _ = everything(store, sae)
    number = int(np.flatnonzero((values_NF[:, 2] > 0) & (values_NF[:, 7] > 0))[0])
    windows = read_windows(sae, store, np.array([2, 7]), np.array([[number], [number]]), 0, 0)
    assert [some[0].values[0] for some in windows] == pytest.approx(values_NF[number, [2, 7]].tolist(), rel=1e-5)


def test_chosen_latents_are_the_most_active_and_an_even_spread_of_the_rest():
    density = np.array([0.0, 0.5, 0.01, 0.3, 0.02, 0.0, 0.1, 0.2, 0.05, 0.4])
    maximum = np.array([0.0, 1.0, 9.0, 2.0, 3.0, 0.0, 1.5, 1.2, 8.0, 0.5])
    assert choose_latents(density, maximum, 5, 2).tolist() == [1, 2, 3, 6, 8]
    assert choose_latents(density, maximum, 2, 5).tolist() == [2, 8]
    assert choose_latents(density, maximum, 100, 0).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]  # never a dead one
    assert choose_latents(np.zeros(4), np.zeros(4), 3, 1).tolist() == []


def test_write_latents_writes_what_the_parts_say(store, sae, tmp_path):
    tokenizer = tiny_tokenizer()
    path = tmp_path / "eval" / "run" / "latents.json"
    values = write_latents(sae, store, tokenizer, path, run="run", config=LatentsConfig(latents=6, examples=3))
    assert json.loads(path.read_text()) == values
    assert (values["run"], values["rows_scanned"]) == ("run", len(store))
    assert len(values["density"]) == len(values["max_activation"]) == len(values["nearest_cosine"]) == F
    found = scan(sae, store, 10**9, 3)
    rows = everything(store, sae)[1]
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
            value = found.top_values_FN[index][found.top_rows_FN[index].tolist().index(number)]
            assert context["values"][context["peak"]] == pytest.approx(value, rel=5e-3)  # written to three digits
        assert sum(share for _, share in latent["top_tokens"]) <= 1 + 1e-3
    before = path.read_bytes()
    write_latents(sae, store, tokenizer, path, run="run", config=LatentsConfig(latents=6, examples=3))
    assert path.read_bytes() == before


def test_promoted_tokens_are_the_highest_logits_through_the_norms_gain_and_the_unembedding(tmp_path):
    model, sae = tiny_model(12), random_sae(12, F, seed=1)
    expected = (sae.W_dec * torch.linspace(-1, 2, 12)) @ model.hf.get_output_embeddings().weight.detach().T
    found = dashboards._logits(sae.W_dec, model)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    text = TokenText(model.tokenizer)
    order = expected[4].argsort(descending=True).tolist()
    assert dashboards._best(found[4], 3, text) == [text(index) for index in order[:3]]
    assert dashboards._best(-found[4], 2, text) == [text(index) for index in order[::-1][:2]]


def test_write_latents_with_the_model_fills_in_promoted_tokens(store, sae, tmp_path):
    model, config = tiny_model(D + 1), LatentsConfig(promoted=4)
    model.hf.base_model.final_layer_norm = torch.nn.LayerNorm(D)  # a model of the store's width, odd as that is
    model.hf.set_output_embeddings(torch.nn.Linear(D, 18, bias=False))
    values = write_latents(sae, store, model, tmp_path / "latents.json", run="r", config=config)
    assert all(len(latent["promoted"]) == len(latent["suppressed"]) == 4 for latent in values["latents"])
    assert all(set(latent["promoted"]).isdisjoint(latent["suppressed"]) for latent in values["latents"])


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"max_rows": 30}, lambda values: values["rows_scanned"]),
        ({"latents": 3}, lambda values: len(values["latents"])),
        ({"latents": 4, "most_active": 0}, lambda values: [latent["index"] for latent in values["latents"]]),
        ({"examples": 2}, lambda values: max(len(latent["contexts"]) for latent in values["latents"])),
        ({"tokens_before": 0}, lambda values: max(c["peak"] for n in values["latents"] for c in n["contexts"])),
        ({"tokens_after": 0}, lambda values: sum(len(c["tokens"]) for n in values["latents"] for c in n["contexts"])),
    ],
)
def test_every_option_changes_the_file(store, sae, tmp_path, change, measure):
    config = LatentsConfig(latents=4, most_active=2) if "most_active" in change else LatentsConfig()
    tokenizer = tiny_tokenizer()
    default = write_latents(sae, store, tokenizer, tmp_path / "a.json", run="r", config=config)
    changed = dataclasses.replace(config, **change)
    assert measure(write_latents(sae, store, tokenizer, tmp_path / "b.json", run="r", config=changed)) != measure(
        default
    )


def test_a_bad_option_and_a_wrong_width_are_user_errors(store, tmp_path):
    with pytest.raises(UserError, match="examples=0: expected at least 1"):
        LatentsConfig(examples=0)
    with pytest.raises(UserError, match="tokens_after=-1: expected 0 or more"):
        LatentsConfig(tokens_after=-1)
    with pytest.raises(UserError, match="expected activations of the SAE's width 6, found d_model=5"):
        write_latents(random_sae(6, F), store, tiny_tokenizer(), tmp_path / "x.json", run="r")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's byte alphabet as the whole vocabulary, one token a byte, and a few merged ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ċ", "Ċ")]
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, "Ġa", "ĊĊ", "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def test_token_text_is_readable_for_byte_level_bpe():
    tokenizer = byte_level_tokenizer()
    text = TokenText(tokenizer)
    ids = tokenizer(" a\n\n\t<|end|>")["input_ids"]
    assert [text(index) for index in ids] == [" a", "↵↵", "⇥", "<|end|>"]
    assert [text(index) for index in tokenizer("é")["input_ids"]] == ["\\xc3", "\\xa9"]
    assert text(len(tokenizer) + 5).startswith("⟨")


def test_token_text_keeps_a_sentencepiece_tokens_space():
    pieces = ["▁the", "ory", "▁"]
    fake = SimpleNamespace(
        get_vocab=lambda: {piece: n for n, piece in enumerate(pieces)}, convert_ids_to_tokens=pieces.__getitem__
    )
    assert [TokenText(fake)(n) for n in range(3)] == [" the", "ory", " "]


def test_characters_that_would_reorder_or_hide_text_are_spelt_out():
    assert visible("a\u202eb\u200bc\r\u2028\x00") == "a⟨U+202E⟩b⟨U+200B⟩c␍⟨U+2028⟩⟨U+0000⟩"
    assert visible("naïve Ωμέγα 漢字 <b>&") == "naïve Ωμέγα 漢字 <b>&"
