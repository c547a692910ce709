"""A transformers model and tokenizer, loaded whole: every parameter from the weights, every token id in the embedding.

transformers fills in what the weights lack with random values and goes on. Here that is refused. No code from a model's
folder runs: `trust_remote_code` is always off, and a pickle is opened with `weights_only`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hafs_extract.loading.files import check_files, integer_weights, library_errors, some, weight_bytes
from hafs_jax.base.errors import UserError

MOST_LAYERS, MOST_WIDTH = 1_000, 1_000_000
_PARAMETERS_PER_BYTE = 8  # of any weights on disk; four-bit ones hold two


@dataclass(frozen=True)
class Loaded:
    """A model whose activations are those of its weights."""

    hf: Any
    tokenizer: Any
    missing_head: tuple[str, ...]  # parameters of the output head that the weights lack: there are no logits


def load(name: str, origin: str, where: str, dtype: torch.dtype, gguf: str | None = None) -> Loaded:
    """The model and tokenizer in the folder `where`; with `gguf`, those in that file in it.

    Raises `UserError` where a parameter of the model's body is not in the weights, or has another shape there, or where
    the weights hold more of the body than the model has. `name` and `origin` are for the messages.
    """
    folder = Path(where) if gguf is None else None
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if gguf is not None:
        options["gguf_file"] = gguf
    with library_errors(name, origin), _quiet():
        if folder is not None:
            check_files(folder)
            _check_config(name, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, weights_only=True, **options
        )
        hf, info = loaded
        if gguf is not None and hasattr(hf.config, "quantization_config"):
            del hf.config.quantization_config  # the weights are dequantised already
        rows = hf.get_input_embeddings().weight.shape[0]
    missing_head = check_loaded(name, origin, hf, info)
    quantised = [key for key, parameter in hf.named_parameters() if not parameter.is_floating_point()]
    with library_errors(name, origin):
        quantised += integer_weights(folder) if folder is not None else []
    method = getattr(hf.config, "quantization_config", None)
    if gguf is None and (quantised or (method and getattr(hf, "hf_quantizer", None) is None)):
        found = some(quantised) if quantised else f"quantization_config {method}"
        raise UserError(f"model {name!r} ({origin}) is quantised ({found}); give the model before it was quantised")
    check_tokenizer(name, origin, tokenizer, rows)
    return Loaded(hf, tokenizer, missing_head)


def check_loaded(name: str, origin: str, hf: Any, info: dict[str, Any]) -> tuple[str, ...]:
    """Raises `UserError` where the body of `hf` is not that of its weights, by transformers' loading info.

    The body is all but the output head. Tied weights are not missing: transformers leaves them out. Returns the missing
    parameters of the head, which the activations do not need. Weights that lie outside the body's parts are ignored,
    such as a classifier's or another tower's; those of further blocks, or of a quantised layer, are not.
    """
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    modules = {module for module, _ in hf.named_modules()}
    prefix = f"{hf.base_model_prefix}." if hf.base_model is not hf else ""
    problems = []
    if body := {key for key in missing if key.startswith(prefix)}:
        problems.append(f"{len(body)} parameters are not in the weights ({some(body)})")
    if info["mismatched_keys"]:
        shapes = [f"{key} {list(found)}, not {list(wanted)}" for key, found, wanted in info["mismatched_keys"]]
        problems.append(f"{len(shapes)} have another shape there ({some(shapes)})")
    inner = {key for key in unexpected if _is_of_body(key, prefix, modules) and not _is_buffer(key)}
    if inner:
        problems.append(f"the weights hold {len(inner)} that the model does not have ({some(inner)})")
    elif body and unexpected:
        problems.append(f"the weights hold {some(unexpected)} instead")
    if problems:
        raise UserError(
            f"model {name!r} does not load whole from {origin}: {'; '.join(problems)};"
            " its config and its weights must be of the same model, saved by `save_pretrained`"
        )
    return tuple(sorted(missing))


def check_tokenizer(name: str, origin: str, tokenizer: Any, rows: int) -> None:
    """Raises `UserError` where text gives no token ids, or one that is not among the `rows` of the embedding.

    Special tokens other than BOS do not count, since their names in a text are plain text: many a tokenizer has such
    that its model never learned.
    """
    with library_errors(name, origin):
        special = set(tokenizer.all_special_ids)
        special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        usable = {number: token for token, number in tokenizer.get_vocab().items() if number not in special}
        tokenizer(["A text."], add_special_tokens=False)  # fails where a value of its config is of another type
    if not usable:
        raise UserError(
            f"model {name!r}: {origin} holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, or"
            " tokenizer.model; save it there with the tokenizer's `save_pretrained`"
        )
    if tokenizer.bos_token_id is not None:
        usable[tokenizer.bos_token_id] = tokenizer.bos_token
    last = max(usable)
    if last >= rows:
        raise UserError(
            f"model {name!r}: its tokenizer has token ids up to {last} ({usable[last]!r}), but its embedding has {rows}"
            f" rows; the tokenizer in {origin} must be the model's own"
        )


def _check_config(name: str, folder: Path) -> None:
    """Raises `UserError` where config.json describes a model far larger than its weights: it would fill the memory."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, stored = config.get_text_config(), weight_bytes(folder)
    layers, width = text.num_hidden_layers, text.hidden_size
    for key, value, most in (("num_hidden_layers", layers, MOST_LAYERS), ("hidden_size", width, MOST_WIDTH)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(f"{folder}/config.json: {key}={str(value)[:40]}: expected 1 to {most:,}")
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    if stored and parameters > _PARAMETERS_PER_BYTE * stored:
        raise UserError(
            f"model {name!r} does not load from {folder}: its config.json describes {parameters:,} parameters, but its"
            f" weights have only {stored:,} bytes; they are cut short, or of another model"
        )


def _is_of_body(key: str, prefix: str, modules: set[str]) -> bool:
    """Whether a part of the model's body holds `key`. Weights saved from the body alone lack its prefix."""
    return any(name.startswith(prefix) and any(_parents(name, prefix) & modules) for name in {key, f"{prefix}{key}"})


def _parents(key: str, prefix: str) -> set[str]:
    """The modules that would hold `key`, below the body itself."""
    parts = key.split(".")
    return {parent for n in range(1, len(parts)) if len(parent := ".".join(parts[:n])) > len(prefix)}


def _is_buffer(key: str) -> bool:
    """Whether `key` is a causal mask or a table of positions, which earlier versions of libraries saved as weights."""
    last_two = ".".join(key.split(".")[-2:])
    return key.endswith(("masked_bias", "inv_freq", "position_ids")) or last_two in ("attn.bias", "attention.bias")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which are over in a moment, and reports, whose matter becomes an error."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
