"""Latents that fire together or share a direction, against planted data."""

import numpy as np
import pytest
import torch

from hafs_evaluate.latents.neighbours import partners, sharing


def test_partners_are_ranked_by_phi_which_is_the_correlation_of_firings():
    random = np.random.default_rng(0)
    fires = random.random((500, 4)) < 0.2
    fires[:, 1] = fires[:, 0] & (random.random(500) < 0.9)  # nearly always with 0
    fires[:, 3] = False
    fires[[3, 4], 3] = fires[[3, 4], 0] = True  # with 0 on two rows only: the highest pmi of all
    count = fires.sum(0)
    together = fires.T.astype(int) @ fires.astype(int)
    both = np.corrcoef(fires.T)[0]
    (found,) = partners(np.array([0]), together[:1], count, 500, least=3, most=5)
    assert found[0]["index"] == 1
    assert {entry["index"] for entry in found} <= {1, 2}
    assert found[0]["phi"] == pytest.approx(both[1], rel=1e-4)
    assert found[0]["pmi"] == pytest.approx(np.log2(500 * together[0, 1] / count[0] / count[1]), rel=1e-4)
    assert found[0]["rows"] == together[0, 1]
    (rare,) = partners(np.array([0]), together[:1], count, 500, least=2, most=5)
    assert 3 in {entry["index"] for entry in rare}
    assert partners(np.array([3]), together[3:], count, 500, least=3, most=5) == [[]]
    assert len(partners(np.array([0]), together[:1], count, 500, least=2, most=1)[0]) == 1


def test_sharing_names_parent_child_and_peer_by_coverage():
    parent = torch.tensor([1.0, 0, 0, 0])
    child = torch.tensor([0.8, 0.6, 0, 0])
    peer = torch.tensor([0.7, 0, 0.7, 0])
    other = torch.tensor([0, 0, 0, 1.0])
    W_dec = torch.stack([parent, 2 * child, peer, other])
    count = np.array([100, 20, 50, 40])
    together = np.array([[100, 18, 5, 0], [18, 20, 2, 0], [5, 2, 50, 0], [0, 0, 0, 40]])
    of_parent, of_child, of_other = sharing(W_dec, np.array([0, 1, 3]), together[[0, 1, 3]], count, 0.2, 5)
    assert [(entry["index"], entry["kind"]) for entry in of_parent] == [(1, "child"), (2, "peer")]
    assert [(entry["index"], entry["kind"]) for entry in of_child] == [(0, "parent"), (2, "peer")]
    assert of_parent[0] == {"index": 1, "cosine": 0.8, "covered": 0.18, "covers": 0.9, "kind": "child"}
    assert of_other == []
    assert sharing(W_dec, np.array([0]), together[:1], count, 0.75, 5)[0] == of_parent[:1]
    assert sharing(W_dec, np.array([0]), together[:1], count, 0.2, 1)[0] == of_parent[:1]
