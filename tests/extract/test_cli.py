"""The command line: which profile, in how long, and what it says of a user's mistake."""

import contextlib
import errno
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hafs_extract
from hafs_extract.cli import main
from hafs_extract.hub import presence as hub
from hafs_extract.hub.presence import hub_needs, missing_from_cache, prepare_hub
from hafs_extract.models import pick_device
from hafs_extract.profiles import DATASETS, OFFLINE, PROFILES, PYTHIA70M, Resolved, resolve
from hafs_jax.base.files import read_json
from hafs_jax.store.manifest import read_manifest
from tests.support.tiny_models import save_jsonl, save_model, save_wikitext, sentence

ROOT = Path(hafs_extract.__file__).parents[1]


@pytest.fixture
def no_hub_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache and no setting that spares the question; undone afterwards. Returns the cache."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "")  # so that the test's end restores it
        monkeypatch.delenv(name)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(hub, "_answers", {})
    return tmp_path / "hf"


@contextlib.contextmanager
def _endpoint(status: int) -> Iterator[str]:
    """A server that answers every HEAD with `status`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_) -> None:
            """Says nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _fill_cache(cache: Path) -> None:
    """What a run of `pythia70m` leaves in the hub libraries' caches."""
    snapshot = cache / "hub" / "models--EleutherAI--pythia-70m-deduped" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_text("")
    for name in ("Salesforce___wikitext/wikitext-103-raw-v1", "cais___wmdp/wmdp-bio"):
        folder = cache / "datasets" / name / "0.0.0" / "abc"
        folder.mkdir(parents=True)
        (folder / "part.arrow").write_text("")


def test_auto_is_offline_within_five_seconds_when_names_hang(
    no_hub_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def hang(*_, **__):
        release.wait(60)
        raise socket.gaierror("never")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    started = time.monotonic()
    resolved = resolve("auto")
    assert time.monotonic() - started < 5
    assert resolved.resolved == "offline" and "did not answer within 3.5 s" in resolved.reason
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    release.set()


def test_auto_is_pythia_where_the_hub_answers(no_hub_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _endpoint(200) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert resolve("auto") == Resolved("auto", "pythia70m", "the hub answers", "standard")
        prepare_hub(PYTHIA70M)  # nothing in the cache, and nothing to complain of
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_hub_that_refuses_is_there(no_hub_settings: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    with _endpoint(status) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert resolve("auto").resolved == "pythia70m"


def test_auto_is_pythia_where_the_cache_serves(no_hub_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert len(missing_from_cache(PYTHIA70M)) == 3
    _fill_cache(no_hub_settings)
    assert missing_from_cache(PYTHIA70M) == []
    resolved = resolve("auto")
    assert resolved.resolved == "pythia70m" and "the hub's cache holds its model and text" in resolved.reason
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    prepare_hub(PYTHIA70M)
    (no_hub_settings / "hub/models--EleutherAI--pythia-70m-deduped/snapshots/abc/model.safetensors").unlink()
    assert resolve("auto").resolved == "offline"


def test_the_offline_variable_spares_the_question(no_hub_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub._OPENER, "open", lambda *_: pytest.fail("asked"))
    assert hub.hub_problem() == "HF_HUB_OFFLINE is set"


def test_nothing_is_asked_where_all_is_local(no_hub_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub._OPENER, "open", lambda *_: pytest.fail("asked"))
    assert hub_needs(OFFLINE) == (None, [])
    prepare_hub(OFFLINE)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_hub_libraries_see_the_choice_though_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    hub.go_offline()
    assert huggingface_hub.constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "m")


def test_auto_is_recorded_and_a_second_run_has_nothing_to_do(
    no_hub_settings: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = save_jsonl(tmp_path / "a.jsonl", [{"text": sentence(n, 9)} for n in range(60)])
    flags = ["extract", "--model", str(model), "--text", str(text), "--hook-point", "blocks.1.hook_resid_pre"]
    flags += ["--heldout-fraction", "0.3", "--dtype", "bfloat16", "--context-length", "64"]
    flags += ["--out", str(tmp_path / "out")]
    assert main(flags) == 0
    said = capsys.readouterr()
    reason = "HF_HUB_OFFLINE is set, and the hub's cache does not serve"
    assert said.err.startswith(f"profile offline ({reason}): store {tmp_path}")
    assert said.err.splitlines()[0].endswith(f", device {pick_device('auto')}")
    assert read_json(tmp_path / "out" / "auto.json", "auto") == {"profile": "offline", "reason": reason}
    store = tmp_path / "out" / "offline" / "store"
    expected = {"requested": "auto", "resolved": "offline", "reason": reason, "suite": "sae_probes"}
    manifest = read_manifest(store / "train")
    assert manifest.profile == expected and manifest.hook_point == "blocks.1.hook_resid_pre"
    assert f"train: {manifest.rows:,} rows of 20 bfloat16" in said.out and "tokens/s" in said.out

    left = store / ".work" / "train-parts"  # by a kill in the last moment
    left.mkdir(parents=True)
    assert main(flags) == 0
    assert "the stores are there already" in capsys.readouterr().err and not left.parent.exists()
    monkeypatch.setattr("hafs_extract.run.extract", lambda *_: pytest.fail("extracted again"))
    assert main(flags) == 0
    assert "the stores are there already" in capsys.readouterr().err

    assert main(["verify", str(store / "train")]) == 0
    assert f"{manifest.rows:,} rows of 20 bfloat16 in 1 shards, train split" in capsys.readouterr().out
    shard = store / "train" / "shard-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert main(["verify", str(store / "train")]) == 1
    said = capsys.readouterr()
    assert "shard-00000.npy: sha256 is" in said.err and not said.out
    (tmp_path / "out" / "auto.json").unlink()
    assert main([*flags, "--profile", "offline"]) == 0
    noted = read_json(tmp_path / "out" / "auto.json", "auto")
    assert noted == {"profile": "offline", "reason": "named on the command line"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "ofline"], "profile 'ofline': expected auto, offline, wide, pythia70m; did you mean 'offline'?"),
        (["--hookpoint", "x"], "unknown argument '--hookpoint'; did you mean '--hook-point'?"),
        (["--profile", "offline", "--seed", "-1"], "--seed -1: expected 0 to"),
        (["--profile", "offline", "--text", "/no/such.jsonl"], "/no/such.jsonl: no such file or folder"),
        (["--profile", "offline", "--model", "./nowhere"], "./nowhere: no such file or folder"),
        (["--profile", "offline", "--model", "no/such"], "needs model no/such from the hub, but HF_HUB_OFFLINE is set"),
        (["--profile", "offline", "--text", "no/such"], "needs dataset no/such from the hub"),
        (["--profile", "pythia70m"], "use --profile offline, or name local ones with --model and --text"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    no_hub_settings: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], message: str, capsys
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["extract", *flags])
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("profile ")]
    assert stopped.value.code == 2 and len(said) == 1
    assert said[0].startswith("error: ") and message in said[0]


def test_a_store_to_verify_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["verify"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: hafs verify [options] STORE")


def test_an_unknown_hook_point_is_named(
    no_hub_settings: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    flags = ["extract", "--profile", "pythia70m", "--model", str(model), "--hook-point", "blocks.7.hook_resid_post"]
    flags += ["--text", f"wikitext={save_wikitext(tmp_path / 'w', 5)}", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert "5 layers and no such hook point; the last is blocks.4.hook_resid_post" in capsys.readouterr().err


def test_what_the_disk_refuses_is_one_line(
    no_hub_settings: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    text = save_jsonl(tmp_path / "a.jsonl", [{"text": sentence(n, 9)} for n in range(60)])
    flags = ["extract", "--profile", "offline", "--model", str(model), "--text", str(text)]
    flags += ["--hook-point", "blocks.1.hook_resid_pre"]
    flags += ["--heldout-fraction", "0.3", "--out", str(tmp_path / "out")]

    def said(*more: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*flags, *more])
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert said() == f"error: context_length=128: {model} has 64 positions"

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hafs_extract.parts.making.write_part", full)
        assert "out: No space left on device; put that right and repeat" in said("--context-length", "64")
    assert main([*flags, "--context-length", "64"]) == 0
    (tmp_path / "file").write_text("")
    assert "file/offline/store: Not a directory" in said("--context-length", "64", "--out", str(tmp_path / "file"))


def test_help_is_complete_and_needs_no_torch() -> None:
    script = """
import sys
from hafs_extract.cli import main
try:
    main(['extract', '--help'])
finally:
    print('torch' in sys.modules)
"""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True, timeout=600
    )
    fields = [name.replace("_", "-") for name in json.loads(json.dumps(OFFLINE.__dict__, default=str))]
    for flag in {*fields, "out", "text", "force", "engine", "workers"} - {"sources"}:
        assert f"--{flag} " in done.stdout, flag
    assert "pythia70m  EleutherAI/pythia-70m-deduped" in done.stdout and "[NAME=]PATH[@WEIGHT]" in done.stdout
    for name in (*PROFILES, *DATASETS):
        assert f"\n  {name} " in done.stdout
    assert done.stdout.endswith("False\n")
