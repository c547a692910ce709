"""Paired differences, bootstrap intervals, Holm and Student intervals, on numbers whose answers are known."""

import numpy as np
import pytest

from hafs_evaluate.results.paired import difference, holm, pooled_sd

S, T = 5, 7


def test_a_constant_shift_is_found_whatever_the_spread_of_seeds_and_datasets() -> None:
    """Pairing removes what seeds and datasets share."""
    random = np.random.default_rng(0)
    b_ST = random.normal(size=(S, 1)) + 3 * random.normal(size=(1, T))
    found = difference(b_ST + 0.25, b_ST)
    assert found.mean == pytest.approx(0.25)
    assert found.low == pytest.approx(0.25) and found.high == pytest.approx(0.25)
    assert found.p < 1e-9
    assert found.reseed_sd == pytest.approx(np.std(b_ST.mean(1), ddof=1))
    assert not found.is_resolved  # 0.25 is under twice the SD between seeds


def test_a_difference_is_resolved_where_its_interval_excludes_0_and_it_exceeds_twice_the_reseed_sd() -> None:
    b_ST = np.zeros((S, T)) + 0.01 * np.arange(S)[:, None]
    assert difference(b_ST + 0.2, b_ST).is_resolved
    assert not difference(b_ST + 0.02, b_ST).is_resolved


@pytest.mark.parametrize("n_sets", [1, 20])
def test_intervals_cover_the_truth_as_often_as_they_say(n_sets: int) -> None:
    """Under no difference 95% intervals exclude 0 in about 5% of experiments; five seeds allow some more."""
    random = np.random.default_rng(1)
    outside = 0
    for trial in range(200):
        seeds_S1 = random.normal(size=(S, 1))
        delta_ST = seeds_S1 + 0.3 * random.normal(size=(S, n_sets))
        found = difference(delta_ST, np.zeros((S, n_sets)), samples=400, seed=trial)
        outside += found.low > 0 or found.high < 0
    assert 0.01 < outside / 200 < 0.16


def test_one_dataset_far_off_widens_the_interval() -> None:
    """Datasets are a sample: a gain that rests on one of them is not certain."""
    a_ST = np.zeros((S, T))
    a_ST[:, 0] = 1.0
    found = difference(a_ST, np.zeros((S, T)))
    assert found.mean == pytest.approx(1 / T) and found.low <= 0 < found.high


def test_p_is_students_paired_test() -> None:
    from scipy.stats import ttest_rel

    a_ST, b_ST = np.random.default_rng(2).normal(size=(2, S, T))
    assert difference(a_ST, b_ST, samples=10).p == pytest.approx(ttest_rel(a_ST.mean(1), b_ST.mean(1)).pvalue)
    assert difference(a_ST, a_ST, samples=10).p == 1.0


def test_one_seed_gives_no_interval() -> None:
    found = difference(np.ones((1, T)), np.zeros((1, T)))
    assert (found.low, found.high, found.p) == (float("-inf"), float("inf"), 1.0)
    assert not found.is_resolved


def test_shapes_that_are_not_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        difference(np.zeros((S, T)), np.zeros((S, T + 1)))


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_pooled_sd_averages_variances() -> None:
    assert pooled_sd([np.array([0.0, 2.0]), np.array([1.0, 1.0])]) == pytest.approx(1.0)
    assert np.isnan(pooled_sd([np.array([1.0])]))
