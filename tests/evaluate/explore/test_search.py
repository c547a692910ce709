"""The ranking of latents by a text: the formula by hand, and a latent that is about a text is found."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hafs_evaluate.explore.explorer import Explorer
from hafs_evaluate.explore.loaded import load_run
from hafs_evaluate.explore.reading import latents_of, text_scores
from hafs_evaluate.explore.requests import SearchRequest
from hafs_evaluate.workspace import FinishedRun
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json
from tests.evaluate.explore.conftest import RUNS
from tests.support.workspaces import F


def test_the_score_is_strength_times_the_logarithm_of_the_lift() -> None:
    latents = torch.tensor([[2.0, 1.0, 0.0, 8.0, 3.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    density = torch.tensor([0.125, 1.0, 0.5, 0.0, 1.0])
    maximum = torch.tensor([4.0, 2.0, 2.0, 0.0, 2.0])
    score, strength, share = text_scores(latents, density, maximum, rows=64)
    assert share.tolist() == [0.5, 1.0, 0.0, 0.5, 0.5]
    assert strength.tolist() == [0.25, 0.5, 0.0, 0.5, 0.5]  # the last is over its maximum, and counts as 1
    expected = [0.25 * math.log2(0.5 / 0.125), 0.0, 0.0, 0.5 * math.log2(0.5 * 64), 0.5 * math.log2(0.5)]
    assert score.tolist() == pytest.approx(expected)


def test_what_fires_everywhere_is_below_what_fires_here(explorer: Explorer, run) -> None:
    request = SearchRequest("glass under rivers", RUNS[0], top=200)
    answer = explorer.search(request)
    found = answer["latents"]
    scores = [one["score"] for one in found]
    assert found and scores == sorted(scores, reverse=True) and min(scores) > 0
    values = latents_of(run.sae, explorer._reading(request.text))[1:]
    assert answer["counted"] == len(values)
    for one in found:
        assert one["share"] > one["density"]
        assert one["share"] == pytest.approx(float((values[:, one["index"]] > 0).float().mean()), rel=1e-4)
    assert len(explorer.search(SearchRequest(request.text, RUNS[0], top=2))["latents"]) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.pop("rows_scanned"), "expected rows_scanned"),
        (lambda values: values["density"].pop(), f"expected density of {F} latents"),
        (lambda values: values.update(max_activation=[None] * F), f"expected max_activation of {F} latents"),
    ],
)
def test_latents_that_lack_a_figure_are_refused(
    explorer: Explorer, change: Callable[[dict[str, Any]], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = explorer.workspace
    run = FinishedRun(RUNS[0], workspace.runs / RUNS[0], is_exported=True)

    def changed(path: Path, what: str) -> dict[str, Any]:
        values = read_json(path, what)
        change(values)
        return values

    monkeypatch.setattr("hafs_evaluate.explore.loaded.read_json", changed)
    with pytest.raises(UserError, match=said):
        load_run(workspace, run, workspace.train.manifest, "cpu")
