"""The benchmarks fit the library as it is: suites import, peers are checked, the commands that they run exist."""

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peer_steps, sweeping, synthetic
from benchmarks.__main__ import SUITES
from benchmarks.harness import Times
from benchmarks.workloads import K, config_of, planted_rows, random_weights
from hafs_jax.cli import COMMANDS


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_can_be_imported(suite: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{suite}").measure)


@pytest.mark.parametrize(("architecture", "products"), [("topk", "dense"), ("topk", "sparse"), ("relu", "auto")])
def test_the_check_before_timing_sees_other_losses(
    architecture: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(architecture, 8 * K, products=products)
    rows = planted_rows(16, seed=0)
    weights = random_weights(config, rows)
    peer_steps.check_same(config, weights, rows, peer_steps.peers_of(architecture))
    monkeypatch.setattr(peer_steps.peers, "training_sae", _with_another_bias(peer_steps.peers.training_sae))
    with pytest.raises(RuntimeError, match="differs from sae_lens's"):
        peer_steps.check_same(config, weights, rows, ["sae_lens"])


def _with_another_bias(make: Callable[..., Any]) -> Callable[..., Any]:
    def changed(architecture: str, weights: dict[str, Any], **settings: Any) -> Any:
        return make(architecture, {**weights, "b_dec": weights["b_dec"] + 0.1}, **settings)

    return changed


def test_sweeping_times_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
        found = {}
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            found[name] = Times((time.perf_counter() - started,))
        return found

    monkeypatch.setattr(sweeping, "interleaved", once)
    (row,) = sweeping.measure(quick=True)
    assert row.ours > 0 and row.theirs > 0 and row.sizes["members"] == 4


def test_synthetic_runs_commands_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(synthetic.subprocess, "run", lambda arguments, check: called.append(arguments[1:]))
    folder = tmp_path / "synth-toy-1"
    folder.mkdir()
    (folder / "truth.json").write_text(json.dumps({"features": 168, "true_l0": {"train": 6.1}}))
    synthetic.run(tmp_path, "toy-1", {"matryoshka": synthetic.MAIN[:1]})
    assert [words[:3] for words in called] == [["-m", "hafs_jax", n] for n in ("synth-world", "sweep", "synth-score")]
    assert {words[2] for words in called} <= set(COMMANDS)
