"""Other libraries' SAEs on disk: dictionary_learning's to SAELens folders and back, checked SAELens folders. Torch.

A dictionary_learning SAE is a folder with `ae.pt` (a state_dict) and `config.json` ({"trainer": ..., "buffer": ...},
dispatched on trainer.dict_class). Its formats are of version 0.1.0; the library itself is not needed.
"""

import pickle
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hafs_evaluate.exchange.bridge import SAELENS_VERSION, read_saelens, write_saelens
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_atomic, write_json
from hafs_jax.base.options import did_you_mean

Arrays = dict[str, np.ndarray]
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_TOPK = (*_LINEAR, "b_dec", "k", "threshold")
_OWN = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
KEYS: dict[str, tuple[str, ...]] = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "AutoEncoderTopK": _TOPK,
    "BatchTopKSAE": _TOPK,
    "MatryoshkaBatchTopKSAE": (*_OWN, "k", "group_sizes"),
    "JumpReluAutoEncoder": _OWN,
}
"""dictionary_learning's classes and the exact keys of their state_dict."""

_TRAINED_AS = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka"}
_SITE = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


def to_dictionary_learning(folder: Path, target: Path) -> Path:
    """Writes a SAELens folder as `<target>/trainer_0/{ae.pt, config.json}` and returns trainer_0; the same function.

    standard -> AutoEncoder, gated -> GatedAutoEncoder, topk -> AutoEncoderTopK; a jumprelu that was trained as
    batchtopk or matryoshka (one threshold, and k in its metadata) -> BatchTopKSAE or MatryoshkaBatchTopKSAE, any other
    -> JumpReluAutoEncoder, which subtracts no b_dec: its bias is b_enc - b_dec @ W_enc. `UserError` for a transcoder.
    """
    weights, cfg = read_saelens(folder)
    known = cfg.get("metadata") or {}
    if "transcoder" in cfg["architecture"]:
        raise UserError(f"{folder} holds a {cfg['architecture']}, for which dictionary_learning has no class")
    name = _class_for(weights, cfg, known)
    k = int(cfg.get("k") or known.get("k") or 0)
    state = {key: torch.from_numpy(np.array(value)) for key, value in _state(name, weights, k, known).items()}
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
    path = ae.with_name("config.json")
    config = read_json(path, "dictionary_learning's config.json") if path.exists() else {}
    trainer, buffer = config.get("trainer") or {}, config.get("buffer") or {}
    state = _load(ae)
    name = _class_of(state, trainer.get("dict_class"), ae)
    architecture, tensors = _FROM[name](state)
    D, F = tensors["W_enc"].shape
    _check_shapes(tensors, D, F, ae)
    layer, site = trainer.get("layer"), trainer.get("submodule_name")
    named = _SITE.search(site) if site else None
    derived = f"blocks.{layer}.hook_{named[1] if named else 'resid_post'}" if layer is not None else None
    hook = hook_point or trainer.get("hook_name") or (derived if named or not site else None)
    cfg = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
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
    if name in _TRAINED_AS:
        cfg["metadata"] |= {"training_architecture": _TRAINED_AS[name], "k": int(state["k"])}
    if "group_sizes" in state:
        cfg["metadata"]["prefixes"] = np.cumsum(state["group_sizes"]).tolist()
    if architecture == "topk":
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
    fitting = [name for name, keys in KEYS.items() if set(keys) == set(state)]
    if named is not None:
        if named not in KEYS:
            near = did_you_mean(named, KEYS)
            raise UserError(f"{path}: dict_class {named!r}, expected one of {', '.join(KEYS)}{near}")
        if named not in fitting:
            raise UserError(
                f"{path}: expected the keys {', '.join(sorted(KEYS[named]))} of a {named}, found "
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


_FROM: dict[str, Callable[[Arrays], tuple[str, Arrays]]] = {
    "AutoEncoder": lambda state: ("standard", _linear(state, "bias")),
    "AutoEncoderNew": lambda state: ("standard", _linear(state, "decoder.bias")),
    "GatedAutoEncoder": lambda state: ("gated", _gated(state)),
    "AutoEncoderTopK": lambda state: ("topk", _linear(state, "b_dec")),
    "BatchTopKSAE": lambda state: ("jumprelu", _repeated(state, _linear(state, "b_dec"))),
    "MatryoshkaBatchTopKSAE": lambda state: ("jumprelu", _repeated(state, _own(state))),
    "JumpReluAutoEncoder": lambda state: ("jumprelu", _own(state) | {"threshold": state["threshold"]}),
}
"""dictionary_learning's class -> (SAELens architecture, its tensors)."""


def _class_for(weights: Arrays, cfg: dict[str, Any], known: dict[str, Any]) -> str:
    if cfg["architecture"] != "jumprelu":
        return {"standard": "AutoEncoder", "topk": "AutoEncoderTopK", "gated": "GatedAutoEncoder"}[cfg["architecture"]]
    is_one_threshold = np.ptp(weights["threshold"]) == 0
    names = {trained: name for name, trained in _TRAINED_AS.items()}
    trained_as = names.get(known.get("training_architecture") or "")
    return trained_as if trained_as and is_one_threshold and known.get("k") else "JumpReluAutoEncoder"


def _state(name: str, weights: Arrays, k: int, known: dict[str, Any]) -> Arrays:
    """The state_dict of class `name`; `weights` under our names, of an SAE that subtracts b_dec from its input."""
    linear = {"encoder.weight": weights["W_enc"].T, "decoder.weight": weights["W_dec"].T}
    if name == "AutoEncoder":
        return linear | {"bias": weights["b_dec"], "encoder.bias": weights["b_enc"]}
    if name == "GatedAutoEncoder":
        biases = {"gate_bias": weights["b_enc"], "mag_bias": weights["b_mag"], "r_mag": weights["r_mag"]}
        return linear | {"decoder_bias": weights["b_dec"]} | biases
    own = {key: weights[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if name == "JumpReluAutoEncoder":
        shift_F = weights["b_dec"].astype(np.float64) @ weights["W_enc"].astype(np.float64)
        bias_F = (weights["b_enc"] - shift_F).astype(np.float32)
        return own | {"b_enc": bias_F, "threshold": weights["threshold"]}
    threshold = weights["threshold"][0] if "threshold" in weights else np.float32(-1)  # topk: as one never set
    buffers = {"k": np.asarray(k, np.int32), "threshold": np.asarray(threshold, np.float32)}
    if name == "MatryoshkaBatchTopKSAE":
        ends = known.get("prefixes") or [len(weights["b_enc"])]
        return own | buffers | {"group_sizes": np.diff([0, *ends]).astype(np.int64)}
    return linear | {"encoder.bias": weights["b_enc"], "b_dec": weights["b_dec"]} | buffers
