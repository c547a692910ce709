"""Means over the classes of label trees count each figure once."""

import pytest

from hafs_evaluate.hierarchy.tree_means import complements, left_out, macro, mean_over_trees, only_children, with_means
from hafs_evaluate.results.measures import HIERARCHY
from hafs_evaluate.results.readings import dataset_figures, run_figures


def scores(value):
    return {"top_1": {"balanced_accuracy": value, "auroc": value}}


def node(level, parent, rest, siblings=None, hole=None, texts=None):
    contrasts = {"rest": scores(rest), "siblings": siblings and scores(siblings)}
    absorption = None if hole is None else {"fraction": hole, "full": hole}
    return {
        "level": level, "parent": parent, "contrasts": contrasts, "hole": hole, "absorption": absorption,
        "texts": texts,
    }  # fmt: skip


LANGUAGE = {
    "germanic": node(1, None, 0.9, hole=0.5, texts=150),
    "romance": node(1, None, 0.9, hole=0.3, texts=300),
    "germanic/english": node(2, "germanic", 0.9, texts=150),
    "romance/french": node(2, "romance", 0.8, 0.7, texts=150),
    "romance/spanish": node(2, "romance", 0.6, 0.7, texts=150),
}
NEWS = {
    "dispatch": node(1, None, 0.6, hole=0.2, texts=200),
    "headline": node(1, None, 0.6, hole=0.1, texts=100),
    "dispatch/world": node(2, "dispatch", 0.5, 0.4, texts=90),
    "dispatch/sports": node(2, "dispatch", 0.7, 0.6, texts=100),
    "headline/china": node(2, "headline", 0.5, 0.3, texts=50),
    "headline/iran": node(2, "headline", 0.7, 0.3, texts=50),
}


def test_macro_averages_nodes_and_trees():
    nodes = {"a": node(1, None, 0.9, hole=0.2, texts=5), "b": node(1, None, 0.7, texts=4)}
    found = macro({**nodes, "a/x": node(2, "a", 0.6, 0.5, texts=3)}, 20)
    assert found["level_1"]["top_1"]["balanced_accuracy"] == pytest.approx(0.8)
    assert found["parents_top_1"] == pytest.approx(0.9)
    assert (found["hole"], found["absorption_full"]) == (0.2, 0.2)
    assert found["siblings_2"]["top_1"]["auroc"] == 0.5
    both = mean_over_trees([found, {"hole": 0.4, "level_1": scores(0.6)}])
    assert both["hole"] == pytest.approx(0.3)
    assert both["level_1"]["top_1"]["auroc"] == pytest.approx(0.7)


def test_classes_that_repeat_others_are_found():
    assert only_children(LANGUAGE) == {"germanic": "germanic/english"}
    assert complements(LANGUAGE, 450) == {"germanic": "romance", "romance/spanish": "romance/french"}
    assert left_out(LANGUAGE, 450) == ["germanic"]
    assert complements(LANGUAGE, 500) == {"romance/spanish": "romance/french"}  # there is a background
    assert only_children({**LANGUAGE, "germanic": node(1, None, 0.9, texts=200)}) == {}  # texts of no child
    assert only_children(NEWS) == {}
    assert complements(NEWS, 300) == {"headline": "dispatch", "headline/iran": "headline/china"}
    assert left_out(NEWS, 300) == ["headline"]
    third = {**NEWS, "letter": node(1, None, 0.5, texts=0)}
    assert "headline" not in complements(third, 300)


def test_means_leave_them_out():
    language, news = macro(LANGUAGE, 450), macro(NEWS, 300)
    changed = {**LANGUAGE, "germanic": node(1, None, 0.1, hole=0.9, texts=150)}
    assert macro(changed, 450) == language  # nothing of it is in any mean
    assert (language["hole"], language["parents_top_1"]) == (0.3, 0.9)
    assert macro({**NEWS, "headline": node(1, None, 0.1, hole=0.1, texts=100)}, 300) == news
    assert news["hole"] == pytest.approx(0.15)  # a complement's hole is about its own latents
    assert news["siblings_2"]["top_1"]["auroc"] == pytest.approx((0.4 + 0.6 + 0.3) / 3)


def test_every_reader_of_a_result_leaves_them_out():
    written = {"trees": {"language": {"texts": 450, "nodes": LANGUAGE}, "news": {"texts": 300, "nodes": NEWS}}}
    read = with_means({**written, "macro": {"parents_top_1": 0.0}})  # the means of an earlier version
    assert [read["trees"][name]["left_out"] for name in ("language", "news")] == [["germanic"], ["headline"]]
    by_measure = {}
    for measure, dataset, _ in dataset_figures({HIERARCHY: read}):
        by_measure.setdefault(measure, set()).add(dataset)
    parents = {"language:romance", "news:dispatch"}
    assert by_measure["hierarchy_parent_top_1"] == parents
    assert by_measure["hole"] == by_measure["absorption_full"] == parents | {"news:headline"}
    assert "language:romance/spanish" not in by_measure["hierarchy_sibling_top_1"]
    assert "language:romance/spanish" in by_measure["hierarchy_child_top_1"]
    figures = run_figures({"a": {HIERARCHY: read}})["a"]
    assert figures["hierarchy_parent_top_1"] == pytest.approx(0.75)
    assert figures["hole"] == pytest.approx((0.3 + 0.15) / 2)
