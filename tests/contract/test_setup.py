"""The set-up: each choice of accelerator has one CUDA stack on each Python, and the driver decides which is chosen."""

import functools
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from hafs_jax.cli import WITHOUT_DEPENDENCIES
from tests.support.sources import ROOT

FOLDER = ROOT / "constraints"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + ["manylinux2014_x86_64", "linux_x86_64"]
CUDA = re.compile(r"(nvidia|cuda|jax-cuda|jax|torch|triton)(-|$)|jaxlib")  # packages that hold or load CUDA's libraries


@functools.cache
def resolved(accelerator: str, python: str) -> dict[str, dict]:
    """Each package of a set-up for Linux x86-64 under its constraints, as in uv's lock file. It installs nothing."""
    uv = pytest.importorskip("uv", reason="uv is not installed: `make setup` installs it")
    extras = ["extract", "evaluate", "explore", "dev", "docs", *([accelerator] if accelerator != "cpu" else [])]
    command = [
        *(uv.find_uv_bin(), "pip", "compile", ROOT / "pyproject.toml", "--constraints", FOLDER / f"{accelerator}.txt"),
        *(part for extra in extras for part in ("--extra", extra)),
        *("--python-platform", "x86_64-manylinux_2_28", "--python-version", python),
        *("--format", "pylock.toml", "--no-header", "--quiet", "--no-config", "--no-python-downloads"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and re.search("Failed to fetch|error sending request|dns error|Could not connect", done.stderr):
        pytest.skip(f"no package registry is reachable: {done.stderr.splitlines()[0]}")
    assert not done.returncode, done.stderr
    return {package["name"]: package for package in tomllib.loads(done.stdout)["packages"]}


def wheel(package: dict, python: str) -> str:
    """The address of the wheel that this Python takes on Linux x86-64."""
    version = tuple(int(part) for part in python.split("."))
    tags = [*cpython_tags(version, platforms=PLATFORMS), *compatible_tags(version, platforms=PLATFORMS)]
    ranked = []
    for file in package["wheels"]:
        _, _, _, ours = parse_wheel_filename(file.get("name") or file["url"].rsplit("/", 1)[-1])
        ranked += [(tags.index(tag), file["url"]) for tag in ours if tag in tags]
    return min(ranked)[1]


def end_of(address: str, size: int) -> bytes:
    """The last bytes of a file that a registry holds."""
    try:
        request = urllib.request.Request(address, headers={"Range": f"bytes=-{size}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status == 206:
                return answer.read()
    except urllib.error.URLError as error:
        pytest.skip(f"the package registry does not answer: {error}")
    pytest.skip("the package registry does not send parts of a file")


@functools.cache
def files(address: str) -> frozenset[str]:
    """The paths that a wheel installs to, empty files left out: the directory at its end alone is downloaded."""
    end = end_of(address, 1 << 16)
    end_record = end[end.rindex(b"PK\5\6") :]
    if (size := int.from_bytes(end_record[12:16], "little") + len(end_record)) > len(end):
        end = end_of(address, size)
    return frozenset(file.filename for file in zipfile.ZipFile(io.BytesIO(end)).infolist() if file.file_size)


def majors(packages: dict[str, dict]) -> set[str]:
    """The CUDA majors that some packages name: `nvidia-nccl-cu12`, `jax-cuda13-plugin`, `cuda-toolkit` 13.0."""
    found = set()
    for name, package in packages.items():
        found.update(re.findall(r"(?:-cu|^jax-cuda)(1\d)", name))
        if name in ("cuda-toolkit", "cuda-bindings", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc"):
            found.add(package["version"].split(".")[0])
    return found


def shared(packages: dict[str, dict], python: str) -> dict[str, list[str]]:
    """The paths that two of the packages with CUDA install to, with their names."""
    wheels = {name: wheel(package, python) for name, package in packages.items() if CUDA.match(name)}
    owners = defaultdict(list)
    with ThreadPoolExecutor(8) as pool:
        for name, paths in zip(wheels, pool.map(files, wheels.values()), strict=True):
            for path in paths:
                owners[path].append(name)
    return {path: names for path, names in owners.items() if len(names) > 1}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("accelerator", ["cpu", "cuda12", "cuda13"])
def test_each_set_up_has_one_cuda_stack(accelerator: str, python: str) -> None:
    packages = resolved(accelerator, python)
    assert majors(packages) == {"13" if accelerator == "cpu" else accelerator[-2:]}  # the registry's torch brings some
    assert ("jax-cuda12-plugin" in packages, "jax-cuda13-plugin" in packages) == (
        accelerator == "cuda12",
        accelerator == "cuda13",
    )
    assert shared(packages, python) == {}
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.+]+)", (FOLDER / f"{accelerator}.txt").read_text(), re.MULTILINE))
    assert {name: package.get("version") for name, package in packages.items()}.items() <= pinned.items()


def test_two_stacks_at_once_are_seen() -> None:
    both = resolved("cuda12", "3.12") | resolved("cuda13", "3.12")
    assert majors(both) == {"12", "13"}
    assert "nvidia/nccl/lib/libnccl.so.2" in shared(both, "3.12")


def test_what_has_no_dependencies_is_pinned_once() -> None:
    """The command line names the same versions as the set-up installs."""
    pins = (FOLDER / "without-dependencies.txt").read_text().splitlines()
    assert set(WITHOUT_DEPENDENCIES.values()) <= set(pins)


MAKE = shutil.which("make")
RECURSIVE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")  # what a make above this one hands down


@pytest.fixture
def make(tmp_path: Path):
    """Says what `make` would run on a machine whose nvidia-smi prints the given lines; None: it has none."""
    if MAKE is None:
        pytest.skip("make is not installed")

    def run(smi: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
        (folder := tmp_path / "bin").mkdir(exist_ok=True)
        (program := folder / "nvidia-smi").unlink(missing_ok=True)
        if smi is not None:
            program.write_text(f"#!/bin/sh\necho '{smi}'\n")
            program.chmod(0o755)
        given = [f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", *arguments]
        environment = {name: value for name, value in os.environ.items() if name not in ("ACCEL", *RECURSIVE)}
        return subprocess.run(
            [MAKE, "-n", *given], cwd=ROOT, env=environment | {"PATH": str(folder)}, capture_output=True, text=True
        )

    return run


@pytest.mark.parametrize(
    ("smi", "accelerator"),
    [
        (None, "cpu"),
        ("580.65.06, 9.0", "cuda13"),
        ("590.10, 12.0\n590.10, 8.9", "cuda13"),
        ("570.124.06, 10.0", "cuda12"),
        ("525.60.13, 8.0", "cuda12"),
        ("580.65.06, 8.0\n580.65.06, 7.0", "cuda12"),  # CUDA 13 leaves Volta out
        ("580.65.06, 6.1", "cpu"),  # torch 2.10 leaves Pascal out
        ("470.82.01, 8.0", "cpu"),
        ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", "cpu"),
        ("No devices were found", "cpu"),
    ],
)
def test_the_driver_chooses(make, smi: str | None, accelerator: str, tmp_path: Path) -> None:
    done = make(smi, "setup")
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"-c constraints/(\w+)\.txt", done.stdout)) == {accelerator}
    extras = re.search(r"-e '\.\[([\w,]+)\]'", done.stdout)[1].split(",")
    assert extras == ["extract", "evaluate", "explore", "dev", "docs", *([accelerator] if accelerator != "cpu" else [])]
    said = subprocess.run(
        [sys.executable, FOLDER / "accelerator.py"], env={"PATH": str(tmp_path / "bin")}, capture_output=True, text=True
    )
    assert said.stdout == f"{accelerator}\n"
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"ACCEL=auto takes {accelerator}: ")


def test_an_accelerator_that_is_not_known_is_one_line(make) -> None:
    done = make(None, "setup", "ACCEL=rocm")
    assert done.returncode and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "ACCEL=rocm is unknown: take auto, cpu, cuda12 or cuda13" in line


def test_an_environment_keeps_its_accelerator(make, tmp_path: Path) -> None:
    """Later targets need no ACCEL; another one, or other versions of CUDA, makes the environment anew."""
    (tmp_path / "venv").mkdir()
    (stamp := tmp_path / "venv" / ".set-up-cuda12").touch()
    assert "pip install" not in make("580.65.06, 9.0", "train").stdout
    assert "venv --clear" in make(None, "setup", "ACCEL=cuda13").stdout
    assert "venv --clear" in make(None, "setup", "ACCEL=cpu").stdout
    os.utime(stamp, (0, 0))
    older = make("580.65.06, 9.0", "setup").stdout
    assert "venv --clear" in older and "constraints/cuda12.txt" in older
    stamp.rename(cpu := stamp.with_name(".set-up-cpu"))
    assert "constraints/cpu.txt" in (again := make("580.65.06, 9.0", "setup").stdout) and "--clear" not in again
    cpu.unlink()
    assert "--clear" not in make(None, "setup").stdout  # an environment that is not ours stays


def test_tests_stay_on_the_cpu(make) -> None:
    command = make("580.65.06, 9.0", "test").stdout.splitlines()[-1]
    assert command.startswith("JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES= ")
