"""Where training may start from: reads SAELens folders, and moves weights from the model's units into the trainer's.

Owns `scaled`, the inverse of `hafs_jax.method.sae.folded`. Numpy and safetensors; must not import torch.
"""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json
from hafs_jax.base.options import did_you_mean
from hafs_jax.method.sae import InputScale
from hafs_jax.store.manifest import to_float32

Weights = dict[str, np.ndarray]
"""float32 arrays under the trainer's names: W_enc [D, F], b_enc [F], W_dec [F, D_out], b_dec [D_out], and of some
architectures threshold, r_mag, b_mag [F]."""

_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS: dict[str, tuple[str, ...]] = {
    "standard": _PLAIN,
    "topk": _PLAIN,
    "jumprelu": (*_PLAIN, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
    "transcoder": _PLAIN,
    "jumprelu_transcoder": (*_PLAIN, "threshold"),
}
"""The tensors of each SAELens architecture that can be read."""

_KINDS: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_EQUAL_NORMS = 1e-3  # largest relative spread of decoder norms under which rescaling cannot change a top-k in float16


def read_saelens(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """Weights of a SAELens folder that take raw activations, under our names, and its cfg.json in the same terms.

    The returned cfg has apply_b_dec_to_input True (a transcoder: False) and rescale_acts_by_decoder_norm False; a
    folder with other values is converted exactly. gated: b_enc is the gate's bias. A threshold below 0 is 0: the ReLU
    makes them the same. cfg.json of SAELens before version 6 is understood. `UserError` where a file is missing or
    damaged, where tensors do not fit cfg.json, and for an architecture or input normalisation that is not linear.
    """
    cfg = _modern(read_json(folder / "cfg.json", "a SAELens folder's cfg.json"), folder)
    tensors = _checked(_read_tensors(folder / "sae_weights.safetensors"), cfg, folder)
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    if "b_gate" in weights:
        weights["b_enc"] = weights.pop("b_gate")
    if "threshold" in weights:
        weights["threshold"] = np.maximum(weights["threshold"], 0.0)
    if "transcoder" not in cfg["architecture"] and not cfg["apply_b_dec_to_input"]:
        shift_F = weights["b_dec"] @ weights["W_enc"]
        weights["b_enc"] = weights["b_enc"] + shift_F
        if "b_mag" in weights:
            weights["b_mag"] = weights["b_mag"] + shift_F * np.exp(weights["r_mag"])
        cfg["apply_b_dec_to_input"] = True
    if cfg.get("rescale_acts_by_decoder_norm"):
        weights = _unit_rows(weights)
        cfg["rescale_acts_by_decoder_norm"] = False
    return {name: value.astype(np.float32) for name, value in weights.items()}, cfg


def scaled(weights: Weights, scale: InputScale) -> tuple[Weights, np.ndarray | None]:
    """Raw-unit weights as the trainer's: the same function of scaled activations, with a decoder of unit rows.

    With x' = (x - m) s and n_i the norm of W_dec's row i: W_enc' = W_enc n, b_enc' = b_enc n s, W_dec' = W_dec / n,
    b_dec' = (b_dec - m) s, threshold' = threshold n s, b_mag' = b_mag n s, so that latents are n s times the raw ones.
    A transcoder (`scale.target`, of mean m_t and scale s_t): W_enc' = W_enc n s_t / s,
    b_enc' = (b_enc + m W_enc) n s_t, b_dec' = (b_dec - m_t) s_t. A row of W_dec that is zero counts as of norm 1.
    Returns the weights and their threshold [F], None where they have none; a threshold stays among the weights too.
    """
    target = scale.target
    m_D, s = np.asarray(scale.mean_D, np.float64), float(scale.scale)
    raw = _unit_rows({name: value.astype(np.float64) for name, value in weights.items()})
    out_D, out = (m_D, s) if target is None else (np.asarray(target.mean_D, np.float64), float(target.scale))
    found: Weights = {name: raw[name] * out for name in ("b_enc", "b_mag", "threshold") if name in raw}
    found |= {name: raw[name] for name in ("W_enc", "W_dec", "r_mag") if name in raw}
    found["b_dec"] = (raw["b_dec"] - out_D) * out
    if target is not None:
        shift_F = m_D @ raw["W_enc"] * out
        found["W_enc"] = raw["W_enc"] * (out / s)
        found["b_enc"] = found["b_enc"] + shift_F
        if "b_mag" in found:
            found["b_mag"] = found["b_mag"] + shift_F * np.exp(raw["r_mag"])
    result = {name: found[name].astype(np.float32) for name in weights}
    return result, result.get("threshold")


def read_start(
    folder: Path, architecture: str, d_model: int, n_latents: int, scale: InputScale
) -> tuple[Weights, np.ndarray | None]:
    """The first parameters of a run of `architecture` from a SAELens folder, in scaled units, and the threshold [F].

    Holds exactly the parameters that the folder determines: what `architecture` has beyond them (jumprelu's threshold,
    where the folder is no jumprelu) keeps its usual first value. A gated run from an ungated folder gets r_mag = 0 and
    b_mag = b_enc, which is the same function. Raises `UserError` where D or F differ, where a gated folder is to start
    another architecture, where only one of the two is a transcoder, or where a topk folder's decoder norms differ (its
    selection would change).
    """
    weights, cfg = read_saelens(folder)
    target = scale.target
    d_out = d_model if target is None else len(target.mean_D)
    for name, found, expected in (
        ("d_in", weights["W_enc"].shape[0], d_model),
        ("d_out", weights["W_dec"].shape[1], d_out),
        ("d_sae", weights["W_enc"].shape[1], n_latents),
    ):
        if found != expected:
            remedy = f"set --sae.n-latents {found}" if name == "d_sae" else "start from an SAE of this store's model"
            raise UserError(f"{folder / 'cfg.json'} has {name}={found}, this run needs {expected}; {remedy}")
    kind = cfg["architecture"]
    if ("transcoder" in kind) != (target is not None):
        form = "an autoencoder" if target is None else "a transcoder"
        raise UserError(f"{folder} holds a {kind}, this run trains {form}; start from {form} or change --target")
    if kind == "gated" and architecture != "gated":
        raise UserError(f"{folder} holds a gated SAE, which no {architecture} SAE equals; train with --arch gated")
    if kind == "topk":
        norms_F = np.linalg.norm(weights["W_dec"].astype(np.float64), axis=1)
        if norms_F.max() > norms_F.min() * (1 + _EQUAL_NORMS):
            raise UserError(
                f"{folder} holds a topk SAE with decoder norms {norms_F.min():.4g} to {norms_F.max():.4g}; with unit "
                "rows it would choose other latents: start from one with equal norms"
            )
    if architecture == "gated" and kind != "gated":
        weights |= {"r_mag": np.zeros(n_latents, np.float32), "b_mag": weights["b_enc"].copy()}
    params, threshold = scaled(weights, scale)
    if architecture != "jumprelu":
        params.pop("threshold", None)
    return params, threshold


def _unit_rows(weights: Weights) -> Weights:
    """The same function with W_dec's rows of norm 1, latents multiplied by the norms; zero rows stay as they are."""
    norms_F = np.linalg.norm(weights["W_dec"], axis=1)
    norms_F = np.where(norms_F > 0, norms_F, 1.0)
    scaled_by_norm = {"W_enc", "b_enc", "b_mag", "threshold"} & set(weights)
    unit = {name: value * norms_F if name in scaled_by_norm else value for name, value in weights.items()}
    return unit | {"W_dec": weights["W_dec"] / norms_F[:, None]}


def _modern(cfg: Any, folder: Path) -> dict[str, Any]:
    """cfg.json with the keys of SAELens 6; `UserError` where it describes what cannot be written linearly."""
    path = folder / "cfg.json"
    if not isinstance(cfg, dict) or not {"d_in", "d_sae"} <= set(cfg):
        raise UserError(f"{path}: expected a SAELens config with d_in and d_sae, found {sorted(cfg)[:8]}")
    cfg = {"architecture": "standard", "apply_b_dec_to_input": True, **cfg}
    k_before_6 = (cfg.get("activation_fn_kwargs") or {}).get("k")
    if "topk" in (cfg.get("activation_fn_str"), cfg.get("activation_fn")) and k_before_6:
        cfg |= {"architecture": "topk", "k": k_before_6}
    if cfg["architecture"] not in TENSORS:
        near = did_you_mean(cfg["architecture"], TENSORS)
        raise UserError(f"{path}: architecture {cfg['architecture']!r}, expected one of {', '.join(TENSORS)}{near}")
    normalisation = cfg.get("normalize_activations") or "none"
    if normalisation != "none":
        raise UserError(
            f"{path}: normalize_activations={normalisation!r}, expected 'none'; fold the factor into the weights first "
            "(SAELens: fold_activation_norm_scaling_factor); a normalisation of each row cannot be folded"
        )
    return cfg


def _read_tensors(path: Path) -> Weights:
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except OSError:
        raise UserError(f"expected a SAELens folder's weights at {path}, found none that can be read") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: expected a safetensors file, found one that is damaged ({error})") from None
    return {name: _array(entry, f"{path}: {name}") for name, entry in entries}


def _array(entry: Any, where: str) -> np.ndarray:
    if entry["dtype"] not in _KINDS:
        raise UserError(f"{where} is of dtype {entry['dtype']}, expected one of {', '.join(_KINDS)}")
    values = np.frombuffer(entry["data"], _KINDS[entry["dtype"]]).reshape(entry["shape"])
    return to_float32(values, "bfloat16") if entry["dtype"] == "BF16" else values


def _checked(tensors: Weights, cfg: dict[str, Any], folder: Path) -> Weights:
    """The tensors of cfg's architecture, exactly, of cfg's shapes and finite."""
    path, D, F = folder / "sae_weights.safetensors", cfg["d_in"], cfg["d_sae"]
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not np.all(factor == 1):
        raise UserError(f"{path}: scaling_factor is not 1; fold it into W_dec first")
    expected = TENSORS[cfg["architecture"]]
    if set(tensors) != set(expected):
        raise UserError(
            f"{path}: expected the tensors {', '.join(sorted(expected))} of architecture {cfg['architecture']!r}, "
            f"found {', '.join(sorted(tensors)) or 'none'}"
        )
    d_out = cfg.get("d_out", D) if "transcoder" in cfg["architecture"] else D
    shapes = {"W_enc": (D, F), "W_dec": (F, d_out), "b_dec": (d_out,)}
    for name, value in tensors.items():
        if value.shape != (shape := shapes.get(name, (F,))):
            raise UserError(f"{path}: {name} has shape {list(value.shape)}, cfg.json says {list(shape)}")
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds values that are not finite; get the file again")
    return tensors
