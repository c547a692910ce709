"""Many small balanced logistic regressions at once, and how well their answers are. Imports no torch.

The regression is scikit-learn's, with an L2 penalty, `class_weight="balanced"` and standardised inputs. One SAE on one
label tree needs tens of thousands of them on few columns, so `fit_logistic` solves many together by Newton's method. A
test compares it with scikit-learn.
"""

import numpy as np
from jaxtyping import Bool, Float

MAX_STEPS = 25
TOLERANCE = 1e-3  # largest change of a coefficient in the last step; Newton's method squares its error in each step


def fit_logistic(
    inputs_Nk: Float[np.ndarray, "N k"],
    is_positive_N: Bool[np.ndarray, "N"],
    weights_MN: Float[np.ndarray, "M N"],
    C_M: Float[np.ndarray, "M"],
) -> Float[np.ndarray, "M k+1"]:
    """(w, b), coefficients and intercept, of M logistic regressions on the same rows. They minimise

    |w|^2 / 2 + C sum_n weight_n log(1 + exp(-y_n (w . x_n + b))),

    where y_n is 1 or -1: scikit-learn's objective. Each has its own C and its own weights of the rows. By Newton's
    method; a step that does not lower the objective is halved.
    """
    n_rows, k = inputs_Nk.shape
    x_NK = np.concatenate([inputs_Nk, np.ones((n_rows, 1))], axis=1)
    above = np.triu_indices(k + 1)
    # the upper halves of all Hessians are one product with this; float32 is enough, since they only shape the steps
    outer_NP = (x_NK[:, above[0]] * x_NK[:, above[1]]).astype(np.float32)
    penalty_K = np.append(np.ones(k), 0.0)
    ridge_KK = np.diag(np.append(np.ones(k), 1e-9))
    scaled_MN, target_N = weights_MN * np.asarray(C_M)[:, None], is_positive_N.astype(np.float64)
    found_MK = np.zeros((len(scaled_MN), k + 1))
    hessian_MKK = np.empty((len(found_MK), k + 1, k + 1))

    def objective(coefficients_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The objective and the probabilities, by log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|))."""
        odds_MN = coefficients_MK @ x_NK.T
        small_MN = np.exp(-np.abs(odds_MN))
        losses_MN = np.maximum(odds_MN, 0) - target_N * odds_MN + np.log(1 + small_MN)
        value_M = 0.5 * (penalty_K * np.square(coefficients_MK)).sum(1) + np.einsum("mn,mn->m", scaled_MN, losses_MN)
        return value_M, np.where(odds_MN >= 0, 1, small_MN) / (1 + small_MN)

    value_M, p_MN = objective(found_MK)
    for _ in range(MAX_STEPS):
        gradient_MK = penalty_K * found_MK - (scaled_MN * (target_N - p_MN)) @ x_NK
        half_MP = (scaled_MN * p_MN * (1 - p_MN)).astype(np.float32) @ outer_NP
        hessian_MKK[:, above[0], above[1]] = half_MP
        hessian_MKK[:, above[1], above[0]] = half_MP
        step_MK = np.linalg.solve(hessian_MKK + ridge_KK, gradient_MK[:, :, None])[:, :, 0]
        for _ in range(10):
            tried_M, p_MN = objective(found_MK - step_MK)
            rises_M = tried_M > value_M + 1e-9 * np.abs(value_M)
            if not rises_M.any():
                break
            step_MK[rises_M] /= 2
        found_MK, value_M = found_MK - step_MK, tried_M
        if np.abs(step_MK).max() < TOLERANCE:
            break
    return found_MK


def balanced_weights(is_positive_N: Bool[np.ndarray, "N"], is_used_N: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """scikit-learn's class_weight="balanced": (rows used) / (2 x rows used of the row's class); 0 for rows not used."""
    used, positive = is_used_N.sum(), (is_used_N & is_positive_N).sum()
    of_class_N = np.where(is_positive_N, positive, used - positive)
    return np.where(is_used_N, used / (2 * np.maximum(of_class_N, 1)), 0.0)


def standardised(values_Nk: Float[np.ndarray, "N k"], is_train_N: Bool[np.ndarray, "N"]) -> Float[np.ndarray, "N k"]:
    """(values - mean) / standard deviation, both of the training rows; 0 for a column that does not vary there."""
    mean_k, sd_k = values_Nk[is_train_N].mean(0), values_Nk[is_train_N].std(0)
    return np.where(sd_k > 1e-6, (values_Nk - mean_k) / np.maximum(sd_k, 1e-6), 0.0)


def balanced_accuracy(scores_N: Float[np.ndarray, "N"], is_positive_N: Bool[np.ndarray, "N"]) -> float:
    """Mean of the recalls of both classes, where a score above 0 says positive; NaN where a class is absent."""
    positives = is_positive_N.sum()
    if positives in (0, len(is_positive_N)):
        return float("nan")
    is_said_N = scores_N > 0
    true, false = (is_said_N & is_positive_N).sum(), (is_said_N & ~is_positive_N).sum()
    return float((true / positives + 1 - false / (len(is_positive_N) - positives)) / 2)


def auroc(scores_N: Float[np.ndarray, "N"], is_positive_N: Bool[np.ndarray, "N"]) -> float:
    """Probability that a positive row scores above a negative one, ties counting half; NaN where a class is absent."""
    from scipy.stats import rankdata

    positives = int(is_positive_N.sum())
    negatives = len(is_positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    ranks_N = rankdata(scores_N)
    return float((ranks_N[is_positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def quality(scores_N: Float[np.ndarray, "N"], is_positive_N: Bool[np.ndarray, "N"]) -> tuple[float, float]:
    """(balanced accuracy, AUROC)."""
    return balanced_accuracy(scores_N, is_positive_N), auroc(scores_N, is_positive_N)
