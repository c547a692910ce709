"""The command `hafs`: its help without any optional package, mistakes, missing packages; make targets over it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hafs_jax import __version__
from hafs_jax.cli import COMMANDS, EXTRAS, WITHOUT_DEPENDENCIES, main
from hafs_jax.presets import ARCHITECTURES, VARIANTS
from tests.support.sources import ROOT

OPTIONAL = [package for packages in EXTRAS.values() for package in packages] + list(WITHOUT_DEPENDENCIES)
NAMES = (*VARIANTS, *ARCHITECTURES)  # before tests add some
WITHOUT = """
import importlib.abc, sys
blocked = set(sys.argv[1].split(","))
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from hafs_jax.cli import main
for command in sys.argv[2].split(";"):
    try:
        code = main(command.split())
    except SystemExit as stop:
        code = stop.code
    print(f"exit {code}", flush=True)
    print(f"exit {code}", file=sys.stderr, flush=True)
"""


def run_without(packages: list[str], commands: list[str], folder: Path) -> tuple[list[str], list[str]]:
    """(what each of the commands printed, what it said on stderr) in a process that has none of `packages`."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(packages), ";".join(commands)],
        cwd=folder, capture_output=True, text=True, timeout=600, check=True, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    parts = [re.split(r"(?<=exit \d\n)", stream)[:-1] for stream in (done.stdout, done.stderr)]
    assert len(parts[0]) == len(parts[1]) == len(commands), done.stderr
    return parts[0], parts[1]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_bare_it_prints_the_commands(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: hafs COMMAND [options]"
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.help.split()] for line in lines)
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(("before", "during"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_do_not_spin_unless_asked_to(
    monkeypatch: pytest.MonkeyPatch, before: str | None, during: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        main(["unknown"])
    assert os.environ["OMP_WAIT_POLICY"] == during


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hafs-jax {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?; `hafs --help` lists them"),
        (["--frobnicate"], "unknown command '--frobnicate'; `hafs --help` lists them"),
        (["train", "--sae.kk", "3"], "unknown argument '--sae.kk'; did you mean '--sae.k'?; see `hafs train --help`"),
        (["train", "--steps", "3"], "unknown argument '--steps'; did you mean '--tokens'?; see `hafs train --help`"),
        (["sweep", "--tag", "a"], "the following arguments are required: --grid; see `hafs sweep --help`"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert (stop.value.code, said.out, said.err) == (2, "", f"error: {message}\n")


def test_bare_a_command_that_needs_arguments_prints_its_help(capsys: pytest.CaptureFixture) -> None:
    for name in ("verify", "sweep", "tau", "inspect", "import", "export", "upload"):
        with pytest.raises(SystemExit, match="2"):
            main([name])
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(f"usage: hafs {name} ") and "--help" in said.err


def test_the_flags_that_matter_come_first(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: hafs train [options]" and max(map(len, lines)) <= 80
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[:3] == ["options:", "most used:", "data and place:"] and len(groups) == 9
    flags = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
    assert flags[:5] == ["--variant", "--arch", "--sae.k", "--sae.n-latents", "--sae.expansion"]
    assert len(flags) == len(set(flags)) > 60


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "0"], "--k 0: expected at least 1"),
        (["--sae.k", "0"], "--sae.k 0: expected at least 1"),
        (["--optimizer.learning-rate=-1"], "--optimizer.learning-rate -1.0: expected above 0"),
        (["--sae.prefixes", "0.5", "2"], "--sae.prefixes 2.0 ([1]): expected above 0 and at most 1"),
        (["--tag", "a/b"], "--tag 'a/b': expected letters, digits and any of _ . , = + -"),
        (["--patience", "3"], "--patience 3: expected --evaluate-every-steps above 0, found 0; patience counts the "
         "held-out measurements"),
        (["--tokens", "5", "--batch-size", "64"], "--tokens 5: expected at least one batch, --batch-size 64"),
        (["--lr", "x"], "argument --optimizer.learning-rate/--lr: invalid float value: 'x'; see `hafs train --help`"),
    ],
)  # fmt: skip
def test_an_error_names_the_flag_that_was_given(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", *flags])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_line_end_in_what_the_user_gave_leaves_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["train", "--out", str(tmp_path), "--profile", "a\nb\udcff"], ["train", "--a\rb"], ["a\nb"]):
        with pytest.raises(SystemExit):
            main(arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and line.isprintable()


def test_every_commands_help_needs_no_optional_package_and_no_jax(tmp_path: Path) -> None:
    shown, said = run_without(
        [*OPTIONAL, "jax", "flax", "optax", "orbax"], [f"{name} --help" for name in COMMANDS], tmp_path
    )
    for name, text, errors in zip(COMMANDS, shown, said, strict=True):
        assert text.startswith(f"usage: hafs {name} ") and text.endswith("exit 0\n"), name
        assert errors == "exit 0\n"
        assert max(map(len, text.splitlines())) <= 80, name
        assert "[None]" not in text and "[]\n" not in text


def test_a_missing_package_is_one_line_that_names_its_extra(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    commands = {
        "extract --profile offline": "torch, which is not installed: pip install 'hafs-jax[extract]'",
        "synth-world": "torch, which is not installed: pip install 'hafs-jax[extract]'",
        "import-sae a b": "torch, which is not installed: pip install 'hafs-jax[extract,evaluate]'",
    }
    _, said = run_without(OPTIONAL, list(commands), tmp_path)
    for (command, expected), text in zip(commands.items(), said, strict=True):
        *lines, code = text.splitlines()
        assert code == "exit 2", text
        assert lines[-1] == f"error: `hafs {command.split()[0]}` needs the package {expected}"
        assert "Traceback" not in text


def test_what_no_extra_installs_is_named_as_pip_takes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def missing(_: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'sae_bench.evals'", name="sae_bench.evals")

    monkeypatch.setattr("hafs_evaluate.cli.main", missing)
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate"])
    expected = "error: `hafs evaluate` needs the package sae_bench, which is not installed: pip install --no-deps "
    assert capsys.readouterr().err == f"{expected}sae-bench==0.6.0\n"


def test_a_missing_module_that_is_no_extras_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'hafs_evaluate.gone'", name="hafs_evaluate.gone")

    monkeypatch.setattr("hafs_evaluate.cli.main", missing)
    with pytest.raises(ModuleNotFoundError):
        main(["evaluate"])


def makefile() -> dict[str, list[str]]:
    """The recipe of each target that `make help` lists."""
    recipes: dict[str, list[str]] = {}
    for line in (ROOT / "Makefile").read_text().splitlines():
        if found := re.match(r"([a-z-]+):.*## \S", line):
            recipes[found[1]] = []
        elif line.startswith("\t") and recipes:
            recipes[list(recipes)[-1]].append(line.strip())
        else:
            recipes.setdefault("", [])  # what follows is no listed target's
    return {target: recipe for target, recipe in recipes.items() if target}


def test_a_make_target_is_one_line_over_the_command() -> None:
    recipes = makefile()
    for target, command in {"eval": "evaluate", **{name: name for name in recipes if name in COMMANDS}}.items():
        assert len(recipes[target]) == 1 and recipes[target][0].startswith(f"$(HAFS) {command} "), target
        assert recipes[target][0].endswith(" $(ARGS)")
    assert {"extract", "train", "sweep", "synth", "eval", "experiment", "report"} < set(recipes)
    for line in (line for recipe in recipes.values() for line in recipe if "$(HAFS)" in line):
        assert line.split()[1] in COMMANDS, line
    assert "PYTHONPATH" not in (ROOT / "Makefile").read_text()
    assert {"make lint", "make test"} < set((ROOT / ".ci" / "run").read_text().splitlines())


def test_make_help_lists_targets_and_variables() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in makefile():
        assert re.search(rf"^  make {target} ", shown, re.MULTILINE), target
    for name in (
        "VARIANT",
        "ARCH",
        "SEED",
        "OUT",
        "PROFILE",
        "GRID",
        "WORLD",
        "EXPERIMENT",
        "ACCEL",
        "CONFIRM",
        "ARGS",
    ):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE), name
    for name in NAMES:
        assert re.search(rf"\b{name}\b", shown), name


def test_make_clean_removes_results_and_distclean_the_environment_too_but_asks(tmp_path: Path) -> None:
    out, venv = tmp_path / "out", tmp_path / "venv"

    def make(target: str, *settings: str) -> subprocess.CompletedProcess:
        for folder in (out, venv):
            folder.mkdir(exist_ok=True)
        places = (f"OUT={out}", f"VENV={venv}", "ACCEL=cpu")
        return subprocess.run(
            ["make", target, *places, *settings], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    for target in ("clean", "distclean"):
        refused = make(target)
        assert refused.returncode and out.exists() and venv.exists()
        assert str(out) in refused.stdout and "CONFIRM=yes" in refused.stderr
    assert make("clean", "CONFIRM=yes").returncode == 0 and not out.exists() and venv.exists()
    assert make("distclean", "CONFIRM=yes").returncode == 0 and not out.exists() and not venv.exists()


def test_synth_refuses_a_wrong_flag_before_it_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And takes a number of latents below the default k, which is the world's own."""
    started = []
    monkeypatch.setattr("hafs_jax.base.process.children.run", lambda command: started.append(command) or 3)
    for flags, code in ((["--batch-size", "many"], 2), (["--grid", "k="], 2), (["--sae.n-latents", "24"], 3)):
        with pytest.raises(SystemExit) as stop:
            main(["synth", "--out", str(tmp_path), *flags])
        assert stop.value.code == code, capsys.readouterr().err
    assert [command[0] for command in started] == ["synth-world"]
