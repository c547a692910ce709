"""The solver of many small logistic regressions and its figures, against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from hafs_evaluate.hierarchy.logistic import auroc, balanced_accuracy, balanced_weights, fit_logistic

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("C", [0.001, 1.0])
def test_the_solver_is_scikit_learns_balanced_logistic_regression(k, C):
    inputs = RANDOM.normal(size=(120, k))
    is_positive = inputs[:, 0] + RANDOM.normal(size=120) > 0.8
    masks = np.array([np.ones(120, bool), np.arange(120) >= 40])
    weights = np.stack([balanced_weights(is_positive, mask) for mask in masks])
    found = fit_logistic(inputs, is_positive, weights, np.array([C, C]))
    for mask, own in zip(masks, found, strict=True):
        probe = LogisticRegression(C=C, class_weight="balanced", tol=1e-10, max_iter=1000)
        probe.fit(inputs[mask], is_positive[mask])
        np.testing.assert_allclose(own, [*probe.coef_[0], *probe.intercept_], atol=1e-4)


def test_the_solver_stays_finite_where_a_column_separates():
    is_positive = np.arange(60) < 20
    found = fit_logistic(is_positive[:, None] * 9.0, is_positive, np.ones((1, 60)), np.array([1e6]))
    assert np.isfinite(found).all()
    assert balanced_accuracy(is_positive * 9.0 * found[0, 0] + found[0, 1], is_positive) == 1


def test_figures_equal_scikit_learns():
    scores, is_positive = RANDOM.integers(-3, 4, 50).astype(float), RANDOM.random(50) < 0.3
    assert balanced_accuracy(scores, is_positive) == pytest.approx(balanced_accuracy_score(is_positive, scores > 0))
    assert auroc(scores, is_positive) == pytest.approx(roc_auc_score(is_positive, scores))
    assert np.isnan(auroc(scores, np.ones(50, bool)))
