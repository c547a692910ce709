"""The results of label trees: means over nodes and trees, the files of the stage, what is not done twice."""

import hashlib
import json

import pytest

from hafs_evaluate.workspace import Workspace
from hafs_jax.base.errors import UserError
from tests.support.stores import resealed
from tests.support.workspaces import CONFIG, run

SKIP = ("splice", "probing", "latents")


def read(workspace, name):
    return json.loads((workspace.eval / name / "hierarchy.json").read_text())


def test_the_stage_writes_the_schema_and_is_not_done_twice(workspace, monkeypatch):
    run(workspace, skip=SKIP)
    found, llm = read(workspace, "baseline-s0"), read(workspace, "llm")
    assert found["run"] == "baseline-s0" and len(found["sae_sha256"]) == 64
    tree = found["trees"]["words"]
    assert (tree["texts"], tree["levels"], tree["dropped"]) == (80, 2, {})
    assert list(tree["nodes"]) == ["dry", "wet", "dry/iron", "dry/salt", "wet/river", "wet/sea"]
    child, parent = tree["nodes"]["wet/sea"], tree["nodes"]["wet"]
    assert (child["level"], child["parent"], child["label"], child["texts"]) == (2, "wet", "sea", 20)
    names = [f"top_{k}" for k in CONFIG.hierarchy_ks]
    assert list(child["contrasts"]["rest"]) == list(child["contrasts"]["siblings"]) == names
    keys = {"balanced_accuracy", "balanced_accuracy_se", "auroc", "auroc_se"}
    assert set(child["contrasts"]["rest"]["top_1"]) == keys
    assert parent["contrasts"]["siblings"] is None and child["absorption"] is None and child["hole"] is None
    assert set(parent["absorption"]) == {"fraction", "full", "mains", "texts"}
    assert isinstance(parent["hole"], float)
    assert set(found["macro"]) == set(tree["macro"])
    assert tree["left_out"] == ["wet"]  # whatever is not dry
    for values in (found, llm):
        nodes, means = values["trees"]["words"]["nodes"], values["macro"]
        assert means["parents_top_1"] == nodes["dry"]["contrasts"]["rest"]["top_1"]["balanced_accuracy"]
    full = llm["trees"]["words"]["nodes"]["wet"]["contrasts"]["rest"]
    assert set(full) == {"full", *names, *(name.replace("top", "pca") for name in names)}
    assert full["full"]["balanced_accuracy"] > 0.9  # the words themselves say it

    before = {path: path.stat().st_mtime_ns for path in workspace.eval.rglob("hierarchy*")}
    monkeypatch.setattr("hafs_evaluate.hierarchy.tree_results.TreeProbing.sae", None)
    run(workspace, skip=SKIP)
    assert {path: path.stat().st_mtime_ns for path in workspace.eval.rglob("hierarchy*")} == before


def test_a_changed_tree_is_measured_again_with_the_old_activations(workspace, tmp_path, monkeypatch):
    run(workspace, skip=SKIP, names=["strict-s0"])
    path = tmp_path / "trees" / "words.json"
    path.write_text(path.read_text().replace("wet", "wet").replace("{", '{"seed": 3, ', 1))
    monkeypatch.setattr("hafs_evaluate.hierarchy.text_activations._compute", None)  # nothing is left to compute
    written = (workspace.eval / "strict-s0" / "hierarchy.json").stat().st_mtime_ns
    run(workspace, skip=SKIP, names=["strict-s0"])
    assert (workspace.eval / "strict-s0" / "hierarchy.json").stat().st_mtime_ns != written


def test_a_tree_with_nothing_left_is_skipped_and_said(workspace, tmp_path, caplog):
    caplog.set_level("INFO", "hafs_evaluate")
    texts = [json.loads(line)["text"] for line in (tmp_path / "trees" / "words.jsonl").read_text().splitlines()]
    lines = [json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()}) for text in texts[:75]]
    (workspace.train.folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    resealed(workspace.train.folder)
    workspace = Workspace(workspace.folder)
    with pytest.raises(
        UserError, match="no label tree has two leaves outside the training documents; --skip hierarchy"
    ):
        run(workspace, skip=SKIP)
    assert "texts that were not trained on: words (0 of 4)" in caplog.text
