"""The table of measures, and the figures that it finds in result files."""

import pytest

from hafs_evaluate.results import measures
from hafs_evaluate.results.measures import Measure, column_measures, find_measure, register_measure, sentence_name
from hafs_evaluate.results.readings import dataset_figures, read_results, run_figures
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_json

ALPHA = Measure("alphas", "alphas.json", "alphas", "The alphas of an SAE.", path="found.alphas")


@pytest.fixture(autouse=True)
def own_measures():
    """What a test registers is gone after it."""
    before = dict(measures.MEASURES)
    yield
    measures.MEASURES.clear()
    measures.MEASURES.update(before)


def figures(**files):
    return run_figures({"run": {f"{name}.json": values for name, values in files.items()}})["run"]


def test_a_measure_of_several_ks_is_found_by_its_name():
    top_3 = find_measure("top_3")
    assert (top_3.name, top_3.label, top_3.better) == ("top_3", "top-3 probing", "higher")
    assert find_measure("hierarchy_parent_top_1").path == "macro.parents_top_1"
    assert find_measure("hierarchy_parent_top_2").path == ""
    assert find_measure("top_x") is None
    assert sentence_name("hole") == "worst-child hole"
    assert sentence_name("no_such_measure") == "no_such_measure"
    assert [column.name for column in column_measures() if column.file == "probing.json"] == ["top_1", "top_5"]


def test_a_registered_measure_is_read_where_its_path_leads(tmp_path):
    register_measure(ALPHA)
    register_measure(ALPHA)  # once more is no mistake: a module may be imported twice
    assert figures(alphas={"found": {"alphas": 0.5}})["alphas"] == 0.5
    for nothing in ({}, {"found": {}}, {"found": None}, {"found": {"alphas": True}}, {"found": {"alphas": "0.5"}}):
        assert "alphas" not in figures(alphas=nothing)
    assert "alphas" not in figures(alphas={"found": {"alphas": float("nan")}})
    write_json(tmp_path / "run" / "alphas.json", {"found": {"alphas": 3}})
    assert ("alphas", "", 3.0) in dataset_figures(read_results(tmp_path / "run"))
    with pytest.raises(UserError, match="measure 'alphas': expected a name that no other measure has"):
        register_measure(Measure("alphas", "other.json", "alphas", "Other alphas.", path="alphas"))


def test_a_measure_without_any_path_is_refused():
    with pytest.raises(UserError, match=r"measure .m.: expected a path or a per_dataset path into m.json"):
        Measure("m", "m.json", "m", "Nothing.")


def test_means_are_over_the_datasets_that_every_run_has():
    register_measure(Measure("betas", "betas.json", "betas", "The betas.", per_dataset="*.beta"))
    found = {
        "a": {"betas.json": {"x.1": {"beta": 1.0}, "y": {"beta": 3.0}}},
        "b": {"betas.json": {"x.1": {"beta": 5.0}, "z": {"beta": 7.0}}},
        "c": {"betas.json": {}},
    }
    assert run_figures(found) == {"a": {"betas": 1.0}, "b": {"betas": 5.0}, "c": {}}
    assert dataset_figures(found["a"]) == [("betas", "x.1", 1.0), ("betas", "y", 3.0)]


def test_the_runs_figure_may_be_another_than_the_mean_over_its_datasets():
    nodes = {
        "arts": {"parent": None, "hole": 0.4, "contrasts": {"rest": {"top_1": {"balanced_accuracy": 0.8}}}},
        "arts/poet": {
            "parent": "arts",
            "hole": None,
            "contrasts": {
                "rest": {"top_1": {"balanced_accuracy": 0.6}, "full": {"balanced_accuracy": 0.9}},
                "siblings": {"top_2": {"balanced_accuracy": 0.7}},
            },
        },
    }
    hierarchy = {"trees": {"t": {"nodes": nodes}}, "macro": {"hole": 0.3, "parents_top_1": 0.75}}
    assert figures(hierarchy=hierarchy) == {
        "hierarchy_parent_top_1": 0.75,
        "hierarchy_child_top_1": 0.6,
        "hierarchy_sibling_top_2": 0.7,
        "hole": 0.3,
    }
    assert dataset_figures({"hierarchy.json": hierarchy}) == [
        ("hierarchy_parent_top_1", "t:arts", 0.8),
        ("hierarchy_child_top_1", "t:arts/poet", 0.6),
        ("hierarchy_sibling_top_2", "t:arts/poet", 0.7),
        ("hole", "t:arts", 0.4),
    ]


def test_a_first_letter_figure_that_is_not_valid_is_no_figure():
    detail = {"first_letter": "a", "mean_absorption_fraction": 0.2, "full_absorption_rate": 0.1}
    mean = {"mean_absorption_fraction_score": 0.3, "mean_full_absorption_score": 0.1}
    result = {"eval_result_metrics": {"mean": mean}, "eval_result_details": [detail]}
    valid = {"valid": True, "reason": "large", "result": result}
    assert figures(first_letter=valid) == {"first_letter_absorption": 0.3, "first_letter_absorption_full": 0.1}
    assert ("first_letter_absorption", "a", 0.2) in dataset_figures({"first_letter.json": valid})
    assert figures(first_letter={**valid, "valid": False}) == {}
