"""The check of GPU schedules: its limits are read from the README, and without the CUDA wheels it does nothing."""

import importlib.util

import pytest

from benchmarks import schedules
from benchmarks.schedules import Case, cases, spilled_bytes, stated
from hafs_jax.presets import ARCHITECTURES, VARIANTS
from hafs_jax.targets.gpus import GPUS


def test_every_limit_that_the_readme_states_is_of_a_program_that_is_checked() -> None:
    known = {str(case) for case in cases(list(GPUS), list(ARCHITECTURES), list(VARIANTS), [32_768, 131_072])}
    limits = stated(schedules._README.read_text())
    assert len(limits) >= 4 and set(limits) <= known
    assert all(0 < number < 200 for limit in limits.values() for number in limit)
    assert str(Case("h100", "topk", "baseline", 131_072)) == "h100: topk, baseline, F=131,072"


def test_kernels_are_checked_where_they_run() -> None:
    found = list(cases(["h100", "a100"], ["topk", "gated"], ["baseline"], [32_768]))
    assert [str(case) for case in found if case.kernels] == ["h100: topk, baseline, F=32,768, kernels"]
    config = schedules.config_of(Case("h100", "topk", "baseline", 32_768, kernels=True))
    assert (config.products, config.kernels) == ("sparse", "on")


def test_limits_are_the_last_numbers_of_a_row() -> None:
    row = "| h100: topk, baseline, F=131,072 | 9 | 1 | 2.5 | 3 | 4 |"
    text = f"## Schedules for GPUs\n| program | a | GB | x | ms | reads |\n{row}\n## Other\n| a: b | 1 | 1 | 1 | 1 |"
    assert stated(text) == {"h100: topk, baseline, F=131,072": (1.0, 2.5, 3.0, 4)}


def test_spills_are_what_ptxas_says() -> None:
    said = "ptxas info : 0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n 4 bytes spill stores\n"
    assert spilled_bytes(said) == 16 and spilled_bytes("ptxas info : Used 32 registers") == 0


def test_without_the_cuda_wheels_it_says_so_and_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu-check"])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax_plugins" else find_spec(name))
    monkeypatch.setattr(schedules, "check", lambda *_: pytest.fail("compiled"))
    assert schedules.main() == 0
    assert capsys.readouterr().out.count("\n") == 1
