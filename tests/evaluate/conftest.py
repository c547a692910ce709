"""Fixtures that several of the evaluate room's tests share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hafs_evaluate.workspace import Workspace
from hafs_extract.models import load_model
from tests.support.torch_saes import tiny_model, write_tree
from tests.support.workspaces import make_workspace


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder; not to be written to."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """`make_workspace` with label trees of its own, whose runs are exported already."""
    monkeypatch.setattr("hafs_evaluate.hierarchy.label_trees.FOLDER", write_tree(tmp_path / "trees"))
    monkeypatch.setattr("hafs_jax.saelens.export_saelens", lambda folder, k=None: folder / "sae")
    return make_workspace(tmp_path, load_model(str(model_folder), "float32", device="cpu"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from tests.support.browser import launched

    with launched() as chromium:
        yield chromium
