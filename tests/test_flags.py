"""Random command lines: one line and exit code 2, or the work is done (of training: begun) and its result is right."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from hafs_evaluate.cli import main as evaluate
from hafs_extract.cli import _parser as extract_parser
from hafs_extract.cli import main as extract
from hafs_jax.base.options import to_dict
from hafs_jax.commands import main
from hafs_jax.commands.flags import sweep_parser, train_parser
from hafs_jax.store.arrays import ArrayConfig
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify
from tests.support.fuzz import Fuzz
from tests.support.stores import planted, write_store
from tests.support.tiny_models import save_jsonl, save_model, sentence

VALUES = (
    *("inf", "nan", "-inf", "1e400", "-1", "0", "1", "3", "0.5", "1e-9", "2147483648", "18446744073709551616", "none"),
    *("", " ", "a", "é", "\n", "x" * 3000, "../..", "/dev/null", "[x]", "adam", "lbfgs", "topk", "adaptive", "true"),
)
GRIDS = (
    "arch=relu l1=inf",
    "seed=0..3",
    "seed=7 k=2,3",
    "variant=baseline,strict",
    "arch=relu l1=0.1,1",
    "seed=3..0",
    "seed=0..1000000000000",
    "seed=0..99 k=1..99 lr=1,2,3,4,5,6,7,8,9",
    "k=1,1",
    "k=",
    "=",
    ";",
    "variant=a",
    "lr=1e400",
    "k=2 k=3",
    "a b",
)


def flags_of(command: str) -> list[str]:
    parser = train_parser([]) if command == "train" else sweep_parser()
    return [flag for action in parser._actions for flag in action.option_strings if flag != "-h"]


def outcome(run: object, arguments: list[str], capsys: pytest.CaptureFixture) -> tuple[int, list[str]]:
    """The exit code and the lines on stderr; any other exception than the exit passes, as a user would see it."""
    try:
        code = run(arguments) or 0  # type: ignore[operator]
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err.splitlines()


def with_values(flags: list[str], draw: random.Random) -> list[str]:
    """One to three of the flags, most with a value."""
    given = []
    for flag in draw.sample(flags, draw.choice((1, 1, 1, 2, 3))):
        given += [flag, *([draw.choice(VALUES)] if draw.random() < 0.9 else [])]
    return given


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_store(tmp_path / "tiny" / "store" / "train", planted(300, 6, 8, 2)[0], shard_rows=200)
    (tmp_path / "tiny" / "runs").mkdir()
    return tmp_path


@pytest.mark.parametrize(("command", "kind"), [("train", "flags of train"), ("sweep", "flags of sweep")])
def test_any_flags_of_training_start_or_are_one_line(
    command: str, kind: str, out: Path, fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Started(SystemExit):
        pass

    def start(*_: object, **__: object) -> None:
        raise Started(0)

    monkeypatch.setattr("hafs_jax.training.train.fit", start)
    monkeypatch.setattr("hafs_jax.training.sweeps.fit", start)
    train_flags, own = flags_of("train"), flags_of(command)
    flags = [[flag for flag in group if flag not in ("--help", "--wandb", "--out")] for group in (own, train_flags)]
    codes = []
    for draw in fuzz(kind):
        given = ["--out", str(out), "--profile", "tiny", "--batch-size", "40", "--sae.n-latents", "8", "--sae.k", "2"]
        given += ["--grid", draw.choice(GRIDS)] if command == "sweep" else []
        given += with_values(draw.choice([flags[0], *2 * [flags[1]]]), draw)
        code, lines = outcome(main, [command, *given], capsys)
        assert code in (0, 2), given
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == (code == 2), (given, lines)
        codes.append(code)
    assert len(codes) < 50 or set(codes) == {0, 2}


def stored(folder: Path) -> set[bytes]:
    """The rows of a train and a heldout store, which are checked; none twice."""
    rows = []
    for split in ("train", "heldout"):
        assert verify(folder / split) == []
        store = Store(folder / split)
        rows += [row.tobytes() for shard in range(len(store.manifest.shards)) for row in store.read(shard)]
    return set(rows)


def test_any_flags_of_importing_store_the_rows_or_are_one_line(
    tmp_path: Path, fuzz: Fuzz, capsys: pytest.CaptureFixture
) -> None:
    acts = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    files = {"acts": acts, "other": acts[:7], "groups": np.arange(60) // 3, "text": np.array(["a"] * 60)}
    for name, values in files.items():
        np.save(tmp_path / f"{name}.npy", values)
    paths = [str(tmp_path / f"{name}.npy") for name in files]
    config = [f"--{name.replace('_', '-')}" for name in to_dict(ArrayConfig())]
    codes = []
    for draw in fuzz("flags of import"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        given = ["import", paths[0], "--out", str(tmp_path / "out"), "--profile", "p"]
        if draw.random() < 0.3:
            given += [draw.choice(("--target", "--groups")), draw.choice(paths)]
        given += with_values([*config, "--profile", "--target", "--groups", "--force"], draw)
        code, lines = outcome(extract, given, capsys)
        assert code in (0, 2) and (code == 0 or lines[-1].startswith("error: ")), (given, lines)
        if code == 0:
            (folder,) = (path.parent.parent for path in (tmp_path / "out").rglob("store/train/manifest.json"))
            assert len(stored(folder)) <= 60, given
            if "--dtype" not in given:
                assert stored(folder) <= {row.tobytes() for row in acts}, given
        codes.append(code)
    assert len(codes) < 50 or set(codes) == {0, 2}


def test_any_flags_of_extracting_make_stores_or_are_one_line(
    tmp_path: Path, fuzz: Fuzz, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model")
    text = save_jsonl(tmp_path / "text.jsonl", [{"text": sentence(number, 12), "n": number} for number in range(12)])
    default = ["--out", "out", "--profile", "pythia70m", "--model", str(model), "--text", str(text)]
    default += ["--context-length", "16", "--hook-point", "blocks.2.hook_resid_post", "--heldout-fraction", "0.2"]
    parser = extract_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings if flag not in ("-h", "--help")]
    texts = (
        "@",
        "@0",
        "@inf",
        "@nan",
        "@1e400",
        ",keep=n!=3",
        ",keep=",
        ",template={n}",
        ",template={",
        ",kind=a",
        ",=",
    )
    assert outcome(extract, ["extract", *default], capsys)[0] == 0
    whole = stored(tmp_path / "out" / "pythia70m" / "store")
    codes = []
    for draw in fuzz("flags of extract"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        given = ["extract", *default]
        if draw.random() < 0.2:
            given += ["--text", f"{text}{draw.choice(texts)}"]
        given += with_values([flag for flag in flags if flag not in ("--out", "--compile")], draw)
        code, lines = outcome(extract, given, capsys)
        assert code in (0, 2) and (code == 0 or lines[-1].startswith("error: ")), (given, lines)
        if code == 0:
            found = [path.parent.parent for path in (tmp_path / "out").rglob("train/manifest.json")]
            assert found, given
            changed = set(given) & {"--model-dtype", "--hook-point", "--dtype", "--context-length"}
            for folder in found:
                assert stored(folder) and (changed or stored(folder) <= whole or "--text" in given[len(default) :]), (
                    given
                )
        codes.append(code)
    assert len(codes) < 50 or set(codes) == {0, 2}


def test_any_flags_of_evaluating_are_one_line(out: Path, fuzz: Fuzz, capsys: pytest.CaptureFixture) -> None:
    commands = ["evaluate", "report", "experiment", "export", "import-sae", "neuronpedia", "upload", "agreement"]
    for draw in fuzz("flags of evaluate"):
        given = [draw.choice(commands), *draw.choices([*VALUES, "--runs", "--out", str(out), "--profile"], k=3)]
        code, lines = outcome(evaluate, given, capsys)
        assert code in (0, 2), given
        assert code == 0 or lines[-1].startswith("error: "), (given, lines)
