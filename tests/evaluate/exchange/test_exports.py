"""Runs exported to SAELens and to dictionary_learning compute the same there."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hafs_evaluate.cli import main
from hafs_evaluate.exchange.dictionary_learning import to_dictionary_learning
from hafs_jax.api import load
from hafs_jax.base.errors import UserError
from hafs_jax.config import SAEConfig, TrainConfig
from hafs_jax.method.architectures import ARCHITECTURES
from hafs_jax.method.sae import InputScale, init_params
from hafs_jax.saelens import export_saelens, saelens_name
from tests.support.both_saes import CLASSES, D_OUT, B, D, F, K, assert_same, input_scale, of_saelens, of_trainer, rows
from tests.support.peers import dictionary_learning
from tests.support.runs import finished_run
from tests.support.stores import write_store

FORMS = {name: architecture.saelens for name, architecture in ARCHITECTURES.items()}
TRANSCODED = [name for name, form in FORMS.items() if form.transcoder]


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
    threshold = jnp.float32(0.35)
    record: dict[str, Any] = {"folder": "../../store", "fingerprint": "x"}
    record |= {"target": {**record, "folder": "../../target"}} if transcode else {}
    run = finished_run(tmp_path / "runs" / f"baseline-{architecture}", config, record, (D, D_OUT if transcode else D))
    state = SimpleNamespace(weights=lambda: params, threshold=lambda decay: threshold)

    def load_checkpoint(
        folder: Path, config: TrainConfig, d_model: int, d_out: int | None = None, step: Any = None
    ) -> Any:
        assert (d_model, d_out) == (D, D_OUT if transcode else D)
        return state, scale

    monkeypatch.setattr("hafs_jax.api.load_checkpoint", load_checkpoint)
    return run.folder, params, scale, threshold


@pytest.mark.parametrize(
    ("architecture", "transcode"), [(a, False) for a in ARCHITECTURES] + [(a, True) for a in TRANSCODED]
)
def test_every_architecture_is_exported_to_saelens(
    architecture: str, transcode: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, params, scale, threshold = hand_made_run(tmp_path, monkeypatch, architecture, transcode)
    folder = export_saelens(run)
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
    assert set(FORMS) - set(TRANSCODED) == {"topk", "hierarchical_topk", "gated"}
    for architecture in ("topk", "gated"):
        run = hand_made_run(tmp_path / architecture, monkeypatch, architecture, transcode=True)[0]
        with pytest.raises(
            UserError, match=f"no SAELens form for transcoder of architecture '{architecture}': it trains and loads"
        ):
            export_saelens(run)
        assert not (run / "sae").exists()
    with pytest.raises(UserError, match=r"run: no SAELens form for architecture 'other': .* train one of batchtopk,"):
        saelens_name("other", False, "run")


def test_one_hierarchical_topk_is_exported_at_several_k(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = hand_made_run(tmp_path, monkeypatch, "hierarchical_topk")[0]
    trained, _ = of_saelens(export_saelens(run), rows(5))
    files = {path.name: path.read_bytes() for path in (run / "sae").iterdir()}
    for k in (1, 2):
        assert main(["export", str(run), "--k", str(k)]) == 0
        folder = Path(capsys.readouterr().out.strip())
        assert folder == run / f"sae-k{k}"
        latents, recon = of_saelens(folder, rows(5))
        assert ((latents > 0).sum(1) <= k).all() and ((latents > 0).sum(1) == k).any()
        np.testing.assert_array_equal(latents[latents > 0], trained[latents > 0])
        sae = load(run, k=k)
        assert_same(np.asarray(sae(rows(5))), recon)
        assert f"k={k})" in repr(sae)
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert (metadata["k"], metadata["budgets"], metadata["l0"]) == (k, [1, 2, 3], None)
    assert {path.name: path.read_bytes() for path in (run / "sae").iterdir()} == files
    assert main(["export", str(run), "--k", "2", "--format", "dictionary_learning"]) == 0
    theirs, _ = dictionary_learning().utils.load_dictionary(capsys.readouterr().out.strip(), "cpu")
    assert int(theirs.k) == 2 and (run / "dictionary_learning-k2" / "trainer_0").is_dir()


def test_a_k_that_an_sae_cannot_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = hand_made_run(tmp_path / "a", monkeypatch, "topk")[0]
    for k in (0, K + 1):
        with pytest.raises(UserError, match=rf"baseline-topk: k={k}: expected 1 to {K}, the k of training"):
            export_saelens(run, k)
    for architecture in ("batchtopk", "relu"):
        run = hand_made_run(tmp_path / architecture, monkeypatch, architecture)[0]
        with pytest.raises(
            UserError, match=f"active latents of {architecture} are not chosen by k .* train one of topk,"
        ):
            load(run, k=2)


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

    assert main(["import-sae", str(place.parent), str(tmp_path / "back")]) == 0
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
    place = to_dictionary_learning(export_saelens(run), tmp_path / "out")
    assert torch.load(place / "ae.pt", weights_only=True)["group_sizes"].tolist() == [F]
