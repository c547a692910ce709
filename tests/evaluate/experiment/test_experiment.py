"""The experiment runner: its config, its table and its claims from made-up results, and one whole small experiment."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from hafs_evaluate.cli import evaluate_parser
from hafs_evaluate.experiment import experiment as module
from hafs_evaluate.experiment.comparisons import _verdict, off_level, pairs_of, summary_of
from hafs_evaluate.experiment.config import ExperimentConfig, read_experiment, run_name
from hafs_evaluate.experiment.experiment import run_experiment, summarise
from hafs_evaluate.experiment.measurements import Cell, Values, rows_of
from hafs_evaluate.results.paired import Difference
from hafs_evaluate.workspace import Workspace
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import write_json
from hafs_jax.base.process.locks import locked
from hafs_jax.cli import main

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
ARMS = ("baseline", "strict", "strict lam=0.3", "adaptive", "ramp_only", "frozen_decoder")
CONFIG = ExperimentConfig(arms=ARMS, architectures=("relu", "batchtopk"), ks=(2, 4), seeds=3, bootstrap=500)


def write_results(folder: Path, parent: float, hole: float, fvu: float, l0: float) -> None:
    nodes = {
        "people": {
            "parent": None,
            "contrasts": {"rest": {"top_1": {"balanced_accuracy": parent}}, "siblings": None},
            "absorption": {"fraction": hole / 2, "full": hole / 4},
            "hole": hole,
        },
        "people/poet": {
            "parent": "people",
            "contrasts": {
                "rest": {"top_1": {"balanced_accuracy": 0.6}},
                "siblings": {"top_1": {"balanced_accuracy": 0.7}},
            },
            "absorption": {"fraction": 0.9, "full": 0.9},
            "hole": None,
        },
    }
    write_json(folder / "hierarchy.json", {"trees": {"tree": {"nodes": nodes}}})
    write_json(
        folder / "core.json",
        {
            "reconstruction": {"fvu": fvu},
            "sparsity": {"l0": l0, "dead_fraction": 0.0, "dense_fraction": 0.0},
            "geometry": {"mean_coherence": 0.2, "max_coherence": 0.5},
            "model": {},
        },
    )
    details = [
        {"dataset_name": task, "sae_metrics_by_k": {"1": {"test_accuracy": parent, "test_auc": 0.8}}}
        for task in ("task_a", "task_b")
    ]
    write_json(folder / "probing.json", {"eval_result_details": details})


def made_up(folder: Path, gains: Callable[[str], tuple[float, float, float]], config: ExperimentConfig) -> Workspace:
    """A workspace whose arms' (parent probing, hole, FVU) are `gains(arm)` plus a little noise of the seed."""
    workspace = Workspace(folder)
    for cell in config.cells():
        noise = 0.002 * np.random.default_rng(cell.seed).normal()
        parent, hole, fvu = (value + noise for value in gains(cell.variant))
        write_results(workspace.eval / cell.run, parent, hole, fvu, cell.k * 1.001)
    return workspace


def steady(arm: str) -> tuple[float, float, float]:
    """Adaptive is best in both primaries at the baseline's FVU."""
    return {"adaptive": (0.9, 0.1, 0.2), "strict": (0.8, 0.2, 0.3), "ramp_only": (0.85, 0.15, 0.2)}.get(
        arm, (0.7, 0.4, 0.2)
    )


def outcomes(summary: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in summary["falsifiers"]:
        found.setdefault(entry["name"], set()).add(entry["outcome"])
    return found


def test_run_names_are_those_that_a_sweep_gives() -> None:
    from hafs_jax.commands.flags import run_config
    from hafs_jax.training.sweeps import arguments_of, parse_grid

    config = ExperimentConfig(
        arms=("strict lam=0.3", "adaptive penalty.yielding=rarer"), architectures=("relu",), ks=(3,)
    )
    points = parse_grid(config.grid())
    flags = ["--arch", "relu", "--seed", "1"]
    names = [run_config([*flags, *arguments_of(point)]).run_name for point in points]
    assert names == [cell.run for cell in config.cells() if cell.seed == 1]
    assert names == ["strict-relu-s1-lam=0.3,k=3", "adaptive-relu-s1-yielding=rarer,k=3"]
    assert run_name("baseline", "batchtopk", 8, 0) == "baseline-s0-k=8"


def test_the_method_that_the_file_names_is_compared_with_every_other_arm() -> None:
    arms = ("baseline", "strict", "yielding")
    found = pairs_of(arms, "yielding")
    assert found == [("yielding", "baseline"), ("yielding", "strict"), ("strict", "baseline")]
    assert pairs_of(arms, "adaptive") == [("strict", "baseline"), ("yielding", "baseline")]
    with pytest.raises(UserError, match=r"method='yeilding': expected one of the arms baseline, strict, yielding"):
        ExperimentConfig(arms=arms, method="yeilding")


@pytest.mark.parametrize("name", sorted(path.name for path in EXPERIMENTS.glob("*.toml")))
def test_the_committed_experiments_are_valid_and_so_is_every_training_in_them(name: str) -> None:
    from hafs_jax.commands.flags import run_config
    from hafs_jax.training.sweeps import arguments_of, parse_grid

    config = read_experiment(EXPERIMENTS / name)
    for architecture in config.architectures:
        points = parse_grid(config.grid())
        runs = [run_config([*config.train, "--arch", architecture, *arguments_of(point)]).run_name for point in points]
        assert runs == [c.run for c in config.cells() if (c.architecture, c.seed) == (architecture, 0)]
    from hafs_evaluate.cli import evaluate_parser

    evaluate_parser().parse_args(config.evaluate)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm = ['baseline']", "unknown key 'arm'; did you mean 'arms'"),
        ("seeds = 'five'", "seeds: expected int, found 'five'"),
        ("arms = ['strict lam=1,2']", "expected a variant and axes of one value"),
        ("ks = [4, 4]", "each once"),
        ("seeds = 0", "expected 1 to 10,000"),
        ("# nothing", "found one that says nothing"),
        ("name = 'a/b'", "expected letters"),
        ("seeds = ", "e.toml, found a file that is not TOML (Invalid value"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "e.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_experiment(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.toml, found no such file"):
        read_experiment(tmp_path / "nothing.toml")


def test_a_runs_rows_hold_every_measure_and_say_of_what(tmp_path: Path) -> None:
    write_results(tmp_path / "r", 0.8, 0.2, 0.3, 4.0)
    rows = rows_of(Cell("r", "relu", "strict lam=0.3", 4, 1), tmp_path / "r")
    found = {(row["measure"], row["dataset"]): row["value"] for row in rows}
    assert found["fvu", ""] == 0.3 and found["l0", ""] == 4.0
    assert found["top_1", "task_a"] == 0.8 and found["top_1_auroc", "task_b"] == 0.8
    assert found["hierarchy_parent_top_1", "tree:people"] == 0.8 and found["hole", "tree:people"] == 0.2
    assert found["hierarchy_child_top_1", "tree:people/poet"] == 0.6
    assert found["hierarchy_sibling_top_1", "tree:people/poet"] == 0.7
    assert found["absorption_full", "tree:people"] == 0.05
    assert ("absorption_full", "tree:people/poet") not in found  # only parents can be absorbed by their children
    assert ("ce_score", "") not in found  # not measured
    assert all(row["variant"] == "strict lam=0.3" and row["seed"] == 1 for row in rows)


def test_values_are_aligned_by_seed_and_dataset_and_incomplete_datasets_are_left_out() -> None:
    rows = [
        {
            "run": f"r{seed}",
            "architecture": "relu",
            "variant": "a",
            "k": k,
            "seed": seed,
            "measure": "m",
            "dataset": d,
            "value": v,
        }
        for seed, k, d, v in [(0, 2, "x", 1.0), (1, 2, "x", 2.0), (1, 2, "y", 9.0), (1, 4, "x", 4.0), (0, 4, "x", 3.0)]
    ]
    table = Values(rows)
    values, names = table.array("m", "relu", [2], "a", (0, 1))
    assert values.tolist() == [[1.0], [2.0]] and names == ["2/x"]
    values, names = table.array("m", "relu", [2, 4], "a", (0, 1))
    assert values.tolist() == [[1.0, 3.0], [2.0, 4.0]] and names == ["2/x", "4/x"]


def test_stability_is_a_measure_of_each_run(tmp_path: Path) -> None:
    workspace = made_up(tmp_path, steady, CONFIG)
    run = next(CONFIG.cells()).run
    write_json(workspace.eval / "stability.json", {"runs": {run: {"mean_max_cosine": 0.7}, "other": {}}})
    arm = summarise(CONFIG, workspace)["arms"][0]
    assert "stability" not in arm["measures"]  # of one of three seeds alone
    names = [cell.run for cell in CONFIG.cells()]
    write_json(workspace.eval / "stability.json", {"runs": {name: {"mean_max_cosine": 0.7} for name in names}})
    assert summarise(CONFIG, workspace)["arms"][0]["measures"]["stability"]["mean"] == pytest.approx(0.7)


def test_a_planted_win_passes_every_falsifier_and_is_said_with_numbers(tmp_path: Path) -> None:
    summary = summarise(CONFIG, made_up(tmp_path, steady, CONFIG))
    assert outcomes(summary) == {
        "adaptive = ramp_only": {"pass"},
        "parent = global": {"not decided"},
        "best strict ties": {"pass"},
        "gains vanish against frozen_decoder": {"pass"},
        "FVU inferior": {"pass"},
    }
    assert "relu: worst-child hole -0.300 [-0.300, -0.300] against baseline (better)" in summary["verdict"][0]
    assert "-0.100" in summary["verdict"][1] and "against strict (better)" in summary["verdict"][1]
    assert summary["saes"] == len(ARMS) * 2 * 2 * 3 and summary["missing"] == [] and summary["off_level"] == {}
    table = pandas.read_parquet(tmp_path / "experiment" / "results.parquet")
    assert len(table) == len(pandas.read_csv(tmp_path / "experiment" / "results.csv"))
    assert json.loads((tmp_path / "experiment" / "summary.json").read_text())["saes"] == summary["saes"]


def test_ties_trigger_the_falsifiers(tmp_path: Path) -> None:
    def tie(arm: str) -> tuple[float, float, float]:
        return (0.9, 0.1, 0.2) if arm in ("adaptive", "ramp_only", "strict lam=0.3", "frozen_decoder") else steady(arm)

    summary = summarise(CONFIG, made_up(tmp_path, tie, CONFIG))
    found = outcomes(summary)
    assert found["adaptive = ramp_only"] == {"triggered"}
    assert found["best strict ties"] == {"triggered"}
    assert found["gains vanish against frozen_decoder"] == {"triggered"}
    assert "gains vanish against frozen_decoder (relu)" in summary["verdict"][2]


def test_a_cost_in_fvu_above_the_margin_is_inferior(tmp_path: Path) -> None:
    def dear(arm: str) -> tuple[float, float, float]:
        return (0.9, 0.1, 0.25) if arm == "adaptive" else steady(arm)

    assert outcomes(summarise(CONFIG, made_up(tmp_path, dear, CONFIG)))["FVU inferior"] == {"triggered"}


def test_sharing_by_parents_is_judged_where_it_was_trained(tmp_path: Path) -> None:
    config = ExperimentConfig(
        arms=("baseline", "adaptive", "adaptive penalty.sharing=parent"), architectures=("relu",), ks=(2,), seeds=3
    )

    def parents_win(arm: str) -> tuple[float, float, float]:
        return (0.95, 0.05, 0.2) if "parent" in arm else steady(arm)

    assert outcomes(summarise(config, made_up(tmp_path / "a", parents_win, config)))["parent = global"] == {"pass"}
    same = outcomes(summarise(config, made_up(tmp_path / "b", lambda arm: (0.9, 0.1, 0.2), config)))
    assert same["parent = global"] == {"triggered"}


def test_holm_takes_the_verdict_back_where_many_primaries_are_tested() -> None:
    found = Difference(0.2, 0.01, 0.4, p=0.03, reseed_sd=0.01, seeds=5)
    assert _verdict("top_1", found, None) == "better"
    assert _verdict("top_1", found, 0.12) == "not resolved"
    assert _verdict("fvu", found, None) == "worse"


def test_one_seed_has_no_interval_and_another_method_only_the_falsifiers_of_its_arms(tmp_path: Path) -> None:
    config = ExperimentConfig(
        arms=("baseline", "yielding"), method="yielding", ks=(2,), seeds=1, primaries=("top_1", "fvu")
    )
    summary = summarise(config, made_up(tmp_path, lambda arm: (0.9 if arm == "yielding" else 0.7, 0.1, 0.2), config))
    assert re.match(r"Yielding over 2 SAEs and 1 seed: .*top-1 accuracy \+0\.200 \(one seed: no", summary["verdict"][0])
    assert set(outcomes(summary)) == {"FVU inferior"} and "adaptive" not in json.dumps(summary["falsifiers"])


def test_runs_off_their_level_are_named() -> None:
    rows = [
        {"run": "a", "measure": "l0", "k": 16, "value": 16.2},
        {"run": "b", "measure": "l0", "k": 16, "value": 17.0},
    ]
    assert off_level(rows, 0.02) == {"b": 17.0}


def test_nothing_measured_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected evaluated runs of experiment, found none"):
        summarise(CONFIG, Workspace(tmp_path))


def test_the_committed_table_still_gives_the_committed_verdict() -> None:
    folder = EXPERIMENTS.parent / "docs" / "results" / "reduced"
    rows = pandas.read_parquet(folder / "results.parquet").to_dict("records")
    arms = ("baseline", "strict", "adaptive")
    config = dataclasses.replace(read_experiment(EXPERIMENTS / "reduced.toml"), arms=arms, secondaries=("fvu",))
    own = [row for row in rows if row["variant"] in arms and row["measure"] in ("l0", "fvu", *config.primaries)]
    said = (folder / "README.md").read_text()
    for sentence in summary_of(own, config)["verdict"][:2]:
        found = re.findall(r"[+-]\d\.\d{3} \[[^]]+\]", sentence)
        assert len(found) >= 4
        assert all(figure in said for figure in found)


@pytest.mark.slow
def test_a_whole_small_experiment_runs_resumes_and_reports(tmp_path: Path) -> None:
    """Extraction aside: a store without tokens, two arms, one L0, two seeds."""
    acts = np.random.default_rng(0).normal(size=(4_000, 12)).astype(np.float32)
    np.save(tmp_path / "acts.npy", acts)
    out = tmp_path / "out"
    assert main(["import", str(tmp_path / "acts.npy"), "--out", str(out / "tiny"), "--profile", "array"]) == 0
    config = ExperimentConfig(
        name="tiny",
        profile="array",
        arms=("baseline", "adaptive"),
        architectures=("batchtopk",),
        ks=(3,),
        seeds=2,
        train=("--sae.n-latents", "24", "--tokens", "2048", "--batch-size", "64"),
        bootstrap=100,
    )
    workspace = run_experiment(config, out, 2, ("train", "evaluate", "table"))
    summary = json.loads((workspace.folder / "experiment" / "summary.json").read_text())
    assert summary["saes"] == 4 and summary["missing"] == []
    fvu = [c for c in summary["comparisons"] if c["measure"] == "fvu" and c["k"] is None]
    assert [(c["a"], c["b"]) for c in fvu] == [("adaptive", "baseline")] and fvu[0]["seeds"] == 2
    before = (workspace.runs / "baseline-s1-k=3" / "run.json").stat().st_mtime_ns
    run_experiment(config, out, 1, ("train", "table"))
    assert (workspace.runs / "baseline-s1-k=3" / "run.json").stat().st_mtime_ns == before


def test_a_failing_command_is_one_line_that_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`hafs extract` failed with exit code 2: error: .*extract\.log"):
        run_experiment(ExperimentConfig(name="e", profile="nowhere"), tmp_path, 1)


def test_an_experiments_own_stages_to_skip_are_skipped_beside_the_runners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command of the evaluation leaves out what the experiment's file says, and what the runner adds."""
    commands: list[list[str]] = []
    monkeypatch.setattr(module, "_run_all", lambda given, *_: commands.extend(given.values()))
    config = ExperimentConfig(name="e", ks=(3,), seeds=2, evaluate=("--skip", "probing", "--heldout-rows", "9"))
    module.evaluate(config, Workspace(tmp_path / "p"), 1)
    skipped = [evaluate_parser().parse_args(command[1:]).skip for command in commands]
    assert skipped == [["probing", "latents", "domains", "across"]] * 2 + [["probing"]]
    assert evaluate_parser().parse_args([]).skip == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ".."}, r"name='\.\.': expected letters"),
        ({"train": ("--seed", "3")}, "train: expected none of .*, which the experiment sets; found --seed"),
        ({"evaluate": ("--runs=a",)}, "evaluate: expected none of .*; found --runs=a"),
        ({"fvu_margin": float("nan")}, "fvu_margin=nan: expected at least 0"),
        ({"seeds": 10**9}, "seeds=1000000000: expected 1 to 10,000"),
        ({"bootstrap": 10**9}, "bootstrap=1000000000: expected 1 to 1,000,000"),
        ({"ks": (0,)}, r"ks\[0\]=0: expected at least 1"),
    ],
)
def test_what_an_experiment_may_not_say_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExperimentConfig(**fields)


def test_a_folder_for_a_file_and_a_second_experiment_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"expected an experiment's TOML file at {tmp_path}, found a folder"):
        read_experiment(tmp_path)
    root = tmp_path / "e"
    with (
        locked(root / ".lock", "an experiment", root),
        pytest.raises(UserError, match="an experiment is at work on it"),
    ):
        run_experiment(ExperimentConfig(name="e", profile="nowhere"), tmp_path, 1)
