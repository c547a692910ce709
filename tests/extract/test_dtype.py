"""`--model-dtype auto`: what the machine multiplies fast, and what was begun goes on as it began."""

import dataclasses
from pathlib import Path

import pytest
import torch

from hafs_extract import models, run
from hafs_extract.config import ExtractConfig, SourceConfig
from hafs_extract.journal import is_complete
from hafs_extract.models import pick_dtype
from hafs_extract.profiles import OFFLINE, resolve
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import read_manifest
from tests.support.tiny_models import save_model, save_wikitext

RESOLVED = resolve("pythia70m")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    folder = tmp_path_factory.mktemp("inputs")
    source = SourceConfig(name="w", path=str(save_wikitext(folder / "w", 12)), kind="wikitext")
    return ExtractConfig(
        profile="p",
        model=str(save_model(folder / "m")),
        model_dtype="auto",
        hook_point="blocks.3.hook_resid_post",
        sources=(source,),
        context_length=17,
        batch_tokens=256,
        heldout_fraction=0.3,
    )


def _machine(patch: pytest.MonkeyPatch, dtype: str) -> None:
    patch.setattr(run, "pick_dtype", lambda _: dtype)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fma avx2 f16c", "float32"), ("avx2 avx512_bf16", "bfloat16"), ("amx_tile amx_bf16", "bfloat16")],
)
def test_a_cpu_that_emulates_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str
) -> None:
    monkeypatch.setattr(models.Path, "read_text", lambda *_, **__: f"flags\t\t: fpu {flags}\nbugs\t\t:\n")
    assert pick_dtype("cpu") == dtype


def test_the_offline_profile_asks_the_machine() -> None:
    assert OFFLINE.model_dtype == "auto" and pick_dtype("cpu") in ("float32", "bfloat16")


def test_stores_hold_the_resolved_dtype_and_another_machine_keeps_them(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, "bfloat16")
    ((_, folders),) = run.extract(config, RESOLVED, tmp_path).items()
    manifest = read_manifest(folders["train"])
    assert manifest.config["model_dtype"] == manifest.model.dtype == "bfloat16"
    _machine(monkeypatch, "float32")
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("extracted again"))
    assert is_complete(config, tmp_path)
    run.extract(config, RESOLVED, tmp_path)
    with pytest.raises(UserError, match=r"model_dtype='bfloat16', not 'float32'"):
        is_complete(dataclasses.replace(config, model_dtype="float32"), tmp_path)


def test_an_interrupted_extraction_goes_on_in_the_dtype_that_it_began_with(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_stores", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            run.extract(config, RESOLVED, tmp_path)
    _machine(monkeypatch, "float32")
    ((_, folders),) = run.extract(config, RESOLVED, tmp_path).items()
    assert read_manifest(folders["train"]).model.dtype == "bfloat16"
    ((_, folders),) = run.extract(config, RESOLVED, tmp_path, force=True).items()
    assert read_manifest(folders["train"]).model.dtype == "float32"


def test_cuda_before_ampere_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "pick_device", lambda _: torch.device("cuda"))
    for capability, dtype in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert pick_dtype("auto") == dtype
