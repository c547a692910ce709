"""Transfer to unseen children on a world whose features are known."""

import numpy as np
from scipy.sparse import csr_array

from hafs_evaluate.tokens.transfer import transfer
from hafs_evaluate.truth.agreement import TRANSFER, correlations, root_trials
from hafs_evaluate.truth.ground_truth import Truth

ROOTS, CHILDREN, N = 2, 3, 2_400


def world() -> Truth:
    """Two roots, each on half of the rows, with three children that exclude each other; one of four has none."""
    generator = np.random.default_rng(0)
    n = ROOTS * (1 + CHILDREN)
    fires = np.zeros((N, n))
    for root in range(ROOTS):
        fires[:, root] = generator.random(N) < 0.5
        child = generator.integers(0, CHILDREN + 1, N)
        for number in range(CHILDREN):
            fires[:, ROOTS + root * CHILDREN + number] = fires[:, root] * (child == number)
    parents = np.concatenate([np.full(ROOTS, -1), np.repeat(np.arange(ROOTS), CHILDREN)])
    levels = (parents >= 0).astype(int)
    return Truth(np.eye(n), np.zeros(n), parents, levels, csr_array(fires * generator.uniform(1, 2, fires.shape)))


def figures(truth: Truth, latents: np.ndarray) -> dict[str, float]:
    fires = (truth.coefficients > 0).toarray()
    means = [transfer(csr_array(latents), root_trials(truth, root, fires))["mean"] for root in range(ROOTS)]
    return {name: float(np.mean([mean[name] for mean in means])) for name in TRANSFER}


def test_the_roots_are_the_properties_and_their_children_the_tokens() -> None:
    truth = world()
    fires = (truth.coefficients > 0).toarray()
    found = root_trials(truth, 1, fires)
    (root,) = found.properties
    assert root.name == "1" and root.children == CHILDREN + 1 and root.rows == fires[:, 1].sum()
    assert np.array_equal(root.is_positive_U[found.cell_N], fires[:, 1])
    for child in range(ROOTS + CHILDREN, ROOTS + 2 * CHILDREN):
        assert len(np.unique(found.token_U[found.cell_N[fires[:, child]]])) == 1
    for trial in root.trials:
        halves = [set(found.token_U[at_U & root.is_positive_U].tolist()) for at_U in trial]
        assert len(halves[0]) == len(halves[1]) == 2 and not halves[0] & halves[1]


def test_absorbed_roots_carry_over_less() -> None:
    """The more of a root's children its latent is silent on, the lower are all figures; 1 without any."""
    truth = world()
    acts = truth.coefficients.toarray().astype(np.float32)
    found = []
    for absorbed in range(CHILDREN + 1):
        latents = acts.copy()
        for root in range(ROOTS):
            children = ROOTS + root * CHILDREN + np.arange(absorbed)
            latents[(acts[:, children] > 0).any(1), root] = 0
        found.append(figures(truth, latents))
    assert all(found[0][name] == 1.0 for name in TRANSFER if name not in ("transfer_top_2", "transfer_top_5"))
    assert found[0]["transfer_top_5"] > 0.95  # of its own latent and four that say less
    for name in ("transfer_top_1", "recall_top_1", "child_recall"):
        values = [one[name] for one in found]
        assert values == sorted(values, reverse=True) and values[-1] < values[0] - 0.2, (name, values)
    rows = [{**dict.fromkeys(correlations([]), None), **one, "true_absorption": n} for n, one in enumerate(found)]
    assert correlations(rows)["transfer_top_1"] == {"rho": -1.0, "saes": CHILDREN + 1}
