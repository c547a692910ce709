"""A folder of its own with everything that commands read, small; commands in it, stopped before the heavy work."""

import contextlib
import importlib
import io
import os
import shutil
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hafs_jax import cli
from hafs_jax.base.files import write_json
from tests.support.report_workspace import (
    make_workspace,
    write_domains,
    write_first_letter,
    write_hierarchy,
    write_summary,
    write_tokens,
)
from tests.support.tiny_models import save_jsonl, save_model, sentence

LIMIT_SECONDS = 20
PROFILE, RUNS, TRAINED = "p", ("baseline-s0", "adaptive-s0"), "baseline-s7"
_TRAIN = ["--tokens", "128", "--batch-size", "32", "--sae.n-latents", "13", "--k", "3", "--seed", "7"]
HEAVY = (
    "hafs_jax.training.train.fit",
    "hafs_jax.training.sweeps.fit",
    "hafs_jax.targets.deviceless.devices_of",
    "hafs_jax.targets.report.devices_of",
    "hafs_extract.synthetic.samples.generate",
    "hafs_evaluate.stages.evaluate",
    "hafs_evaluate.explore.command._serve",
    "hafs_evaluate.labels.endpoint.Endpoint.ask",
    "hafs_evaluate.truth.synth_score.evaluate_synthetic",
    "hafs_jax.base.process.children.run",
    "hafs_extract.packaged.fetch",
)
"""What is not done: a command that reaches one of these has taken its input, and ends with exit code 0."""
_DRAW = "hafs_evaluate.report.figures.draw"
FIGURES = {f"{_DRAW}.svg": lambda *_: ("", {}), f"{_DRAW}.write_png": lambda *_: None}
"""What draws the report's figures, which takes seconds, and what does so in no time."""


class Started(SystemExit):
    """The work would begin now."""


class Hangs(BaseException):
    """A case takes too long."""


@dataclass(frozen=True)
class Ended:
    """How a command has ended."""

    code: int
    out: str
    err: str
    started: bool


@dataclass(eq=False)
class Place:
    """The folder `root`, in which only `here` is written to, and there mostly `out`."""

    root: Path
    here: Path = field(init=False)
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.here = self.root / "above" / "here"
        self.out = self.here / "out"
        make_workspace(self.out / PROFILE, RUNS)
        for run in RUNS:
            folder = self.out / PROFILE
            write_hierarchy(folder, run, 0.8)
            write_domains(folder, run, 0.5)
            write_tokens(folder, run, 0.7)
            write_first_letter(folder, run, 0.2)
        write_summary(self.out / PROFILE)
        write_json(self.out / "auto.json", {"profile": PROFILE, "reason": "a test"})
        acts = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
        arrays = {"acts": acts, "other": acts[:7], "groups": np.arange(60) // 3, "text": np.array(["a"] * 60)}
        for name, values in arrays.items():
            np.save(self.here / f"{name}.npy", values)
        save_model(self.here / "model")
        save_jsonl(self.here / "text.jsonl", [{"text": sentence(number, 12), "n": number} for number in range(12)])
        for name in ("pipe", "pipe.jsonl"):
            os.mkfifo(self.here / name)
        (self.here / "zero").symlink_to("/dev/zero")
        (self.here / "secret").symlink_to("/etc/hostname")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as opened:
            os.chdir(self.here)
            opened.bind("socket")
        (self.here / "empty").write_bytes(b"")
        (self.here / "folder").mkdir()
        (self.here / "exp.toml").write_text('name = "exp"\nprofile = "p"\nseeds = 1\nks = [3]\n')
        with self._inside():
            place = ["--out", "out", "--profile", PROFILE]
            for command in (
                ["train", *_TRAIN, *place],
                ["export", TRAINED, "--format", "dictionary_learning", *place],
                [
                    "import-sae",
                    f"out/{PROFILE}/runs/{TRAINED}/dictionary_learning/trainer_0/ae.pt",
                    "new",
                ],  # its imports
            ):
                ended = self._ended(partial(cli.main, command))
                assert ended.code == 0, ended.err
            shutil.rmtree("new")
        self.kept = {path: (path.read_bytes(), _state(path)) for path in _files(self.here)}
        self.above = set(_files(self.root))

    def command(self, arguments: list[str], draws: bool = False) -> Ended:
        """Runs `hafs ARGUMENTS` here, in this process; an exception that a user would see passes."""
        with self._inside(), stopped(draws):
            return self._ended(lambda: cli.main(arguments))

    def call(self, read: Callable[[], Any]) -> Ended:
        """Calls `read` as a command would."""
        from hafs_jax.base.errors import one_line_errors

        def reads() -> int:
            with one_line_errors():
                read()
            return 0

        with self._inside(), stopped():
            return self._ended(reads)

    def restore(self) -> list[Path]:
        """Makes every file as it was; the files that were made outside of OUT."""
        found = {path: _state(path) for path in _files(self.here)}
        strange = sorted(path for path in _files(self.root) if path not in self.above and self.out not in path.parents)
        for path in found.keys() - self.kept.keys():
            path.unlink(missing_ok=True)
        for path, (data, state) in list(self.kept.items()):
            if found.get(path) != state:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                self.kept[path] = data, _state(path)
        for path in strange:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.here / "new", ignore_errors=True)
        return strange

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        before = os.getcwd()
        os.chdir(self.here)
        try:
            yield
        finally:
            os.chdir(before)

    def _ended(self, work: Callable[[], Any]) -> Ended:
        out, err, started = io.StringIO(), io.StringIO(), False
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = work() or 0
            except Started:
                code, started = 0, True
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Ended(code, out.getvalue(), err.getvalue(), started)


@contextlib.contextmanager
def stopped(draws: bool = False) -> Iterator[None]:
    """While inside, heavy work is a `Started`, and no figure is drawn unless with `draws`."""

    def start(*_: Any, **__: Any) -> None:
        raise Started(0)

    with pytest.MonkeyPatch.context() as patch:
        for name in HEAVY:
            patch.setattr(name, start)
        for name, instead in FIGURES.items() if not draws else ():
            patch.setattr(name, instead)
        yield


@contextlib.contextmanager
def limited(seconds: int = LIMIT_SECONDS) -> Iterator[None]:
    """Raises `Hangs` in the main thread where the block takes longer."""

    def hangs(*_: Any) -> None:
        raise Hangs(f"takes over {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def problem(ended: Ended) -> str | None:
    """What is wrong with how a command ended: 0, or 2 with one line of an error."""
    lines = ended.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if ended.code not in (0, 2):
        return f"exit code {ended.code}: {ended.err[-300:]!r}"
    is_help = bool(lines) and lines[0].startswith("usage: ")
    if ended.code == 2 and not is_help and (not errors or lines[-1] != errors[-1]):
        return f"not one line: {ended.err[-500:]!r}"
    if len(errors) > 1:
        return f"several errors: {ended.err[-500:]!r}"
    if ended.code == 0 and errors:
        return f"exit code 0 with {errors[0]!r}"
    if errors and not (errors[0].isprintable() and len(errors[0]) < 20_000):
        return f"a line with what is not printable, or over 20,000 letters: {errors[0][:200]!r}"
    return None


def said(error: BaseException) -> str:
    """An exception as one line, with where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "hafs_" in frame.filename] or frames
    last = ours[-1]
    return f"{type(error).__name__}: {str(error)[:200]!r} at {Path(last.filename).name}:{last.lineno} ({last.name})"


def preload() -> None:
    """Imports what the commands import, so that no case pays for it."""
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name.rpartition(".")[0])


def _files(folder: Path) -> list[Path]:
    return [
        path
        for place, _, names in os.walk(folder)
        for name in names
        if (path := Path(place) / name).is_file() and not path.is_symlink()
    ]


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
