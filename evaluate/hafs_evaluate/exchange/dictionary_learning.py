"""SAEs of other libraries on disk: dictionary_learning's are turned into SAELens folders and back. Torch.

A dictionary_learning SAE is a folder with two files:

- `ae.pt` is a state_dict.
- `config.json` is {"trainer": ..., "buffer": ...}. Its `trainer.dict_class` says which class the state_dict is of.

The format is that of version 0.1.0. The library itself is not needed.
"""

import logging
import math
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hafs_evaluate.core.encode import to_numpy
from hafs_evaluate.core.loading import load_saelens
from hafs_evaluate.exchange.dictionary_classes import CLASSES, COUNTS, MATRICES, SCALARS, Arrays, library_class
from hafs_evaluate.exchange.plain_files import copy_file, plain_file
from hafs_jax.base.checksums.checked import CHECKSUMS, check_folder, write_checksums
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_atomic, write_json
from hafs_jax.base.foreign import refuse_pointer, refuse_special
from hafs_jax.base.options import did_you_mean

LOG = logging.getLogger(__name__)

FILES = ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json")
"""The files of a SAELens folder."""

_SITE = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(\w+)")


def to_dictionary_learning(folder: Path, target: Path) -> Path:
    """Writes the SAE of a SAELens folder as `<target>/trainer_0/{ae.pt, config.json}` and returns trainer_0.

    The written SAE computes the same function. Its class is the one in CLASSES. A jumprelu is written as what it was
    trained as, batchtopk or matryoshka, where all its thresholds are equal and its metadata has k; else as a
    JumpReluAutoEncoder. Raises `UserError` for a transcoder, for which the library has no class.
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
    (place / CHECKSUMS).unlink(missing_ok=True)
    write_atomic(place / "ae.pt", lambda file: torch.save(state, file))
    write_json(place / "config.json", {"trainer": trainer, "buffer": buffer})
    write_checksums(place, ["ae.pt", "config.json"])
    return place


def import_sae(source: Path, target: Path, form: str = "auto", hook_point: str | None = None) -> Path:
    """Writes the SAE at `source` as a SAELens folder at `target`, checked by loading it, and returns `target`.

    `source` is one of

    - a SAELens folder, whose files are copied;
    - an `ae.pt` of dictionary_learning;
    - the folder of one, or the folder above a single trainer_*/.

    `form` "auto" tells them apart. `hook_point` replaces the hook point that the source names, or gives one where it
    names none. Latents and reconstruction are those of the source's own library; but dictionary_learning's AutoEncoder
    normalises its decoder when it loads, which is not done here. What was at `target` is replaced, once the source has
    been read.
    """
    form = detect(source) if form == "auto" else form
    from hafs_jax.saelens import read_safetensors, write_saelens  # JAX

    if form == "saelens":
        if target.resolve() == source.resolve():
            raise UserError(f"expected a target folder other than the source, found {target} for both")
        for name in FILES:
            plain_file(source, name)
        if (sparsity := plain_file(source, "sparsity.safetensors")).exists():
            read_safetensors(sparsity, f"SAELens's log densities at {sparsity}")
        load_saelens(source)
        _clear(target)
        _copy(source, target, hook_point)
    else:
        tensors, cfg = from_dictionary_learning(_ae_file(source), hook_point)
        with tempfile.TemporaryDirectory() as trial:
            write_saelens(Path(trial), tensors, cfg)
            try:
                load_saelens(Path(trial))
            except UserError as error:
                raise UserError(f"{source}: as a SAELens folder it is refused: {error}") from error
        _clear(target)
        write_saelens(target, tensors, cfg)
    LOG.info(f"{source}: loaded by SAELens; weights and the reconstruction of random rows are finite")
    return target


def detect(source: Path) -> str:
    """ "saelens" for a folder with a cfg.json, else "dictionary_learning"."""
    return "saelens" if (source / "cfg.json").exists() else "dictionary_learning"


def from_dictionary_learning(ae: Path, hook_point: str | None = None) -> tuple[Arrays, dict[str, Any]]:
    """The tensors and cfg of a SAELens SAE that computes what the dictionary_learning SAE in `ae` does.

    The class is the trainer.dict_class of the config.json beside it. Without that file it is the class whose keys the
    file has. BatchTopK's threshold is used as its `encode` does: one that training never set, -1, keeps every positive
    latent.
    """
    from hafs_jax.saelens import SAELENS_VERSION  # JAX

    check_folder(ae.parent, "an SAE's file", "export it again, or get it again")
    path = ae.with_name("config.json")
    config = read_json(path, "dictionary_learning's config.json") if path.exists() else {}
    trainer, buffer = _object(config, "trainer", path), _object(config, "buffer", path)
    state = _load(ae)
    name = _class_of(state, _of_type(trainer, "dict_class", str, path), ae)
    found = CLASSES[name]
    tensors = _tensors(state, name, ae)
    D, F = tensors["W_enc"].shape
    for key, kind in (("layer", int), ("submodule_name", str), ("hook_name", str), ("lm_name", str)):
        _of_type(trainer, key, kind, path)
    _of_type(buffer, "ctx_len", int, path)
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
        cfg["metadata"] |= {"training_architecture": found.trained_as, "k": _k(state, F, ae)}
    if "group_sizes" in state:
        cfg["metadata"]["prefixes"] = _ends(state["group_sizes"], F, ae)
    if found.saelens == "topk":
        cfg |= {"k": _k(state, F, ae), "rescale_acts_by_decoder_norm": False}
    return {key: np.asarray(value, np.float32) for key, value in tensors.items()}, cfg


def _clear(target: Path) -> None:
    for stale in (CHECKSUMS, "cfg.json", "sparsity.safetensors"):
        (target / stale).unlink(missing_ok=True)


def _copy(source: Path, target: Path, hook_point: str | None) -> None:
    for name in FILES[:2]:
        if (source / name).exists():
            copy_file(source, name, target)
    cfg = read_json(source / "cfg.json", "a SAELens folder's cfg.json")
    if hook_point is not None:
        holder = cfg if cfg.get("metadata") is None else cfg["metadata"]  # before version 6: at the top
        holder["hook_name"] = hook_point
    write_json(target / "cfg.json", _without_nan(cfg))
    write_checksums(target, [name for name in FILES if (target / name).exists()])


def _without_nan(value: Any) -> Any:
    """The JSON value with null in the place of NaN and infinity, which JSON does not have and Python reads."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    refuse_special(path, "a state_dict")
    try:
        with warnings.catch_warnings(action="ignore"):  # of the pickle's protocol
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch walks the file's archive and pickle as it reads: damage shows as any kind of error
        refuse_pointer(path, "a state_dict")
        reason = " ".join(str(error).split("\n")[0].split())[:200] or type(error).__name__
        raise UserError(f"{path}: expected a state_dict, found a file that does not load ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state_dict of tensors, found {type(state).__name__}")
    return {_text(name, path): _array(value, name, path) for name, value in state.items()}


def _text(name: Any, path: Path) -> str:
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"{path}: expected a state_dict with names for keys, found {str(name)[:80]!r}")
    return name


def _array(value: torch.Tensor, name: str, path: Path) -> np.ndarray:
    """The tensor in float32, or as the integers that it holds."""
    if value.layout != torch.strided or value.is_complex() or value.is_quantized or value.device.type != "cpu":
        raise UserError(f"{path}: {name} is of dtype {value.dtype} and layout {value.layout}, expected dense floats")
    return to_numpy(value) if value.is_floating_point() else value.detach().numpy()


def _tensors(state: Arrays, name: str, path: Path) -> Arrays:
    """SAELens's tensors from a state_dict of class `name`, in float32; `UserError` where their shapes do not fit."""
    found = CLASSES[name]
    for key, value in state.items():
        rank = 2 if key in MATRICES else 1
        if key in SCALARS and value.size != 1 and not (key == "threshold" and found.has_thresholds):
            raise UserError(f"{path}: {key} has shape {list(value.shape)}, expected one number")
        if key not in SCALARS and value.ndim != rank:
            raise UserError(f"{path}: {key} has shape {list(value.shape)}, expected {rank} dimensions")
        if key not in COUNTS and value.dtype.kind != "f":
            raise UserError(f"{path}: {key} is of dtype {value.dtype}, expected floats")
    tensors = found.read({key: value.reshape(()) if value.size == 1 and key in SCALARS and not found.has_thresholds
                          else value for key, value in state.items()})  # fmt: skip
    D, F = tensors["W_enc"].shape
    if not D or not F:
        raise UserError(f"{path}: the encoder has shape {[D, F]}, expected no dimension of 0")
    _check_shapes(tensors, D, F, path)
    return tensors


def _k(state: Arrays, F: int, path: Path) -> int:
    k = state["k"]
    is_whole = k.size == 1 and k.dtype.kind in "iuf" and bool(np.isfinite(k).all()) and bool((k % 1 == 0).all())
    if not is_whole:
        raise UserError(f"{path}: expected k to be one whole number, found {k.tolist()} of dtype {k.dtype}")
    if not 1 <= (found := int(k.reshape(()))) <= F:
        raise UserError(f"{path}: expected k from 1 to the {F} latents, found {found}")
    return found


def _ends(sizes: np.ndarray, F: int, path: Path) -> list[int]:
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (sizes < 1).any() or sizes.sum() != F:
        raise UserError(f"{path}: expected group_sizes to be whole numbers that sum to {F}, found {sizes.tolist()[:8]}")
    return np.cumsum(sizes).tolist()


def _object(config: Any, key: str, path: Path) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return _of_type(config, key, dict, path) or {}


def _of_type(holder: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value = holder.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise UserError(f"{path}: expected {key} to be of type {kind.__name__}, found {type(value).__name__}")
    return value


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
