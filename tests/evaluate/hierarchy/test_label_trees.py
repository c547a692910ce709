"""Label trees: the bundled files, a user's own, what is left out and what is refused."""

import hashlib
import json

import pytest

from hafs_evaluate.hierarchy import label_trees
from hafs_evaluate.hierarchy.label_trees import MIN_TEXTS, find_trees, labelled_texts, read_tree
from hafs_evaluate.saebench.task_activations import task_path
from hafs_extract import packaged
from hafs_jax.base.errors import UserError
from tests.support.torch_saes import write_tree

RECORDS = [
    {"title": f"T{n}", "extract": f"text {n}", "description": description, "topic": topic}
    for n, (description, topic) in enumerate(
        [("English poet and king", "People")] * 25
        + [("King of Norway", "People")] * 24
        + [("a city", "Geography")] * 30
    )
]
PACKAGED = {"kind": "packaged", "name": "packaged/wikipedia-summaries", "text": "extract", "group": "title"}


def wikipedia_tree(folder, *leaves, **more):
    path = folder / "own.json"
    leaves = [{"source": "wiki", **leaf} for leaf in leaves]
    path.write_text(json.dumps({"cap": 22, "sources": {"wiki": PACKAGED}, "leaves": leaves, **more}))
    return path


POETS = {"path": "people/arts/poet", "where": {"topic": "^People$", "description": r"\bpoet\b"}}
KINGS = {"path": "people/power/king", "where": {"description": r"\bking\b"}}
REST = {"path": "", "where": {}}


@pytest.fixture
def records(monkeypatch):
    monkeypatch.setattr(packaged, "read_records", lambda text: RECORDS)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def paths_of(texts):
    return {path: [item for item in texts.items if item.path == path] for path in texts.leaves}


def test_the_bundled_trees_are_read_and_name_known_tasks():
    trees = find_trees()
    assert [tree.name for tree in trees] == sorted(
        ["code", "language", "news", "occupations", "professions", "sentiment", "topics"]
    )
    for tree in trees:
        assert tree.about
        for leaf in tree.leaves:
            if leaf.task:
                assert task_path(leaf.task).exists()


def test_the_first_rule_that_matches_takes_a_record_and_the_cap_holds(tmp_path, records):
    texts = labelled_texts(read_tree(wikipedia_tree(tmp_path, POETS, KINGS, {**REST, "cap": 28})))
    found = paths_of(texts)
    assert {path: len(items) for path, items in found.items()} == {
        "": 28,
        "people/arts/poet": 22,
        "people/power/king": 22,
    }
    assert {item.text for item in found["people/arts/poet"]} <= {f"text {n}" for n in range(25)}
    assert all(item.group.startswith("T") for item in texts.items)


def test_training_documents_are_left_out_and_a_leaf_left_with_too_few_is_dropped(tmp_path, records):
    tree = read_tree(wikipedia_tree(tmp_path, POETS, KINGS, REST))
    trained_on = {sha256(f"text {n}") for n in [*range(3), *range(25, 35)]}
    texts = labelled_texts(tree, trained_on)
    assert texts.in_training == 13
    assert texts.dropped == {"people/power/king": 14}
    assert texts.leaves == ["", "people/arts/poet"]
    assert not {sha256(item.text) for item in texts.items} & trained_on


def test_the_draw_is_the_seeds_and_does_not_move_when_other_texts_go(tmp_path, records):
    drawn = {
        seed: {item.text for item in labelled_texts(read_tree(wikipedia_tree(tmp_path, REST, seed=seed))).items}
        for seed in (0, 1)
    }
    assert drawn[0] != drawn[1]
    gone = next(text for text in (f"text {n}" for n in range(79)) if text not in drawn[0])
    fewer = labelled_texts(read_tree(wikipedia_tree(tmp_path, REST)), {sha256(gone)})
    assert {item.text for item in fewer.items} == drawn[0]


def test_a_users_own_jsonl_tree(tmp_path):
    folder = write_tree(tmp_path)
    (tree,) = find_trees([str(folder / "words.json")])
    texts = labelled_texts(tree)
    assert texts.leaves == ["dry/iron", "dry/salt", "wet/river", "wet/sea"]
    assert all(item.path.split("/")[1] == item.text.split(" ")[0] and item.group == item.text for item in texts.items)


def test_a_text_of_two_paths_is_ambiguous_and_one_given_twice_counts_once(tmp_path):
    folder = write_tree(tmp_path, texts=22)
    with open(folder / "words.jsonl", "a") as file:
        file.write('{"text": "river wet the the 0", "label": "dry/iron"}\n')
        file.write('{"text": "river wet cell cell 1", "label": "wet/river", "group": "g"}\n')
    texts = labelled_texts(read_tree(folder / "words.json"))
    assert texts.ambiguous == 1
    assert "river wet the the 0" not in {item.text for item in texts.items}
    assert len({item.text for item in texts.items}) == len(texts.items)


def test_a_leaf_with_too_few_texts_is_an_error_that_names_it(tmp_path):
    folder = write_tree(tmp_path, texts=MIN_TEXTS - 1)
    with pytest.raises(UserError, match="leaf 'wet/river': expected at least 20 texts, found 19; widen"):
        labelled_texts(read_tree(folder / "words.json"))


@pytest.mark.parametrize(
    ("leaf", "more", "message"),
    [
        ({"path": "a//b", "where": {}}, {}, "expected a path like people/arts/actor"),
        ({"path": "a", "source": "wikki", "where": {}}, {}, "expected one of the sources wiki, found 'wikki'; did you"),
        ({"path": "a", "where": {"topic": "("}}, {}, "expected where: {field: regular expression}, 'topic': missing"),
        ({"path": "a"}, {}, "expected where"),
        ({"path": "a", "were": {}}, {}, "unknown key 'were', expected .*; did you mean 'where'"),
        (REST, {"cap": 3}, "cap=3: expected at least 20"),
        (REST, {"sources": {"wiki": {"kind": "csv"}}}, "expected kind packaged, sae_probes or jsonl, found 'csv'"),
        (REST, {"sources": {"wiki": {**PACKAGED, "name": "wikipedia"}}}, "expected a packaged text, found 'wikipedia'"),
        (REST, {"sources": {"wiki": {"kind": "packaged", "name": PACKAGED["name"]}}}, "expected text, the field that"),
        (REST, {"sources": {"wiki": PACKAGED, "own": {"kind": "jsonl"}}}, "'own': expected path, the file of"),
    ],
)
def test_a_wrong_tree_is_one_line(tmp_path, leaf, more, message):
    with pytest.raises(UserError, match=message) as raised:
        read_tree(wikipedia_tree(tmp_path, leaf, **more))
    assert "\n" not in str(raised.value)


def test_unknown_names_and_fields_are_errors(tmp_path, records, monkeypatch):
    with pytest.raises(UserError, match=r"tree .topcis.: expected .*; did you mean .topics."):
        find_trees(["topcis"])
    with pytest.raises(UserError, match=r"expected a label tree at nowhere\.json"):
        find_trees(["nowhere.json"])
    tree = read_tree(wikipedia_tree(tmp_path, {"path": "a", "where": {"subject": "x"}}))
    with pytest.raises(UserError, match="has no field 'subject'; it has title, extract"):
        labelled_texts(tree)
    monkeypatch.setattr(label_trees, "FOLDER", write_tree(tmp_path / "trees"))
    assert [tree.name for tree in find_trees()] == ["words"]
