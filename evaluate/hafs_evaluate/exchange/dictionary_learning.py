"""SAEs of other libraries on disk: dictionary_learning's are turned into SAELens folders and back. Torch.

A dictionary_learning SAE is a folder with two files:

- `ae.pt` is a state_dict.
- `config.json` is {"trainer": ..., "buffer": ...}. Its `trainer.dict_class` says which class the state_dict is of.

The format is that of version 0.1.0. The library itself is not needed.
"""

import pickle
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hafs_evaluate.exchange.dictionary_classes import CLASSES, Arrays, library_class
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_atomic, write_json
from hafs_jax.base.options import did_you_mean

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
    write_atomic(place / "ae.pt", lambda file: torch.save(state, file))
    write_json(place / "config.json", {"trainer": trainer, "buffer": buffer})
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

    The class is the trainer.dict_class of the config.json beside it. Without that file it is the class whose keys the
    file has. BatchTopK's threshold is used as its `encode` does: one that training never set, -1, keeps every positive
    latent.
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
        # Whatever the library raises, it is the file that is wrong.
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
