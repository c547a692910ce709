"""Datasets and profiles are records: by name on the command line, and added from outside."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from hafs_evaluate.config import EvalConfig, resolved
from hafs_extract import Profile, SourceConfig, packaged, register_dataset, register_profile
from hafs_extract.config import parse_source
from hafs_extract.profiles import DATASETS, OFFLINE, PROFILES, PYTHIA70M
from hafs_jax.base import plugins
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json
from hafs_jax.cli import main
from hafs_jax.store.manifest import UPSTREAM, read_manifest
from hafs_jax.store.verify import verify
from tests.support.tiny_models import save_jsonl, save_model, sentence

PLUGIN = """
from hafs_extract import ExtractConfig, Profile, SourceConfig, register_dataset, register_profile

poems = SourceConfig(name="poems", path={poems!r}, template="{{verse}}", keep="language=en")
register_dataset("poems", poems)
register_dataset("letters", SourceConfig(name="other", path={letters!r}))
config = ExtractConfig(
    profile="poetry",
    model={model!r},
    hook_point="blocks.1.hook_resid_post",
    sources=(poems,),
    context_length=16,
    heldout_fraction=0.3,
)
register_profile(Profile(config, suite="sae_probes", help="poems through a tiny model"))
"""


@pytest.fixture
def tables() -> Iterator[None]:
    """Lets a test register what it likes: the tables are put back afterwards."""
    before = DATASETS.copy(), PROFILES.copy()
    yield
    for table, entries in zip((DATASETS, PROFILES), before, strict=True):
        table.clear()
        table.update(entries)


def test_a_dataset_and_a_profile_of_a_users_own_module(
    tables: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poems = [{"verse": sentence(n, 9), "language": "en" if n % 3 else "fr"} for n in range(60)]
    letters = [{"text": sentence(1000 + n, 9)} for n in range(60)]
    places = {
        "model": str(save_model(tmp_path / "m")),
        "poems": str(save_jsonl(tmp_path / "poems.jsonl", poems)),
        "letters": str(save_jsonl(tmp_path / "letters.jsonl", letters)),
    }
    (tmp_path / "users_poetry.py").write_text(PLUGIN.format(**places))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, "users_poetry")
    monkeypatch.setattr(plugins, "_loaded", set())

    flags = ["--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert main(["extract", "--profile", "poetry", *flags]) == 0
    store = tmp_path / "out" / "poetry" / "store" / "train"
    manifest = read_manifest(store)
    assert verify(store) == [] and verify(store.parent / "heldout") == []
    assert [(source.name, source.path) for source in manifest.sources] == [("poems", places["poems"])]
    heldout = read_manifest(store.parent / "heldout")
    assert manifest.sources[0].documents + heldout.sources[0].documents == 40  # the English ones
    reason = "named on the command line"
    assert manifest.profile == {
        "requested": "poetry",
        "resolved": "poetry",
        "reason": reason,
        "suite": "sae_probes",
    }
    assert resolved(EvalConfig(), manifest.profile).suite == "sae_probes"
    assert read_json(tmp_path / "out" / "auto.json", "auto") == {"profile": "poetry", "reason": reason}

    mixed = ["--text", "poems", "--text", "letters@0.25"]
    assert main(["extract", "--profile", "poetry", *mixed, *flags, "--force"]) == 0
    sources = read_manifest(store).sources
    assert [(source.name, source.weight) for source in sources] == [("poems", 1.0), ("letters", 0.25)]
    assert sources[1].path == places["letters"] and sources[1].rows > 0

    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["extract", "--help"])
    shown = capsys.readouterr().out
    assert "poetry     poems through a tiny model" in shown and "\n  letters " in shown and places["letters"] in shown


def test_a_name_means_one_thing(tables: None) -> None:
    poems = SourceConfig(name="poems", path="poems.jsonl")
    register_dataset("poems", poems)
    register_dataset("poems", poems)  # a module that is imported twice
    with pytest.raises(UserError, match="dataset 'poems': expected a new name, found another dataset of that name"):
        register_dataset("poems", dataclasses.replace(poems, path="other.jsonl"))
    with pytest.raises(UserError, match="dataset 'my poems': expected letters, digits"):
        register_dataset("my poems", poems)
    for name in ("offline", "auto"):
        profile = Profile(dataclasses.replace(PYTHIA70M, profile=name))
        with pytest.raises(UserError, match=f"profile '{name}': expected a new name"):
            register_profile(profile)
    with pytest.raises(UserError, match="profile 'a/b': expected letters, digits"):
        register_profile(Profile(dataclasses.replace(PYTHIA70M, profile="a/b")))
    assert PROFILES["offline"].config is OFFLINE


def test_a_dataset_by_name_and_what_a_flag_changes_of_it() -> None:
    wikitext, biology = DATASETS["wikitext"], DATASETS["biology"]
    assert parse_source("wikitext", (), DATASETS) == wikitext
    assert parse_source("wikitext@0.3,split=test", (), DATASETS) == dataclasses.replace(
        wikitext, weight=0.3, split="test"
    )
    assert parse_source("cells=biology", (), DATASETS) == dataclasses.replace(biology, name="cells")
    assert parse_source("wikitext", PYTHIA70M.sources, DATASETS) == PYTHIA70M.sources[0]  # the profile's weight
    moved = parse_source("wikitext=/data/wikitext", PYTHIA70M.sources, DATASETS)
    assert moved == dataclasses.replace(PYTHIA70M.sources[0], path="/data/wikitext")
    assert parse_source("wikitext=/data/w", OFFLINE.sources, DATASETS) == SourceConfig(name="wikitext", path="/data/w")
    assert parse_source("./wikitext", (), DATASETS) == SourceConfig(name="wikitext", path="./wikitext")


def test_the_profiles_name_their_suites() -> None:
    suites = {name: profile.suite for name, profile in PROFILES.items()}
    assert suites == {"offline": "sae_probes", "wide": "sae_probes", "pythia70m": "standard"}


def test_every_packaged_model_has_a_name_on_the_hub() -> None:
    assert set(packaged.MODELS) == set(UPSTREAM)
