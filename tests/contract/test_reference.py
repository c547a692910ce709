"""The reference pages name everything: public names, commands and flags, measures, the keys of files."""

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.hooks import generated, schedules
from hafs_evaluate.results.measures import MEASURES
from hafs_evaluate.results.results import build_results
from hafs_evaluate.stages import STAGES
from hafs_jax import train, with_fields
from hafs_jax.base.files import read_json
from hafs_jax.cli import COMMANDS
from hafs_jax.store.arrays import write_array_store
from tests.support.report_workspace import make_workspace
from tests.support.steps import small

DOCS = Path(__file__).parents[2] / "docs"
REGISTRIES = (
    "hafs_evaluate.stage.Stage", "hafs_evaluate.stages.register_evaluation",
    "hafs_evaluate.results.measures.Measure", "hafs_evaluate.results.measures.register_measure",
    "hafs_evaluate.saebench.suites.ProbingSuite", "hafs_evaluate.saebench.suites.register_suite",
    "hafs_evaluate.saebench.datasets.ProbingDataset", "hafs_evaluate.saebench.datasets.register_probing_dataset",
)  # fmt: skip
"""What a user of hafs_evaluate needs to add something of their own."""


@functools.cache
def page(name: str) -> str:
    """The page with what is generated in it."""
    return generated.filled((DOCS / name).read_text())


def section(name: str, heading: str) -> str:
    """The page from a heading to the next one of its level."""
    level = heading.split()[0]
    _, found, rest = page(name).partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"^{level} ", rest, flags=re.M)[0]


def keys(text: str) -> set[str]:
    """What the first columns of the tables in `text` name."""
    return {key for line in re.findall(r"^\| (`.*?) \|", text, flags=re.M) for key in re.findall(r"`([^`]+)`", line)}


def test_every_public_name_has_its_place() -> None:
    documented = re.findall(r"^::: ([\w.]+)$", page("reference/python.md"), flags=re.M)
    assert len(documented) == len(set(documented))
    found = {}
    for path in documented:
        module, _, name = path.rpartition(".")
        found[name] = getattr(importlib.import_module(module), name)
    for package in ("hafs_jax", "hafs_extract"):
        for name in generated.public_names(package):
            assert name in found, f"{package}.{name} is not in docs/reference/python.md"
            assert found[name] is getattr(importlib.import_module(package), name)
    assert set(REGISTRIES) <= set(documented)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_is_in_its_section(command: str) -> None:
    text = section("reference/commands.md", f"## hafs {command}")
    parser = generated.parser_of(command)
    lines = re.findall(r"^  (-.*?)(?:  |$)", parser.format_help(), flags=re.M)
    flags = {flag for line in lines for flag in re.findall(r"--[a-z][\w.-]*", line)} - {"--help"}
    assert [flag for flag in sorted(flags) if f"`{flag}`" not in text] == []
    assert len(flags) > 10 or command != "train"
    positional = [action for action in generated.visible_flags(parser) if not action.option_strings]
    assert [a.dest for a in positional if f"`{a.metavar or a.dest}`" not in text] == []


def test_every_measure_has_its_definition() -> None:
    text = page("reference/measures.md")
    for measure in MEASURES.values():
        assert f"`{measure.name}`" in text, measure.name
        assert any(f"`{path}`" in text for path in (measure.path, measure.per_dataset) if path)
    assert {measure.file for measure in MEASURES.values()} <= {stage.file for stage in STAGES.values()}


def test_every_command_stands_in_a_guide() -> None:
    """Not only where it is generated."""
    guides = "\n".join(path.read_text() for path in DOCS.glob("*.md"))
    assert [name for name in COMMANDS if not re.search(rf"`?hafs {name}\b", guides)] == []


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    acts = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    return write_array_store(tmp_path_factory.mktemp("keys"), acts)


def test_the_keys_of_a_runs_files(stores: dict[str, Path], tmp_path: Path) -> None:
    config = with_fields(
        small("adaptive"), {"evaluate_every_steps": 2, "coherence_every_steps": 2, "log_every_steps": 2}
    )
    run = train(config, stores["train"], tmp_path)
    record = read_json(run.config_path, "a config")
    assert set(flat(record["config"])) == keys(section("files.md", "## config.json"))
    said = section("files.md", "## config.json").partition("A field")[0]
    assert set(record) | set(record["store"]) <= set(re.findall(r"`(\w+)`", said))
    assert set(run.result()) - {"not_finite"} == keys(section("files.md", "## run.json"))
    logged = {key for record in run.metrics() for key in record}
    assert logged == keys(section("files.md", "## metrics.jsonl"))


def test_the_keys_of_a_manifest(stores: dict[str, Path]) -> None:
    manifest = read_json(stores["train"] / "manifest.json", "a manifest")
    whole, *parts = re.split(r"^(?:Each of )?`(\w+)`:$", section("files.md", "## manifest.json"), flags=re.M)
    assert set(manifest) == keys(whole)
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    for name, text in found.items():
        of = manifest[name]
        assert set(of[0] if isinstance(of, list) else of) == keys(text), name
    assert {"model", "tokenizer", "sources", "norm_filter", "shards"} == set(found)


def test_the_keys_of_results(tmp_path: Path) -> None:
    results = build_results(make_workspace(tmp_path / "offline", ("baseline-s0", "adaptive-s0")))
    top, variants, arms = re.split(r"^Each of `\w+`:", section("files.md", "## results.json"), flags=re.M)
    assert set(results) == keys(top)
    assert set(results["variants"]["baseline"]) == keys(variants)
    named = set(re.findall(r"`(\w+)`", arms))
    arm = results["arms"]["baseline"]
    assert set(arm) | set(next(iter(arm["measures"].values()))) == named - {"variants"}
    assert set(results["llm"]) <= set(re.findall(r"`(\w+)`", top))


def test_the_schedules_are_drawn_from_training() -> None:
    """`python -m docs.hooks.schedules` draws them again."""
    assert schedules.PLACE.read_text() == schedules.drawn()
