"""A trained SAE as a Python object: raw activations in, latents and reconstructions in the model's units out."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hafs_jax.base.errors import UserError
from hafs_jax.base.tensors import check_dtype, host_array
from hafs_jax.config import SAEConfig, TrainConfig
from hafs_jax.method.architectures import ARCHITECTURES, OperatingPoint
from hafs_jax.method.sae import SAE, InputScale
from hafs_jax.ops.devices import check_devices
from hafs_jax.ops.products import Params
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run, is_run
from hafs_jax.saelens_files import CFG
from hafs_jax.saelens_format import fold, read_saelens
from hafs_jax.sources import sae_folder
from hafs_jax.training.checkpoint import load_checkpoint


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "scale", "scaled_threshold"),
    meta_fields=("config", "source"),
)
@dataclass(frozen=True, eq=False, repr=False)
class TrainedSAE:
    """What training left behind, at inference. A pytree, so that `jax.jit` takes it as an argument.

    `encode`, `decode` and the call take one row [D], or rows of any leading shape [..., D]: arrays of numpy and JAX,
    tensors of torch of any dtype and device, with or without gradient, and lists. They compute in float32.

    W_enc, b_enc, W_dec, b_dec and threshold are in the model's units: with pre = (x - b_dec) @ W_enc + b_enc, of a
    transcoder x @ W_enc + b_enc, the latents of an architecture with a threshold are pre where pre > threshold, and the
    reconstruction is latents @ W_dec + b_dec. The fields `params` and `scaled_threshold` are in scaled units (see
    `method.sae`).
    """

    config: TrainConfig
    params: Params
    scale: InputScale
    scaled_threshold: Float[Array, ""]
    source: str = ""  # of an SAE that was read from a SAELens folder: which

    def __repr__(self) -> str:
        sae, name = self.config.sae, self.source or self.config.run_name
        width = f"D={self.d_model}" + (f", D_out={self.d_out}" if sae.transcode else "")
        k = f", k={sae.k}" if not self.source or sae.architecture == "topk" else ""  # else nobody knows it
        return f"TrainedSAE({name}: {sae.architecture}, {width}, F={self.n_latents}{k})"

    @property
    def d_model(self) -> int:
        """D, the width of the activations that are encoded."""
        return self.params["W_enc"].shape[1]

    @property
    def d_out(self) -> int:
        """The width of the reconstruction: D, or of a transcoder its target's."""
        return self.params["W_dec"].shape[1]

    @property
    def n_latents(self) -> int:
        return self.params["W_dec"].shape[0]

    @property
    def W_enc(self) -> Float[Array, "D F"]:
        return self._folded[0]["W_enc"]

    @property
    def b_enc(self) -> Float[Array, "F"]:
        """The encoder's bias; of a gated SAE the gate's."""
        return self._folded[0]["b_enc"]

    @property
    def W_dec(self) -> Float[Array, "F D_out"]:
        """The dictionary: unit rows; of a transcoder rows of one other norm."""
        return self._folded[0]["W_dec"]

    @property
    def b_dec(self) -> Float[Array, "D_out"]:
        return self._folded[0]["b_dec"]

    @property
    def threshold(self) -> Float[Array, "..."] | None:
        """One number, or of jumprelu one for each latent; None where the architecture has none."""
        has_one = ARCHITECTURES[self.config.sae.architecture].learns_threshold or "threshold" in self.params
        return self._folded[1] if has_one else None

    def encode(self, acts: Any) -> Float[Array, "*B F"]:
        """The latents of raw activations [..., D], in the model's units: reconstruction = latents @ W_dec + b_dec.

        Raises `UserError` where the last dimension is not D, or the values are no finite numbers.
        """

        def rows(acts_BD: Array) -> Array:
            return _encode(self.params, acts_BD, self.scale, self.scaled_threshold, self.config.sae)

        return _by_row(rows, acts, self.d_model, f"activations [..., D] with this SAE's D={self.d_model}")

    def decode(self, latents: Any) -> Float[Array, "*B D"]:
        """The raw reconstruction of latents [..., F] in the model's units; a transcoder's is of its target.

        Raises `UserError` where the last dimension is not F, or the values are no finite numbers.
        """

        def rows(latents_BF: Array) -> Array:
            return _decode(self.params, latents_BF, self.scale, self.config.sae)

        return _by_row(rows, latents, self.n_latents, f"latents [..., F] with this SAE's F={self.n_latents}")

    def __call__(self, acts: Any) -> Float[Array, "*B D"]:
        """The raw reconstruction of raw activations [..., D]."""
        return self.decode(self.encode(acts))

    @functools.cached_property
    def _folded(self) -> tuple[Params, Array]:
        return fold(self.params, self.scale, self.scaled_threshold)


def load(source: Path | str, which: str = "last", k: int | None = None) -> TrainedSAE:
    """The SAE of a run's folder or a SAELens folder; of the hub ("hub:USER/REPO/NAME") or a SAELens release
    ("release:RELEASE/ID"), see `hafs_jax.sources`.

    Of a run, `which` says the `last` checkpoint, or the `best` on held-out rows. A SAELens folder may hold any
    architecture and setting that one of ours equals: standard, topk, jumprelu, gated, and transcoders of these. Its
    latents are SAELens's.

    `k` is the number of active latents per row, from 1 to the config's (None: the config's). hierarchical_topk is
    trained for several; topk takes a smaller one too. Raises `UserError` where there is no such SAE or checkpoint, for
    one that no architecture of ours equals, and for a k that the architecture cannot have.
    """
    if which not in ("last", "best"):
        raise UserError(f"which={which!r}: expected last or best")
    check_devices()
    folder = sae_folder(source)
    if (folder / CFG).exists() and not is_run(folder):
        if which == "best":
            raise UserError(f"which='best': expected a run, found a SAELens folder at {folder}, which holds one SAE")
        return _of_saelens(folder, k, str(source))
    if folder.is_dir() and not is_run(folder):
        raise UserError(f"{folder}: expected a run's config.json or a SAELens folder's {CFG}, found neither")
    run = Run(folder)
    config, (d_model, d_out) = run.config(), run.widths()
    folder, step = run.checkpoint(which)
    state, scale = load_checkpoint(folder, config, d_model, d_out, step)
    threshold = state.threshold(config.sparsity.threshold_decay)
    if k is not None:
        config = _with_k(config, k, run.folder)
    return TrainedSAE(config, state.weights(), scale, threshold)


def _of_saelens(folder: Path, k: int | None, source: str) -> TrainedSAE:
    """The SAE of a SAELens folder. It takes raw activations already: its scale is 1, its mean 0."""
    weights, cfg = read_saelens(folder)
    kind, (D, F) = cfg["architecture"], weights["W_enc"].shape
    forms = {name: form for name, architecture in ARCHITECTURES.items() if (form := architecture.saelens) is not None}
    names = [name for name, form in forms.items() if kind in (form.sae, form.transcoder) and not form.repeats_threshold]
    if not names:  # a format that is read, and that a plugin has taken the architecture of
        raise UserError(f"{folder / CFG}: no architecture of ours computes what SAELens's {kind!r} does")
    transcode, d_out = "transcoder" in kind, weights["W_dec"].shape[1]
    metadata_k = (cfg.get("metadata") or {}).get("k")
    chosen = cfg.get("k") or (metadata_k if isinstance(metadata_k, int) and 1 <= metadata_k <= F else 1)
    fields = {"n_latents": F, "k": chosen, "transcode": transcode}
    config = with_fields(preset("baseline", names[0]), {"sae": fields})
    params = {name: jnp.asarray(value.T if name == "W_enc" else value) for name, value in weights.items()}
    target = InputScale(jnp.zeros(d_out), jnp.float32(1), jnp.float32(d_out)) if transcode else None
    scale = InputScale(jnp.zeros(D), jnp.float32(1), jnp.float32(D), target)
    if k is not None:
        config = _with_k(config, k, folder)
    return TrainedSAE(config, params, scale, jnp.float32(0), source.rstrip("/"))


def _with_k(config: TrainConfig, k: int, where: Path) -> TrainConfig:
    """The config at inference with another k; `UserError`, naming the run, where there is no such k."""
    architecture = ARCHITECTURES[config.sae.architecture]
    if architecture.learns_threshold or architecture.cost is not None:
        having = [name for name, of in ARCHITECTURES.items() if not of.learns_threshold and of.cost is None]
        raise UserError(
            f"{where}: k={k}: the active latents of {config.sae.architecture} are not chosen by k at inference; leave "
            f"k out, or train one of {', '.join(having)}"
        )
    if not 1 <= k <= config.sae.k:
        raise UserError(f"{where}: k={k}: expected 1 to {config.sae.k}, the k of training")
    return dataclasses.replace(config, sae=dataclasses.replace(config.sae, k=k))


def _by_row(function: Callable[[Array], Array], values: Any, width: int, what: str) -> Array:
    """`function` of rows [B, width], applied to values of any leading shape; `what` names what they must be."""
    array = _float_array(values, what)
    if array.ndim == 0 or array.shape[-1] != width:
        raise UserError(f"expected {what}, found shape {list(array.shape)}; the last dimension must be {width}")
    found = function(array.reshape(-1, width))
    return found.reshape(*array.shape[:-1], found.shape[-1])


def _float_array(values: Any, what: str) -> Array:
    """The values in float32; `UserError` where they are no finite numbers. Those of a traced array are not known."""
    if isinstance(values, jax.Array):
        check_dtype(values.dtype, what)
        array = values.astype(jnp.float32)
        is_finite = isinstance(array, jax.core.Tracer) or bool(jnp.isfinite(array).all())
    else:
        host = host_array(values, what)
        is_finite, array = bool(np.isfinite(host).all()), jnp.asarray(host)
    if not is_finite:
        raise UserError(f"expected {what}, found values that are not finite in float32; leave such rows out")
    return array


@functools.partial(jax.jit, static_argnames="config")
def _encode(params: Params, acts_BD: Array, scale: InputScale, threshold: Array, config: SAEConfig) -> Array:
    sae = SAE(config, acts_BD.shape[1], params["W_dec"].shape[1])
    at = OperatingPoint(config.k, threshold)
    return cast(Any, sae.apply({"params": params}, scale(acts_BD), at, method="encode")).latents_BF / scale.scale


@functools.partial(jax.jit, static_argnames="config")
def _decode(params: Params, latents_BF: Array, scale: InputScale, config: SAEConfig) -> Array:
    into = scale if scale.target is None else scale.target
    sae = SAE(config, params["W_enc"].shape[1], params["W_dec"].shape[1])
    recon_BD = cast(Array, sae.apply({"params": params}, latents_BF * scale.scale, method="decode"))
    return recon_BD / into.scale + into.mean_D[None]
