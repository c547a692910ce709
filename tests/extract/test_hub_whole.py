"""The commands against a hub on loopback, from extraction to upload, and the same commands again: no request but one.

Each command is a process of its own, as a user starts it.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hafs_jax.base.files import read_json
from hafs_jax.store.manifest import TIMING, read_manifest
from tests.support.hub import Hub, serving
from tests.support.tiny_models import WORDS, save_model, save_parquet, save_wikitext, save_wmdp

MODEL, WIKITEXT, WMDP, NEWS = "EleutherAI/pythia-70m-deduped", "Salesforce/wikitext", "cais/wmdp", "fancyzhx/ag_news"
PROBE = [f"HEAD /{MODEL}/resolve/main/config.json"]
EXTRACT = ("extract", "--context-length", "64", "--heldout-fraction", "0.2", "--batch-tokens", "512")
TRAIN = ("train", "--sae.n-latents", "30", "--sae.k", "3", "--tokens", "4096", "--batch-size", "256")
VARIANTS = ("baseline", "strict", "adaptive")
EVALUATE = ("evaluate", "--contexts", "4", "--ks", "1", "2", "--tasks", NEWS, "--skip", "hierarchy")
EVALUATE += ("--probe-train-texts", "40", "--probe-test-texts", "20", "--device", "cpu")


def _news(folder: Path) -> Path:
    """A folder laid out as the hub's fancyzhx/ag_news: a label's texts are of words of its own."""
    for split, count in (("train", 160), ("test", 80), ("unread", 8)):
        rows = [
            {"text": " ".join(WORDS[(n % 4) * 4 + (n + index) % 4] for index in range(9)), "label": n % 4}
            for n in range(count)
        ]
        save_parquet(folder / f"data/{split}-00000-of-00001.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub()
    hub.add("model", MODEL, save_model(folder / "m"))
    hub.add_dataset(WIKITEXT, save_wikitext(folder / "w", 60), {"wikitext-103-raw-v1": ["train", "test"]})
    hub.add_dataset(WMDP, save_wmdp(folder / "q", 30), {"wmdp-bio": ["test"], "wmdp-cyber": ["test"]})
    hub.add("dataset", NEWS, _news(folder / "n"))
    with serving(hub):
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def _start(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    hub.forget()
    environment = {"HAFS_HUB_WAIT": "6", "JAX_PLATFORMS": "cpu", "HF_TOKEN": "hf_mine", **environment}
    return subprocess.run(
        [sys.executable, "-m", "hafs_jax", *arguments],
        capture_output=True,
        text=True,
        cwd=home,
        env=hub.env(home, **environment),
        timeout=300,
    )


def _run(hub: Hub, home: Path, *arguments: str) -> str:
    done = _start(hub, home, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def done(hub: Hub, home: Path) -> dict[str, tuple[str, list[str]]]:
    """What each command said, and what it asked the hub for."""
    commands = {"extract": (*EXTRACT, "--compile", "on")}
    commands |= {variant: (*TRAIN, "--variant", variant) for variant in VARIANTS}
    commands |= {"evaluate": EVALUATE, "report": ("report",)}
    commands["upload"] = ("upload", str(home / "artifacts/pythia70m/runs/adaptive-s0"), "--repo-id", "me/saes")
    found = {}
    for name, command in commands.items():
        found[name] = _run(hub, home, *command), hub.asked()
        assert all(asked.authorization == "Bearer hf_mine" for asked in hub.log if not asked.path.startswith("/lfs"))
    return found


@pytest.mark.timeout(600)  # some 60 s of one core; more where others use it
def test_the_commands_work_against_the_hub(hub: Hub, home: Path, done: dict) -> None:
    store = home / "artifacts/pythia70m/store/train"
    manifest = read_manifest(store)
    assert manifest.profile["requested"] == "auto" and manifest.profile["resolved"] == "pythia70m"
    assert (manifest.model.name, manifest.model.revision) == (MODEL, hub.commit("model", MODEL))
    assert {source.path: source.revision for source in manifest.sources} == {
        name: hub.commit("dataset", name) for name in (WIKITEXT, WMDP)
    }
    assert read_json(store / TIMING, "timing")["compiled"]
    assert f"the probing suite standard will fetch 0.0 MB whole: {NEWS} 0.0 MB" in done["evaluate"][0]
    for variant in VARIANTS:
        result = read_json(home / f"artifacts/pythia70m/eval/{variant}-s0/probing.json", "result")
        assert result["eval_config"]["dataset_commits"] == {NEWS: hub.commit("dataset", NEWS)}
        assert result["eval_config"]["probe_train_set_size"] == 40
        (detail,) = result["eval_result_details"]
        assert 0.5 < detail["llm_test_accuracy"] <= 1
    assert (home / "artifacts/pythia70m/report/index.html").exists()


def test_only_the_splits_that_are_read_are_fetched(done: dict) -> None:
    got = [path.rsplit("/resolve/", 1) for path in done["extract"][1] if path.startswith("GET") and "parquet" in path]
    assert [(name.removeprefix("GET /datasets/"), file.split("/", 1)[1]) for name, file in got] == [
        (WIKITEXT, "wikitext-103-raw-v1/train-00000-of-00002.parquet"),
        (WIKITEXT, "wikitext-103-raw-v1/train-00001-of-00002.parquet"),
        (WMDP, "wmdp-bio/test-00000-of-00001.parquet"),
    ]
    got = [path for path in done["evaluate"][1] if path.startswith("GET") and path.endswith(".parquet")]
    assert [path.rsplit("/", 1)[1].split("-")[0] for path in got] == ["train", "test"]


def test_training_and_reporting_ask_nothing(done: dict) -> None:
    assert [done[name][1] for name in (*VARIANTS, "report")] == [[]] * 4


def test_a_run_is_uploaded_in_one_commit(hub: Hub, home: Path, done: dict) -> None:
    said, asked = done["upload"]
    assert said.splitlines()[0] == f"{hub.url}/me/saes"
    uploaded, weights = hub.repositories["models", "me/saes"], "adaptive-s0/sae_weights.safetensors"
    assert uploaded[weights] == (home / "artifacts/pythia70m/runs/adaptive-s0/sae/sae_weights.safetensors").read_bytes()
    assert f'base_model: "{MODEL}"' in uploaded["README.md"].decode()
    assert len([path for path in asked if "/commit/" in path]) == 1


def test_the_same_commands_again_ask_whether_the_hub_is_there_and_no_more(hub: Hub, home: Path, done: dict) -> None:
    _run(hub, home, *EXTRACT, "--compile", "on")
    assert hub.asked() == PROBE
    _run(hub, home, *TRAIN, "--variant", "strict")
    assert hub.asked() == []
    _run(hub, home, *EVALUATE)
    assert hub.asked() == [f"HEAD /{MODEL}/resolve/{hub.commit('model', MODEL)}/config.json"]
    _run(hub, home, "upload", str(home / "artifacts/pythia70m/runs/adaptive-s0"), "--repo-id", "me/saes")
    assert not hub.asked("POST .*/commit/")  # nothing has changed


def test_a_new_sae_needs_nothing_from_the_hub(hub: Hub, home: Path, done: dict) -> None:
    """Its model and its probing texts are those of before, though the hub has others now."""
    hub.repositories["datasets", NEWS]["README.md"] = b"---\nlicense: other\n---\n"
    _run(hub, home, *TRAIN, "--variant", "ortsae")
    _run(hub, home, *EVALUATE, "--runs", "ortsae-s0", "--skip", "splice", "latents", "domains", "across")
    assert len(hub.asked()) == 1
    of_new, of_old = (
        read_json(home / f"artifacts/pythia70m/eval/{name}-s0/probing.json", "result")["eval_config"]
        for name in ("ortsae", "strict")
    )
    assert of_new["dataset_commits"] == of_old["dataset_commits"] != {NEWS: hub.commit("dataset", NEWS)}


def test_a_gate_is_named_before_anything_is_fetched_and_the_extraction_goes_on_in_its_commits(
    hub: Hub, tmp_path: Path
) -> None:
    extract = (*EXTRACT, "--compile", "off")
    gate = hub.gate(WMDP)
    refused = _start(hub, tmp_path, *extract)
    gate.times = 0
    assert refused.returncode == 2
    assert re.fullmatch(
        rf"error: source wmdp-bio: dataset {WMDP} cannot be had: the hub answers 403: it is gated; accept its terms at"
        rf" {hub.url}/datasets/{WMDP}, then run `hf auth login` or set HF_TOKEN",
        refused.stderr.splitlines()[-1],
    )
    assert not hub.asked("GET .*(safetensors|parquet)")

    down = hub.fail("GET .*model.safetensors", 500)
    stopped = _start(hub, tmp_path, *extract, HAFS_HUB_WAIT="1")
    down.times = 0
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert "the hub answers 500 Internal Server Error, 4 times in a row" in stopped.stderr.splitlines()[-1]
    before = hub.commit("dataset", WIKITEXT)
    hub.repositories["datasets", WIKITEXT]["LICENSE"] = b"another commit"
    _run(hub, tmp_path, *extract)
    assert not hub.asked("GET .*parquet")
    sources = read_manifest(tmp_path / "artifacts/pythia70m/store/train").sources
    assert sources[0].revision == before != hub.commit("dataset", WIKITEXT)
