"""SAEs across libraries: exports and imports compared with SAELens's and dictionary_learning's own code."""

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from evaluate_helpers import saved_sae
from peers import dictionary_learning
from sae_lens import SAE as TorchSAE
from sae_lens.registry import get_sae_class
from stores import write_store

from evaluate.__main__ import main
from evaluate.bridge import export_run, saelens_name, write_saelens
from evaluate.interop import import_sae, to_dictionary_learning
from extract.format.errors import UserError
from hafs_jax.architectures import ARCHITECTURES, OperatingPoint
from hafs_jax.config import SAEConfig, TrainConfig
from hafs_jax.pretrained import read_saelens, read_start, scaled
from hafs_jax.runs import Run
from hafs_jax.sae import SAE, InputScale, folded, init_params

B, D, D_OUT, F, K = 60, 5, 7, 11, 3
SAELENS = ("standard", "topk", "jumprelu", "gated", "transcoder", "jumprelu_transcoder")
OURS = {"standard": "relu", "transcoder": "relu", "jumprelu_transcoder": "jumprelu"}  # others have the same name
TRANSCODED = [name for name in ARCHITECTURES if name not in ("topk", "gated")]


def rows(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 2.0, (B, D)).astype(np.float32)


def input_scale(transcode: bool = False) -> InputScale:
    random = np.random.default_rng(9)
    target = InputScale(jnp.asarray(random.normal(size=D_OUT), jnp.float32), jnp.float32(3.0), jnp.float32(D_OUT))
    mean_D = jnp.asarray(random.normal(size=D), jnp.float32)
    return InputScale(mean_D, jnp.float32(0.4), jnp.float32(D), target if transcode else None)


def saelens_folder(folder: Path, architecture: str, unit: bool = False, seed: int = 0, **cfg: Any) -> Path:
    """A random SAE of SAELens's own class, saved by SAELens; decoder rows of norms .5 to 2 unless `unit`."""
    kind, config = get_sae_class(architecture)
    cfg |= {"k": K} if architecture == "topk" else {}
    cfg |= {"d_out": D_OUT, "apply_b_dec_to_input": False} if "transcoder" in architecture else {}
    sae = kind(config(**{"d_in": D, "d_sae": F, "normalize_activations": "none", **cfg}))
    random = torch.Generator().manual_seed(seed)
    state = {name: 0.7 * torch.randn(value.shape, generator=random) for name, value in sae.state_dict().items()}
    norms = torch.ones(F) if unit else torch.linspace(0.5, 2.0, F)
    state["W_dec"] = torch.nn.functional.normalize(state["W_dec"], dim=1) * norms[:, None]
    sae.load_state_dict(state)
    sae.save_model(folder)
    return folder


def of_saelens(folder: Path, acts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SAELens's latents and reconstruction."""
    sae = TorchSAE.load_from_disk(folder)
    with torch.no_grad():
        latents = sae.encode(torch.tensor(acts))
        return latents.numpy(), sae.decode(latents).numpy()


def of_trainer(
    params: dict[str, Any], architecture: str, scale: InputScale, acts: np.ndarray, threshold: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """The trainer's own latents, in scaled units, and its reconstruction in raw units."""
    transcode = scale.target is not None
    config = SAEConfig(architecture=architecture, n_latents=F, k=K, transcode=transcode)
    assert set(params) == set(init_params(config, D, jax.random.key(0), D_OUT if transcode else None))
    params = {name: jnp.asarray(value) for name, value in params.items()}
    sae = SAE(config, D, D_OUT if transcode else None)
    encoding, recon = sae.apply({"params": params}, scale(jnp.asarray(acts)), OperatingPoint(K, threshold))
    out = scale.target or scale
    return np.asarray(encoding.latents_BF), np.asarray(recon) / float(out.scale) + np.asarray(out.mean_D)


def assert_same(found: np.ndarray, expected: np.ndarray, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape and np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() / np.abs(expected).max() < relative


# reading a start


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("architecture", SAELENS)
def test_a_start_from_saelens_computes_the_same_and_has_unit_rows(
    architecture: str, apply_b_dec: bool, tmp_path: Path
) -> None:
    transcode = "transcoder" in architecture
    cfg = {} if transcode else {"apply_b_dec_to_input": apply_b_dec}
    folder = saelens_folder(tmp_path, architecture, unit=architecture == "topk", **cfg)
    acts, scale, ours = rows(), input_scale(transcode), OURS.get(architecture, architecture)
    latents, recon = of_saelens(folder, acts)
    params, threshold = read_start(folder, ours, D, F, scale)
    our_latents, our_recon = of_trainer(params, ours, scale, acts)
    norms = np.linalg.norm(TorchSAE.load_from_disk(folder).W_dec.detach().numpy(), axis=1)
    assert_same(our_latents, latents * norms * float((scale.target or scale).scale))
    assert_same(our_recon, recon)
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 1.0, rtol=1e-6)
    assert (threshold is None) == ("jumprelu" not in architecture)

    raw, raw_threshold = folded({k: jnp.asarray(v) for k, v in params.items()}, scale, jnp.float32(0.0))
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


def test_scaled_undoes_folded_number_by_number() -> None:
    for transcode in (False, True):
        scale = input_scale(transcode)
        config = SAEConfig(architecture="jumprelu", n_latents=F, k=K, transcode=transcode)
        params = init_params(config, D, jax.random.key(3), D_OUT if transcode else None)
        random = np.random.default_rng(1)
        params |= {
            name: jnp.asarray(random.uniform(0, 1, params[name].shape), jnp.float32) for name in ("b_enc", "b_dec")
        }
        raw, threshold = folded(params, scale, jnp.float32(0.0))
        back, threshold = scaled(
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
    with pytest.raises(UserError, match="holds a gated SAE, which no relu SAE equals; train with --arch gated"):
        read_start(saelens_folder(tmp_path / "gated", "gated"), "relu", D, F, scale)
    with pytest.raises(UserError, match="holds a standard, this run trains a transcoder"):
        read_start(saelens_folder(tmp_path / "square", "standard", d_in=D), "relu", D, F,
                   dataclasses.replace(scale, target=scale))  # fmt: skip
    with pytest.raises(UserError, match="d_out=7, this run needs 5"):
        read_start(saelens_folder(tmp_path / "transcoder", "transcoder"), "relu", D, F, scale)
    with pytest.raises(UserError, match=r"d_in=5, this run needs 6; start from an SAE of this store's model"):
        read_start(standard, "relu", D + 1, F, scale)
    with pytest.raises(UserError, match=r"d_sae=11, this run needs 12; set --sae\.n-latents 11"):
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


# exporting runs


def hand_made_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, transcode: bool = False, sampled: int = 0
) -> tuple[Path, dict[str, Any], InputScale, Any]:
    """A finished run's folder with random parameters in place of a checkpoint: (folder, params, scale, threshold)."""
    sae = SAEConfig(architecture=architecture, n_latents=F, k=K, transcode=transcode, sampled_prefixes=sampled)
    config, scale = TrainConfig(tokens=50, batch_size=10, sae=sae), input_scale(transcode)
    store, target = tmp_path / "store", tmp_path / "target"
    write_store(store, rows())
    write_store(target, np.zeros((B, D_OUT)))
    params = init_params(sae, D, jax.random.key(4), D_OUT if transcode else None)
    random = np.random.default_rng(2)
    for name in set(params) - {"W_enc", "W_dec"}:
        params[name] = jnp.asarray(random.uniform(0.0, 0.3, params[name].shape), jnp.float32)
    run, threshold = Run(tmp_path / "runs" / f"baseline-{architecture}"), jnp.float32(0.35)
    record = {"folder": "../../store", "fingerprint": "x"}
    run.write_config(config, record | ({"target": {**record, "folder": "../../target"}} if transcode else {}))
    final = {"l0": 3.0, "dead_fraction": 0.0, "fvu_ema": 0.25}
    run.result_path.write_text(json.dumps({"name": run.folder.name, "tokens": 50, "final": final}))
    state = SimpleNamespace(weights=lambda: params, threshold=lambda decay: threshold)

    def load_checkpoint(folder: Path, config: TrainConfig, d_model: int, d_out: int | None = None) -> Any:
        assert (d_model, d_out) == (D, D_OUT if transcode else None)
        return state, scale

    monkeypatch.setattr("hafs_jax.checkpoint.load_checkpoint", load_checkpoint)
    return run.folder, params, scale, threshold


@pytest.mark.parametrize(
    ("architecture", "transcode"), [(a, False) for a in ARCHITECTURES] + [(a, True) for a in TRANSCODED]
)
def test_every_architecture_is_exported_to_saelens(
    architecture: str, transcode: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, params, scale, threshold = hand_made_run(tmp_path, monkeypatch, architecture, transcode)
    folder = export_run(run)
    latents, recon = of_saelens(folder, rows(5))
    our_latents, our_recon = of_trainer(params, architecture, scale, rows(5), threshold)
    assert_same(recon, our_recon)
    assert_same(latents * float(scale.scale), our_latents)
    assert 0 < (latents > 0).mean() < 1
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == saelens_name(architecture, transcode, "")
    assert cfg["metadata"]["training_architecture"] == architecture
    assert cfg["metadata"].get("hook_name_out") == ("blocks.0.hook_resid_post" if transcode else None)


def test_what_saelens_has_no_form_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture in ("topk", "gated"):
        run = hand_made_run(tmp_path / architecture, monkeypatch, architecture, transcode=True)[0]
        with pytest.raises(
            UserError, match=f"no SAELens form for transcoder of architecture '{architecture}'; expected"
        ):
            export_run(run)
        assert not (run / "sae").exists()
    with pytest.raises(UserError, match="no SAELens form for architecture 'other'; expected one of relu"):
        saelens_name("other", False, "run")


CLASSES = {
    "relu": "AutoEncoder",
    "matryoshka_relu": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_exported_to_dictionary_learning_and_comes_back(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = hand_made_run(tmp_path, monkeypatch, architecture)[0]
    assert main(["export", str(run), "--format", "dictionary_learning"]) == 0
    place = Path(capsys.readouterr().out.strip())
    assert place == run / "dictionary_learning" / "trainer_0"
    theirs, config = dictionary_learning().utils.load_dictionary(str(place), "cpu")
    trainer = config["trainer"]
    assert type(theirs).__name__ == trainer["dict_class"] == CLASSES[architecture]
    assert (trainer["layer"], trainer["lm_name"], config["buffer"]["ctx_len"]) == (0, "tiny", 8)
    assert {value.dtype for value in theirs.parameters()} == {torch.float32}
    acts = rows(6)
    latents, recon = of_saelens(run / "sae", acts)
    with torch.no_grad():
        assert_same(theirs.encode(torch.tensor(acts)).numpy(), latents)
        assert_same(theirs(torch.tensor(acts)).numpy(), recon)
    if architecture == "matryoshka":
        assert theirs.group_sizes.tolist() == [1, 1, 3, 6]  # 1/32, 3/32, 7/32, 15/32 and 1 of F, no group empty

    assert main(["import", str(place.parent), str(tmp_path / "back")]) == 0
    back_latents, back_recon = of_saelens(tmp_path / "back", acts)
    assert_same(back_latents, latents)
    assert_same(back_recon, recon)
    before, after = (json.loads((f / "cfg.json").read_text()) for f in (run / "sae", tmp_path / "back"))
    assert before["architecture"] == after["architecture"] and before.get("k") == after.get("k")
    kept = ["model_name", "hook_name", "context_size"] + (["prefixes"] if architecture == "matryoshka" else [])
    for name in kept:
        assert before["metadata"][name] == after["metadata"][name] is not None


def test_sampled_prefixes_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = hand_made_run(tmp_path, monkeypatch, "matryoshka", sampled=3)[0]
    place = to_dictionary_learning(export_run(run), tmp_path / "out")
    assert torch.load(place / "ae.pt", weights_only=True)["group_sizes"].tolist() == [F]


# importing


def library_sae(name: str) -> Any:
    """A random SAE of dictionary_learning's class `name`, its decoder's norms not 1."""
    peer = dictionary_learning()
    torch.manual_seed(3)
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        sae = getattr(peer.top_k if name == "AutoEncoderTopK" else peer.batch_top_k, name)(D, F, K)
    elif name == "MatryoshkaBatchTopKSAE":
        sae = peer.matryoshka.MatryoshkaBatchTopKSAE(D, F, K, [2, 4, 5])
    else:
        sae = getattr(peer.dictionary, name)(D, F)
    random = torch.Generator().manual_seed(8)
    for parameter in sae.parameters():
        parameter.data = 0.8 * torch.randn(parameter.shape, generator=random)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        sae.threshold.fill_(0.4)
    return sae


def library_folder(folder: Path, name: str, **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(library_sae(name).state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "layer": 4, "lm_name": "EleutherAI/pythia-70m-deduped", "k": K} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return folder


NAMES = [*dict.fromkeys(CLASSES.values()), "AutoEncoderNew"]


@pytest.mark.parametrize("name", NAMES)
def test_every_class_of_dictionary_learning_is_imported(name: str, tmp_path: Path) -> None:
    folder = import_sae(library_folder(tmp_path / "source", name), tmp_path / "sae")
    theirs, acts = library_sae(name), rows(7)
    latents, recon = of_saelens(folder, acts)
    with torch.no_grad():
        assert_same(latents, theirs.encode(torch.tensor(acts)).numpy())
        assert_same(recon, theirs(torch.tensor(acts)).numpy())
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == "blocks.4.hook_resid_post"
    assert cfg["metadata"]["model_name"] == "EleutherAI/pythia-70m-deduped"
    assert cfg["metadata"]["context_size"] == 128
    # and as a start for training, but for a topk, whose decoder's norms differ
    if name != "AutoEncoderTopK":
        ours = {"AutoEncoderNew": "relu", "BatchTopKSAE": "jumprelu", "MatryoshkaBatchTopKSAE": "jumprelu"}
        ours |= {their: our for our, their in CLASSES.items() if their not in ours and our != "matryoshka_relu"}
        params, _ = read_start(folder, ours[name], D, F, input_scale())
        assert_same(of_trainer(params, ours[name], input_scale(), acts)[1], recon)


def test_a_threshold_that_training_never_set_keeps_every_positive_latent(tmp_path: Path) -> None:
    folder = library_folder(tmp_path / "source", "BatchTopKSAE")
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    import_sae(folder, tmp_path / "sae")
    theirs = dictionary_learning().utils.load_dictionary(str(folder), "cpu")[0]
    with torch.no_grad():
        assert_same(of_saelens(tmp_path / "sae", rows())[0], theirs.encode(torch.tensor(rows())).numpy())


def test_the_hook_point_of_an_import(tmp_path: Path) -> None:
    def hook(**trainer: Any) -> Any:
        source = library_folder(tmp_path / str(len(list(tmp_path.iterdir()))), "AutoEncoder", **trainer)
        folder = import_sae(source, tmp_path / "out", hook_point=given)
        return TorchSAE.load_from_disk(folder).cfg.metadata.hook_name

    given = None
    assert hook(submodule_name="resid_pre_layer_4") == "blocks.4.hook_resid_pre"
    assert hook(submodule_name="something") is None
    assert hook(layer=None) is None
    assert hook(hook_name="blocks.1.hook_mlp_out") == "blocks.1.hook_mlp_out"
    given = "blocks.2.hook_resid_mid"
    assert hook(hook_name="blocks.1.hook_mlp_out") == "blocks.2.hook_resid_mid"
    import_sae(saved_sae(tmp_path / "saelens", D, F), tmp_path / "out", hook_point=given)
    assert TorchSAE.load_from_disk(tmp_path / "out").cfg.metadata.hook_name == given


def test_a_saelens_folder_is_copied_and_replaces_what_was_there(tmp_path: Path) -> None:
    source, target = saved_sae(tmp_path / "source", D, F, "jumprelu"), tmp_path / "target"
    safetensors.torch.save_file({"sparsity": torch.zeros(F)}, source / "sparsity.safetensors")
    import_sae(source, target)
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((target / "cfg.json").read_text()) == json.loads((source / "cfg.json").read_text())
    import_sae(library_folder(tmp_path / "other", "AutoEncoder"), target)
    assert {path.name for path in target.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    with pytest.raises(UserError, match="expected a target folder other than the source"):
        import_sae(source, source)


@dataclasses.dataclass
class Attack:
    path: Path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_what_cannot_be_imported_is_one_line_and_leaves_the_target(tmp_path: Path) -> None:
    target = saved_sae(tmp_path / "target", D, F)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def refused(source: Path, match: str, form: str = "auto") -> None:
        with pytest.raises(UserError, match=match) as error:
            import_sae(source, target, form)
        assert "\n" not in str(error.value)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before

    refused(tmp_path / "nowhere", r"SAELens folder \(cfg\.json\) or dictionary_learning's ae\.pt at .*, found neither")
    refused(library_folder(tmp_path / "saelens", "AutoEncoder"), r"expected a SAELens folder's cfg\.json", "saelens")
    folder = library_folder(tmp_path / "a" / "trainer_0", "AutoEncoderTopK")
    library_folder(tmp_path / "a" / "trainer_1", "AutoEncoder")
    refused(tmp_path / "a", "holds 2 SAEs; name one of .*trainer_0, .*trainer_1")
    refused(library_folder(tmp_path / "b", "AutoEncoder", dict_class="AutoEncoderNow"), "did you mean 'AutoEncoderNew'")
    refused(
        library_folder(tmp_path / "c", "AutoEncoder", dict_class="GatedAutoEncoder"), "expected the keys decoder.weight"
    )
    (folder / "config.json").unlink()
    refused(folder / "ae.pt", r"config\.json beside it .* could be any of AutoEncoderTopK, BatchTopKSAE")
    torch.save({"weight": torch.zeros(2)}, folder / "ae.pt")
    refused(folder, "found none; its keys are weight")
    state = library_sae("AutoEncoder").state_dict()
    torch.save(state | {"bias": torch.zeros(D + 1)}, folder / "ae.pt")
    refused(folder, r"b_dec has shape \[6\], its encoder says \[5\]")
    torch.save(state | {"bias": torch.full((D,), torch.inf)}, folder / "ae.pt")
    refused(folder, "b_dec holds values that are not finite")
    torch.save([1, 2], folder / "ae.pt")
    refused(folder, "expected a state_dict of tensors, found list")
    (folder / "ae.pt").write_bytes(pickle.dumps({"bias": Attack(tmp_path / "attacked")}, protocol=2))
    refused(folder, "expected a state_dict, found a file that does not load")
    assert not (tmp_path / "attacked").exists()
    (folder / "ae.pt").write_bytes(b"not a file of torch's")
    refused(folder, "expected a state_dict, found a file that does not load")
    broken = saelens_folder(tmp_path / "broken", "standard")
    cfg = json.loads((broken / "cfg.json").read_text())
    (broken / "cfg.json").write_text(json.dumps(cfg | {"architecture": "batchtopk"}))
    refused(broken, r"SAELens does not load it \(KeyError")
    (broken / "cfg.json").write_text(json.dumps(cfg | {"architecture": "jumprelu"}))
    refused(broken, r"SAELens does not load it \(RuntimeError: .*threshold")
    (broken / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "expected_average_only_in"}))
    refused(broken, "SAELens leaves that factor out")


def test_a_transcoder_has_no_class_in_dictionary_learning(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a transcoder, for which dictionary_learning has no class"):
        to_dictionary_learning(saelens_folder(tmp_path, "transcoder"), tmp_path / "out")


def test_the_command_line_says_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, line in (
        (["export", str(tmp_path / "x")], "expected a run's folder"),
        (["import", str(tmp_path / "x"), str(tmp_path / "y")], "found neither"),
        (["import", "x", "y", "--format", "sparsify"], "sparsify"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert line in capsys.readouterr().err.splitlines()[-1]


def test_a_public_sae_is_measured_like_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "heldout"):
        write_store(tmp_path / "out" / "p" / "store" / split, rows(), split=split)
    (tmp_path / "out" / "p" / "runs" / "taken").mkdir(parents=True)
    source = library_folder(tmp_path / "public" / "their-sae", "GatedAutoEncoder", layer=0)
    command = [
        "run",
        "--out",
        str(tmp_path / "out"),
        "--profile",
        "p",
        "--device",
        "cpu",
        "--sae",
        str(source / "ae.pt"),
    ]
    skip = ["--skip", "splice", "probing", "hierarchy", "latents"]
    assert main([*command, *skip]) == 0
    result = tmp_path / "out" / "p" / "eval" / "their-sae" / "core.json"
    values = json.loads(result.read_text())
    latents, recon = of_saelens(tmp_path / "out" / "p" / "imported" / "their-sae" / "sae", rows())
    variation = np.square(rows() - rows().mean(0)).sum()
    assert values["reconstruction"]["fvu"] == pytest.approx(np.square(rows() - recon).sum() / variation, rel=1e-4)
    assert values["sparsity"]["l0"] == pytest.approx((latents > 0).sum(1).mean())
    written = result.stat().st_mtime_ns
    assert main([*command, *skip]) == 0 and result.stat().st_mtime_ns == written  # not done twice
    short = [*command[-2:], *command[1:-2], "--name", "short"]
    assert short[0] == "--sae" and main([*short, *skip]) == 0  # the short form, without `run`
    again = json.loads((tmp_path / "out" / "p" / "eval" / "short" / "core.json").read_text())
    assert again["reconstruction"] == values["reconstruction"]
    for wrong in (["--runs", "taken"], ["--name", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main([*(command if wrong[0] == "--runs" else command[:-2]), *wrong, *skip])
        assert "expected --name only with --sae" in capsys.readouterr().err
    for name in ("taken", "llm", "a/b", ".."):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--name", name, *skip])
        assert f"--name '{name}': expected a name that no run" in capsys.readouterr().err
