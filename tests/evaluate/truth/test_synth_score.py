"""`hafs synth-score`: the scores of a synthetic world's runs, each made once."""

import csv
import dataclasses

import pytest

import hafs_evaluate.truth.synth_score as stage
from hafs_evaluate.cli import main as evaluate_main
from hafs_evaluate.truth.ground_truth import load_truth
from hafs_evaluate.workspace import Exported, FinishedRun, hashed_export, open_workspace
from hafs_extract.synthetic.samples import HOOK_POINT, generate
from hafs_jax.base.files import read_json
from hafs_jax.runs import Run
from tests.support.runs import STORE, config_of, finished_run
from tests.support.torch_saes import saved_sae
from tests.support.worlds import TINY, D, files

LAM = {"baseline-s0": 0.0, "strict-s1": 3.0}


@pytest.fixture
def workspace(tiny, tmp_path, monkeypatch):
    """A copy of the tiny world with two finished runs and an unfinished one; exporting takes what is there."""
    for name, data in files(tiny).items():
        (tmp_path / "synth-tiny" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "synth-tiny" / name).write_bytes(data)
    for seed, (name, lam) in enumerate(LAM.items()):
        folder = tmp_path / "synth-tiny" / "runs" / name
        saved_sae(folder / "sae", D, 23, seed=seed, hook=HOOK_POINT)
        penalty = {"lam_max": lam, "kind": "hinge"}
        finished_run(folder, config_of(name[:-3], seed=seed, sae={"k": 4, "n_latents": 23}, penalty=penalty))
    Run(tmp_path / "synth-tiny" / "runs" / "adaptive-s0").write_config(config_of("adaptive"), STORE)
    return open_workspace(tmp_path, "synth-tiny")


class Export:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, run: FinishedRun) -> Exported:
        self.calls.append(run.name)
        return hashed_export(run.name, run.folder / "sae")


def test_runs_are_scored_once(workspace, monkeypatch):
    export = Export()
    results = stage.evaluate_synthetic(workspace, device="cpu", export=export)
    assert export.calls == [result["run"] for result in results] == list(LAM)
    truth = load_truth(workspace.folder)
    for result in results:
        path = workspace.result(result["run"], "synthetic.json")
        assert read_json(path, "a result") == result
        exported = hashed_export(result["run"], workspace.runs / result["run"] / "sae")
        assert result["metrics"] == stage.score(exported, workspace.heldout, truth)
        assert result["truth_sha256"] == truth.sha256
        assert result["settings"]["min_edge_rows"] == 20
    assert (results[1]["variant"], results[1]["architecture"], results[1]["seed"], results[1]["k"]) == (
        "strict",
        "batchtopk",
        1,
        4,
    )
    with open(workspace.eval / "synthetic.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == list(LAM)
    assert [float(row["penalty.lam_max"]) for row in rows] == list(LAM.values())
    assert "penalty.kind" not in rows[0]  # the same in both
    assert float(rows[1]["mcc"]) == results[1]["metrics"]["mcc"]
    assert float(rows[1]["f1_level2"]) == results[1]["metrics"]["by_level"][2]["f1"]
    assert rows[1]["absorption_level2"] == ""

    before = {path: path.stat().st_mtime_ns for path in workspace.eval.rglob("*.json")}

    def called(*args: object) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr(stage, "score", called)
    assert stage.evaluate_synthetic(workspace, device="cpu", export=called) == results
    assert {path: path.stat().st_mtime_ns for path in workspace.eval.rglob("*.json")} == before
    run = Run(workspace.runs / "strict-s1")
    run.write_result(dataclasses.replace(run.summary(), seconds=99.0))  # trained again, to the same weights
    again = stage.evaluate_synthetic(workspace, device="cpu", export=export)
    assert export.calls[2:] == ["strict-s1"]
    assert again[1]["metrics"] == results[1]["metrics"]
    saved_sae(workspace.runs / "strict-s1" / "sae", D, 23, seed=9, hook=HOOK_POINT)
    with pytest.raises(AssertionError, match="done already"):
        stage.evaluate_synthetic(workspace, device="cpu", export=export)


@pytest.mark.parametrize("change", ["sae", "truth", "settings"])
def test_another_sae_truth_or_setting_is_scored_anew(workspace, change, monkeypatch):
    first = stage.evaluate_synthetic(workspace, device="cpu", export=Export())
    if change == "sae":
        saved_sae(workspace.runs / "strict-s1" / "sae", D, 23, seed=9, hook=HOOK_POINT)
    elif change == "truth":
        generate(dataclasses.replace(TINY, seed=5), workspace.folder.parent, force=True)
        workspace = open_workspace(workspace.folder.parent, "synth-tiny")
    else:
        monkeypatch.setattr(stage, "SETTINGS", {"version": 99})
    scored = []
    original = stage.score
    monkeypatch.setattr(stage, "score", lambda *args: scored.append(args[0].name) or original(*args))
    second = stage.evaluate_synthetic(workspace, device="cpu", export=Export())
    assert scored == (["strict-s1"] if change == "sae" else list(LAM))
    assert (second[1]["metrics"] != first[1]["metrics"]) == (change != "settings")


def test_the_command_line_scores_the_named_runs_and_keeps_the_others_rows(workspace, capsys, monkeypatch):
    monkeypatch.setattr("hafs_jax.saelens.export_saelens", lambda folder, k=None: folder / "sae")
    place = ["synth-score", "--out", str(workspace.folder.parent), "--profile", "synth-tiny", "--device", "cpu"]
    assert evaluate_main([*place, "--runs", "strict-s1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "k", "l0", "fvu"]
    assert [line.split()[0] for line in lines[1:-1]] == ["strict-s1"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1] == str(workspace.eval / "synthetic.csv")
    assert not workspace.result("baseline-s0", "synthetic.json").exists()
    assert evaluate_main([*place, "--runs", "baseline-s0"]) == 0
    assert [line.split(",")[0] for line in (workspace.eval / "synthetic.csv").read_text().splitlines()] == ["run", *LAM]
    capsys.readouterr()
    for path in (workspace.folder / "truth.json", workspace.folder / "truth.npz"):
        path.unlink()
    with pytest.raises(SystemExit) as stopped:
        evaluate_main(place)
    assert stopped.value.code == 2
    assert "expected a synthetic world's truth" in capsys.readouterr().err
