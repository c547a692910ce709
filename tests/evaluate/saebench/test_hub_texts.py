"""SAE-Bench's datasets from a hub on loopback: streamed in one commit, and a hub that fails meanwhile is one line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import Hub, serving
from tests.support.tiny_models import save_parquet

EUROPARL, CODE, NEWS = "Helsinki-NLP/europarl", "codeparrot/github-code", "fancyzhx/ag_news"
DRIVER = """
import json, sys
from pathlib import Path
from hafs_evaluate.saebench.hub_texts import HubTexts
from hafs_jax.base.errors import one_line_errors
texts = HubTexts(Path("commits.json"))
with one_line_errors():
    if sys.argv[1] == "plans":
        print(json.dumps([[plan.name, plan.missing_bytes] for plan in texts.plans(sys.argv[2:])]))
    else:
        rows = texts.load(*sys.argv[1:], streaming=True, split="train")
        print(json.dumps([row.get("translation", row) for row in rows]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    save_parquet(folder / "e/en-fr/train-0.parquet", [{"translation": {"en": f"{n}", "fr": "un"}} for n in range(3)])
    save_parquet(folder / "c/data/train-0.parquet", [{"path": "a.py", "content": "x"}, {"path": "b", "content": "y"}])
    hub = Hub()
    hub.add_dataset(EUROPARL, folder / "e", {"en-fr": ["train"]})
    hub.add("dataset", CODE, folder / "c")
    hub.gate(NEWS)
    for split in ("train", "test"):
        save_parquet(folder / f"n/data/{split}-0.parquet", [{"text": "a", "label": 0}])
    hub.add("dataset", NEWS, folder / "n")
    with serving(hub):
        yield hub


def _driver(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        capture_output=True,
        text=True,
        cwd=home,
        env=hub.env(home, HAFS_HUB_WAIT="3"),
        timeout=120,
    )


def test_large_datasets_are_streamed_in_the_commit_that_was_first_read(hub: Hub, tmp_path: Path) -> None:
    found = _driver(hub, tmp_path, EUROPARL, "en-fr")
    assert json.loads(found.stdout or "0") == [{"en": f"{n}", "fr": "un"} for n in range(3)], found.stderr
    found = _driver(hub, tmp_path, CODE)
    assert json.loads(found.stdout or "0") == [{"language": "Python", "code": "x"}], found.stderr
    commits = {name: hub.commit("dataset", name) for name in (EUROPARL, CODE)}
    assert json.loads((tmp_path / "commits.json").read_text()) == commits
    assert all(any(commit in path for commit in commits.values()) for path in hub.asked("GET .*/resolve/"))


@pytest.mark.parametrize("kind", ["status", "silent", "cut"])
def test_a_hub_that_fails_while_rows_are_read_is_one_line(hub: Hub, tmp_path: Path, kind: str) -> None:
    fault = hub.fail("GET .*en-fr/train-0.parquet", 503, kind=kind)
    found = _driver(hub, tmp_path, EUROPARL, "en-fr")
    hub.faults.remove(fault)
    assert found.returncode == 2 and not found.stdout
    (said,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert "4 times in a row" in said and "take --suite sae_probes" in said and "Traceback" not in found.stderr


def test_a_gated_dataset_is_named_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    found = _driver(hub, tmp_path, "plans", NEWS, EUROPARL)
    assert found.returncode == 2
    assert f"dataset {NEWS} cannot be had: the hub answers 403: it is gated" in found.stderr.splitlines()[-1]
    gate, hub.faults[:] = list(hub.faults), []
    found = _driver(hub, tmp_path, "plans", NEWS, EUROPARL)
    hub.faults[:] = gate
    files = hub.repositories["datasets", NEWS]
    sizes = [len(files[f"data/{split}-0.parquet"]) for split in ("train", "test")]
    assert json.loads(found.stdout) == [[NEWS, size] for size in sizes]
