"""Other libraries' SAEs on disk: dictionary_learning's to SAELens folders and back, checked SAELens folders. Torch.

A dictionary_learning SAE is a folder with `ae.pt` (a state_dict) and `config.json` ({"trainer": ..., "buffer": ...},
dispatched on trainer.dict_class). Its formats are of version 0.1.0; the library itself is not needed.
"""

import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_atomic, write_json
from hafs_jax.base.options import did_you_mean

Arrays = dict[str, np.ndarray]
Meta = dict[str, Any]


@dataclass(frozen=True)
class LibraryClass:
    """One of dictionary_learning's SAE classes, and the SAELens architecture that computes the same."""

    saelens: str  # SAELens's name of it
    keys: tuple[str, ...]  # exactly those of its state_dict
    read: Callable[[Arrays], Arrays]  # its state_dict -> SAELens's tensors
    write: Callable[[Arrays, Meta], Arrays] | None  # (weights under our names, metadata) -> its state_dict
    trained_as: str = ""  # our one architecture that this class is for; none: any other of the SAELens architecture
    subtracts_b_dec: bool = True  # from its input


def library_class(saelens: str, trained_as: str = "") -> str:
    """The class for an SAE of a SAELens architecture that was trained as an architecture of ours."""
    fitting = {name: known for name, known in CLASSES.items() if known.saelens == saelens and known.write is not None}
    written = {known.trained_as: name for name, known in fitting.items()}
    return written.get(trained_as, written[""])


_SITE = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


def to_dictionary_learning(folder: Path, target: Path) -> Path:
    """Writes a SAELens folder as `<target>/trainer_0/{ae.pt, config.json}` and returns trainer_0; the same function.

    The class is that of CLASSES. A jumprelu counts as trained as batchtopk or matryoshka where it has one threshold,
    and k in its metadata. Raises `UserError` for a transcoder.
    """
    from hafs_jax.saelens import read_saelens  # JAX

    weights, cfg = read_saelens(folder)
    known = cfg.get("metadata") or {}
    if "transcoder" in cfg["architecture"]:
        raise UserError(f"{folder} holds a {cfg['architecture']}, for which dictionary_learning has no class")
    k = int(cfg.get("k") or known.get("k") or 0)
    has_one_threshold = k > 0 and np.ptp(weights.get("threshold", 0.0)) == 0
    name = library_class(cfg["architecture"], known.get("training_architecture") or "" if has_one_threshold else "")
    write = CLASSES[name].write
    assert write is not None
    state = {key: torch.from_numpy(np.array(value)) for key, value in write(weights, {**known, "k": k}).items()}
    hook = _HOOK.fullmatch(known.get("hook_name") or "")
    trainer = {
        "trainer_class": "hafs-jax",
        "dict_class": name,
        "activation_dim": cfg["d_in"],
        "dict_size": cfg["d_sae"],
        "k": k or None,
        "layer": int(hook[1]) if hook else None,
        "submodule_name": f"{hook[2]}_layer_{hook[1]}" if hook else None,
        "hook_name": known.get("hook_name"),
        "lm_name": known.get("model_name"),
        "seed": known.get("seed"),
        "wandb_name": f"{known.get('variant', 'sae')}",
        "device": "cpu",
    }
    buffer = {"d_submodule": cfg["d_in"], "io": "out", "ctx_len": known.get("context_size")}
    place = target / "trainer_0"
    write_atomic(place / "ae.pt", lambda file: torch.save(state, file))
    write_json(place / "config.json", {"trainer": trainer, "buffer": buffer})
    return place


def import_sae(source: Path, target: Path, form: str = "auto", hook_point: str | None = None) -> Path:
    """Writes the SAE at `source` as a SAELens folder at `target`, checked by loading it, and returns `target`.

    `source`: a SAELens folder (its files are copied), a dictionary_learning `ae.pt`, or the folder of one (also the
    folder above a single trainer_*/). `form` "auto" tells them apart. `hook_point` overrides the hook point that
    the source names, or says it where it names none. Latents and reconstruction are those of the source's own library,
    before the decoder's normalisation that dictionary_learning's AutoEncoder does when it loads. What was at `target`
    is replaced, once the source has been read.
    """
    form = detect(source) if form == "auto" else form
    if form == "saelens":
        if target.resolve() == source.resolve():
            raise UserError(f"expected a target folder other than the source, found {target} for both")
        check_loads(source)
        _clear(target)
        _copy(source, target, hook_point)
        return target
    from hafs_jax.saelens import write_saelens  # JAX

    tensors, cfg = from_dictionary_learning(_ae_file(source), hook_point)
    _clear(target)
    write_saelens(target, tensors, cfg)
    check_loads(target)
    return target


def detect(source: Path) -> str:
    """ "saelens" for a folder with a cfg.json, else "dictionary_learning"."""
    return "saelens" if (source / "cfg.json").exists() else "dictionary_learning"


def from_dictionary_learning(ae: Path, hook_point: str | None = None) -> tuple[Arrays, dict[str, Any]]:
    """The tensors and cfg of a SAELens SAE that computes what the dictionary_learning SAE in `ae` does.

    The class is trainer.dict_class of the config.json beside it; without one, the one whose keys the file has.
    BatchTopK's threshold is used as its encode does: one that training never set (-1) keeps every positive latent.
    """
    from hafs_jax.saelens import SAELENS_VERSION  # JAX

    path = ae.with_name("config.json")
    config = read_json(path, "dictionary_learning's config.json") if path.exists() else {}
    trainer, buffer = config.get("trainer") or {}, config.get("buffer") or {}
    state = _load(ae)
    name = _class_of(state, trainer.get("dict_class"), ae)
    found = CLASSES[name]
    tensors = found.read(state)
    D, F = tensors["W_enc"].shape
    _check_shapes(tensors, D, F, ae)
    layer, site = trainer.get("layer"), trainer.get("submodule_name")
    named = _SITE.search(site) if site else None
    derived = f"blocks.{layer}.hook_{named[1] if named else 'resid_post'}" if layer is not None else None
    hook = hook_point or trainer.get("hook_name") or (derived if named or not site else None)
    cfg = {
        "architecture": found.saelens,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": found.subtracts_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "imported_from": f"dictionary_learning {name}",
            "model_name": trainer.get("lm_name"),
            "hook_name": hook,
            "hook_head_index": None,
            "context_size": buffer.get("ctx_len"),
        },
    }
    if found.trained_as:
        cfg["metadata"] |= {"training_architecture": found.trained_as, "k": int(state["k"])}
    if "group_sizes" in state:
        cfg["metadata"]["prefixes"] = np.cumsum(state["group_sizes"]).tolist()
    if found.saelens == "topk":
        cfg |= {"k": int(state["k"]), "rescale_acts_by_decoder_norm": False}
    return {key: np.asarray(value, np.float32) for key, value in tensors.items()}, cfg


def check_loads(folder: Path) -> Any:
    """The SAELens SAE in `folder`; `UserError` in one line where SAELens refuses it or would load another function."""
    from sae_lens import SAE

    cfg = read_json(folder / "cfg.json", "a SAELens folder's cfg.json")
    if cfg.get("normalize_activations") == "expected_average_only_in":
        raise UserError(
            f"{folder}: normalize_activations='expected_average_only_in', expected 'none': SAELens leaves that factor "
            "out when it loads a folder; fold it in first (fold_activation_norm_scaling_factor)"
        )
    try:
        return SAE.load_from_disk(folder, device="cpu")
    except Exception as error:
        # whatever a foreign file makes the library raise: it is the file that is wrong
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: SAELens does not load it ({type(error).__name__}: {reason})") from error


def _clear(target: Path) -> None:
    for stale in ("cfg.json", "sparsity.safetensors"):
        (target / stale).unlink(missing_ok=True)


def _copy(source: Path, target: Path, hook_point: str | None) -> None:
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        if (source / name).exists():
            with open(source / name, "rb") as original:
                write_atomic(target / name, partial(shutil.copyfileobj, original))
    cfg = read_json(source / "cfg.json", "a SAELens folder's cfg.json")
    if hook_point is not None:
        cfg.get("metadata", cfg)["hook_name"] = hook_point  # before version 6: at the top
    write_json(target / "cfg.json", cfg)


def _ae_file(source: Path) -> Path:
    if source.is_file():
        return source
    found = [source / "ae.pt"] if (source / "ae.pt").exists() else sorted(source.glob("trainer_*/ae.pt"))
    if len(found) > 1:
        raise UserError(f"{source} holds {len(found)} SAEs; name one of {', '.join(str(ae.parent) for ae in found)}")
    if not found:
        raise UserError(
            f"expected a SAELens folder (cfg.json) or dictionary_learning's ae.pt at {source}, found neither"
        )
    return found[0]


def _load(path: Path) -> Arrays:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected a state_dict, found a file that does not load ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state_dict of tensors, found {type(state).__name__}")
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in state.items()}


def _class_of(state: Arrays, named: str | None, path: Path) -> str:
    fitting = [name for name, known in CLASSES.items() if set(known.keys) == set(state)]
    if named is not None:
        if named not in CLASSES:
            near = did_you_mean(named, CLASSES)
            raise UserError(f"{path}: dict_class {named!r}, expected one of {', '.join(CLASSES)}{near}")
        if named not in fitting:
            raise UserError(
                f"{path}: expected the keys {', '.join(sorted(CLASSES[named].keys))} of a {named}, found "
                f"{', '.join(sorted(state))}"
            )
        return named
    if len(fitting) != 1:
        what = f"it could be any of {', '.join(fitting)}" if fitting else f"its keys are {', '.join(sorted(state))}"
        raise UserError(f"{path}: expected a config.json beside it that names trainer.dict_class, found none; {what}")
    return fitting[0]


def _check_shapes(tensors: Arrays, D: int, F: int, path: Path) -> None:
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    for name, value in tensors.items():
        if value.shape != (expected := shapes.get(name, (F,))):
            raise UserError(f"{path}: {name} has shape {list(value.shape)}, its encoder says {list(expected)}")
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds values that are not finite; get the file again")


def _linear(state: Arrays, b_dec: str) -> Arrays:
    found = {"W_enc": state["encoder.weight"].T, "W_dec": state["decoder.weight"].T, "b_dec": state[b_dec]}
    return found | ({"b_enc": state["encoder.bias"]} if "encoder.bias" in state else {})


def _own(state: Arrays) -> Arrays:
    return {name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def _repeated(state: Arrays, tensors: Arrays) -> Arrays:
    return tensors | {"threshold": np.full(tensors["W_enc"].shape[1], float(state["threshold"]))}


def _gated(state: Arrays) -> Arrays:
    renamed = {"b_gate": state["gate_bias"], "b_mag": state["mag_bias"], "r_mag": state["r_mag"]}
    return _linear(state, "decoder_bias") | renamed


def _matrices(weights: Arrays) -> Arrays:
    return {"encoder.weight": weights["W_enc"].T, "decoder.weight": weights["W_dec"].T}


def _state_plain(weights: Arrays, known: Meta) -> Arrays:
    return _matrices(weights) | {"bias": weights["b_dec"], "encoder.bias": weights["b_enc"]}


def _state_gated(weights: Arrays, known: Meta) -> Arrays:
    biases = {"gate_bias": weights["b_enc"], "mag_bias": weights["b_mag"], "r_mag": weights["r_mag"]}
    return _matrices(weights) | {"decoder_bias": weights["b_dec"]} | biases


def _state_topk(weights: Arrays, known: Meta) -> Arrays:
    return _matrices(weights) | {"encoder.bias": weights["b_enc"], "b_dec": weights["b_dec"]} | _buffers(weights, known)


def _state_matryoshka(weights: Arrays, known: Meta) -> Arrays:
    ends = known.get("prefixes") or [len(weights["b_enc"])]
    return _own(weights) | _buffers(weights, known) | {"group_sizes": np.diff([0, *ends]).astype(np.int64)}


def _state_jumprelu(weights: Arrays, known: Meta) -> Arrays:
    """Its encoder subtracts no b_dec: the bias is b_enc - b_dec @ W_enc."""
    shift_F = weights["b_dec"].astype(np.float64) @ weights["W_enc"].astype(np.float64)
    return _own(weights) | {"b_enc": (weights["b_enc"] - shift_F).astype(np.float32), "threshold": weights["threshold"]}


def _buffers(weights: Arrays, known: Meta) -> Arrays:
    threshold = weights["threshold"][0] if "threshold" in weights else -1  # of a topk: as one that was never set
    return {"k": np.asarray(known["k"], np.int32), "threshold": np.asarray(threshold, np.float32)}


_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_TOPK = (*_LINEAR, "b_dec", "k", "threshold")
_GATED = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
_OWN = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

CLASSES: dict[str, LibraryClass] = {
    "AutoEncoder": LibraryClass("standard", (*_LINEAR, "bias"), lambda state: _linear(state, "bias"), _state_plain),
    "AutoEncoderNew": LibraryClass(
        "standard",
        (*_LINEAR, "decoder.bias"),
        lambda state: _linear(state, "decoder.bias"),
        write=None,
        subtracts_b_dec=False,
    ),
    "GatedAutoEncoder": LibraryClass("gated", _GATED, _gated, _state_gated),
    "AutoEncoderTopK": LibraryClass("topk", _TOPK, lambda state: _linear(state, "b_dec"), _state_topk),
    "BatchTopKSAE": LibraryClass(
        "jumprelu", _TOPK, lambda state: _repeated(state, _linear(state, "b_dec")), _state_topk, trained_as="batchtopk"
    ),
    "MatryoshkaBatchTopKSAE": LibraryClass(
        "jumprelu",
        (*_OWN, "k", "group_sizes"),
        lambda state: _repeated(state, _own(state)),
        _state_matryoshka,
        trained_as="matryoshka",
    ),
    "JumpReluAutoEncoder": LibraryClass(
        "jumprelu",
        _OWN,
        lambda state: _own(state) | {"threshold": state["threshold"]},
        _state_jumprelu,
        subtracts_b_dec=False,
    ),
}
"""dictionary_learning's classes by name."""
