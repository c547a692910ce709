"""What the hub refuses, breaks off or falsifies: bounded retries, one line, nothing false in the cache, pinned commits.

One process fetches all the cases, each a repository of its own on a hub on loopback, since the hub libraries read their
settings when they are imported.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hafs_extract.hub import presence
from hafs_extract.hub.files import HubFile, difference, plan_dataset, plan_model
from hafs_jax.base import hub as client
from hafs_jax.base.errors import UserError
from tests.support.hub import PAGE, Fault, Hub, serving
from tests.support.tiny_models import save_wikitext

DRIVER = """
import json, sys, time
from hafs_extract.config import SourceConfig
from hafs_extract.hub.files import plan_dataset, plan_model
from hafs_jax.base.errors import UserError
for kind, name in json.loads(sys.stdin.read()):
    started, error, found = time.monotonic(), None, []
    try:
        source = SourceConfig(name="text", path=name, subset="wikitext-103-raw-v1")
        plan = plan_dataset(source) if kind == "dataset" else plan_model(name, None)
        plan.check_access()
        plan = plan.run()
        found = [str(path) for path in plan.paths]
    except UserError as caught:
        error = str(caught)
    seconds = time.monotonic() - started
    print(json.dumps({"name": name, "error": error, "paths": found, "seconds": seconds}), flush=True)
"""
WAIT = 3.0  # HAFS_HUB_WAIT: half a second of silence ends an attempt

QUANTISED = b'{"model_type": "gpt_neox", "quantization_config": {"quant_method": "gptq"}}'

WEIGHTS = "GET .*{}/resolve/.*model.safetensors"
MODELS: dict[str, tuple[Fault | None, str | None]] = {
    "org/whole": (None, None),
    "org/once": (Fault(WEIGHTS, "status", 500, times=1), None),
    "org/head": (Fault("HEAD .*{}/resolve/.*model.safetensors", "status", 503, times=1), None),
    "org/later": (Fault("GET .*{}/", "status", 429, times=1, headers={"Retry-After": "1"}), None),
    "org/broken": (Fault(WEIGHTS, "cut", times=1), None),
    "org/down": (Fault(WEIGHTS, "status", 500), r"org/down/.*the hub answers 500 .*, 4 times in a row; give the same"),
    "org/hours": (Fault("GET .*{}/resolve", "status", 429, headers={"Retry-After": "3000"}), r"asks to wait 3,000 s"),
    "org/cut": (Fault(WEIGHTS, "cut"), r"the connection failed \(peer closed.*4 times in a row"),
    "org/mute": (Fault(WEIGHTS, "silent"), r"model.safetensors: the hub said nothing for 0.5 s, 4 times in a row"),
    "org/muteapi": (Fault("api/models/{}", "silent"), r"the hub said nothing for 0.5 s, 4 times in a row"),
    "org/page": (Fault(WEIGHTS, "page"), r"expected the hub's data, found an HTML page"),
    "org/typed": (
        Fault("GET .*{}/resolve/.*config.json", "page", headers={"Content-Type": "application/json"}),
        r"org/typed.*config.json",
    ),
    "org/pageapi": (Fault("api/models/{}", "page"), r"expected the hub's data, found an HTML page"),
    "org/short": (Fault(WEIGHTS, "size"), r"expected 6,000 bytes of .*model.safetensors, found 3,000; give the same"),
    "org/other": (Fault(WEIGHTS, "bytes"), r"model.safetensors: expected sha256 \w{12}, found \w{12}; it is not kept"),
    "org/small": (Fault("GET .*{}/.*tokenizer.json", "bytes"), r"tokenizer.json: expected git hash \w{12}, found"),
    "org/secret": (Fault("{}", "status", 401), r"answers 401: org/secret does not exist, or is private; .*`hf auth"),
    "org/none": (Fault("{}", "status", 404), r"answers 404: there is none of that name at http://.*; check the name"),
    "org/closed": (Fault("{}", "status", 403), r"answers 403: no right to it; ask for access at http://.*/org/closed"),
    "org/gated": (
        Fault("{}/resolve", "status", 403, headers={"X-Error-Code": "GatedRepo"}),
        r"it is gated; accept its terms at http://.*/org/gated, then run `hf auth login` or set HF_TOKEN",
    ),
    "org/empty": (None, r"the hub has no weights there"),
    "org/adapter": (None, r"model org/adapter holds an adapter \(adapter_config.json\); merge it into its model"),
    "org/quantised": (
        Fault(WEIGHTS, "status", 418),
        r"model org/quantised is quantised \(quantization_config of config.json: 'gptq'\)",
    ),
}  # fmt: skip
DATASETS: dict[str, tuple[Fault | None, str | None]] = {
    "data/whole": (None, None),
    "data/gated": (
        Fault("{}/resolve", "status", 403, headers={"X-Error-Code": "GatedRepo"}),
        r"source text: .*it is gated; accept its terms at http://.*/datasets/data/gated, then run `hf auth login`",
    ),
    "data/down": (Fault("api/datasets/{}/tree", "status", 502), r"the hub answers 502 .*4 times in a row"),
    "data/gone": (None, r"source text: dataset data/gone cannot be had: the hub answers 401: data/gone does not exist"),
}


def _model_files() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "gpt_neox"}',
        "tokenizer.json": b'{"version": "1.0"}',
        "README.md": b"not read",
        "onnx/model.onnx": b"not read",
        "model.safetensors": bytes(range(250)) * 24,
        "pytorch_model.bin": b"not read",
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with all the cases."""
    hub = Hub()
    folder = save_wikitext(tmp_path_factory.mktemp("data") / "w", 4)
    for name in MODELS:
        hub.repositories["models", name] = _model_files()
    for file in ("model.safetensors", "pytorch_model.bin"):
        del hub.repositories["models", "org/empty"][file]
    of = hub.repositories["models", "org/adapter"]
    of["adapter_config.json"], of["adapter_model.safetensors"] = b"{}", of.pop("model.safetensors")
    del of["config.json"], of["pytorch_model.bin"]
    hub.repositories["models", "org/quantised"]["config.json"] = QUANTISED
    for name in DATASETS:
        hub.add_dataset(name, folder, {"wikitext-103-raw-v1": ["train", "test"]})
    del hub.repositories["datasets", "data/gone"]
    for name, (fault, _) in (MODELS | DATASETS).items():
        if fault is not None:
            fault.pattern = (
                fault.pattern.format(name + "(/|$)") if fault.pattern == "{}" else fault.pattern.format(name)
            )
            hub.faults.append(fault)
    with serving(hub):
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def _fetch(hub: Hub, home: Path, cases: list[tuple[str, str]]) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=hub.env(home, HAFS_HUB_WAIT=str(WAIT)),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def fetched(hub: Hub, home: Path) -> dict[str, dict]:
    """What became of each case: an error or paths, and seconds."""
    return _fetch(hub, home, [*(("model", name) for name in MODELS), *(("dataset", name) for name in DATASETS)])


@pytest.mark.parametrize("name", [*MODELS, *DATASETS])
def test_a_fault_of_the_hub_is_mended_or_one_line(fetched: dict, hub: Hub, home: Path, name: str) -> None:
    found, (_, message) = fetched[name], (MODELS | DATASETS)[name]
    if message is None:
        assert found["error"] is None and found["paths"]
    else:
        assert re.search(message, found["error"]), found["error"]
        assert "\n" not in found["error"] and len(found["error"]) < 600
    assert found["seconds"] < 4 * WAIT + 10  # a busy machine, and the second that huggingface_hub adds to each cut


def test_only_what_is_read_is_fetched(fetched: dict, hub: Hub) -> None:
    assert [Path(path).name for path in fetched["org/whole"]["paths"]] == [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    ]
    assert [Path(path).name for path in fetched["data/whole"]["paths"]] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    assert not hub.asked("GET .*(onnx|pytorch_model.bin|test-00000)")
    assert not hub.asked("GET .*org/gated/resolve") and not hub.asked("GET .*data/gated/.*parquet")


def test_nothing_false_stays_in_the_cache(fetched: dict, home: Path) -> None:
    cache = home / "hf" / "hub"
    right = {*_model_files().values(), QUANTISED}
    kept = [path for path in cache.glob("models--org--*/blobs/*") if path.is_file()]
    assert len(kept) > 20
    assert all(path.read_bytes() in right for path in kept)
    assert not any(PAGE in path.read_bytes() for path in cache.rglob("*") if path.is_file())
    for name in ("page", "short", "other", "cut", "mute", "down"):
        assert not list(cache.glob(f"models--org--{name}/snapshots/*/model.safetensors"))


def test_the_same_command_goes_on_from_whole_files(fetched: dict, hub: Hub, home: Path) -> None:
    hub.faults.clear()
    hub.forget()
    again = _fetch(hub, home, [("model", "org/down"), ("model", "org/other")])
    assert all(found["error"] is None for found in again.values())
    assert len(hub.asked("GET .*/resolve")) == 2  # the two files of weights; the others were there
    hub.forget()
    commits = [hub.commit("model", "org/down")]
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from hafs_extract.hub.files import plan_model as p;p('org/down', {commits[0]!r}).run()",
        ],
        env=hub.env(home),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and hub.asked() == []  # a commit that was fetched needs no hub


@pytest.mark.parametrize(("kind", "plan"), [("model", plan_model), ("dataset", plan_dataset)])
def test_a_note_of_fetched_files_holds_while_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, plan: object
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    from hafs_extract.config import SourceConfig

    source = SourceConfig(name="d", path="a/b", subset="en", split="test")
    commit = "ab" * 20
    file = presence.cached_repository(kind, "a/b") / "snapshots" / commit / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    selection = ("en", "test") if kind == "dataset" else ()
    record = presence.fetched_record(kind, "a/b", None, selection)
    record.parent.mkdir()
    record.write_text(json.dumps({"commit": commit, "files": [{"path": "config.json", "size": 2}]}))
    found = plan_dataset(source) if kind == "dataset" else plan_model("a/b", None)
    assert (found.commit, found.paths, found.missing) == (commit, [file], ())
    assert presence.dataset_is_cached(source) == (kind == "dataset")
    file.unlink()
    if kind == "dataset":
        assert plan_dataset(source).paths == []
    else:
        with pytest.raises(UserError, match=r"model 'a/b' does not load from hub: .*its cache holds no main"):
            plan_model("a/b", None)


def test_content_is_compared_with_size_sha_and_git_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"hello\n")
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"  # sha256sum
    assert difference(path, HubFile("x.json", 6, sha)) is None
    assert difference(path, HubFile("x.json", 6, None, blob)) is None
    assert difference(path, HubFile("x.json")) is None
    assert difference(path, HubFile("x.json", 7)) == "expected 7 bytes, found 6"
    named = tmp_path / sha  # as the cache calls a large file's content, by its ETag
    named.write_bytes(b"hello!")
    assert "expected sha256 5891b5b522d5, found" in str(difference(named, HubFile("x")))
    path.write_bytes(PAGE)
    assert str(difference(path, HubFile("x.json", None, sha))).endswith(" (an HTML page)")
    assert "expected git hash ce0136250" in str(difference(path, HubFile("x.json", None, None, blob)))


def test_the_token_is_found_where_the_library_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert presence.token() is None
    (tmp_path / "token").write_text("hf_file\n")
    assert presence.token() == "hf_file"
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "other"))
    assert presence.token() is None
    (tmp_path / "other").write_text("hf_other")
    assert presence.token() == "hf_other"
    monkeypatch.setenv("HF_TOKEN", " hf_env ")
    assert presence.token() == "hf_env"
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert presence.token() is None


def test_the_hub_is_asked_once_for_what_is_used_with_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hafs_extract.cli import main

    hub = Hub()
    hub.fail("HEAD", 429, headers={"Retry-After": "3000"})
    hub.fail("api/models", 404)
    hub.fail("api/datasets", 404)
    with serving(hub):
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(presence, "_answers", {})
        stopped = []
        monkeypatch.setattr("hafs_extract.run.extract", lambda *args: stopped.append(args[0]) or sys.exit(3))
        for flags, path in (
            (["--model", "org/mine"], "/org/mine/resolve/main/config.json"),
            (["--model", "org/mine", "--revision", "v1"], "/org/mine/resolve/v1/config.json"),
            (["--model", str(tmp_path), "--text", "me/data"], "/datasets/me/data/resolve/main/README.md"),
            ([], "/EleutherAI/pythia-70m-deduped/resolve/main/config.json"),
        ):
            presence._answers.clear()
            hub.forget()
            with pytest.raises(SystemExit):
                main(["extract", "--out", str(tmp_path / "out"), *flags])
            assert [(asked.method, asked.path, asked.authorization) for asked in hub.log] == [
                ("HEAD", path, "Bearer hf_mine")
            ]
        assert all(config.profile == "pythia70m" for config in stopped) and len(stopped) == 4


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_wrong_bound_is_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HAFS_HUB_WAIT", value)
    with pytest.raises(UserError, match=r"HAFS_HUB_WAIT='.*': expected a number of seconds above 0"):
        client.connect()


def test_the_silence_that_is_waited_for_is_the_librarys_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAFS_HUB_WAIT", raising=False)
    monkeypatch.delenv("HF_HUB_DOWNLOAD_TIMEOUT", raising=False)
    pauses = sum(2**n for n in range(client.ATTEMPTS - 1))
    assert client.ATTEMPTS * client.silence() + pauses < 60
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "30")
    assert client.silence() == 30
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "soon")
    with pytest.raises(UserError, match="HF_HUB_DOWNLOAD_TIMEOUT='soon': expected a whole number"):
        client.silence()
