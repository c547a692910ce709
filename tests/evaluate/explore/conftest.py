"""An explorer of a tiny model and two random SAEs, shared by the tests of the explorer."""

from pathlib import Path
from typing import Any

import pytest

from hafs_evaluate.explore.explorer import Explorer
from hafs_evaluate.latents.dashboards import LatentsConfig, show_latents, write_latents
from hafs_evaluate.results.readings import LATENTS, OTHERS
from hafs_evaluate.workspace import FinishedRun
from hafs_extract.models import load_model
from tests.support.torch_saes import random_sae
from tests.support.workspaces import HOOK, D, F, make_workspace

RUNS = ("baseline-s0", "strict-s0")


@pytest.fixture(scope="session")
def explorer(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Explorer:
    """Not to be changed; `explorer.workspace` has two finished runs whose latents are evaluated."""
    model = load_model(str(model_folder), "float32", device="cpu")
    workspace = make_workspace(tmp_path_factory.mktemp("explored"), model)
    for seed, name in enumerate(RUNS):
        sae = random_sae(D, F, seed=seed, hook=HOOK)
        values = show_latents(sae, workspace.train, model, LatentsConfig(latents=5, others=4, examples=3))
        others = {"run": name, "latents": values.pop("others")}
        write_latents(workspace.result(name, OTHERS), others)
        write_latents(workspace.result(name, LATENTS), {"run": name, **values})
    runs = [FinishedRun(name, workspace.runs / name, is_exported=True) for name in RUNS]
    return Explorer(workspace, runs, "cpu")


@pytest.fixture
def run(explorer: Explorer) -> Any:
    """The first run, loaded."""
    return explorer._run(RUNS[0])
