"""The ranking of latents by a text: the formula by hand, and a latent that is about a text is found."""

import math

import pytest
import torch

from hafs_evaluate.explore.explorer import Explorer
from hafs_evaluate.explore.reading import latents_of, text_scores
from hafs_evaluate.explore.requests import SearchRequest
from tests.evaluate.explore.conftest import RUNS


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
