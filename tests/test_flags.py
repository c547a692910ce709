"""Random flags of extract and import: one line and exit code 2, or stores of the right rows.

`tests.torture.fuzz` tries the command lines of all commands, up to where the work begins.
"""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from hafs_extract.cli import _parser as extract_parser
from hafs_extract.cli import main as extract
from hafs_jax.base.options import to_dict
from hafs_jax.store.arrays import ArrayConfig
from hafs_jax.store.reader import Store
from hafs_jax.store.verify import verify
from tests.support.fuzz import Fuzz
from tests.support.tiny_models import save_jsonl, save_model, sentence

VALUES = (
    *("inf", "nan", "-inf", "1e400", "-1", "0", "1", "3", "0.5", "1e-9", "2147483648", "18446744073709551616", "none"),
    *("", " ", "a", "é", "\n", "x" * 3000, "../..", "/dev/null", "[x]", "adam", "lbfgs", "topk", "adaptive", "true"),
)


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
