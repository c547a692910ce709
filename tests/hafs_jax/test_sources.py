"""SAEs that are loaded from elsewhere: SAELens folders, the model hub, releases of SAELens."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE as TorchSAE

from hafs_jax.api import load
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_json
from tests.support.both_saes import SAELENS, D, F, K, assert_same, rows, saelens_folder
from tests.support.environments import importing
from tests.support.hub import Hub, serving


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("architecture", SAELENS)
def test_a_saelens_folder_computes_what_saelens_does(architecture: str, apply_b_dec: bool, tmp_path: Path) -> None:
    cfg = {} if "transcoder" in architecture else {"apply_b_dec_to_input": apply_b_dec}
    folder = saelens_folder(tmp_path, architecture, **cfg)
    sae, theirs = load(folder), TorchSAE.load_from_disk(str(folder))
    acts = rows()
    with torch.no_grad():
        latents = theirs.encode(torch.tensor(acts))
        recon = theirs.decode(latents)
    assert_same(np.asarray(sae.encode(acts)), latents.numpy())
    assert_same(np.asarray(sae(acts)), recon.numpy())
    ours = np.asarray(sae.encode(acts)) @ np.asarray(sae.W_dec) + np.asarray(sae.b_dec)
    assert_same(ours, recon.numpy())
    shown = repr(sae)
    assert "\n" not in shown and f"D={D}, " in shown and f"F={F}" in shown and str(folder) in shown
    assert (f"k={K}" in shown) == (architecture == "topk")


def test_what_is_no_sae_that_can_be_loaded_is_one_line(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "a", "standard")
    with pytest.raises(UserError, match="which='best': expected a run, found a SAELens folder"):
        load(folder, "best")
    with pytest.raises(UserError, match=r"k=1: the active latents of relu are not chosen by k"):
        load(folder, k=1)
    write_json(folder / "cfg.json", read_json(folder / "cfg.json", "cfg") | {"architecture": "skip_transcoder"})
    with pytest.raises(UserError, match=r"architecture 'skip_transcoder', expected one of standard, topk, jumprelu"):
        load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected a run's config\.json or a SAELens folder's cfg\.json, found"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"expected a run's config\.json at .*nowhere"):
        load(tmp_path / "nowhere")
    for wrong in ("hub:", "hub:user", "hub:/repo/name"):
        with pytest.raises(UserError, match="expected hub:USER/REPO/NAME"):
            load(wrong)
    for wrong in ("release:", "release:gpt2"):
        with pytest.raises(UserError, match="expected release:RELEASE/ID"):
            load(wrong)


def python(script: str, environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"from hafs_jax import UserError, load\n{script}"],
        cwd=folder, env={**os.environ, "XDG_CACHE_HOME": str(folder), **environment},
        capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_sae_of_the_hub_is_loaded(tmp_path: Path) -> None:
    folder, hub = saelens_folder(tmp_path / "sae", "jumprelu"), Hub()
    files = {f"mine/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.repositories["models", "user/saes"] = files
    script = (
        "import sys\n"
        "print(load('hub:user/saes/mine'))\n"
        "for source in ('hub:user/saes/other', 'hub:user/none/mine', 'hub:user/saes@gone/mine'):\n"
        "    try: load(source)\n"
        "    except UserError as error: print(error)\n"
        "print('torch' in sys.modules)\n"
    )
    with serving(hub):
        environment = {**hub.env(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        lines = python(script, environment, tmp_path).splitlines()
    assert lines[0] == f"TrainedSAE(hub:user/saes/mine: jumprelu, D={D}, F={F})"
    assert "model user/saes cannot be had: the hub answers 404: it has no such file" in lines[1]
    assert "model user/none cannot be had: the hub answers" in lines[2]
    assert "model user/saes cannot be had: the hub answers 404: it has no such revision" in lines[3]
    assert lines[4:] == ["False"]


SAE_LENS = """
import shutil
class SAE:
    @classmethod
    def from_pretrained(cls, release, identity, device):
        if (release, identity) != ("some-release", "layer_1/wide"):
            raise ValueError(f"Release {release} has no SAE {identity}.")
        return cls()
    def save_model(self, folder):
        shutil.copytree("SOURCE", folder)
        print("a bar", flush=True)
"""


def test_an_sae_of_a_release_is_read_by_saelens_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = saelens_folder(tmp_path / "sae", "topk")
    package = tmp_path / "packages" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SAE_LENS.replace("SOURCE", str(folder)))
    paths = importing(package.parent, Path.cwd())["PYTHONPATH"]
    script = (
        "import sys\n"
        "print(load('release:some-release/layer_1/wide'))\n"
        "try: load('release:some-release/layer_2')\n"
        "except UserError as error: print(error)\n"
        "print(sorted({'sae_lens', 'torch'} & set(sys.modules)))\n"
    )
    lines = python(script, {"PYTHONPATH": paths}, tmp_path).splitlines()
    assert lines[0] == f"TrainedSAE(release:some-release/layer_1/wide: topk, D={D}, F={F}, k={K})"
    assert lines[1].endswith("SAELens does not give it: ValueError: Release some-release has no SAE layer_2.")
    assert lines[2] == "[]"
    (package / "__init__.py").write_text("raise SystemExit(1)")  # it is kept: SAELens is not asked again
    assert (
        python("print(load('release:some-release/layer_1/wide'))", {"PYTHONPATH": paths}, tmp_path) == lines[0] + "\n"
    )
