"""Absorption and holes on planted latents, where both are known."""

from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import spearmanr

from hafs_evaluate.hierarchy.absorption import MIN_ROWS, MainLatents, main_latents, measure, worst_child_hole
from hafs_evaluate.truth.agreement import correlations

D, N, CHILDREN = 12, 3_000, 3
RANDOM = np.random.default_rng(0)
VECTORS = np.linalg.qr(RANDOM.normal(size=(D, D)))[0]
IS_PARENT = np.arange(N) % 2 == 0
CHILD = np.where(IS_PARENT & (RANDOM.random(N) < 0.75), RANDOM.integers(0, CHILDREN, N), -1)
IS_CHILD = [child == CHILD for child in range(CHILDREN)]
HALF = RANDOM.integers(0, 2, N)


def planted(absorbed_share):
    """A parent latent, one a child, three of noise; the parent's is silent on `absorbed_share` of child 0's rows,

    where that child's latent carries the parent's direction too.
    """
    acts = np.outer(IS_PARENT, VECTORS[0]) + sum(
        np.outer(rows, VECTORS[1 + child]) for child, rows in enumerate(IS_CHILD)
    )
    is_absorbed = IS_CHILD[0] & (np.random.default_rng(1).random(N) < absorbed_share)
    noise = np.random.default_rng(2).random((N, 3)) < 0.1
    latents = np.stack([IS_PARENT & ~is_absorbed, *IS_CHILD, *noise.T], axis=1).astype(np.float32)
    W_dec = np.stack([VECTORS[0], VECTORS[0] + VECTORS[1], VECTORS[2], VECTORS[3], *VECTORS[6:9]])
    if not absorbed_share:
        W_dec[1] = VECTORS[1]
    return latents, acts, W_dec


def measured(absorbed_share, **options):
    latents, acts, W_dec = planted(absorbed_share)
    return measure(latents, acts, W_dec, np.zeros(D), IS_PARENT, IS_PARENT, IS_CHILD, HALF, **options)


def test_without_absorption_there_is_no_hole():
    found = measured(0.0)
    assert found.hole == 0
    assert found.full == 0
    assert found.fraction == 0
    assert found.texts == IS_PARENT.sum()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_parent_silent_on_one_child_is_found_in_full(share):
    latents, *_ = planted(share)
    silent = IS_CHILD[0] & (latents[:, 0] == 0)
    found = measured(share)
    assert found.hole == pytest.approx(silent.sum() / IS_CHILD[0].sum())
    assert found.full == pytest.approx(silent.sum() / IS_PARENT.sum())
    assert found.full <= found.fraction <= IS_CHILD[0].sum() / IS_PARENT.sum()


def test_the_grown_set_takes_the_childs_latent_and_hides_the_hole():
    assert measured(1.0).mains == 2
    assert measured(1.0, grown=True).hole == 0
    assert measured(0.0).mains == 1


def test_main_latents_come_from_the_other_half():
    latents, acts, W_dec = planted(0.0)
    swapped = latents.copy()
    swapped[HALF == 1, 0] = 0  # the parent's latent is dead in half 1 alone
    found = measure(swapped, acts, W_dec, np.zeros(D), IS_PARENT, IS_PARENT, IS_CHILD, HALF)
    assert found.hole == pytest.approx(_recall(swapped), abs=1e-9)


def _recall(latents):
    """By hand: half 0 is scored by the best latent of half 1, and the other way round."""
    is_hit = np.zeros(N, bool)
    for half in (0, 1):
        f1 = [
            2 * (latents[half == HALF, j] * IS_PARENT[half == HALF]).sum()
            / (latents[half == HALF, j].sum() + IS_PARENT[half == HALF].sum())
            for j in range(latents.shape[1])
        ]  # fmt: skip
        is_hit[half != HALF] = latents[half != HALF, int(np.argmax(f1))] > 0
    alone = IS_PARENT & (CHILD < 0)
    return is_hit[alone].mean() - min(is_hit[rows].mean() for rows in IS_CHILD)


def test_averages_over_texts_need_a_threshold():
    values = np.abs(np.random.default_rng(3).normal(size=(N, 4))) * 0.1 + 0.01
    values[:, 2] += IS_PARENT
    mains = main_latents(values, IS_PARENT, pooled=True)
    assert mains.latents.tolist() == [2]
    assert 0.3 < mains.thresholds[0] < 1.1
    assert (mains.fires(values) == IS_PARENT).mean() > 0.99
    assert not (main_latents(values, IS_PARENT).fires(values) == IS_PARENT).all()  # over 0, it always fires


def test_the_reference_of_the_hole():
    is_parent, is_hit = np.ones(100, bool), np.arange(100) < 60
    children = np.array([np.arange(100) < 50, np.arange(100) >= 50])
    assert worst_child_hole(is_hit, is_parent, children) == pytest.approx(0.6 - 0.2)  # no row without a child
    some = np.array([np.arange(100) < 30, (np.arange(100) >= 30) & (np.arange(100) < 80)])
    assert worst_child_hole(is_hit, is_parent, some) == pytest.approx(0.0 - 0.6)  # the last 20 have none
    few = np.array([np.arange(100) < 50, np.arange(100) >= 100 - (MIN_ROWS - 1)])
    assert worst_child_hole(is_hit, is_parent, few) is None


def test_dead_latents_are_an_empty_set_of_main_latents():
    latents, acts, W_dec = planted(0.0)
    found = measure(latents * 0, acts, W_dec, np.zeros(D), IS_PARENT, IS_PARENT, IS_CHILD, HALF)
    assert (found.mains, found.hole, found.full) == (0, 0, 0)
    assert MainLatents(np.zeros(0, int), np.zeros(0)).first.fires(latents).sum() == 0


def test_the_hole_ranks_planted_saes_as_the_truth_does():
    shares = [0.0, 0.1, 0.3, 0.5, 0.8]
    rows = [{**asdict(measured(share)), "true_absorption": share, "top_1": 1 - share} for share in shares]
    for row in rows:
        row |= {f"{name}_grown": None for name in ("hole", "full", "fraction")}
    found = correlations(rows)
    assert found["hole"] == {"rho": pytest.approx(1), "saes": 5}
    assert found["top_1"]["rho"] == pytest.approx(-1)
    assert found["hole_grown"] == {"rho": None, "saes": 0}
    assert spearmanr([row["full"] for row in rows], shares).statistic == pytest.approx(found["full"]["rho"])
