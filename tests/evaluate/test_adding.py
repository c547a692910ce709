"""An evaluation, a suite of probing tasks and a dataset, each added from outside of the repository by one record.

Every test writes one module to a folder of its own, imports it, and finds its numbers wherever results are shown. No
other file is touched.
"""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas
import pytest

from hafs_evaluate.cli import evaluate_parser
from hafs_evaluate.config import EvalConfig
from hafs_evaluate.experiment.config import ExperimentConfig
from hafs_evaluate.experiment.experiment import summarise
from hafs_evaluate.report.report import write_report
from hafs_evaluate.results import measures
from hafs_evaluate.saebench import datasets, suites
from hafs_evaluate.stages import STAGES, evaluate
from hafs_evaluate.workspace import Workspace, finished_runs
from hafs_jax.base.errors import UserError
from tests.support.environments import importing
from tests.support.runs import config_of, finished_run
from tests.support.workspaces import CONFIG

K = 4
OTHERS = [stage.name for stage in STAGES.values() if stage.can_be_skipped and not stage.modes]

EVALUATION = '''
"""How much of each row's norm the SAE keeps."""

import torch

from hafs_evaluate.results.measures import Measure
from hafs_evaluate.stage import Job, Stage
from hafs_evaluate.stages import register_evaluation

CALLS = []


@torch.no_grad()
def compute(job: Job) -> dict:
    CALLS.append(job.run.name)
    sae = job.sae()
    acts_BD = torch.from_numpy(next(iter(job.heldout.batches(16)))[1]).to(sae.device, sae.dtype)
    kept_B = sae(acts_BD).norm(dim=1) / acts_BD.norm(dim=1)
    return {"kept": {"mean": float(kept_B.mean()), "halves": {"first": {"kept": 0.25}, "second": {"kept": 0.75}}}}


register_evaluation(
    Stage(
        "norms",
        "how much of each row's norm the SAE keeps",
        "norms.json",
        compute=compute,
        inputs=lambda evaluation: [evaluation.workspace.heldout.manifest.fingerprint],
        line=lambda values: f"norm kept {values['kept']['mean']:.3f}",
        needs_tokens=False,
        measures=(
            Measure("norm_kept", "norms.json", "norm kept", "Mean share of a row's norm.", "kept.mean"),
            Measure("half_kept", "norms.json", "half kept", "Of halves.", per_dataset="kept.halves.*.kept"),
        ),
    )
)
'''

SUITE = '''
"""A suite of one made-up task, whose probe's accuracy is a property of the SAE."""

from hafs_evaluate.saebench.suites import ProbingSuite, register_suite


def probe(prepared, job):
    accuracy = round(0.5 + 0.4 * float(job.sae().W_dec.detach().abs().mean()), 6)
    metrics = {"test_accuracy": accuracy, "test_auc": 0.625}
    details = [{"dataset_name": task, "sae_metrics_by_k": {"1": metrics}} for task in job.config.tasks]
    return {"eval_result_details": details, "eval_result_unstructured": prepared}


register_suite(
    ProbingSuite(
        "made_up",
        "one task that needs no text",
        ("parity",),
        prepare=lambda evaluation: {"prepared_for": evaluation.manifest.hook_point},
        probe=probe,
        language_model=lambda evaluation, prepared, values: {"tasks": {"parity": {"full": {"test_accuracy": 0.875}}}},
    )
)
'''


DATASET = '''
"""Texts labelled by whether they begin with a number."""

from hafs_evaluate.saebench.datasets import ProbingDataset, register_probing_dataset


def read():
    for n in range(260):
        yield (f"{n} things", "number") if n % 2 else (f"w{n} things", "word")


register_probing_dataset(ProbingDataset("numbers", "whether a text begins with a number", read))
'''


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    tables: list[dict] = [STAGES, measures.MEASURES, suites.SUITES, datasets.PROBING_DATASETS]
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


@pytest.fixture
def runs(workspace: Workspace) -> Workspace:
    """The workspace's two runs as those of an experiment: baseline and strict at k = 4."""
    for variant in ("baseline", "strict"):
        folder = workspace.runs / f"{variant}-s0"
        target = workspace.runs / f"{variant}-s0-k={K}"
        shutil.rmtree(target, ignore_errors=True)
        finished_run(target, config_of(variant, tag=f"k={K}", sae={"k": K}))
        (folder / "sae").rename(target / "sae")
        shutil.rmtree(folder)
    return workspace


def imported(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def shown_everywhere(workspace: Workspace) -> tuple[dict, dict[str, str], pandas.DataFrame]:
    """(results.json's adaptive variants, {file: its text} of the report, the experiment's table)."""
    config = ExperimentConfig(arms=("baseline", "strict"), ks=(K,), seeds=1, bootstrap=50)
    summarise(config, workspace)
    write_report(workspace.folder)
    results = json.loads((workspace.report / "results.json").read_text())
    texts = {name: (workspace.report / name).read_text() for name in ("index.html", "report.md")}
    return results, texts, pandas.read_parquet(workspace.folder / "experiment" / "results.parquet")


def test_an_evaluation_is_one_module_and_one_record(
    runs: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = imported(tmp_path, "norms", EVALUATION, monkeypatch)
    assert "eval/<run>/norms.json" in evaluate_parser().format_help()
    assert evaluate_parser().parse_args(["--skip", "norms"]).skip == ["norms"]
    with caplog.at_level("INFO", "hafs_evaluate"):
        evaluate(runs, CONFIG, finished_runs(runs), skip=OTHERS)
    name = f"strict-s0-k={K}"
    values = json.loads(runs.result(name, "norms.json").read_text())
    kept = values["kept"]["mean"]
    assert values["run"] == name and len(values["sae_sha256"]) == 64 and values["config"]["contexts"] == 4
    assert f"{name}: norm kept {kept:.3f}" in caplog.text
    results, texts, table = shown_everywhere(runs)
    strict = results["arms"]["strict"]
    assert (
        strict["measures"]["norm_kept"]["mean"]
        == kept
        == results["variants"][strict["runs"][0]]["measures"]["norm_kept"]
    )
    assert strict["measures"]["half_kept"]["mean"] == 0.5
    for text in texts.values():
        assert f"{kept:.3f}" in text and "Mean share of a row" in text
    assert "| norm kept |" in texts["report.md"]
    rows = table[table.run == name].set_index(["measure", "dataset"]).value
    assert rows["norm_kept", ""] == kept and rows["half_kept", "second"] == 0.75
    assert "norms/strict-s0-k=4" in json.loads(runs.seconds.read_text())

    assert sorted(module.CALLS) == [f"baseline-s0-k={K}", name]
    evaluate(runs, CONFIG, finished_runs(runs), skip=OTHERS)
    assert len(module.CALLS) == 2  # what is done is not done again


def test_the_command_takes_an_evaluation_that_hafs_plugins_names(tmp_path: Path) -> None:
    (tmp_path / "norms.py").write_text(EVALUATION)
    command = [sys.executable, "-m", "hafs_jax", "evaluate", "--help"]
    environment = importing(tmp_path, HAFS_PLUGINS="norms")
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "how much of each row's norm the SAE keeps" in shown and "eval/<run>/norms.json" in shown


def test_a_suite_is_one_record(runs: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(tmp_path, "made_up_suite", SUITE, monkeypatch)
    assert "one task that needs no text" in evaluate_parser().format_help()
    skip = [name for name in OTHERS if name != "probing"]
    evaluate(runs, EvalConfig(suite="made_up", device="cpu"), finished_runs(runs), skip=skip)
    name = f"strict-s0-k={K}"
    values = json.loads(runs.result(name, "probing.json").read_text())
    (detail,) = values["eval_result_details"]
    accuracy = detail["sae_metrics_by_k"]["1"]["test_accuracy"]
    assert detail["dataset_name"] == "parity"
    assert values["eval_result_unstructured"]["run"] == name
    assert values["eval_result_unstructured"]["prepared_for"] == runs.heldout.manifest.hook_point
    results, texts, table = shown_everywhere(runs)
    assert results["llm"]["probing"] == {"parity": {"full": 0.875}}
    for text in texts.values():
        assert f"{accuracy:.3f}" in text and "parity" in text and "0.875" in text
    rows = table[table.run == name].set_index(["measure", "dataset"]).value
    assert rows["top_1", "parity"] == accuracy and rows["top_1_auroc", "parity"] == 0.625


def test_a_dataset_is_one_record(runs: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(tmp_path, "numbers_dataset", DATASET, monkeypatch)
    assert "numbers: whether a text begins with a number" in evaluate_parser().format_help()
    skip = [name for name in OTHERS if name != "probing"]
    config = EvalConfig(suite="sae_probes", tasks=("numbers",), ks=(1,), device="cpu")
    evaluate(runs, config, finished_runs(runs), skip=skip)
    name = f"strict-s0-k={K}"
    (detail,) = json.loads(runs.result(name, "probing.json").read_text())["eval_result_details"]
    assert detail["dataset_name"] == "numbers" and 0.4 < detail["llm_test_accuracy"] <= 1
    results, texts, table = shown_everywhere(runs)
    assert results["llm"]["probing"]["numbers"].keys() == {"full", "top_1", "pca_1"}
    accuracy = detail["sae_metrics_by_k"]["1"]["test_accuracy"]
    for text in texts.values():
        assert f"{accuracy:.3f}" in text and "numbers" in text
    rows = table[table.run == name].set_index(["measure", "dataset"]).value
    assert rows["top_1", "numbers"] == accuracy

    done = json.loads(runs.result(name, "probing.json").read_text())["marks"]["probing"]
    other = [("new text", "number"), *datasets.PROBING_DATASETS["numbers"].rows]
    changed = datasets.ProbingDataset("numbers", "with another text", lambda: other)
    monkeypatch.setitem(datasets.PROBING_DATASETS, "numbers", changed)
    evaluate(runs, config, finished_runs(runs, [name]), skip=skip)
    assert json.loads(runs.result(name, "probing.json").read_text())["marks"]["probing"] != done


def test_a_stage_says_how_it_measures(tmp_path: Path) -> None:
    from hafs_evaluate.stage import Stage
    from hafs_evaluate.stages import register_evaluation

    with pytest.raises(UserError, match="stage 'x': expected one of compute, compute_together and compute_all"):
        Stage("x", "nothing", "x.json")
    with pytest.raises(UserError, match="stage 'core': expected a name that no other stage has"):
        register_evaluation(Stage("core", "another core", "core.json", compute=lambda job: {}))
