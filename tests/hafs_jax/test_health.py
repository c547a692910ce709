"""What `inspect` says of healthy and ill runs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hafs_evaluate.report.verdict import verdict
from hafs_evaluate.results.results import build_results
from hafs_jax.api import load
from hafs_jax.commands import main
from hafs_jax.health import death, health
from hafs_jax.presets import preset, with_fields
from hafs_jax.runs import Run
from hafs_jax.training.train import train
from tests.support.runs import COUNTS, config_of, finished_run
from tests.support.stores import planted, write_store

GOOD = {
    "l0": 40.1, "dead_fraction": 0.01, "bad_batches": 0, "loss_reconstruction": 0.2, "penalty_gradient_share": 0.3,
    "tau_reached": True, "lambda": 2.0, "heldout_fvu": 0.2, "heldout_l0": 39.0, "step": 1000, "tokens": 1_024_000,
    "seconds": 60.0, "tokens_per_second": 17_000.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"l0": 43.0}, "L0 43.00 in training, +7.5% from k=40"),
        ({"dead_fraction": 0.2}, "20.0% of latents dead: silent on the last 100,000 training rows"),
        ({"bad_batches": 3}, "3 batches"),
        ({"loss_reconstruction": 0.4}, "reconstruction loss 0.4000, rising"),
        ({"penalty_gradient_share": 0.99}, "gradient is 99%"),
        ({"tau_reached": False}, "tau 0.3 never reached by FVU's moving average; lambda 2.00"),
        (
            {"tau_reached": False, "lambda": 0.01},
            "by FVU's moving average; lambda 0.01: adaptive inactive",
        ),
        ({"heldout_fvu": 0.3}, "held-out FVU 0.3000, best 0.2000"),
        ({"heldout_l0": 31.4}, "held-out L0 31.40 at inference, -21.5% from k=40: the threshold"),
        ({"step": 72}, "72 steps, under the 300 after which the moving average of FVU and the threshold of"),
    ],
)
def test_each_illness_is_named_and_nothing_else(changes: dict, said: str) -> None:
    config = with_fields(preset("adaptive"), {"penalty": {"tau": 0.3}})
    well = health(config, [GOOD] * 40)
    assert len(well) == 8 and all(verdict for verdict, _ in well)
    ill = [text for verdict, text in health(config, [GOOD] * 38 + [{**GOOD, **changes}] * 2) if not verdict]
    assert len(ill) == 1 and said in ill[0]


def test_a_baseline_without_heldout_rows_has_fewer_checks() -> None:
    record = {name: value for name, value in GOOD.items() if not name.startswith("heldout")}
    assert len(health(dataclasses.replace(preset()), [record])) == 4


def test_a_sweep_warns_of_the_runs_that_look_ill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for seed, changes in enumerate([{}, {"dead_fraction": 0.2}, {"dead_fraction": 0.9}]):
        changed = {"seed": seed, "penalty.tau": 0.3, "sae.n_latents": 200}
        run = finished_run(tmp_path / "runs" / f"adaptive-s{seed}", with_fields(preset("adaptive"), changed))
        run.metrics_path.write_text("".join(json.dumps({**GOOD, **changes}) + "\n" for _ in range(40)))
        runs.append(run)
    (runs[2].folder / "run.json").unlink()  # it failed
    monkeypatch.setattr("hafs_jax.training.sweeps.sweep", lambda *_: (runs, []))
    store = write_store(tmp_path / "store" / "train", planted(64, 5, 11, 2, seed=0)[0])
    main(["sweep", "--grid", "seed=0..2", "--store", str(store), "--out", str(tmp_path)])
    looks = [line for line in capsys.readouterr().err.splitlines() if "LOOK" in line]
    assert looks == ["LOOK adaptive-s1: 20.0% of latents dead: silent on the last 100,000 training rows"]


def test_an_l1_of_the_unscaled_activations_kills_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pattern of an L1 weight of 0.04 beside the mean error of unscaled rows: L0 0, no latent, l2_ratio 0."""
    D, B, norm = 13, 50, 0.1
    acts = planted(4000, D, 24, 4, seed=2)[0]
    acts -= acts.mean(0)
    acts *= norm / np.sqrt((acts**2).sum(1).mean())
    store = write_store(tmp_path / "store" / "train", acts)

    def run(coefficient: float, tag: str) -> Run:
        fields = {"coefficient": coefficient, "match_l0": False, "aux": 0.0}
        changes = {
            "sae": {"n_latents": 29, "k": 4},
            "sparsity": fields,
            "tokens": 1500 * B,
            "batch_size": B,
            "tag": tag,
        }
        return train(with_fields(preset("baseline", "relu"), changes), store, tmp_path / "runs", progress=False)

    dead = run(0.04 * D * np.sqrt(D) / norm, "unscaled")  # the same L1 in units in which rows have mean square D
    alive = run(0.04, "scaled")
    final = dead.result()["final"]
    assert final["l0"] == 0 and final["fvu_ema"] == pytest.approx(1.0, abs=0.05)
    sae = load(dead.folder)
    assert not np.asarray(sae.encode(acts)).any()  # a probe of any k latents then has accuracy 0.5
    assert np.linalg.norm(sae(acts)) / np.linalg.norm(acts) < 0.05  # l2_ratio
    said = (
        "dead: L0 0, rows are reconstructed as b_dec, and probes of its latents are at chance; the L1 coefficient "
        "kills it: it pulls latents to 0 with 18.7, while the error pushes with 2 along a random vector and at most "
        "7.21 on an average row (on unscaled activations it is an L1 of 0.52 beside a squared error, 0.04 beside its "
        "mean over D); lower it, or leave sparsity.match_l0 on"
    )
    assert death(dead) == said and death(alive) is None
    main(["inspect", str(dead.folder)])
    assert f"  LOOK {said}\n" in capsys.readouterr().out
    main(["inspect", str(alive.folder)])
    assert "dead:" not in capsys.readouterr().out
    results = build_results(tmp_path)
    assert {values["run"]: values["dead"] for values in results["variants"].values()} == {
        "baseline-relu-s0-unscaled": said,
        "baseline-relu-s0-scaled": None,
    }
    told = [sentence for sentence in verdict(results) if "dead" in sentence]
    assert told == [f"baseline-relu-s0-unscaled is {said}."]


def test_a_death_without_l1_is_not_blamed_on_it(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "runs" / "baseline-s0", config_of("baseline", "batchtopk"))
    run.metrics_path.write_text(json.dumps({"step": 0, "l0": 0.0, "sparsity_coefficient": 0.0, **COUNTS}) + "\n")
    said = death(run)
    assert said is not None and "no L1 coefficient explains it" in said
    run.metrics_path.write_text(json.dumps({"step": 0, "l0": None, **COUNTS}) + "\n")
    assert death(run) is None
