"""The wheel beside Hugging Face's `evaluate`, and the command from a wheel that has only the core dependencies."""

import base64
import csv
import email
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hafs_jax import __version__
from tests.support.sources import ROOT

PACKAGES = {"hafs_extract", "hafs_jax", "hafs_evaluate"}
PEER = "evaluate==0.4.6"

pytestmark = pytest.mark.slow


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a command that sees nothing of this repository but what its own environment has installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HAFS"))}
    environment |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, cwd="/", check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def pip(*arguments: str | Path, into: Path | None = None, check: bool = True) -> subprocess.CompletedProcess:
    """This environment's pip, acting on the environment `into`."""
    place = [] if into is None else ["--python", into / "bin" / "python"]
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *place, *arguments, check=check)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built by hatchling where it is installed, else in an environment that pip makes for it."""
    folder = tmp_path_factory.mktemp("wheel")
    alone = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    if not alone and pip("download", "hatchling", "--no-deps", "-d", folder / "builder", check=False).returncode:
        pytest.skip("hatchling is not installed, and pip could not download it: no package registry is reachable")
    pip("wheel", ROOT, "--no-deps", "-w", folder, *alone)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face's wheel, without what it depends on."""
    folder = tmp_path_factory.mktemp("peer")
    if pip("download", PEER, "--no-deps", "--only-binary", ":all:", "-d", folder, check=False).returncode:
        pytest.skip(f"pip could not download {PEER}: no package registry is reachable")
    return next(folder.glob("*.whl"))


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs without any extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        facts = email.message_from_bytes(archive.read(name))
    return [text for text in facts.get_all("Requires-Dist", []) if "extra ==" not in text]


def environment(folder: Path, requirements: list[str]) -> Path:
    """A virtual environment without pip that sees `requirements` of this one, with what they depend on, and no more."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    visible = folder / "visible"
    visible.mkdir()
    waiting, seen = [Requirement(text) for text in requirements], set[str]()
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            if not (visible / top).exists():
                (visible / top).symlink_to(str(distribution.locate_file(top)))
        for inner in map(Requirement, distribution.requires or ()):
            extras = ("", *requirement.extras)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                inner.marker = None
                waiting.append(inner)
    (site(folder) / "visible.pth").write_text(f"{visible}\n")
    return folder


def site(folder: Path) -> Path:
    (found,) = folder.glob("lib/python3*/site-packages")
    return found


def altered(folder: Path, name: str) -> list[str]:
    """The files of an installed distribution that are missing or are not as its RECORD says; checks at least ten."""
    (record,) = site(folder).glob(f"{name}-*.dist-info/RECORD")
    found, checked = [], 0
    for path, digest, _ in csv.reader(record.read_text().splitlines()):
        file = site(folder) / path
        if digest:
            kind, _, expected = digest.partition("=")
            assert kind == "sha256"
            checked += 1
            actual = hashlib.sha256(file.read_bytes()).digest() if file.exists() else b""
            if base64.urlsafe_b64encode(actual).rstrip(b"=").decode() != expected:
                found.append(path)
    assert checked >= 10
    return found


def check_ours(folder: Path) -> None:
    assert altered(folder, "hafs_jax") == []
    names = ", ".join(sorted(PACKAGES))
    script = f"import {names}; print(*[package.__file__ for package in ({names})])"
    for file in run(folder / "bin" / "python", "-c", script).stdout.split():
        assert Path(file).is_relative_to(site(folder))
    assert run(folder / "bin" / "hafs", "--version").stdout == f"hafs-jax {__version__}\n"


def check_peer(folder: Path) -> None:
    assert altered(folder, "evaluate") == []
    found = run(folder / "bin" / "python", "-c", "import evaluate; print(evaluate.__file__, evaluate.load.__module__)")
    assert found.stdout.split() == [str(site(folder) / "evaluate" / "__init__.py"), "evaluate.loading"]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of our wheel and the core dependencies; not to be written to."""
    folder = environment(tmp_path_factory.mktemp("installed") / "venv", requirements(wheel))
    pip("install", "--no-deps", wheel, into=folder)
    return folder


def test_the_wheel_holds_our_packages_their_types_and_their_data(installed: Path) -> None:
    (record,) = site(installed).glob("hafs_jax-*.dist-info/RECORD")
    paths = {row[0] for row in csv.reader(record.read_text().splitlines())}
    tops = {path.split("/")[0] for path in paths if not path.startswith("..")}
    assert tops == {*PACKAGES, record.parent.name} and "../../../bin/hafs" in paths
    places = {"hafs_extract": "extract/hafs_extract", "hafs_jax": "hafs_jax", "hafs_evaluate": "evaluate/hafs_evaluate"}
    for package, place in places.items():
        listed = run("git", "-C", ROOT, "ls-files", place).stdout.split()
        assert len(listed) > 10 and {f"{package}{path.removeprefix(place)}" for path in listed} <= paths


@pytest.mark.parametrize("ours_first", [True, False])
def test_it_and_hugging_faces_evaluate_leave_each_other_whole(
    wheel: Path, peer: Path, tmp_path: Path, ours_first: bool
) -> None:
    """Installed in either order, and after either is uninstalled: every file as its wheel had it, and both import."""
    folder = environment(tmp_path / "venv", requirements(peer))
    for file in (wheel, peer) if ours_first else (peer, wheel):
        pip("install", "--no-deps", file, into=folder)
    check_ours(folder)
    check_peer(folder)
    pip("uninstall", "-y", "hafs-jax", into=folder)
    assert not any((site(folder) / package).exists() for package in PACKAGES)
    check_peer(folder)
    pip("install", "--no-deps", wheel, into=folder)
    pip("uninstall", "-y", "evaluate", into=folder)
    assert not (site(folder) / "evaluate").exists()
    check_ours(folder)


def test_the_check_finds_a_file_that_another_wheel_wrote_over(installed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(installed, tmp_path / "venv", symlinks=True)
    (site(folder) / "hafs_jax" / "cli.py").write_text("print('another')")
    (site(folder) / "hafs_jax" / "runs.py").unlink()
    assert sorted(altered(folder, "hafs_jax")) == ["hafs_jax/cli.py", "hafs_jax/runs.py"]


def test_the_command_needs_only_the_core_dependencies_and_names_the_extra_for_more(
    installed: Path, tmp_path: Path
) -> None:
    hafs = installed / "bin" / "hafs"
    assert run(hafs, "--help").stdout.startswith("usage: hafs COMMAND")
    assert run(hafs).stdout == run(hafs, "--help").stdout
    shown = run(hafs, "train", "--help").stdout
    assert shown.startswith("usage: hafs train") and "--penalty.lam-max" in shown
    names = "import hafs_jax; print(all(hasattr(hafs_jax, name) for name in hafs_jax.__all__))"
    assert run(installed / "bin" / "python", "-c", names).stdout == "True\n"
    refused = run(hafs, "extract", "--profile", "offline", "--out", tmp_path / "out", check=False)
    assert refused.returncode == 2 and refused.stdout == ""
    (error,) = refused.stderr.splitlines()
    expected = "`hafs extract` needs the package torch, which is not installed: pip install 'hafs-jax[extract]'"
    assert error == f"error: {expected}"
