"""The files of a model on this machine: their fingerprint, what is refused of them, and what a library makes of them.

Standard library only. Torch and transformers must not be imported here.
"""

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of
from hafs_jax.base.foreign import refuse_pointer, refuse_special

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_DECIDING = (
    *WEIGHTS,
    "config.json",
    "*.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
"""The files of a model's folder that decide its token ids and activations. Others, such as a README, may change."""

_FLOATING = ("fp8", "fbgemm_fp8", "mxfp4")
"""Methods of `quantization_config` whose weights are floating-point numbers."""

_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}


@contextlib.contextmanager
def library_errors(name: str, origin: str, does_not: str = "load") -> Iterator[None]:
    """Turns any error of a library that reads a model's files into a `UserError`. Only calls of libraries stand inside.

    What damaged files make transformers and its dependencies raise is open-ended: OSError, KeyError, TypeError,
    ImportError for a quantisation package, RecursionError, errors of pickle, safetensors, pydantic-like checks, httpx.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        reason = " ".join(str(error).split())[:300]
        kind = "" if isinstance(error, OSError | ValueError) and reason else f"{type(error).__name__}: "
        raise UserError(f"model {name!r} does not {does_not} from {origin}: {kind}{reason}") from error


def fingerprint(model: Path) -> str:
    """A SHA-256 of a model's folder or file by contents: equal where config, tokenizer and weights are equal.

    All bytes of the weights count, so that a single changed value is found. That reads 0.6 GB/s a thread: 0.3 s for
    Pythia-70m, some 4 s for 5 GB, next to a model that was just loaded from the same files. Times, paths and files that
    do not decide the activations do not count.
    """
    if model.is_file():
        return sha256_of(model)
    paths = deciding_files(model)
    with ThreadPoolExecutor(4) as threads:
        lines = [f"{sha}  {path.name}\n" for path, sha in zip(paths, threads.map(sha256_of, paths), strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def deciding_files(folder: Path) -> list[Path]:
    """The folder's files that decide token ids and activations, by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, like) for like in _DECIDING)
    )


def weight_bytes(folder: Path) -> int:
    """The size of the folder's weights on disk."""
    return sum(path.stat().st_size for like in WEIGHTS for path in folder.glob(like))


def check_files(folder: Path) -> None:
    """Raises `UserError` for a folder that is no model's as it stands: adapters alone, pointers in place of files.

    A library would load some of these without a word, and the activations would be those of another model.
    """
    refuse_adapter(folder, (path.name for path in folder.iterdir()))
    for path in sorted(folder.iterdir()):
        refuse_special(path, "a model's file")
    for path in deciding_files(folder):
        refuse_pointer(path, "a model's file")
    config = folder / "config.json"
    if config.exists():
        refuse_quantised(folder, read_json(config, "a model's config"))
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs and not config.exists():
        raise UserError(f"{folder} has no config.json but {', '.join(ggufs[:3])}; give one such file as the model")


def refuse_adapter(where: object, names: Iterable[str]) -> None:
    """Raises `UserError` where `names` are the files of an adapter: `where` says whose."""
    if "adapter_config.json" in names:
        raise UserError(
            f"{where} holds an adapter (adapter_config.json); merge it into its model and save that whole"
            " (`merge_and_unload` of peft), then give that folder"
        )


def refuse_quantised(where: object, config: Mapping[str, Any]) -> None:
    """Raises `UserError` where a model's config.json says that its weights are integers, before they are read.

    Of the methods that keep floating-point numbers, the loaded weights tell.
    """
    method = config.get("quantization_config")
    if isinstance(method, Mapping):
        method = method.get("quant_method") or "bitsandbytes"  # which once left its name out
    if method is not None and method not in _FLOATING:
        raise UserError(
            f"{where} is quantised (quantization_config of config.json: {str(method)[:100]!r});"
            " give the model before it was quantised"
        )


def integer_weights(folder: Path) -> list[str]:
    """Names of the weight matrices that the folder's safetensors files store as integers: they are quantised."""
    return [
        name
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in _header(path).items()
        if name.endswith("weight") and tensor.get("dtype") in _INTEGERS
    ]


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """The names, dtypes and shapes in a safetensors file that a library has already read without complaint."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return {name: tensor for name, tensor in json.loads(file.read(length)).items() if name != "__metadata__"}


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
