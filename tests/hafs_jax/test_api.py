"""A trained SAE as an object: what it accepts, what it computes, its weights in the model's units."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from hafs_jax.api import TrainedSAE, load
from hafs_jax.base.errors import UserError
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.method.sae import init_params
from hafs_jax.presets import preset, with_fields
from hafs_jax.training.checkpoint import blank
from hafs_jax.training.state import hyperparameters, init_state
from hafs_jax.training.train import train
from tests.support.both_saes import D_OUT, B, D, F, K, assert_same, input_scale, rows
from tests.support.stores import write_store

SHAPES = [(D,), (0, D), (B, D), (4, 15, D), (2, D, D), (2, 3, 10, D)]  # where L = D, too


@functools.cache
def made(architecture: str = "batchtopk", transcode: bool = False) -> TrainedSAE:
    """An SAE of random parameters."""
    config = with_fields(preset("baseline", architecture), {"sae": {"n_latents": F, "k": K, "transcode": transcode}})
    shapes = init_params(config.sae, D, jax.random.key(0), D_OUT if transcode else None)
    random = np.random.default_rng(4)
    params = {name: jnp.asarray(random.normal(size=value.shape), jnp.float32) for name, value in shapes.items()}
    params |= {"threshold": jnp.abs(params["threshold"])} if "threshold" in params else {}
    return TrainedSAE(config, params, input_scale(transcode), jnp.float32(0.3))


def shaped(shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape[:-1]))
    return rows()[:count].reshape(shape)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_leading_shape_is_taken(architecture: str) -> None:
    sae = made(architecture)
    expected = np.stack([np.asarray(sae.encode(row)) for row in rows()])
    for shape in SHAPES:
        acts = shaped(shape)
        latents, recon = sae.encode(acts), sae(acts)
        assert latents.shape == (*shape[:-1], F) and recon.shape == shape
        count = acts.size // D
        np.testing.assert_allclose(latents.reshape(-1, F), expected[:count], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(recon, sae.decode(latents), rtol=1e-6)
    assert made("relu", True)(shaped((4, 15, D))).shape == (4, 15, D_OUT)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "jumprelu", "topk", "relu", "gated"])
@pytest.mark.parametrize("transcode", [False, True])
def test_the_weights_in_the_models_units_compute_the_same(architecture: str, transcode: bool) -> None:
    sae, x = made(architecture, transcode), rows()
    latents = np.asarray(sae.encode(x))
    W_enc, b_enc, W_dec, b_dec = (np.asarray(getattr(sae, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert (W_enc.shape, b_enc.shape, W_dec.shape) == ((D, F), (F,), (F, D_OUT if transcode else D))
    assert_same(latents @ W_dec + b_dec, np.asarray(sae(x)))
    assert_same(np.asarray(sae.decode(latents)), np.asarray(sae(x)))
    pre = (x if transcode else x - b_dec) @ W_enc + b_enc
    if architecture in ("batchtopk", "matryoshka", "jumprelu"):
        assert sae.threshold is not None
        assert_same(np.where(pre > np.asarray(sae.threshold), np.maximum(pre, 0), 0), latents)
    else:
        assert sae.threshold is None
    if architecture == "relu":
        assert_same(np.maximum(pre, 0), latents)


class Boxed:
    """What knows how to become an array, as a pandas frame does."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return rows()


@pytest.mark.parametrize(
    ("acts", "error"),
    [
        (rows().tolist(), 0),
        (list(torch.tensor(rows(), requires_grad=True)), 0),
        (list(jnp.asarray(rows())), 0),
        (Boxed(), 0),
        (rows().astype(np.float64), 0),
        (np.asfortranarray(rows())[::1], 0),
        (jnp.asarray(rows()), 0),
        (torch.tensor(rows()), 0),
        (torch.tensor(rows(), dtype=torch.float64, requires_grad=True), 0),
        (torch.nn.Parameter(torch.tensor(rows())), 0),
        (torch.tensor(rows()).to_sparse(), 0),
        (rows().astype(np.float16), 2e-3),
        (torch.tensor(rows()).half(), 2e-3),
        (rows().astype(ml_dtypes.bfloat16), 2e-2),
        (jnp.asarray(rows(), jnp.bfloat16), 2e-2),
        (torch.tensor(rows()).bfloat16().requires_grad_(), 2e-2),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_any_kind_of_array_is_taken(acts: Any, error: float) -> None:
    sae = made("relu")  # without a jump, rounded activations give nearly the same
    assert_same(np.asarray(sae(acts)), np.asarray(sae(rows())), max(error, 1e-6))
    assert sae(acts).dtype == sae.encode(acts).dtype == jnp.float32
    whole = np.round(rows()).astype(np.int32)
    np.testing.assert_array_equal(sae(whole), sae(whole.astype(np.float32)))


def nonfinite(value: float) -> np.ndarray:
    acts = rows()
    acts[3, 2] = value
    return acts


@pytest.mark.parametrize(
    ("acts", "found"),
    [
        (rows()[:, :4], r"found shape \[60, 4\]"),
        (rows().T, r"found shape \[5, 60\]"),
        (np.float32(1.0), r"found shape \[\]"),
        ([], r"found shape \[0\]"),
        (np.zeros((3, 0)), r"found shape \[3, 0\]"),
        (None, "found values of dtype object"),
        ("acts.npy", "found values of dtype <U8"),
        (rows().astype(object), "found values of dtype object"),
        (rows() > 0, "found values of dtype bool"),
        (torch.tensor(rows()) > 0, "found values of dtype bool"),
        (jnp.asarray(rows()) > 0, "found values of dtype bool"),
        (rows().astype(np.complex64), "found values of dtype complex64"),
        (rows().astype(np.float16).view("V2"), r"found values of dtype \|V2"),
        (jax.random.key(0), "found values of dtype key"),
        ([[1.0, 2.0], [3.0]], "found a list that is no array"),
        (torch.empty(3, D, device="meta"), "found a Tensor that is no array"),
        (nonfinite(np.nan), "found values that are not finite"),
        (torch.tensor(nonfinite(np.inf)), "found values that are not finite"),
        (jnp.asarray(nonfinite(-np.inf)), "found values that are not finite"),
        (1e39 * rows().astype(np.float64), "found values that are not finite in float32"),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}-{getattr(value, 'shape', '')}",
)
def test_what_is_no_activation_is_one_line_that_names_the_width(acts: Any, found: str) -> None:
    for call in (made().encode, made()):
        with pytest.raises(
            UserError, match=rf"expected activations \[\.\.\., D\] with this SAE's D=5, {found}"
        ) as error:
            call(acts)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"expected latents \[\.\.\., F\] with this SAE's F=11, found shape \[60, 5\]"):
        made().decode(rows())


def test_it_is_a_pytree_of_one_line() -> None:
    sae, acts = made(), rows()
    inside = jax.jit(lambda sae, acts: sae(acts))(sae, acts)
    assert_same(np.asarray(inside), np.asarray(sae(acts)))
    assert_same(np.asarray(jax.vmap(sae)(acts)), np.asarray(sae(acts)))
    with pytest.raises(UserError, match=r"found shape \[4\]"):
        jax.vmap(sae)(acts[:, :4])
    assert repr(sae) == "TrainedSAE(baseline-s0: batchtopk, D=5, F=11, k=3)"
    assert repr(made("relu", True)) == "TrainedSAE(baseline-relu-s0: relu, D=5, D_out=7, F=11, k=3)"
    assert {sae: 1}[sae] == 1 and sae == made() and sae != made("relu")


@pytest.mark.parametrize("variant", ["baseline", "adaptive"])
def test_a_run_is_loaded_without_compiling_the_model(variant: str, tmp_path: Path) -> None:
    """Shapes are traced, not computed: op by op, loading compiled over a hundred programs."""
    store = write_store(tmp_path / "train", rows().repeat(4, 0))
    fields: dict[str, Any] = {"tokens": 64, "batch_size": 16, "sae": {"n_latents": F, "k": K}}
    fields |= {"penalty": {"tau": 0.5}} if variant == "adaptive" else {}
    run = train(with_fields(preset(variant), fields), store, tmp_path / "runs", progress=False)
    jax.clear_caches()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    sae = load(run.folder)
    assert 0 < sum("backend_compile" in event for event in compiled) < 30
    assert sae(rows()).shape == rows().shape
    expected = init_state(run.config(), D, jax.random.key(0), hyperparameters(run.config()))
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(blank(run.config(), D)[0])] == shapes


def test_the_object_needs_no_torch() -> None:
    script = "import sys, hafs_jax.api\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
