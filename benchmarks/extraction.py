"""Tokens per second from text to a store on disk, against the bare forward pass and against sae_lens's runner.

Model and text are the packaged ones. Tokens are those that the model sees, BOS included.

- Loading the model is left out of all rates.
- Our rate includes tokenising, the forward pass, shuffling and writing. sae_lens's includes those of them that it does.
- On our side the model's blocks are compiled, as in a large extraction. Compiling is left out of the rates too.

All sides must compute the same activations: a relative difference above `TOLERANCE` is an error.
"""

import contextlib
import dataclasses
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Row, interleaved
from hafs_extract.contexts import mixed
from hafs_extract.hub.presence import prepare_hub
from hafs_extract.models import LanguageModel, load_model, pick_dtype
from hafs_extract.packaged import model_folder
from hafs_extract.profiles import OFFLINE, Resolved
from hafs_extract.run import extract
from hafs_jax.base.files import read_json
from hafs_jax.store.manifest import TIMING
from hafs_jax.store.reader import Store

BARE_TARGET, SAE_LENS_TARGET = 0.95, 1.5
TOLERANCE = 2e-2  # bfloat16 has 8 bits: in it the plain model is 1.0e-2 from float32, the compiled one 0.8e-2
LAYER = int(OFFLINE.hook_point.split(".")[1])
LENGTH, BATCH = OFFLINE.context_length, OFFLINE.batch_tokens // OFFLINE.context_length


def measure(quick: bool) -> Iterator[Row]:
    """Rows of the suite."""
    tokens = (15 if quick else 50) * OFFLINE.batch_tokens
    prepare_hub(OFFLINE)  # no file of the hub is needed
    model = load_model(OFFLINE.model, pick_dtype("auto"))
    sizes = {"tokens": tokens, "model": OFFLINE.model, "layers": LAYER + 1, "L": LENGTH, "batch": BATCH}
    sizes["dtype"] = pick_dtype("auto")

    def row(peer: str, ours: float, theirs: float, target: float | None, note: str) -> Row:
        return Row("text to store", peer, ours, theirs, "tokens/s", ours / theirs, target, ">=", sizes, None, note)

    with tempfile.TemporaryDirectory(prefix="hafs-extraction-") as temporary:
        tokens_NL = packed(model, tokens)
        products = interleaved({"products": matrix_products(model)}, rounds=5)["products"].rate(BATCH * LENGTH)[0]
        model.compile_blocks((OFFLINE.hook_point,), (BATCH, LENGTH))
        bare = {"bare forward": truncated(compiled=False), "bare forward, compiled": truncated(compiled=True)}
        for name, run in bare.items():
            _check(run(tokens_NL[:BATCH]), model.activations(tokens_NL[:BATCH], OFFLINE.hook_point), name)
        before = {name: _bare_rate(run, tokens_NL) for name, run in bare.items()}
        ours, stages = _our_rate(Path(temporary) / "ours", tokens)
        for name, run in bare.items():  # measured before and after ours, since the machine may have other work
            theirs = 2 / (1 / before[name] + 1 / _bare_rate(run, tokens_NL))
            note = f"ours also includes tokenising, padding, shuffling and writing: {stages}"
            yield row(name, ours, theirs, BARE_TARGET, note)
        note = "only a batch's products with the weights of all layers up to the hooked one"
        yield row("the pass's matrix products", ours, products, None, note)
        theirs = _sae_lens_rate(Path(temporary) / "sae_lens", model, tokens)
        again, _ = _our_rate(Path(temporary) / "again", tokens)
        note = (
            "CacheActivationsRunner of class AutoModelForCausalLM, which stops after the hooked layer: the default, "
            "HookedTransformer, does not know this model and asks the hub. It joins documents, so pads nothing, and "
            "leaves the rows on disk in their order"
        )
        yield row("sae_lens", 2 / (1 / ours + 1 / again), theirs, SAE_LENS_TARGET, note)


def texts(model: LanguageModel, tokens: int) -> list[tuple[str, np.ndarray]]:
    """Documents of the profile's mix with their token ids, until they hold `tokens` tokens."""
    found: list[tuple[str, np.ndarray]] = []
    for _, document, ids in mixed(OFFLINE.sources, model.tokenize, []):
        found.append((document.text, ids))
        tokens -= len(ids)
        if tokens <= 0:
            break
    return found


def packed(model: LanguageModel, tokens: int) -> torch.Tensor:
    """The token ids of the mix one after another, cut into contexts [N, L] without padding."""
    ids = np.concatenate([ids for _, ids in texts(model, tokens)])
    return torch.from_numpy(ids[: tokens // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64))


def truncated(compiled: bool) -> Any:
    """A function tokens [B, L] -> activations [B, L, D]: transformers' model, cut off after the hooked layer."""
    base = load_model(OFFLINE.model, pick_dtype("auto")).hf.base_model
    base.layers = base.layers[: LAYER + 1]
    base.norm = torch.nn.Identity()
    if compiled:
        base = torch.compile(base)

    @torch.no_grad()
    def run(tokens_BL: torch.Tensor) -> torch.Tensor:
        return base(tokens_BL, use_cache=False).last_hidden_state

    return run


def matrix_products(model: LanguageModel) -> Callable[[], Any]:
    """A case of a batch's products with each weight matrix of the layers up to the hooked one, in their dtype.

    No forward pass of the same model can be faster, whatever it fuses.
    """
    layers = model.hf.base_model.layers[: LAYER + 1]
    weights = [module.weight for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    rows = {
        width: torch.randn(BATCH * LENGTH, width, dtype=weights[0].dtype) for width in {w.shape[1] for w in weights}
    }

    @torch.no_grad()
    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(rows[weight.shape[1]], weight)

    return run


def _bare_rate(run: Any, tokens_NL: torch.Tensor) -> float:
    run(tokens_NL[:BATCH])
    started = time.perf_counter()
    for batch_BL in tokens_NL.split(BATCH):
        run(batch_BL)
    return tokens_NL.numel() / (time.perf_counter() - started)


def _our_rate(out: Path, tokens: int) -> tuple[float, str]:
    """Tokens per second of an extraction of `tokens` training rows without loading and compiling, and its stages."""
    config = dataclasses.replace(OFFLINE, max_rows=tokens, compile="on")
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        (folders,) = extract(config, Resolved("offline", "offline", "a benchmark"), out).values()
    seconds = time.perf_counter() - started
    timing = read_json(folders["train"] / TIMING, "a store's timing")
    stages = timing["seconds_by_stage"]
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items())
    seen = sum(len(Store(folder).contexts().tokens) for folder in folders.values())
    rate = seen / (seconds - stages["load"] - stages["compile"])
    return rate, f"{spent}; {timing['padding_share']:.1%} of the positions are padding"


def _sae_lens_rate(out: Path, model: LanguageModel, tokens: int) -> float:
    """Tokens per second of sae_lens's runner on the same documents, with two buffers and float16 on disk."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        documents = Dataset.from_dict({"text": [text for text, _ in texts(model, 2 * tokens)]})
        buffer = -(-tokens // (2 * BATCH * LENGTH)) * BATCH * LENGTH
        config = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=str(model_folder(OFFLINE.model)),
            model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": getattr(torch, pick_dtype("auto"))},
            model_batch_size=BATCH,
            hook_name=f"model.layers.{LAYER}",
            d_in=model.info.d_model,
            training_tokens=2 * buffer,
            context_size=LENGTH,
            new_cached_activations_path=str(out),
            dtype="float16",
            device=str(model.device),
            buffer_size_gb=(buffer + 1) * 2 * model.info.d_model / 1e9,
        )
        runner = CacheActivationsRunner(config, override_dataset=documents)
        started = time.perf_counter()
        made = runner.run()
        seconds = time.perf_counter() - started
        first = made.with_format("torch")[: min(4, len(made))]
    logging.disable(logging.NOTSET)
    ours = model.activations(first["token_ids"].long(), OFFLINE.hook_point)
    _check(first[f"model.layers.{LAYER}"], ours, "sae_lens")
    return len(made) * LENGTH / seconds


def _check(theirs: torch.Tensor, ours: torch.Tensor, peer: str) -> None:
    """Raises `RuntimeError` if the activations of the same tokens differ by more than `TOLERANCE`."""
    difference = float((theirs.float() - ours.float()).norm() / ours.float().norm())
    if difference > TOLERANCE:
        raise RuntimeError(f"activations of {peer} differ from ours by {difference:.2%} for the same tokens")
