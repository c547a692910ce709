"""The commands against a hub on loopback, from extraction to upload, and the same commands again: no request but one.

Each command is a process of its own, as a user starts it.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hafs_jax.base.files import read_json
from hafs_jax.store.manifest import TIMING, read_manifest
from tests.support.hub import Hub, serving
from tests.support.tiny_models import WORDS, save_model, save_parquet, save_wikitext, save_wmdp

MODEL, WIKITEXT, WMDP, NEWS = "EleutherAI/pythia-70m-deduped", "Salesforce/wikitext", "cais/wmdp", "fancyzhx/ag_news"
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PROBE = [f"HEAD /{MODEL}/resolve/main/config.json"]
EXTRACT = ("extract", "--context-length", "64", "--heldout-fraction", "0.2", "--batch-tokens", "512")
TRAIN = ("train", "--sae.n-latents", "30", "--sae.k", "3", "--tokens", "4096", "--batch-size", "256")
EVALUATE = (
    "evaluate",
    "--contexts",
    "4",
    "--ks",
    "1",
    "2",
    "--tasks",
    NEWS,
    "--skip",
    "hierarchy",
    "latents",
    "domains",
)
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


@pytest.mark.timeout(280)  # 14 processes: 87 s of one core
def test_from_a_compiled_extraction_to_the_upload_and_again_without_a_request(hub: Hub, home: Path) -> None:
    """One test, since its 60 s of one core would be taken by each worker that has a part of it."""
    out = home / "artifacts/pythia70m"
    _run(hub, home, *EXTRACT, "--compile", "on")
    assert all(asked.authorization == "Bearer hf_mine" for asked in hub.log)
    _check_fetched_splits(hub.asked("GET .*parquet"))
    _check_store(hub, out / "store/train")

    for variant in ("baseline", "strict"):
        _run(hub, home, *TRAIN, "--variant", variant)
        assert hub.asked() == []
    said = _run(hub, home, *EVALUATE)
    assert f"the probing suite standard will fetch 0.0 MB whole: {NEWS} 0.0 MB" in said
    files = [path.rsplit("/", 1)[1] for path in hub.asked("GET .*parquet")]
    assert [name.split("-")[0] for name in files] == ["train", "test"]

    first = hub.commit("dataset", NEWS)
    hub.repositories["datasets", NEWS]["README.md"] = b"---\nlicense: other\n---\n"  # another commit
    _run(hub, home, *TRAIN, "--variant", "adaptive")
    _run(hub, home, *EVALUATE)
    probe = [f"HEAD /{MODEL}/resolve/{hub.commit('model', MODEL)}/config.json"]
    assert hub.asked() == probe  # a new SAE is measured with the model and the texts of the others
    for variant in ("baseline", "strict", "adaptive"):
        result = read_json(out / f"eval/{variant}-s0/probing.json", "result")
        assert result["eval_config"]["dataset_commits"] == {NEWS: first} != {NEWS: hub.commit("dataset", NEWS)}
        assert result["eval_config"]["probe_train_set_size"] == 40
        assert 0.5 < result["eval_result_details"][0]["llm_test_accuracy"] <= 1
    _run(hub, home, "report")
    assert hub.asked() == [] and (out / "report/index.html").exists()
    _check_upload(hub, home, out / "runs/adaptive-s0")

    _run(hub, home, *EXTRACT, "--compile", "on")
    assert hub.asked() == PROBE
    _run(hub, home, *EVALUATE)
    assert hub.asked() == probe


def _check_fetched_splits(got: list[str]) -> None:
    """Of each dataset, only the split that is read."""
    parts = [path.removeprefix("GET /datasets/").split("/resolve/") for path in got]
    assert [(name, file.split("/", 1)[1]) for name, file in parts] == [
        (WIKITEXT, "wikitext-103-raw-v1/train-00000-of-00002.parquet"),
        (WIKITEXT, "wikitext-103-raw-v1/train-00001-of-00002.parquet"),
        (WMDP, "wmdp-bio/test-00000-of-00001.parquet"),
    ]


def _check_store(hub: Hub, store: Path) -> None:
    """What was resolved, in which commits, and that the model was compiled."""
    manifest = read_manifest(store)
    assert manifest.profile["requested"] == "auto" and manifest.profile["resolved"] == "pythia70m"
    assert (manifest.model.name, manifest.model.revision) == (MODEL, hub.commit("model", MODEL))
    commits = {source.path: source.revision for source in manifest.sources}
    assert commits == {name: hub.commit("dataset", name) for name in (WIKITEXT, WMDP)}
    assert read_json(store / TIMING, "timing")["compiled"]


def _check_upload(hub: Hub, home: Path, run: Path) -> None:
    """One commit, with the weights and a card that names the model."""
    said = _run(hub, home, "upload", str(run), "--repo-id", "me/saes")
    assert said.splitlines()[0] == f"{hub.url}/me/saes"
    uploaded, weights = hub.repositories["models", "me/saes"], "sae_weights.safetensors"
    assert uploaded[f"{run.name}/{weights}"] == (run / "sae" / weights).read_bytes()
    assert f'base_model: "{MODEL}"' in uploaded["README.md"].decode()
    assert len(hub.asked("POST .*/commit/")) == 1


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


@pytest.mark.slow
@pytest.mark.timeout(280)  # 8 processes
def test_the_smallest_cell_of_the_pythia_protocol_runs_to_its_end(hub: Hub, home: Path) -> None:
    """Of the committed file: two arms, its first architecture and L0, one seed; fewer latents, texts and tasks."""
    values = tomllib.loads((EXPERIMENTS / "pythia70m.toml").read_text())
    assert {"baseline", "yielding"} <= set(values["arms"]) and "evaluate" not in values
    level = values["ks"][:1]
    train = ["--sae.n-latents", "128", "--batch-size", "512"]
    small = {"architectures": values["architectures"][:1], "ks": level, "latents_ks": level, "seeds": 1}
    flags = {"extract": [*EXTRACT[1:], "--compile", "off"], "train": [*values["train"], *train]}
    values |= {"arms": ["baseline", "yielding"], "method": "yielding", "evaluate": EVALUATE[1:], **small, **flags}
    (home / "cell.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    _run(hub, home, "experiment", "cell.toml", "--out", "experiments")
    folder = home / "experiments/pythia70m/pythia70m"
    summary = read_json(folder / "experiment/summary.json", "summary")
    assert summary["saes"] == 2 and summary["missing"] == []
    [tokens] = [each for each in summary["comparisons"] if each["measure"] == "transfer_top_1" and each["k"] is None]
    assert (tokens["a"], tokens["b"], tokens["seeds"]) == ("yielding", "baseline", 1)
    assert "transfer" in summary["verdict"][0] and "no interval" in summary["verdict"][0]
    runs = read_json(folder / "report/results.json", "results")["variants"]
    found = {run["variant"] for run in runs.values() if run["tokens"]["transfer_top_1"] > 0.5}
    assert found == {"baseline", "yielding"}
