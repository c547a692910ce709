"""Fixtures that several of the evaluate room's tests share."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hafs_evaluate.report.figures import draw
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


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> Iterator[dict[Any, Any]]:
    """Equal panels are drawn once: drawing is most of a report's time, and equal panels give equal bytes.

    Gives what was drawn; where that is cleared all is drawn again.
    """
    made: dict[tuple[str, bytes], Any] = {}

    def svg(panel: Any, styles: Any) -> Any:
        return copy.deepcopy(kept("svg", (panel, styles), lambda: drawn_svg(panel, styles)))

    def write_png(path: Path, panels: Any, styles: Any, columns: int) -> None:
        def drawn() -> bytes:
            drawn_png(path, panels, styles, columns)
            return path.read_bytes()

        data = kept(path.name, (panels, styles, columns), drawn)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def kept(name: str, of: Any, make: Callable[[], Any]) -> Any:
        key = name, pickle.dumps(of)
        if key not in made:
            made[key] = make()
        return made[key]

    drawn_svg, drawn_png = draw.svg, draw.write_png
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "svg", svg)
        patch.setattr(draw, "write_png", write_png)
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from tests.support.browser import launched

    with launched() as chromium:
        yield chromium
