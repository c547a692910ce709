"""SAEs of dictionary_learning and SAELens imported, and measured like runs."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from sae_lens import SAE as TorchSAE

from hafs_evaluate.cli import main
from hafs_evaluate.exchange.dictionary_classes import library_class
from hafs_evaluate.exchange.dictionary_learning import import_sae, to_dictionary_learning
from hafs_jax.base.errors import UserError
from hafs_jax.saelens_format import read_start
from tests.support.both_saes import (
    CLASSES,
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
from tests.support.peers import dictionary_learning
from tests.support.stores import write_store
from tests.support.torch_saes import saved_sae


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


def test_an_architecture_is_written_as_the_class_of_its_own_or_of_its_form() -> None:
    assert library_class("jumprelu", "batchtopk") == "BatchTopKSAE"
    assert library_class("jumprelu", "matryoshka") == "MatryoshkaBatchTopKSAE"
    assert library_class("jumprelu", "of another library") == library_class("jumprelu") == "JumpReluAutoEncoder"
    assert library_class("standard", "matryoshka_relu") == "AutoEncoder"  # AutoEncoderNew is read alone


def test_a_threshold_that_training_never_set_keeps_every_positive_latent(tmp_path: Path) -> None:
    folder = library_folder(tmp_path / "source", "BatchTopKSAE")
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(state | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    import_sae(folder, tmp_path / "sae")
    theirs = dictionary_learning().utils.load_dictionary(str(folder), "cpu")[0]
    with torch.no_grad():
        assert_same(of_saelens(tmp_path / "sae", rows())[0], theirs.encode(torch.tensor(rows())).numpy())


def test_a_pointer_in_place_of_a_dictionary_is_named(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"expected a state_dict at .*ae\.pt, found a Git-LFS pointer"):
        import_sae(tmp_path / "ae.pt", tmp_path / "sae")


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
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()} | {"checksums.json"}
    for name in ("sae_weights.safetensors", "sparsity.safetensors"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((target / "cfg.json").read_text()) == json.loads((source / "cfg.json").read_text())
    import_sae(library_folder(tmp_path / "other", "AutoEncoder"), target)
    assert {path.name for path in target.iterdir()} == {"cfg.json", "checksums.json", "sae_weights.safetensors"}
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
    (broken / "cfg.json").write_text(json.dumps(cfg | {"architecture": "topk"}))
    refused(broken, "architecture 'topk' needs k from 1 to d_sae=11, found None")
    (broken / "cfg.json").write_text(json.dumps(cfg | {"architecture": "batchtopk"}))
    refused(broken, "architecture 'batchtopk' needs k from 1 to d_sae=11, found None")
    (broken / "cfg.json").write_text(json.dumps(cfg | {"architecture": "jumprelu"}))
    refused(broken, r"SAELens does not load or run it \(RuntimeError: .*threshold")
    (broken / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "expected_average_only_in"}))
    refused(broken, "SAELens leaves another factor out")


def test_a_transcoder_has_no_class_in_dictionary_learning(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a transcoder, for which dictionary_learning has no class"):
        to_dictionary_learning(saelens_folder(tmp_path, "transcoder"), tmp_path / "out")


def test_the_command_line_says_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, line in (
        (["export", str(tmp_path / "x")], "expected a run's folder"),
        (["import-sae", str(tmp_path / "x"), str(tmp_path / "y")], "found neither"),
        (["import-sae", "x", "y", "--format", "sparsify"], "sparsify"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert line in capsys.readouterr().err.splitlines()[-1]


def test_a_public_sae_is_measured_like_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "heldout"):
        write_store(tmp_path / "out" / "p" / "store" / split, rows(), split=split)
    (tmp_path / "out" / "p" / "runs" / "taken").mkdir(parents=True)
    source = library_folder(tmp_path / "public" / "their-sae", "GatedAutoEncoder", layer=0)
    place = ["--out", str(tmp_path / "out"), "--profile", "p", "--device", "cpu"]
    command = ["evaluate", *place, "--sae", str(source / "ae.pt")]
    skip = ["--skip", "splice", "probing", "hierarchy", "tokens", "latents"]
    assert main([*command, *skip]) == 0
    result = tmp_path / "out" / "p" / "eval" / "their-sae" / "core.json"
    values = json.loads(result.read_text())
    latents, recon = of_saelens(tmp_path / "out" / "p" / "imported" / "their-sae" / "sae", rows())
    variation = np.square(rows() - rows().mean(0)).sum()
    assert values["reconstruction"]["fvu"] == pytest.approx(np.square(rows() - recon).sum() / variation, rel=1e-4)
    assert values["sparsity"]["l0"] == pytest.approx((latents > 0).sum(1).mean())
    written = result.stat().st_mtime_ns
    assert main([*command, *skip]) == 0 and result.stat().st_mtime_ns == written  # not done twice
    assert main([*command, "--name", "other", *skip]) == 0
    again = json.loads((tmp_path / "out" / "p" / "eval" / "other" / "core.json").read_text())
    assert again["reconstruction"] == values["reconstruction"]
    for wrong in (["--runs", "taken"], ["--name", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main([*(command if wrong[0] == "--runs" else command[:-2]), *wrong, *skip])
        assert "expected --name only with --sae" in capsys.readouterr().err
    topk = saelens_folder(tmp_path / "public" / "topk", "topk")
    cfg = json.loads((topk / "cfg.json").read_text())
    del cfg["k"]
    (topk / "cfg.json").write_text(json.dumps(cfg))
    for several in (["evaluate", *place, "--sae", str(topk), *skip], ["import-sae", str(topk), str(tmp_path / "to")]):
        with pytest.raises(SystemExit, match="2"):
            main(several)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{topk / 'cfg.json'}: architecture 'topk' needs k from 1 to d_sae=11, found None" in line
    for name in ("taken", "llm", "a/b", ".."):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--name", name, *skip])
        assert f"--name '{name}': expected a name that no run" in capsys.readouterr().err
