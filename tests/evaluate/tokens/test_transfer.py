"""Transfer to unseen children on planted latents, where it is known by hand."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from hafs_evaluate.tokens import transfer as module
from hafs_evaluate.tokens.transfer import Counted, best_thresholds, fit_probe, token_transfer, transfer
from hafs_evaluate.tokens.trials import halves, plan
from hafs_jax.base.errors import UserError

POSITIVE, NEGATIVE, DOCUMENTS = 16, 48, 10
IDS = POSITIVE + NEGATIVE
TOKEN_N, DOCUMENT_N = (axis.ravel() for axis in np.meshgrid(np.arange(IDS), np.arange(DOCUMENTS)))
HAS = {"planted": np.arange(IDS) < POSITIVE}


def measured(latents: np.ndarray, **options) -> dict:
    found = token_transfer(csr_array(latents.astype(np.float32)), TOKEN_N, DOCUMENT_N, HAS, **options)
    return found["properties"]["planted"]


def of_tokens() -> np.ndarray:
    """A latent for each token with the property, which fires on that token alone."""
    return TOKEN_N[:, None] == np.arange(POSITIVE)


def test_a_latent_for_the_property_carries_over() -> None:
    latents = np.concatenate([of_tokens(), HAS["planted"][TOKEN_N][:, None]], axis=1)
    found = measured(latents, ks=(1, 2, 5))
    assert found["latents"] == [POSITIVE] * 10
    for k in (1, 2, 5):
        assert found[f"top_{k}"] == {"balanced_accuracy": 1.0, "f1": 1.0, "recall": 1.0, "seen": 1.0}
    assert (found["children"], found["rows"]) == (POSITIVE, POSITIVE * DOCUMENTS)
    assert (found["child_recall"], found["child_spread"]) == (1.0, 0.0)


def test_latents_that_memorise_tokens_carry_nothing_over() -> None:
    """Chosen where they know an eighth of the children each, they know none of the others: a coin's 0.5."""
    found = measured(of_tokens(), ks=(1, 2, 5))
    for k in (1, 2, 5):
        assert found[f"top_{k}"]["balanced_accuracy"] == pytest.approx(0.5)
        assert found[f"top_{k}"]["recall"] == found[f"top_{k}"]["f1"] == 0.0
        assert found[f"top_{k}"]["seen"] == pytest.approx(0.5 + k / 16)  # recall k/8
    assert (found["child_recall"], found["child_spread"]) == (0.0, 0.0)


def test_a_latent_that_knows_half_of_the_tokens_carries_over_by_half() -> None:
    """The unseen children of a split's two trials are all children, of which it knows one half."""
    found = measured((TOKEN_N < POSITIVE // 2)[:, None], ks=(1,))
    assert found["top_1"]["recall"] == pytest.approx(0.5)
    assert found["top_1"]["balanced_accuracy"] == pytest.approx(0.75)
    assert (found["child_recall"], found["child_spread"]) == (0.5, 0.5)
    recalls = 2 * np.array(found["splits"]) - 1
    assert np.allclose(recalls[::2] + recalls[1::2], 1.0)


def test_a_latent_that_fires_on_other_tokens_too_is_charged_for_them() -> None:
    found = measured((TOKEN_N < 2 * POSITIVE)[:, None], ks=(1,))  # on all 16, and on 16 of the 48 others
    assert found["top_1"]["recall"] == 1.0
    assert found["top_1"]["balanced_accuracy"] == pytest.approx(1 - 1 / 6)


def test_a_latent_that_memorises_documents_carries_nothing_over() -> None:
    """It fires on the rows with the property, in those documents in which it is chosen by half of the trials."""
    trials = plan(TOKEN_N, DOCUMENT_N, HAS)
    in_first_half = trials.cell_N < len(trials.rows_U) // 2
    latents = (HAS["planted"][TOKEN_N] & in_first_half)[:, None]
    found = transfer(csr_array(latents.astype(np.float32)), trials, (1,))["properties"]["planted"]
    assert found["splits"] == [0.5, 1.0] * 5  # chosen where it fires and measured where it is silent, and vice versa


def test_no_child_and_no_document_is_both_chosen_on_and_measured_on() -> None:
    words = np.arange(IDS) // 2  # two forms of each word
    trials = plan(TOKEN_N, DOCUMENT_N, HAS, children=words, n_splits=3)
    (planted,) = trials.properties
    assert planted.children == POSITIVE // 2 and len(planted.trials) == 6
    documents_of = [set(DOCUMENT_N[trials.cell_N == cell].tolist()) for cell in range(len(trials.rows_U))]
    for trial in planted.trials:
        chosen, unseen, seen = ({int(trials.child_U[cell]) for cell in np.flatnonzero(at_U)} for at_U in trial)
        assert not chosen & unseen and chosen == seen and len(chosen | unseen) == IDS // 2
        documents = [set.union(*(documents_of[cell] for cell in np.flatnonzero(at_U))) for at_U in trial]
        assert not documents[0] & documents[1] and documents[1] == documents[2]
    sides = [tuple(trial.chosen_U) for trial in planted.trials]
    assert len(set(sides)) == 6


def test_halves_have_children_of_all_frequencies() -> None:
    counts = np.array([1000, 990, 100, 90, 10, 9, 500, 400, 3])
    is_positive = np.arange(9) < 6
    seen = set()
    for seed in range(30):
        half = halves(counts, is_positive, np.random.default_rng(seed))
        assert half[0] != half[1] and half[2] != half[3] and half[4] != half[5] and half[6] != half[7]
        seen.add(tuple(half.tolist()))
    assert len(seen) > 10 and {half[8] for half in seen} == {0, 1}


def test_what_has_too_little_is_left_out_with_the_reason() -> None:
    properties = {
        **HAS,
        "few": np.arange(IDS) < 6,
        "again": np.arange(IDS) < POSITIVE,
        "all": np.ones(IDS, bool),
        "none": np.zeros(IDS, bool),
    }
    trials = plan(TOKEN_N, DOCUMENT_N, properties)
    assert [each.name for each in trials.properties] == ["planted"]
    assert trials.left_out == {
        "few": "3 tokens in a half, expected 4",
        "again": "the same rows as planted",
        "all": "0 rows without it in a half, expected 20",
        "none": "0 tokens in a half, expected 4",
    }
    assert plan(TOKEN_N, DOCUMENT_N, HAS, least_rows=41).left_out == {
        "planted": "40 rows with it in a half, expected 41"
    }
    empty = token_transfer(csr_array(np.ones((len(TOKEN_N), 1))), TOKEN_N, DOCUMENT_N, {"none": properties["none"]})
    assert empty["properties"] == {} and empty["mean"]["transfer_top_1"] is None


def test_a_property_is_split_as_it_is_without_the_others() -> None:
    more = {"other": np.arange(IDS) % 3 == 0, **HAS}
    latents = csr_array(np.random.default_rng(0).random((len(TOKEN_N), 7)) > 0.5, dtype=np.float32)
    alone = token_transfer(latents, TOKEN_N, DOCUMENT_N, HAS)
    both = token_transfer(latents, TOKEN_N, DOCUMENT_N, more)
    assert both["properties"]["planted"] == alone["properties"]["planted"]
    mean = np.mean([figures["top_2"]["balanced_accuracy"] for figures in both["properties"].values()])
    assert both["mean"]["transfer_top_2"] == pytest.approx(mean) and len(both["properties"]) == 2


def test_dense_and_sparse_products_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.maximum(np.random.default_rng(1).normal(size=(len(TOKEN_N), 40)), 0)
    found = token_transfer(values, TOKEN_N, DOCUMENT_N, HAS)
    monkeypatch.setattr(module, "_DENSE", 2.0)
    assert token_transfer(csr_array(values), TOKEN_N, DOCUMENT_N, HAS) == found


def test_coordinates_of_either_sign_are_cut_where_they_tell_most() -> None:
    """A coordinate that is low on the property, with no threshold at 0."""
    noise = np.random.default_rng(2).normal(size=(len(TOKEN_N), 3))
    values = np.concatenate([noise, 5 - 4 * HAS["planted"][TOKEN_N][:, None] + 0.01 * noise[:, :1]], axis=1)
    found = token_transfer(values, TOKEN_N, DOCUMENT_N, HAS, signed=True)["properties"]["planted"]
    assert found["latents"] == [3] * 10
    assert found["top_1"]["balanced_accuracy"] == found["top_2"]["balanced_accuracy"] == 1.0
    as_latents = token_transfer(values, TOKEN_N, DOCUMENT_N, HAS)["properties"]["planted"]
    assert as_latents["top_1"]["balanced_accuracy"] < 0.7


def test_the_probe_is_ridge_regression_with_balanced_classes() -> None:
    from sklearn.linear_model import Ridge

    generator = np.random.default_rng(3)
    is_positive = generator.random(300) < 0.2
    inputs = generator.normal(size=(300, 3)) * [1.0, 5.0, 0.1] + is_positive[:, None]
    w, thresholds = fit_probe(inputs, is_positive, ridge=0.1)
    weight = np.where(is_positive, 0.5 / is_positive.sum(), 0.5 / (~is_positive).sum())
    scale = np.sqrt(np.cov(inputs.T, aweights=weight, bias=True).diagonal())
    reference = Ridge(alpha=0.1).fit(inputs / scale, np.where(is_positive, 1, -1), sample_weight=weight)
    assert np.allclose(w, reference.coef_ / scale, rtol=1e-5)
    assert thresholds == best_thresholds(inputs @ w, is_positive)
    counts = generator.integers(1, 4, 300)
    counted = fit_probe(inputs, is_positive, counts)
    repeated = fit_probe(np.repeat(inputs, counts, axis=0), np.repeat(is_positive, counts))
    assert np.allclose(counted[0], repeated[0]) and np.allclose(counted[1], repeated[1])


def test_the_thresholds_are_the_best_of_all() -> None:
    generator = np.random.default_rng(4)
    for _ in range(20):
        scores = generator.integers(0, 6, 30).astype(float)
        is_positive = generator.random(30) < 0.4

        def counted(threshold: float, scores=scores, is_positive=is_positive) -> Counted:
            return Counted.of_rows(scores > threshold, is_positive)

        best, cuts = best_thresholds(scores, is_positive), np.arange(-0.5, 6)
        for name in ("balanced_accuracy", "f1"):
            every = [getattr(counted(cut), name) for cut in cuts]
            assert getattr(counted(getattr(best, name)), name) == pytest.approx(max(every))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"planted: expected a mask over all token ids, found 64 entries and ids from 0 to 99"
    ):
        plan(np.where(TOKEN_N == 5, 99, TOKEN_N), DOCUMENT_N, HAS)
    with pytest.raises(UserError, match="at least 2 documents, found 1"):
        plan(TOKEN_N, np.zeros_like(TOKEN_N), HAS)
    with pytest.raises(ValueError, match="the latents of 640 rows, found 3"):
        token_transfer(np.ones((3, 2)), TOKEN_N, DOCUMENT_N, HAS)
