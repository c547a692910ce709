"""The two files of a SAELens folder, cfg.json and sae_weights.safetensors: checked and read, and written.

Whatever a foreign file holds, a reader here returns what it means or raises a `UserError` of one line that names it.
Standard library, numpy and safetensors; no JAX, no torch.
"""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from hafs_jax.base.checksums.checked import CHECKSUMS, check_folder, write_checksums
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_atomic, write_json
from hafs_jax.base.foreign import refuse_pointer, refuse_special
from hafs_jax.store.manifest import to_float32

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

Weights = dict[str, np.ndarray]
"""Float arrays by name: W_enc [D, F], b_enc [F], W_dec [F, D_out], b_dec [D_out], of some architectures more [F]."""

AT_RUN_TIME = ("layer_norm", "constant_norm_rescale")
"""SAELens's normalisations of each row that it computes as it runs, so that no weights can hold them."""

_NUMPY_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_DENSE = ("standard", "transcoder", "skip_transcoder", "gated")  # architectures that select no k latents


def read_cfg(folder: Path) -> dict[str, Any]:
    """cfg.json in the terms of SAELens 6, with `architecture`, `apply_b_dec_to_input` and `normalize_activations`.

    A file of SAELens before version 6 names its activation function apart: a topk with its k is understood, and another
    function than ReLU is refused where the architecture does not compute it. Raises `UserError` for that, and where a
    value that decides the function is missing or of another type.
    """
    path = folder / CFG
    check_folder(folder, "an SAE's file", "export or import it again")
    cfg = read_json(path, "a SAELens folder's cfg.json")
    if not isinstance(cfg, dict) or not {"d_in", "d_sae"} <= set(cfg):
        found = sorted(map(str, cfg))[:8] if isinstance(cfg, dict) else type(cfg).__name__
        raise UserError(f"{path}: expected a SAELens config with d_in and d_sae, found {found}")
    cfg = {"architecture": "standard", "apply_b_dec_to_input": True, **cfg}
    for name in ("d_in", "d_sae", "d_out"):
        if name in cfg and not _is_count(cfg[name]):
            raise UserError(f"{path}: expected {name} to be a whole number above 0, found {_shown(cfg[name])}")
    for name, kind, what in (
        ("architecture", str, "a name"),
        ("apply_b_dec_to_input", bool, "true or false"),
        ("rescale_acts_by_decoder_norm", bool, "true or false"),
    ):
        if name in cfg and not isinstance(cfg[name], kind):
            raise UserError(f"{path}: expected {name} to be {what}, found {_shown(cfg[name])}")
    for name in ("metadata", "activation_fn_kwargs"):
        if not isinstance(cfg.get(name), (dict, type(None))):
            raise UserError(f"{path}: expected {name} to be a JSON object, found {_shown(cfg[name])}")
    cfg |= _selection(cfg, path)
    normalisation = cfg.get("normalize_activations")
    if normalisation is None or normalisation is False:
        normalisation = "none"
    elif normalisation is True:  # of SAELens's first versions
        normalisation = "expected_average_only_in"
    if not isinstance(normalisation, str):
        raise UserError(f"{path}: expected normalize_activations to be a name, found {_shown(normalisation)}")
    return cfg | {"normalize_activations": normalisation}


def read_tensors(folder: Path) -> Weights:
    """The arrays of sae_weights.safetensors, in their own precision (bfloat16: float32), finite and float."""
    path = folder / WEIGHTS
    return read_safetensors(path, f"a SAELens folder's weights at {path}")


def read_safetensors(path: Path, what: str) -> Weights:
    """The float arrays of a safetensors file; `UserError` names one that is damaged, of another dtype or not finite."""
    refuse_special(path, "a safetensors file")
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except OSError:
        raise UserError(f"expected {what}, found none that can be read") from None
    except safetensors.SafetensorError as error:
        refuse_pointer(path, "a safetensors file")
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: expected a safetensors file, found one that is damaged ({reason})") from None
    arrays = {name: _array(entry, f"{path}: {printable(name)}") for name, entry in entries}
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {printable(name)} holds values that are not finite; get the file again")
    return arrays


def write_saelens(folder: Path, tensors: dict[str, np.ndarray], cfg: dict[str, Any], **more: Any) -> None:
    """Writes a SAELens folder, cfg.json last; equal tensors give equal bytes.

    The files' checksums are written beside them, with what `more` says. Whoever reads the folder here compares them.
    """
    (folder / CHECKSUMS).unlink(missing_ok=True)
    weights = safetensors.numpy.save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})
    write_atomic(folder / WEIGHTS, lambda file: file.write(weights) and None)
    write_json(folder / CFG, cfg)
    write_checksums(folder, [WEIGHTS, CFG], more)


def printable(name: str) -> str:
    """A tensor's name as a message of one line has it."""
    return name if name.isprintable() and len(name) < 80 else _shown(name)


def _selection(cfg: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the activation function that cfg names says of `architecture` and `k`; `UserError` where they contradict."""
    kind, k = cfg["architecture"], cfg.get("k")
    for name in ("activation_fn_str", "activation_fn"):
        function = cfg.get(name)
        if function in (None, "", "relu"):
            continue
        k_of_function = (cfg.get("activation_fn_kwargs") or {}).get("k")
        if function == "topk" and kind in ("standard", "topk") and (k_of_function or kind == "topk"):
            kind, k = "topk", k_of_function or k
        elif function != "batchtopk" or kind != "jumprelu":  # a batchtopk has one threshold at inference
            raise UserError(
                f"{path}: {name}={_shown(function)} of architecture {kind!r} would be read as a ReLU; expected relu, "
                "topk with k in activation_fn_kwargs, or for a batchtopk architecture 'jumprelu' and a threshold"
            )
    if "topk" in kind:
        if not _is_count(k) or k > cfg["d_sae"]:
            raise UserError(f"{path}: architecture {kind!r} needs k from 1 to d_sae={cfg['d_sae']}, found {_shown(k)}")
        return {"architecture": kind, "k": k}
    if kind in _DENSE and k is not None:
        raise UserError(
            f"{path}: k={_shown(k)}, but architecture {kind!r} selects no k latents; say which architecture it is"
        )
    return {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _shown(value: Any) -> str:
    """The value as a message quotes it, cut short."""
    if isinstance(value, int) and abs(value) > 1 << 63:
        return "a larger number"
    text = repr(value)
    return text if len(text) < 80 else text[:80] + "..."


def _array(entry: Any, where: str) -> np.ndarray:
    if entry["dtype"] not in _NUMPY_DTYPES:
        raise UserError(f"{where} is of dtype {entry['dtype']}, expected one of {', '.join(_NUMPY_DTYPES)}")
    dtype = _NUMPY_DTYPES[entry["dtype"]]
    if 0 in entry["shape"]:
        raise UserError(f"{where} has shape {entry['shape']}, expected no dimension of 0")
    values = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return to_float32(values, "bfloat16") if entry["dtype"] == "BF16" else values
