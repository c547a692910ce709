"""Random SAEs on disk and a tiny language model with a tokenizer, for the tests of the evaluate room."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from extract.format.store import ModelInfo
from extract.models import LanguageModel

HOOK = "blocks.1.hook_resid_post"
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", "eats", "big", "small"]


def random_sae(d_model: int, n_latents: int, architecture: str = "standard", seed: int = 0, hook: str = HOOK) -> Any:
    """A random SAE with a unit-norm decoder, as SAELens makes it."""
    metadata = SAEMetadata(model_name="tiny", hook_name=hook, prepend_bos=True, context_size=8)
    config, kind = {
        "standard": (StandardSAEConfig, StandardSAE),
        "jumprelu": (JumpReLUSAEConfig, JumpReLUSAE),
    }[architecture]
    sae = kind(config(d_in=d_model, d_sae=n_latents, device="cpu", apply_b_dec_to_input=True, metadata=metadata))
    random = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(value.shape, generator=random) for name, value in sae.state_dict().items()}
    state["W_dec"] = torch.nn.functional.normalize(state["W_dec"], dim=1)
    if "threshold" in state:
        state["threshold"] = state["threshold"].abs()
    sae.load_state_dict(state)
    return sae.requires_grad_(False)


def saved_sae(folder: Path, *args: Any, **kwargs: Any) -> Path:
    """A random SAE's SAELens folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random_sae(*args, **kwargs).save_model(folder)
    SAE.load_from_disk(folder)
    return folder


def identity_sae(d_model: int, bound: float = 1e3, hook: str = HOOK) -> Any:
    """An SAE that reconstructs any activation over -bound exactly up to rounding: relu(x + bound) - bound."""
    sae = random_sae(d_model, d_model, hook=hook)
    eye = torch.eye(d_model)
    bias = torch.full((d_model,), bound)
    sae.load_state_dict({"W_enc": eye, "W_dec": eye.clone(), "b_enc": torch.zeros(d_model), "b_dec": -bias})
    return sae


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, BOS prepended by default."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(d_model: int = 12, seed: int = 0) -> LanguageModel:
    """A random-weight GPT-NeoX of three layers in float32."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    )
    info = ModelInfo("org/tiny", None, "folder:tiny", "float32", 3, d_model)
    return LanguageModel(GPTNeoXForCausalLM(config), tokenizer, info, torch.device("cpu"))
