"""Commands hold what they read: they refuse a run or a store that another process replaces, and say who does."""

import fcntl
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from hafs_jax.cli import main
from hafs_jax.runs import Run
from hafs_jax.store.holding import replacing
from tests.support.report_workspace import write_latents, write_run
from tests.support.stores import write_store

READERS: dict[str, list[str]] = {
    "export": ["export", "RUN"],
    "upload": ["upload", "RUN", "--repo-id", "a/b", "--dry-run", "DRY"],
    "neuronpedia": ["neuronpedia", "RUN", "--out", "DRY"],
    "explore": ["explore", "--out", "OUT", "--profile", "p"],
    "start": ["train", "--out", "OUT", "--profile", "p", "--init-from", "baseline-s0"],
    "verify": ["verify", "STORE"],
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    acts = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    for split in ("train", "heldout"):
        write_store(tmp_path / "p" / "store" / split, acts, split=split)
    write_run(tmp_path / "p", "baseline-s0")
    write_latents(tmp_path / "p", "baseline-s0")
    return tmp_path


def command(name: str, out: Path) -> list[str]:
    places = {"RUN": out / "p/runs/baseline-s0", "STORE": out / "p/store/train", "DRY": out / "dry", "OUT": out}
    return [str(places.get(word, word)) for word in READERS[name]]


@pytest.mark.parametrize("name", [name for name in READERS if name != "verify"])
def test_a_run_that_is_trained_anew_is_not_read(name: str, out: Path, capsys: pytest.CaptureFixture) -> None:
    with Run(out / "p/runs/baseline-s0").locked(), pytest.raises(SystemExit) as stop:
        main(command(name, out))
    assert stop.value.code == 2 and "baseline-s0: a training is at work on it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["verify", "explore"])
def test_a_store_that_is_replaced_is_not_read(name: str, out: Path, capsys: pytest.CaptureFixture) -> None:
    with replacing([out / "p/store"], "an extraction"), pytest.raises(SystemExit) as stop:
        main(command(name, out))
    assert stop.value.code == 2 and "store: an extraction is at work on it" in capsys.readouterr().err


def test_an_explorer_holds_its_run_and_its_store_while_it_serves(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def serve(*_: object) -> int:
        seen.extend(is_held_alone(path) for path in (out / "p/store/.lock", out / "p/runs/.locks/baseline-s0"))
        return 0

    monkeypatch.setattr("hafs_evaluate.explore.command._serve", serve)
    assert main(command("explore", out)) == 0 and seen == [True, True]
    assert not is_held_alone(out / "p/store/.lock")


def test_a_report_holds_its_runs(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    lock = out / "p/runs/.locks/baseline-s0"
    monkeypatch.setattr("hafs_evaluate.report.report.write_report", lambda _: seen.append(is_held_alone(lock)))
    assert main(["report", "--out", str(out), "--profile", "p"]) == 0 and seen == [True]


def test_no_lock_is_made_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("export", "verify"):
        words = [name, str(tmp_path / "folder")]
        with ExitStack() as stack:
            if name == "export":
                stack.enter_context(pytest.raises(SystemExit))
            main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def is_held_alone(path: Path) -> bool:
    """Whether who wants the lock alone would have to wait."""
    with open(path, "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("name", ["export", "upload", "neuronpedia"])
def test_beside_a_folder_that_is_no_runs_no_lock_is_made(name: str, tmp_path: Path) -> None:
    model = tmp_path / "p/runs/baseline-s0"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(SystemExit) as ended:
        main(command(name, tmp_path))
    assert ended.value.code == 2
    assert [path.name for path in model.parent.iterdir()] == ["baseline-s0"]
