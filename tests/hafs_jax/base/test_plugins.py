"""Modules of a user's own: every command imports them, those that it starts too; a missing one is a line."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hafs_jax.base import plugins
from hafs_jax.base.errors import UserError

PLUGIN = """
print("plugin imported")
from hafs_jax.presets import VARIANTS
VARIANTS["users"] = {"penalty": {"kind": "hinge", "lam_max": 0.7}}
"""


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(plugins.VARIABLE, raising=False)


def test_a_named_module_is_imported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("users_first", "users_second"):
        (tmp_path / f"{name}.py").write_text(f"print({name!r})")
    monkeypatch.chdir(tmp_path)  # searched, though no entry of sys.path
    monkeypatch.setenv(plugins.VARIABLE, " users_first,users_second, ")
    plugins.load()
    for name in ("users_first", "users_second"):
        del sys.modules[name]
    plugins.load()
    assert capsys.readouterr().out == "users_first\nusers_second\n"


def test_an_installed_package_declares_its_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "users_third.py").write_text("print('third')")
    facts = tmp_path / "users_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: users-package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nmine = users_third\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    plugins.load()
    assert capsys.readouterr().out == "third\n"
    (facts / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nmine = users_gone\n")
    with pytest.raises(UserError, match="the installed package users-package names the plugin 'users_gone', of which"):
        plugins.load()


def test_a_module_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_needy.py").write_text("import users_absent")
    (tmp_path / "users_broken.py").write_text("1 / 0")
    for name, expected in {
        "users_gone": "HAFS_PLUGINS names the plugin 'users_gone', of which there is no module 'users_gone'; correct",
        "users_gone.part": "names the plugin 'users_gone.part', of which there is no module 'users_gone'",
        "users_needy": "'users_needy', which the environment variable HAFS_PLUGINS names, needs the module 'users_a",
    }.items():
        monkeypatch.setenv(plugins.VARIABLE, name)
        with pytest.raises(UserError, match=expected):
            plugins.load()
    monkeypatch.setenv(plugins.VARIABLE, "users_broken")
    with pytest.raises(ZeroDivisionError):  # the plugin's bug, with its traceback
        plugins.load()


def test_commands_know_what_a_plugin_adds_and_so_do_those_that_they_start(tmp_path: Path) -> None:
    (tmp_path / "users_variant.py").write_text(PLUGIN)
    script = (
        "import subprocess, sys\n"
        "from hafs_jax.cli import main\n"
        "subprocess.run([sys.executable, '-m', 'hafs_jax', 'train', '--variant', 'users', '--help'], check=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path, env={**os.environ, plugins.VARIABLE: "users_variant"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("plugin imported\n")
    assert "random_init, frozen_decoder, users [baseline]" in " ".join(done.stdout.split())
    assert "[0.7]" in done.stdout  # the variant's own default
