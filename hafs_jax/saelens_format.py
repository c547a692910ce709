"""The format of the library SAELens: folders read and written, and weights turned into the trainer's units and back.

A SAELens folder holds cfg.json and sae_weights.safetensors. Its SAE takes raw activations, the trainer's takes centred
and scaled ones (`hafs_jax.method.sae.InputScale`). `fold` puts that map into the weights, and `unfold` takes it out.
What SAELens calls an architecture of ours is in the architecture's own record (`Architecture.saelens`).

This module is below the training, which may start from a SAELens folder. `hafs_jax.saelens` is above it and exports
runs. Neither imports torch.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hafs_jax.base.errors import UserError, arg
from hafs_jax.base.options import did_you_mean
from hafs_jax.config import SAEConfig
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.method.sae import InputScale
from hafs_jax.ops.products import Params
from hafs_jax.saelens_files import CFG, WEIGHTS, Weights, printable, read_cfg, read_tensors
from hafs_jax.store.manifest import Manifest

SAELENS_VERSION = "6.54.12"  # the version whose on-disk format this is; SAELens drops metadata of versions below 6

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

_EQUAL_NORMS = 1e-3  # relative spread of decoder norms up to which rescaling does not change a top-k in float16
_IN_UNITS = ("b_enc", "b_mag")  # biases that have the units of the scaled activations


def read_saelens(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """Weights of a SAELens folder that take raw activations, under our names, and its cfg.json in the same terms.

    The returned cfg has apply_b_dec_to_input True (a transcoder: False) and rescale_acts_by_decoder_norm False. A
    folder with other values is converted exactly. The b_enc of a gated SAE is its gate's bias. A threshold below 0
    becomes 0, which is the same behind a ReLU. A cfg.json of SAELens before version 6 is understood.
    Raises `UserError` where a file is missing or damaged, where the tensors do not fit cfg.json, and for an
    architecture or input normalisation that is not linear.
    """
    cfg = _linear(read_cfg(folder), folder)
    tensors = _checked(read_tensors(folder), cfg, folder)
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    if "b_gate" in weights:
        weights["b_enc"] = weights.pop("b_gate")
    if "threshold" in weights:
        weights["threshold"] = np.maximum(weights["threshold"], 0.0)
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large is refused below
        if "transcoder" not in cfg["architecture"] and not cfg["apply_b_dec_to_input"]:
            shift_F = weights["b_dec"] @ weights["W_enc"]
            weights["b_enc"] = weights["b_enc"] + shift_F
            if "b_mag" in weights:
                weights["b_mag"] = weights["b_mag"] + shift_F * np.exp(weights["r_mag"])
            cfg["apply_b_dec_to_input"] = True
        if cfg.get("rescale_acts_by_decoder_norm"):
            weights = _unit_rows(weights)
            cfg["rescale_acts_by_decoder_norm"] = False
    return _in_float32(weights, folder / WEIGHTS), cfg


class NoSAELensForm(UserError):
    """SAELens has no class that computes what this architecture does."""


def saelens_name(architecture: str, transcode: bool, where: str) -> str:
    """SAELens's name of an architecture of ours; `NoSAELensForm`, naming `where`, where it has none."""
    forms = {name: entry.saelens for name, entry in ARCHITECTURES.items() if entry.saelens is not None}
    known = {name: form.transcoder if transcode else form.sae for name, form in forms.items()}
    if (found := known.get(architecture)) is None:
        form = "transcoder of architecture" if transcode else "architecture"
        having = ", ".join(name for name, kind in known.items() if kind is not None)
        raise NoSAELensForm(
            f"{where}: no SAELens form for {form} {architecture!r}: it trains and loads in hafs_jax alone; to export, "
            f"train one of {having}, or give its Architecture a SAELensForm"
        )
    return found


def saelens_tensors(params: Params, config: SAEConfig, scale: InputScale, threshold: Array) -> dict[str, np.ndarray]:
    """The float32 tensors of a SAELens folder from the trainer's parameters and inference threshold."""
    architecture = ARCHITECTURES[config.architecture]
    assert architecture.saelens is not None
    renamed = architecture.saelens.renamed
    raw, raw_threshold = fold(params, scale, threshold)
    tensors = {renamed.get(name, name): np.asarray(value, np.float32) for name, value in raw.items()}
    if architecture.saelens.repeats_threshold or "threshold" in params:
        tensors["threshold"] = np.broadcast_to(np.float32(raw_threshold), config.F)
    return tensors


def saelens_config(
    config: SAEConfig, kind: str, manifest: Manifest, target: Manifest | None, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The cfg.json of an SAE of ours that SAELens calls `kind`, with where its activations came from and `metadata`.

    `manifest` is that of the rows which are encoded, `target` that of the rows which a transcoder reconstructs.
    """
    sources = manifest.sources
    most = max(sources, key=lambda source: source.rows, default=None)
    cfg: dict[str, Any] = {
        "architecture": kind,
        "d_in": manifest.d_model,
        "d_sae": config.F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": target is None,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "trained_with": "hafs-jax",
            "training_architecture": config.architecture,
            "model_name": manifest.model.hub_name or manifest.model.name,
            "model_revision": manifest.model.hub_revision,
            "model_source": manifest.model.public_origin,
            "hook_name": manifest.hook_point,
            "hook_head_index": None,
            "context_size": manifest.context_length,
            "prepend_bos": manifest.tokenizer.prepend_bos,
            "dataset_path": most.path if most else None,
            "dataset_paths": sorted({source.path for source in sources}),
            **metadata,
        },
    }
    if target is not None:
        cfg["d_out"] = target.d_model
        cfg["metadata"]["hook_name_out"] = target.hook_point
    if kind == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def fold(params: Params, scale: InputScale, threshold: Float[Array, ""]) -> tuple[Params, Float[Array, "..."]]:
    """The weights and the inference threshold for raw activations: the same function in the language model's units.

    W_enc comes out as [D, F].

    With x' = (x - m) s, and ' for what the SAE has in scaled units:

    - b_dec = m + b_dec'/s.
    - Biases of the encoder and thresholds are divided by s. Matrices and r_mag stay. So latents = latents'/s, and the
      decoder's rows keep their unit norm.

    A transcoder differs in two ways:

    - Its encoder does not subtract b_dec, so b_enc = b_enc'/s - m @ W_enc.
    - Its latents are in units of 1/s, but its target has another scale s_t. So W_dec = W_dec' s/s_t, whose rows have
      norm s/s_t.

    The threshold is the learned one [F] if the parameters hold one, else the scalar `threshold`.
    """
    s, target = scale.scale, scale.target
    raw = {name: value / s if name in _IN_UNITS else value for name, value in params.items() if name != "threshold"}
    raw["W_enc"] = params["W_enc"].T
    if target is None:
        raw["b_dec"] = scale.mean_D + params["b_dec"] / s
    else:
        raw["b_enc"] = raw["b_enc"] - scale.mean_D @ raw["W_enc"]
        raw["W_dec"] = params["W_dec"] * s / target.scale
        raw["b_dec"] = target.mean_D + params["b_dec"] / target.scale
        if "b_mag" in raw:
            raw["b_mag"] = raw["b_mag"] - (scale.mean_D @ raw["W_enc"]) * jnp.exp(params["r_mag"])
    return raw, params.get("threshold", threshold) / s


def unfold(weights: Weights, scale: InputScale) -> tuple[Weights, np.ndarray | None]:
    """Raw-unit weights as the trainer's: the same function of scaled activations, with a decoder of unit rows.

    The inverse of `fold` for decoders of any norm. With x' = (x - m) s and n_i the norm of W_dec's row i:

        W_enc' = W_enc n          b_enc' = b_enc n s      threshold' = threshold n s
        W_dec' = W_dec / n        b_mag' = b_mag n s      b_dec' = (b_dec - m) s

    so that latents are n s times the raw ones. A transcoder (`scale.target`, of mean m_t and scale s_t) has
    W_enc' = W_enc n s_t / s, b_enc' = (b_enc + m W_enc) n s_t and b_dec' = (b_dec - m_t) s_t.

    The result's W_enc is [F, D]. A row of W_dec that is zero counts as of norm 1. Returns the weights and their
    threshold [F], None where they have none; a threshold stays among the weights too.
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
    found["W_enc"] = found["W_enc"].T
    result = {name: found[name].astype(np.float32) for name in weights}
    return result, result.get("threshold")


def read_start(
    folder: Path, architecture: str, d_model: int, n_latents: int, scale: InputScale
) -> tuple[Weights, np.ndarray | None]:
    """The first parameters of a run of `architecture` from a SAELens folder, in scaled units, and the threshold [F].

    Holds exactly the parameters that the folder determines. What `architecture` has beyond them (jumprelu's threshold,
    where the folder is no jumprelu) keeps its usual first value. A gated run from an ungated folder gets r_mag = 0 and
    b_mag = b_enc, which is the same function. Raises `UserError` where

    - D or F differ,
    - a gated folder is to start another architecture,
    - only one of the two is a transcoder,
    - a topk folder's decoder norms differ, since its selection would change.
    """
    own = ARCHITECTURES[architecture]
    is_gated = own.saelens is not None and own.saelens.sae == "gated"
    weights, cfg = read_saelens(folder)
    target = scale.target
    d_out = d_model if target is None else len(target.mean_D)
    for name, found, expected in (
        ("d_in", weights["W_enc"].shape[0], d_model),
        ("d_out", weights["W_dec"].shape[1], d_out),
        ("d_sae", weights["W_enc"].shape[1], n_latents),
    ):
        if found != expected:
            remedy = (
                f"set {arg('sae.n_latents', found)}" if name == "d_sae" else "start from an SAE of this store's model"
            )
            raise UserError(f"{folder / CFG} has {name}={found}, this run needs {expected}; {remedy}")
    kind = cfg["architecture"]
    if ("transcoder" in kind) != (target is not None):
        form = "an autoencoder" if target is None else "a transcoder"
        raise UserError(f"{folder} holds a {kind}, this run trains {form}; start from {form} or change {arg('target')}")
    if kind == "gated" and not is_gated:
        raise UserError(
            f"{folder} holds a gated SAE, which no {architecture} SAE equals; train with architecture gated"
        )
    if kind == "topk":
        norms_F = np.linalg.norm(weights["W_dec"].astype(np.float64), axis=1)
        if norms_F.max() > norms_F.min() * (1 + _EQUAL_NORMS):
            raise UserError(
                f"{folder} holds a topk SAE with decoder norms {norms_F.min():.4g} to {norms_F.max():.4g}; with unit "
                "rows it would choose other latents: start from one with equal norms"
            )
    if is_gated and kind != "gated":
        weights |= {"r_mag": np.zeros(n_latents, np.float32), "b_mag": weights["b_enc"].copy()}
    with np.errstate(over="ignore", invalid="ignore"):
        params, threshold = unfold(weights, scale)
    params = _in_float32(params, folder / WEIGHTS)
    if "threshold" not in own.params:
        params.pop("threshold", None)
    return params, threshold


def _unit_rows(weights: Weights) -> Weights:
    """The same function with W_dec's rows of norm 1, latents multiplied by the norms; zero rows stay as they are."""
    norms_F = np.linalg.norm(weights["W_dec"], axis=1)
    norms_F = np.where(norms_F > 0, norms_F, 1.0)
    scaled_by_norm = {"W_enc", "b_enc", "b_mag", "threshold"} & set(weights)
    unit = {name: value * norms_F if name in scaled_by_norm else value for name, value in weights.items()}
    return unit | {"W_dec": weights["W_dec"] / norms_F[:, None]}


def _linear(cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`cfg`; `UserError` where it describes what cannot be written linearly."""
    path = folder / CFG
    if cfg["architecture"] not in TENSORS:
        near = did_you_mean(cfg["architecture"], TENSORS)
        raise UserError(f"{path}: architecture {cfg['architecture']!r}, expected one of {', '.join(TENSORS)}{near}")
    normalisation = cfg["normalize_activations"]
    if normalisation != "none":
        raise UserError(
            f"{path}: normalize_activations={normalisation!r}, expected 'none'; fold the factor into the weights first "
            "(SAELens: fold_activation_norm_scaling_factor); a normalisation of each row cannot be folded"
        )
    return cfg


def _checked(tensors: Weights, cfg: dict[str, Any], folder: Path) -> Weights:
    """The tensors of cfg's architecture, exactly, and of cfg's shapes."""
    path, D, F = folder / WEIGHTS, cfg["d_in"], cfg["d_sae"]
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not np.all(factor == 1):
        raise UserError(f"{path}: scaling_factor is not 1; fold it into W_dec first")
    expected = TENSORS[cfg["architecture"]]
    if set(tensors) != set(expected):
        raise UserError(
            f"{path}: expected the tensors {', '.join(sorted(expected))} of architecture {cfg['architecture']!r}, "
            f"found {', '.join(map(printable, sorted(tensors))) or 'none'}"
        )
    d_out = cfg.get("d_out", D) if "transcoder" in cfg["architecture"] else D
    shapes = {"W_enc": (D, F), "W_dec": (F, d_out), "b_dec": (d_out,)}
    for name, value in tensors.items():
        if value.shape != (shape := shapes.get(name, (F,))):
            raise UserError(f"{path}: {name} has shape {list(value.shape)}, cfg.json says {list(shape)}")
    return tensors


def _in_float32(weights: Weights, path: Path) -> Weights:
    """The weights in float32; `UserError` where one is too large for it, or became so as the folder was converted."""
    with np.errstate(over="ignore"):
        found = {name: value.astype(np.float32) for name, value in weights.items()}
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name} holds values that are too large for float32; scale the SAE down")
    return found
