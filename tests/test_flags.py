"""Random command lines of training and evaluating, the work itself left out: one line and exit code 2, or a start."""

import random
from pathlib import Path

import pytest

from hafs_evaluate.cli import main as evaluate
from hafs_jax.commands import _parser, main
from tests.support.stores import planted, write_store

VALUES = (
    *("inf", "nan", "-inf", "1e400", "-1", "0", "1", "3", "0.5", "1e-9", "2147483648", "18446744073709551616", "none"),
    *("", " ", "a", "é", "\n", "x" * 3000, "../..", "/dev/null", "[x]", "adam", "lbfgs", "topk", "adaptive", "true"),
)
GRIDS = (
    "arch=relu l1=inf",
    "seed=0..3",
    "seed=3..0",
    "k=1,1",
    "k=",
    "=",
    ";",
    "variant=a",
    "lr=1e400",
    "k=2 k=3",
    "a b",
)
CASES, EVALUATED = 60, 200


def flags_of(command: str) -> list[str]:
    parser = _parser([command])
    groups = [action for action in parser._actions if action.choices and command in action.choices]
    return [flag for action in groups[0].choices[command]._actions for flag in action.option_strings if flag != "-h"]


def outcome(run: object, arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    """The exit code and the lines on stderr; any other exception than the exit passes, as a user would see it."""
    try:
        code = run(arguments) or 0  # type: ignore[operator]
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err.splitlines()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_store(tmp_path / "tiny" / "store" / "train", planted(300, 6, 8, 2)[0], shard_rows=200)
    (tmp_path / "tiny" / "runs").mkdir()
    return tmp_path


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_any_flags_of_training_start_or_are_one_line(
    command: str, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Started(SystemExit):
        pass

    def start(*_: object, **__: object) -> None:
        raise Started(0)

    monkeypatch.setattr("hafs_jax.training.train.fit", start)
    monkeypatch.setattr("hafs_jax.training.sweeps.fit", start)
    monkeypatch.setattr("hafs_jax.commands._use_compilation_cache", lambda: None)
    draw, train_flags = random.Random(0), flags_of("train")
    flags = {"train": train_flags, "sweep": [*flags_of("sweep"), *train_flags]}[command]
    flags = [flag for flag in flags if flag not in ("--help", "--wandb", "--out")]
    codes = set()
    for _ in range(CASES):
        given = ["--out", str(out), "--profile", "tiny", "--batch-size", "40", "--sae.n-latents", "8", "--sae.k", "2"]
        given += ["--grid", draw.choice(GRIDS)] if command == "sweep" else []
        for flag in draw.sample(flags, draw.choice((1, 1, 1, 2, 3))):
            given += [flag, *([draw.choice(VALUES)] if draw.random() < 0.9 else [])]
        code, lines = outcome(main, [command, *given], capsys)
        assert code in (0, 2), given
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == (code == 2), (given, lines)
        codes.add(code)
    assert codes == {0, 2}


def test_any_flags_of_evaluating_are_one_line(out: Path, capsys: pytest.CaptureFixture) -> None:
    draw = random.Random(1)
    commands = ["evaluate", "report", "experiment", "export", "import-sae", "neuronpedia", "upload", "agreement"]
    for _ in range(EVALUATED):
        given = [draw.choice(commands), *draw.choices([*VALUES, "--runs", "--out", str(out), "--profile"], k=3)]
        code, lines = outcome(evaluate, given, capsys)
        assert code in (0, 2), given
        assert code == 0 or lines[-1].startswith("error: "), (given, lines)
