"""Which suite of probing tasks a store gets."""

import pytest

from hafs_evaluate.config import EvalConfig, resolved
from hafs_evaluate.saebench.suites import OFFLINE_TASKS, STANDARD_DATASETS, SUITES, ProbingSuite, register_suite
from hafs_jax.base.errors import UserError


@pytest.mark.parametrize(
    ("profile", "suite"),
    [
        ({"resolved": "offline"}, "sae_probes"),
        ({"resolved": "pythia70m"}, "standard"),
        ({"resolved": "mine"}, "sae_probes"),  # imported arrays, another's profile: what needs no hub
        ({}, "sae_probes"),
        ({"resolved": "mine", "suite": "standard"}, "standard"),
        ({"resolved": "pythia70m", "suite": "sae_probes"}, "sae_probes"),
    ],
)
def test_the_suite_is_the_one_that_the_profile_names(profile, suite):
    config = resolved(EvalConfig(), profile)
    assert (config.suite, config.tasks) == (suite, OFFLINE_TASKS if suite == "sae_probes" else STANDARD_DATASETS)
    other = {"sae_probes": "standard", "standard": "sae_probes"}[suite]
    assert resolved(EvalConfig(suite=other, tasks=("a",)), profile) == EvalConfig(suite=other, tasks=("a",))


def test_a_profile_that_names_an_unknown_suite_is_refused():
    with pytest.raises(UserError, match=r"suite='standart': expected one of auto, sae_probes, standard; did you mean"):
        resolved(EvalConfig(), {"suite": "standart"})


@pytest.mark.parametrize("name", ["auto", "standard"])
def test_a_suites_name_is_its_own(name):
    suite = ProbingSuite(name, "mine", ("a",), prepare=lambda evaluation: None, probe=lambda prepared, job: {})
    with pytest.raises(UserError, match="expected a name that no other suite has"):
        register_suite(suite)
    assert register_suite(SUITES["standard"]) is SUITES["standard"]
