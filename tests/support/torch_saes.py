"""Random SAEs, in memory and on disk, and a tiny language model, for the tests of the evaluate room."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from hafs_extract.models import LanguageModel, load_model
from tests.support.tiny_models import WORDS, save_model

HOOK = "blocks.1.hook_resid_post"


def random_sae(d_model: int, n_latents: int, architecture: str = "standard", seed: int = 0, hook: str = HOOK) -> Any:
    """A random SAE with a unit-norm decoder, as SAELens makes it."""
    metadata = SAEMetadata(model_name="tiny", hook_name=hook, prepend_bos=True, context_size=8)
    config, kind = {
        "standard": (StandardSAEConfig, StandardSAE),
        "jumprelu": (JumpReLUSAEConfig, JumpReLUSAE),
        "topk": (partial(TopKSAEConfig, k=3), TopKSAE),
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
    return folder


def identity_sae(d_model: int, bound: float = 1e3, hook: str = HOOK) -> Any:
    """An SAE that reconstructs any activation over -bound exactly up to rounding: relu(x + bound) - bound."""
    sae = random_sae(d_model, d_model, hook=hook)
    eye = torch.eye(d_model)
    bias = torch.full((d_model,), bound)
    sae.load_state_dict({"W_enc": eye, "W_dec": eye.clone(), "b_enc": torch.zeros(d_model), "b_dec": -bias})
    return sae


def tiny_model(folder: Path) -> LanguageModel:
    """A random-weight GPT-NeoX (D = 20, 5 layers) in float32, whose predictions differ widely."""
    return load_model(str(save_model(folder, {"initializer_range": 0.3})), "float32", device="cpu")


def write_tree(folder: Path, texts: int = 20) -> Path:
    """A folder of one label tree, `words`: its texts' first word says the leaf and the second the parent."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = ["wet/river", "wet/sea", "dry/salt", "dry/iron"]
    records = [
        {"text": f"{leaf.split('/')[1]} {leaf.split('/')[0]} {WORDS[n % 19]} {WORDS[n % 7]} {n}", "label": leaf}
        for leaf in leaves
        for n in range(texts)
    ]
    (folder / "words.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tree = {"cap": 20, "sources": {"own": {"kind": "jsonl", "path": "words.jsonl"}}}
    (folder / "words.json").write_text(json.dumps(tree))
    return folder
