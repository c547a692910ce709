"""Where an SAE that is loaded may come from: a folder, the model hub, or a release of SAELens. No JAX, no torch.

"artifacts/offline/runs/baseline-s0"    a run's folder, or a SAELens folder
"hub:USER/REPO/NAME"                    the SAELens folder NAME in a repository of the model hub
"hub:USER/REPO@REVISION/NAME"           the same at a commit, branch or tag
"release:RELEASE/ID"                    an SAE of SAELens's table of releases; needs the package sae_lens
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hafs_jax.base.errors import UserError
from hafs_jax.base.hub import connect, hub_errors
from hafs_jax.base.places import temporary_folder
from hafs_jax.saelens_files import CFG, WEIGHTS

HUB, RELEASE = "hub:", "release:"

_SAVE = """
import sys
from sae_lens import SAE
SAE.from_pretrained(sys.argv[1], sys.argv[2], device="cpu").save_model(sys.argv[3])
"""
"""What a process of its own runs, which so may import torch: SAELens reads the release, in whatever format it is."""


def sae_folder(source: Path | str) -> Path:
    """The folder of an SAE, fetched where it is not on this disk. Raises `UserError` where it cannot be had."""
    text = str(source)
    if text.startswith(HUB):
        return _of_hub(text)
    if text.startswith(RELEASE):
        return _of_release(text)
    return Path(source)


def _of_hub(source: str) -> Path:
    """The folder in the hub's cache."""
    user, _, rest = source.removeprefix(HUB).partition("/")
    repository, _, name = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not user or not repository:
        raise UserError(f"{source}: expected {HUB}USER/REPO/NAME, NAME being the SAE's folder in the repository")
    connect()
    from huggingface_hub import hf_hub_download

    prefix = f"{name.strip('/')}/" if name.strip("/") else ""
    with hub_errors("model", f"{user}/{repository}"):
        paths = [
            hf_hub_download(f"{user}/{repository}", prefix + file, revision=revision or None) for file in (CFG, WEIGHTS)
        ]
    return Path(paths[0]).parent


def _of_release(source: str) -> Path:
    """The folder in our cache that SAELens has written."""
    release, _, identity = source.removeprefix(RELEASE).partition("/")
    if not release or not identity:
        raise UserError(f"{source}: expected {RELEASE}RELEASE/ID, as SAELens's table of pretrained SAEs names them")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hafs-jax" / "releases"
    folder = root / release / identity.replace("/", "__")
    if (folder / CFG).exists():
        return folder
    if importlib.util.find_spec("sae_lens") is None:
        raise UserError(f"{source}: needs the package sae_lens, which is not installed: pip install sae-lens")
    with temporary_folder(folder.parent, ".new-") as temporary:
        made = temporary / "sae"
        command = [sys.executable, "-c", _SAVE, release, identity, str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (made / CFG).exists():
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it wrote no SAE"]
            raise UserError(f"{source}: SAELens does not give it: {said[-1][:400]}")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder
