"""A model is loaded whole or refused in one line: weights, tokenizer, causality, hook points; and it is known again."""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hafs_extract import packaged
from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_extract.hub.presence import hub_needs
from hafs_extract.loading.files import fingerprint, library_errors
from hafs_extract.models import LanguageModel, check_same_model, load_model
from hafs_jax.base.errors import UserError
from tests.support.fuzz import Fuzz
from tests.support.tiny_models import D, save_model

HOOK = "blocks.3.hook_resid_post"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("whole") / "neox")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "neox")


@pytest.fixture(scope="module")
def acts(whole: Path) -> torch.Tensor:
    return _acts(_load(whole))


def _load(path: Path, dtype: str = "float32") -> LanguageModel:
    return load_model(str(path), dtype, device="cpu")


def _acts(model: LanguageModel) -> torch.Tensor:
    tokens_BL = torch.from_numpy(np.random.default_rng(0).integers(1, 300, (2, 9)))
    return model.activations(tokens_BL, HOOK)


def _reweigh(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def _reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DENSE = "gpt_neox.layers.1.attention.dense.weight"
DAMAGES = {
    "prefix": (
        lambda w: {f"module.{key}": value for key, value in w.items()},
        r"63 parameters are not in the weights \(gpt_neox.embed_in.weight, .* instead",
    ),
    "layer": (
        lambda w: {key: value for key, value in w.items() if ".layers.2." not in key},
        r"12 parameters are not in the weights \(gpt_neox.layers.2.attention.dense.bias, .* and 9 more\)",
    ),
    "shape": (
        lambda w: {**w, DENSE: torch.zeros(D, D + 1)},
        r"1 have another shape there \(gpt_neox.layers.1.attention.dense.weight \[20, 21\], not \[20, 20\]\)",
    ),
    "deeper": (
        lambda w: {**w, "gpt_neox.layers.5.mlp.dense_h_to_4h.bias": torch.zeros(44)},
        r"the weights hold 1 that the model does not have \(gpt_neox.layers.5.mlp.dense_h_to_4h.bias\)",
    ),
    "deeper, saved from the body": (
        lambda w: {**_body(w), "layers.5.mlp.dense_h_to_4h.bias": torch.zeros(44)},
        r"the weights hold 1 that the model does not have \(.*layers.5.mlp.dense_h_to_4h.bias\)",
    ),
    "scales": (
        lambda w: {**w, DENSE.replace("weight", "SCB"): torch.zeros(D)},
        r"the weights hold 1 that the model does not have \(gpt_neox.layers.1.attention.dense.SCB\)",
    ),
    "integers": (lambda w: {**w, DENSE: w[DENSE].to(torch.int8)}, r"is quantised \(gpt_neox.layers.1.*weight\)"),
}


def _body(weights: Weights) -> Weights:
    """As saved from the model without its output head."""
    return {key.removeprefix("gpt_neox."): value for key, value in weights.items() if key != "embed_out.weight"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_does_not_load_whole_is_refused_by_its_parameters(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    _reweigh(folder, change)
    with pytest.raises(UserError, match=message):
        _load(folder)


@pytest.mark.parametrize("body_alone", [False, True])
def test_a_missing_output_head_hinders_logits_alone(folder: Path, acts: torch.Tensor, body_alone: bool) -> None:
    _reweigh(folder, _body if body_alone else lambda w: {k: v for k, v in w.items() if k != "embed_out.weight"})
    model = _load(folder)
    torch.testing.assert_close(_acts(model), acts, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"has no logits: its weights lack the output head \(lm_head.weight\)"):
        model.logits(torch.ones(1, 3, dtype=torch.long))


def test_other_heads_and_old_buffers_are_no_hindrance(folder: Path, acts: torch.Tensor) -> None:
    layer = "gpt_neox.layers.0.attention."
    more = {
        "score.weight": torch.ones(2, D),
        "v_head.summary.bias": torch.ones(1),
        "gpt_neox.pooler.bias": torch.ones(2),
    }
    more |= {layer + "masked_bias": torch.ones(1), layer + "rotary_emb.inv_freq": torch.ones(2)}
    more |= {layer + "bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    _reweigh(folder, lambda w: {**w, **more})
    torch.testing.assert_close(_acts(_load(folder)), acts, rtol=0, atol=0)


def _save_llama(folder: Path, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=401, max_position_embeddings=64, tie_word_embeddings=tied, **sizes))
    hf.save_pretrained(folder)
    return hf


def test_tied_weights_are_not_missing(folder: Path, whole: Path) -> None:
    _save_llama(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = _load(folder)
    assert model.missing_head == () and model.logits(torch.ones(1, 3, dtype=torch.long)).shape == (1, 3, 401)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "truncated", "short", "text"])
def test_a_damaged_bin_is_refused_and_a_pickle_not_run(folder: Path, tmp_path: Path, kind: str) -> None:
    path, ran = folder / "pytorch_model.bin", tmp_path / "ran"
    torch.save(load_file(folder / "model.safetensors"), path)
    (folder / "model.safetensors").unlink()
    assert _load(folder).info.d_model == D
    data = path.read_bytes()
    if kind == "pickle":
        torch.save({"x": _Touch(ran), "more": torch.zeros(34_000)}, path)
    elif kind == "text":
        path.write_bytes(pickle.dumps((_Touch(ran), bytes(200_000))))
    else:
        path.write_bytes(data[: len(data) // 2 if kind == "truncated" else 10])
    with pytest.raises(UserError, match=r"does not load from "):
        _load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("share", [0, 4, 1_000, 60_000])
def test_truncated_safetensors_are_refused(folder: Path, share: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:share])
    with pytest.raises(UserError, match=r"does not load from "):
        _load(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "none of these"])
def test_a_quantised_model_is_refused(folder: Path, method: str) -> None:
    _reconfigure(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UserError, match=rf"is quantised \(quantization_config of config.json: '{method}'\)"):
        _load(folder)


def test_no_code_of_a_models_folder_runs_even_where_the_user_would_say_yes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (folder / "evil.py").write_text(code + "from transformers import GPTNeoXConfig as C, GPTNeoXForCausalLM as M\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": auto_map}))
    _reconfigure(folder, auto_map=auto_map)
    for model_type in ("gpt_neox", "own"):
        _reconfigure(folder, model_type=model_type)
        with contextlib.suppress(UserError):
            _load(folder)  # by the library's own code
        assert not (tmp_path / "ran").exists()


def test_folders_that_are_no_model_say_what_they_are(folder: Path, whole: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        (folder / name).write_text(pointer)
        with pytest.raises(UserError, match=rf"{name}, found a Git-LFS pointer, .* `git lfs pull`"):
            _load(folder)
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    os.mkfifo(folder / "merges.txt")
    with pytest.raises(UserError, match=r"merges.txt, found a pipe, a device or a socket"):
        _load(folder)
    (folder / "merges.txt").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter .* merge it"):
        _load(folder)
    with pytest.raises(UserError, match=r"config.json' is a file; expected a model's folder, a .gguf file"):
        _load(folder / "config.json")


@pytest.mark.parametrize(
    ("text", "found"), [("[]", "a list"), ("null", "null"), ("5", "a number"), ('"x"', "a string")]
)
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str, found: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config.json, found JSON that is no object but {found}"):
        _load(folder)


class PanicException(BaseException):
    """As that of a library in Rust."""


@pytest.mark.parametrize(
    "error", [PanicException("panicked"), MemoryError(), RecursionError("too deep"), KeyError("x")]
)
def test_what_a_library_raises_over_a_models_files_is_one_line(error: BaseException) -> None:
    message = rf"model 'm' does not load from hub: {type(error).__name__}"
    with pytest.raises(UserError, match=message), library_errors("m", "hub"):
        raise error
    with pytest.raises(KeyboardInterrupt), library_errors("m", "hub"):
        raise KeyboardInterrupt


def test_a_model_of_the_hub_is_pinned_to_its_commit(
    whole: Path, acts: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = "a1" * 20, "b2" * 20
    cache = tmp_path / "models--org--tiny"
    for commit in (first, second):
        shutil.copytree(whole, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(first)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load_model("org/tiny", "float32", device="cpu")
    assert (model.info.revision, model.info.origin, model.info.fingerprint) == (first, "hub", None)
    torch.testing.assert_close(_acts(model), acts, rtol=0, atol=0)
    (cache / "refs" / "main").write_text(second)
    assert load_model("org/tiny", "float32", device="cpu").info.revision == second
    shutil.rmtree(cache / "snapshots" / second)
    assert load_model("org/tiny", "float32", first, device="cpu").info.revision == first
    with pytest.raises(UserError, match=r"model 'org/tiny' does not load from hub"):
        load_model("org/tiny", "float32", device="cpu")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer; expected tokenizer.json, or vocab.json"):
        _load(folder)


@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path, special: bool) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"word{n}" for n in range(401 - len(tokenizer) + 1)], special_tokens=special)
    tokenizer.save_pretrained(folder)
    if special:  # no text gives these
        assert max(map(max, _load(folder).tokenize(["word1 word2 word100"]))) < 401
        return
    with pytest.raises(UserError, match=r"token ids up to 401 \('word\d+'\), but its embedding has 401 rows"):
        _load(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_causal_model_is_found_causal(whole: Path, dtype: str) -> None:
    for length in (2, 17, 64):
        _load(whole, dtype).check_causal((HOOK, "blocks.0.hook_resid_pre"), length)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bidirectional_model_is_refused(folder: Path, dtype: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = BertConfig(vocab_size=401, max_position_embeddings=64, initializer_range=0.3, **sizes)
    BertLMHeadModel(config).save_pretrained(folder)
    model = _load(folder, dtype)
    model.check_causal(("blocks.0.hook_resid_pre",), 32)  # the embedding alone does not look ahead
    with pytest.raises(UserError, match=r"is not causal at blocks.1.hook_resid_post: the activations of 16 tokens"):
        model.check_causal(("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"), 32)


def test_hook_points_without_a_vector_for_each_token_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _load(whole)
    with pytest.raises(
        UserError, match=r"hook_pattern': expected one vector for each of 2 x 3 tokens, found .* \[2, 2"
    ):
        model.check_hook_point("blocks.2.attn.hook_pattern")
    monkeypatch.setattr(model.bridge, "run_with_hooks", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"hook point blocks.2.attn.hook_z: .* never comes by it"):
        model.check_hook_point("blocks.2.attn.hook_z")


def test_the_fingerprint_is_of_what_decides_the_activations(folder: Path, whole: Path) -> None:
    first = fingerprint(whole)
    assert first == fingerprint(folder) == _load(folder).info.fingerprint
    (folder / "README.md").write_text("new")
    (folder / "trainer_state.json").write_text("{}")
    assert fingerprint(folder) == first
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        assert fingerprint(folder) != first
        (folder / name).write_bytes(data)
    assert fingerprint(folder) == first


def test_what_was_not_recorded_is_not_compared(whole: Path) -> None:
    info = _load(whole).info
    check_same_model(info, info, "the store was made by")
    check_same_model(info, dataclasses.replace(info, fingerprint=None), "the store was made by")
    with pytest.raises(UserError, match=r"neox: config, tokenizer or weights have changed: .* put the files back"):
        check_same_model(info, dataclasses.replace(info, fingerprint="0" * 64), "the store was made by")
    hub = dataclasses.replace(info, origin="hub", fingerprint=None, revision="a" * 40)
    for revision in (None, "main", "a" * 40):
        check_same_model(hub, dataclasses.replace(hub, revision=revision), "the store was made by")
    with pytest.raises(UserError, match=rf"\('{'b' * 40}', 20\), found \('{'a' * 40}', 20\)"):
        check_same_model(hub, dataclasses.replace(hub, revision="b" * 40), "the store was made by")


def _save_gguf(path: Path, hf: LlamaForCausalLM, tokenizer: Path, without: str = "-") -> Path:
    """The Llama `hf` as a GGUF file of float32, without the tensors whose names hold `without`."""
    gguf = pytest.importorskip("gguf")
    writer, config = gguf.GGUFWriter(path, "llama"), hf.config
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    heads = config.num_attention_heads
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk."}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for key, weight in hf.state_dict().items():
        name = key
        for old, new in names.items():
            name = name.replace(old, new)
        if key == "lm_head.weight" or without in name:
            continue
        if "attn_q." in name or "attn_k." in name:  # llama.cpp has the rotary halves of each head interleaved
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(name, weight.contiguous().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def test_a_gguf_file_is_a_model(whole: Path, tmp_path: Path) -> None:
    hf = _save_llama(tmp_path / "llama")
    file = _save_gguf(tmp_path / "tiny.gguf", hf, whole)
    model = _load(file)
    assert model.info.origin == f"file:{file}" and model.info.fingerprint == fingerprint(file)
    tokens_BL = torch.from_numpy(np.random.default_rng(0).integers(1, 300, (2, 9)))
    with torch.no_grad():
        wanted = hf.eval()(tokens_BL, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(model.activations(tokens_BL, "blocks.2.hook_resid_post"), wanted, rtol=1e-5, atol=1e-6)
    assert model.check_hook_point("blocks.1.hook_mlp_out") == 32
    assert len(model.tokenize(["the cell of a membrane"])[0]) > 2
    config = ExtractConfig("own", str(file), hook_point="x", sources=(SourceConfig("a", str(file)),))
    assert hub_needs(config) == (None, [])
    with pytest.raises(UserError, match=r"has no config.json but tiny.gguf; give one such file as the model"):
        _load(tmp_path)
    file.write_bytes(file.read_bytes()[:5_000])
    with pytest.raises(UserError, match=r"does not load from file:"):
        _load(file)


@pytest.mark.parametrize("way", ["file", "packaged"])
def test_a_gguf_file_that_lacks_a_layer_is_refused(whole: Path, tmp_path: Path, way: str) -> None:
    file = _save_gguf(tmp_path / "tiny.gguf", _save_llama(tmp_path / "llama"), whole, without="blk.1.ffn_")
    with pytest.raises(UserError, match=r"4 parameters are not in the weights \(model.layers.1.mlp.down_proj.weight, "):
        _load(file) if way == "file" else packaged._convert(file, tmp_path / "made")
    assert not (tmp_path / "made").exists()


SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
WRONG = (None, [], {}, "x", "20", -1, 0, 1, 3, 2.5, 10**12, 10**400, float("inf"), True, "[" * 50)
KEYS = (*SIZES, "model_type", "architectures", "hidden_act", "rotary_pct", "rope_parameters", "dtype", "layer_norm_eps")
KEYS += ("max_position_embeddings", "use_parallel_residual", "tie_word_embeddings", "attention_bias", "torch_dtype")


def _damage(folder: Path, rng: random.Random) -> str | None:
    """Damages the model in `folder`. Returns what was done, or None where the damage may be another valid model."""
    pick = rng.choice
    kind = pick(("delete", "value", "nest", "json", "truncate", "flip", "rename", "drop", "reshape", "tokenizer"))
    config, weights = folder / "config.json", folder / "model.safetensors"
    key = pick(KEYS)
    if kind == "delete":
        values = json.loads(config.read_text())
        values.pop(key, None)
        config.write_text(json.dumps(values))
    elif kind == "value":
        key, value = pick(SIZES), pick(WRONG)
        if key == "num_attention_heads" and value in (1, True):
            return None  # a model of one head has weights of the same shapes
        _reconfigure(folder, **{key: value})
        key = f"{key}={str(value)[:9]}"
    elif kind == "nest":
        config.write_text('{"a":' * 100_000)
    elif kind == "json":
        config.write_text(pick(("", "[]", "null", "5", '"text"', "{", "{}", "\0", '{"model_type": 5}')))
    elif kind == "truncate":
        path = pick((weights, config, folder / "tokenizer.json"))
        data, n = path.read_bytes(), rng.randrange(path.stat().st_size)
        path.write_bytes(data[:n])
        key = f"{path.name} at {n}"
    elif kind == "flip":
        data = bytearray(weights.read_bytes())
        data[rng.randrange(8)] ^= 1 << rng.randrange(8)  # the header's length
        weights.write_bytes(data)
    elif kind == "tokenizer":
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        field = pick(sorted(values["model"]) + sorted(values))
        where = values if field in values else values["model"]
        where[field] = pick((None, [], {}, 5, "x"))
        path.write_text(json.dumps(values))
        key = field
    else:
        name = key = pick(sorted(load_file(weights)))

        def change(found: Weights) -> Weights:
            tensor = found.pop(name)
            if kind == "rename":
                found[pick((f"model.{name}", name.replace("gpt_neox", "gpt-neox"), f"{name}_orig"))] = tensor
            elif kind == "reshape":
                found[name] = pick((tensor[:-1], tensor[None], tensor.reshape(-1), torch.zeros(0), torch.zeros(())))
            return found

        if kind == "reshape" and load_file(weights)[name].ndim == 1:
            return None  # reshaping may change nothing
        _reweigh(folder, change)
    return f"{kind} {key}"


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_folder_gives_the_same_activations_or_one_line(
    whole: Path, acts: torch.Tensor, tmp_path: Path, fuzz: Fuzz, part: int
) -> None:
    refused = []
    for rng in fuzz("model folders", part, 4):
        shutil.rmtree(folder := tmp_path / "model", ignore_errors=True)
        what = _damage(shutil.copytree(whole, folder), rng)
        try:
            model = _load(folder)
            model.check_hook_point(HOOK)
            found = _acts(model)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1_000, what
            refused.append(what)
            continue
        if what is not None and not what.startswith("tokenizer"):  # another tokenizer gives other ids, not activations
            torch.testing.assert_close(found, acts, rtol=0, atol=0, msg=what)
    assert refused
