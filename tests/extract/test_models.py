"""The language model: its activations are transformers' own, and the bridge's; errors name what was asked for."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hafs_extract.loading.files import fingerprint
from hafs_extract.models import LanguageModel, load_for_manifest, load_model, pick_device
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import ModelInfo
from tests.support.tiny_models import LAYERS, D, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "neox")


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load_model(str(folder), "float32", device="cpu")


@pytest.fixture(scope="module")
def tokens_BL() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(1, 300, (3, 7)))


def test_chats_are_tokenised_as_the_chat_template_says(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, messages = model.chat, [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(
        UserError, match=r"the chat template of .* does not take these messages: .*chat_template is not"
    ):
        chat.render(messages)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }}<|endoftext|>{% endfor %}"
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", template, raising=False)
    text = chat.render(messages)
    assert text == "<|endoftext|>a b<|endoftext|>c<|endoftext|>"
    (ids,) = chat.tokenize([text])
    assert ids.tolist() == [*model.tokenize(["a b"])[0], 0, *model.tokenize(["c"])[0], 0]  # contexts begin with BOS
    with pytest.raises(UserError, match="does not take these messages: no tools"):
        chat.render([{"role": "tool", "content": ""}])


def test_info_says_what_was_loaded(model: LanguageModel, folder: Path) -> None:
    info = (str(folder), None, f"folder:{folder}", "float32", LAYERS, D, fingerprint(folder))
    assert dataclasses.astuple(model.info) == info
    assert model.prepend_bos and model.bos_token_id == 0


def test_token_ids_have_no_bos_and_special_tokens_names_are_text(model: LanguageModel) -> None:
    plain, named, empty = model.tokenize(["the cell", "the<|endoftext|>cell", ""])
    assert plain.dtype == np.int32 and len(plain) == 2 and len(empty) == 0
    assert len(named) > 4 and model.bos_token_id not in named
    assert model.tokenizer.decode(named) == "the<|endoftext|>cell"


def test_activations_are_the_models_hidden_states(model: LanguageModel, tokens_BL: torch.Tensor) -> None:
    with torch.no_grad():
        states = model.hf(tokens_BL, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        pre = model.activations(tokens_BL, f"blocks.{layer}.hook_resid_pre")
        torch.testing.assert_close(pre, states[layer], rtol=0, atol=0)
        if layer + 1 < LAYERS:  # transformers' last hidden state is past the final norm
            post = model.activations(tokens_BL, f"blocks.{layer}.hook_resid_post")
            torch.testing.assert_close(post, states[layer + 1], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_other_architectures_blocks_are_found(architecture: str, model: LanguageModel, tokens_BL: torch.Tensor) -> None:
    """Llama is the offline model's; GPT-2's blocks lie under another name, and OPT's one module deeper."""
    if architecture == "llama":
        sizes = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 3, "num_attention_heads": 2}
        hf = LlamaForCausalLM(LlamaConfig(vocab_size=401, **sizes))
    elif architecture == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=401, n_embd=12, n_layer=3, n_head=2, n_positions=32))
    else:
        sizes = {"hidden_size": 12, "ffn_dim": 14, "num_hidden_layers": 3, "num_attention_heads": 2}
        hf = OPTForCausalLM(OPTConfig(vocab_size=401, word_embed_proj_dim=12, max_position_embeddings=32, **sizes))
    info = ModelInfo(architecture, None, "hub", "float32", 3, 12)
    other = LanguageModel(hf, model.tokenizer, info, torch.device("cpu"))
    with torch.no_grad():
        states = other.hf(tokens_BL, output_hidden_states=True).hidden_states
    for layer in range(3):
        pre = other.activations(tokens_BL, f"blocks.{layer}.hook_resid_pre")
        torch.testing.assert_close(pre, states[layer], rtol=0, atol=0)
    post = other.activations(tokens_BL, "blocks.1.hook_resid_post")
    torch.testing.assert_close(post, states[2], rtol=0, atol=0)
    assert "bridge" not in vars(other)


def test_only_the_layers_up_to_the_hook_point_run(model: LanguageModel, tokens_BL: torch.Tensor) -> None:
    ran: list[int] = []
    layers = model.hf.base_model.layers
    hooks = [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers]
    handles = [
        layer.register_forward_hook(lambda *_, n=number: ran.append(n), always_call=True)
        for number, layer in enumerate(layers)
    ]
    model.activations(tokens_BL, "blocks.2.hook_resid_post")
    assert ran == [0, 1, 2]
    ran.clear()
    model.activations(tokens_BL, "blocks.2.hook_resid_pre")
    assert ran[:2] == [0, 1] and 3 not in ran
    for handle in handles:
        handle.remove()
    assert [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers] == hooks


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_give_the_same_for_every_shape(
    folder: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = load_model(str(folder), "float32", device="cpu")
    points = ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_post")
    compiled.compile_blocks(points, (D, D // 2))  # as many contexts as dimensions, positions as dimensions of a head
    graphs = [block.forward for block in compiled.hf.base_model.layers]
    assert [hasattr(graph, "_torchdynamo_orig_callable") for graph in graphs] == [True] * 3 + [False] * (LAYERS - 3)
    set_stance = torch.compiler.set_stance
    for shape in ((D, D // 2), (7, 7), (3, 5), (16, 9), (1, 6), (4, 1)):
        tokens_BL = torch.from_numpy(np.random.default_rng(1).integers(1, 300, shape))
        if min(shape) > 1:  # the compiled code serves: under this stance anything else is an error
            with monkeypatch.context() as strict:
                strict.setattr(torch.compiler, "set_stance", lambda _: set_stance("fail_on_recompile"))
                compiled.activations_at(tokens_BL, points)
        found, wanted = compiled.activations_at(tokens_BL, points), model.activations_at(tokens_BL, points)
        for point in points:
            torch.testing.assert_close(found[point], wanted[point], rtol=1e-4, atol=1e-5, msg=f"{point} {shape}")


@pytest.mark.parametrize(
    ("error", "at_once"),
    [(RuntimeError("no C++ compiler"), False), (OSError("no space"), False), (RuntimeError("Python 3.15"), True)],
)
def test_a_model_that_does_not_compile_stays_as_it_was(
    folder: Path, tokens_BL: torch.Tensor, error: Exception, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    def compile_(forward: Callable, dynamic: bool) -> Callable:
        return fail() if at_once else fail

    other = load_model(str(folder), "float32", device="cpu")
    before = other.activations(tokens_BL, "blocks.2.hook_resid_post")
    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(UserError, match=rf"torch.compile fails on .*: {re.escape(error.args[0])}"):
        other.compile_blocks(("blocks.2.hook_resid_post",), (2, 8))
    torch.testing.assert_close(other.activations(tokens_BL, "blocks.2.hook_resid_post"), before, rtol=0, atol=0)


def test_padding_on_the_right_changes_nothing_before_it(model: LanguageModel, tokens_BL: torch.Tensor) -> None:
    padded = torch.nn.functional.pad(tokens_BL, (0, 4))
    got = model.activations(padded, "blocks.3.hook_resid_post")[:, :7]
    torch.testing.assert_close(got, model.activations(tokens_BL, "blocks.3.hook_resid_post"), rtol=1e-5, atol=1e-6)


def test_a_splice_of_the_identity_changes_nothing_and_of_zeros_much(
    model: LanguageModel, tokens_BL: torch.Tensor
) -> None:
    clean = model.logits(tokens_BL)
    seen: list[torch.Tensor] = []

    def keep(acts: torch.Tensor) -> torch.Tensor:
        seen.append(acts)
        return acts

    for hook_point in ("blocks.2.hook_resid_post", "blocks.2.hook_resid_pre"):
        torch.testing.assert_close(model.logits(tokens_BL, keep, hook_point), clean, rtol=0, atol=0)
        torch.testing.assert_close(seen[-1], model.activations(tokens_BL, hook_point), rtol=0, atol=0)
        ablated = model.logits(tokens_BL, torch.zeros_like, hook_point)
        assert (ablated - clean).abs().max() > 0.1
    torch.testing.assert_close(model.logits(tokens_BL), clean, rtol=0, atol=0)


def test_an_unknown_layer_is_named(model: LanguageModel) -> None:
    with pytest.raises(UserError, match=r"'blocks.5.hook_resid_post': .* 5 layers .* last is blocks.4.hook_resid_post"):
        model.check_hook_point("blocks.5.hook_resid_post")
    assert model.check_hook_point("blocks.4.hook_resid_post") == D


@pytest.mark.slow
def test_the_bridge_gives_the_same_and_serves_every_other_hook_point(folder: Path, tokens_BL: torch.Tensor) -> None:
    model = load_model(str(folder), "float32", device="cpu")
    hook_points = [f"blocks.{n}.hook_resid_{side}" for n in range(LAYERS) for side in ("pre", "post")]
    before = {hook_point: model.activations(tokens_BL, hook_point) for hook_point in hook_points}
    clean = model.logits(tokens_BL)
    assert not any(parameter.requires_grad for parameter in model.bridge.parameters())
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(tokens_BL)
    for hook_point in hook_points:
        # the bridge computes attention in another order
        torch.testing.assert_close(before[hook_point], cache[hook_point], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(before[hook_point], model.activations(tokens_BL, hook_point), rtol=1e-5, atol=1e-6)

    for hook_point in ("blocks.2.hook_mlp_out", "blocks.2.attn.hook_z", "hook_embed"):
        acts = model.activations(tokens_BL, hook_point)
        torch.testing.assert_close(acts, cache[hook_point].flatten(2), rtol=1e-5, atol=1e-6)
        assert model.check_hook_point(hook_point) == acts.shape[-1]
        kept = model.logits(tokens_BL, lambda a: a, hook_point)
        torch.testing.assert_close(kept, clean, rtol=1e-4, atol=1e-5)
    ablated = model.logits(tokens_BL, torch.zeros_like, "blocks.2.hook_mlp_out")
    assert (ablated - clean).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"'blocks.2.hook_mlpout'.*did you mean 'blocks.2.hook_mlp_out'\?"):
        model.check_hook_point("blocks.2.hook_mlpout")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_model_computes_in_its_dtype(folder: Path, tokens_BL: torch.Tensor, dtype: str) -> None:
    acts = load_model(str(folder), dtype, device="cpu").activations(tokens_BL, "blocks.3.hook_resid_post")
    assert acts.dtype == getattr(torch, dtype)


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model '.*empty' does not load from folder:"):
        load_model(str(tmp_path / "empty"), "float32", device="cpu")
    from hafs_extract.hub.presence import go_offline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    go_offline()
    with pytest.raises(UserError, match=r"model 'nobody/nothing' does not load from hub"):
        load_model("nobody/nothing", "float32", device="cpu")


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for device in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match=rf"device '{device}' cannot be used .* say --device cpu"):
            pick_device(device)


@dataclasses.dataclass
class _Manifest:
    model: object
    has_tokens: bool = True


def test_the_model_of_a_manifest_is_loaded_again(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    again = load_for_manifest(_Manifest(model.info), device="cpu")  # type: ignore[arg-type]
    assert again.info == dataclasses.replace(model.info, name=str(folder))
    gone = dataclasses.replace(model.info, origin=f"folder:{tmp_path / 'gone'}")
    with pytest.raises(UserError, match=r"read from .*gone, where there is no folder now"):
        load_for_manifest(_Manifest(gone))  # type: ignore[arg-type]
    other = dataclasses.replace(model.info, d_model=21)
    with pytest.raises(UserError, match=r"made by \(revision, width\) \(None, 21\), found \(None, 20\)"):
        load_for_manifest(_Manifest(other))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"was imported from an array: it has no language model"):
        load_for_manifest(_Manifest(model.info, has_tokens=False))  # type: ignore[arg-type]
    packaged = dataclasses.replace(model.info, origin="wheel:old==1", name="local/Old")
    with pytest.raises(UserError, match="not packaged in this version"):
        load_for_manifest(_Manifest(packaged))  # type: ignore[arg-type]
