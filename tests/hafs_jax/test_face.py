"""What a user of the library meets: names that are listed and typed, an import that is cheap, notes that are silent."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hafs_jax
from tests.support.sources import ROOT

SCRIPT = """
import numpy as np
from hafs_jax import Store, TrainConfig, load, preset, sweep, train, with_fields, write_array_store
import hafs_jax

def log(step: int, values: dict[str, float | int | None]) -> None:
    print(step, values["loss"])

acts = np.zeros((100, 8), np.float32)
stores = write_array_store("out", acts)
config: TrainConfig = with_fields(preset("adaptive"), {"tokens": 1000})
run = train(config, stores["train"], "runs", on_metrics=log)
sae = load(run.folder)
reveal_type(train)
reveal_type(sweep)
reveal_type(run)
reveal_type(run.summary().k)
reveal_type(Store(stores["train"]))
reveal_type(hafs_jax.__version__)
sae.dictionary  # wrong
train(config)  # wrong
train(config, stores["train"], "runs", on_metrics=lambda step: None)  # wrong
hafs_jax.trian  # wrong
"""


@pytest.mark.slow  # where mypy has not seen JAX before
def test_a_users_script_is_type_checked(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hafs-jax" / "mypy"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "--hide-error-context", "--no-pretty",
         "--no-color-output", "--cache-dir", str(cache), "script.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = SCRIPT.split("\n")
    found: dict[str, str] = {}
    for line in done.stdout.splitlines()[:-1]:
        _, number, _, message = line.split(":", 3)
        found[lines[int(number) - 1]] = message.strip()
    assert found.pop("reveal_type(train)").startswith('Revealed type is "def (config: hafs_jax.config.TrainConfig, ')
    assert found.pop("reveal_type(sweep)").startswith('Revealed type is "def (configs: ')
    assert found.pop("reveal_type(run)") == 'Revealed type is "hafs_jax.runs.Run"'
    assert found.pop("reveal_type(run.summary().k)") in ('Revealed type is "int"', 'Revealed type is "builtins.int"')
    assert found.pop('reveal_type(Store(stores["train"]))') == 'Revealed type is "hafs_jax.store.reader.Store"'
    assert "str" in found.pop("reveal_type(hafs_jax.__version__)")
    assert found.pop("sae.dictionary  # wrong").startswith('"TrainedSAE" has no attribute "dictionary"')
    assert "missing" in found.pop("train(config)  # wrong").lower()
    assert "on_metrics" in found.pop('train(config, stores["train"], "runs", on_metrics=lambda step: None)  # wrong')
    assert 'no attribute "trian"' in found.pop("hafs_jax.trian  # wrong")
    assert not found, done.stdout


def test_the_names_are_listed_and_are_those_that_type_checkers_see() -> None:
    source = ast.parse(Path(hafs_jax.__file__).read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    typed = {
        alias.name: f"{node.module}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == {name: f"hafs_jax.{module}" for name, module in hafs_jax._MODULES.items()}
    assert all(alias.name == alias.asname for node in block.body for alias in node.names)  # type: ignore[attr-defined]
    assert set(hafs_jax.__all__) == {*typed, "__version__"} <= set(dir(hafs_jax))
    assert "Any" not in dir(hafs_jax)
    for name in hafs_jax.__all__:
        assert getattr(hafs_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'hafs_jax' has no attribute 'trian'"):
        hafs_jax.trian  # noqa: B018
    assert all((ROOT / place / "py.typed").exists() for place in ("hafs_jax", "extract/hafs_extract"))


def test_importing_it_brings_no_jax_and_no_optional_package(tmp_path: Path) -> None:
    script = (
        "import sys, hafs_jax\n"
        "hafs_jax.preset('adaptive'), hafs_jax.Store, hafs_jax.Run, hafs_jax.UserError, hafs_jax.write_array_store\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=True
    )
    assert "hafs_jax" in done.stdout.split() and done.stderr == ""
    assert not {"jax", "flax", "optax", "orbax", "torch", "pandas", "tqdm"} & set(done.stdout.split())
