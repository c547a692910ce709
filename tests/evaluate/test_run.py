"""`hafs evaluate`: workspaces, stages that are not done twice, the command line's errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hafs_evaluate.stage
from hafs_evaluate.cli import main
from hafs_evaluate.config import EvalConfig, resolved
from hafs_evaluate.latents.dashboards import LatentsConfig
from hafs_evaluate.stage import Evaluation
from hafs_evaluate.stages import STAGES
from hafs_evaluate.workspace import Workspace, fingerprint, finished_runs, hashed_export, open_workspace
from hafs_extract.models import pick_device
from hafs_jax.base.checksums.checked import write_checksums
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, write_json
from hafs_jax.base.options import to_dict
from hafs_jax.runs import Run
from hafs_jax.store.holding import replacing
from hafs_jax.store.manifest import write_manifest
from tests.support.torch_saes import saved_sae
from tests.support.workspaces import CONFIG, HOOK, TASK, D, F, run

ROOT = Path(__file__).parents[2]


def results(workspace):
    return {str(path.relative_to(workspace.eval)): path.read_bytes() for path in workspace.eval.rglob("*.*")}


def written(workspace):
    return {
        str(path.relative_to(workspace.eval)): path.stat().st_mtime_ns
        for path in workspace.eval.rglob("*.*")
        if path.name != "seconds.json"
    }


def core(workspace, name):
    return json.loads(workspace.result(name, "core.json").read_text())


def forbid(monkeypatch, *names):
    def called(*args, **kwargs):
        raise AssertionError("this was done already")

    for name in names:
        monkeypatch.setattr(name, called)


WORK = (
    "hafs_evaluate.core.reconstruction.core_metrics",
    "hafs_evaluate.core.splice.splice_metrics",
    "hafs_evaluate.saebench.sae_probes.probe_sae",
    "hafs_evaluate.latents.dashboards.show_latents",
    "hafs_evaluate.latents.domains.detections",
    "hafs_evaluate.tokens.token_results.token_latents",
    "hafs_extract.models.load_for_manifest",
)


def test_all_stages_write_what_the_report_reads_and_are_not_done_twice(workspace, monkeypatch):
    run(workspace)
    for name in ("baseline-s0", "strict-s0"):
        values = core(workspace, name)
        assert values["run"] == name
        assert values["reconstruction"]["fvu"] > 0
        assert values["sparsity"]["n_latents"] == F
        assert values["model"]["contexts"] == 4
        assert values["config"]["suite"] == "sae_probes"
        probing = json.loads(workspace.result(name, "probing.json").read_text())
        assert [detail["dataset_name"] for detail in probing["eval_result_details"]] == [TASK]
        assert probing["eval_result_unstructured"]["sae_sha256"] == values["sae_sha256"]
        tokens = json.loads(workspace.result(name, "tokens.json").read_text())
        assert tokens["run"] == name and tokens["sae_sha256"] == values["sae_sha256"]
        assert tokens["properties"].keys() | tokens["left_out"].keys() > {"leading_space", "first_letter_t", "months"}
        latents = json.loads(workspace.result(name, "latents.json").read_text())
        assert latents["run"] == name
        others = {"baseline-s0", "strict-s0"} - {name}
        assert all(set(latent["matches"]) == others for latent in latents["latents"])
        with np.load(workspace.result(name, "core_latents.npz")) as latents:
            assert latents["density"].shape == (F,)
    assert core(workspace, "baseline-s0")["sae_sha256"] != core(workspace, "strict-s0")["sae_sha256"]
    llm = json.loads(workspace.llm_probing.read_text())
    assert llm["tasks"][TASK].keys() == {"full", "top_1", "top_2", "pca_1", "pca_2"}
    seconds = json.loads(workspace.seconds.read_text())
    assert {"splice", "core/strict-s0", "probing", "probing/llm", "latents/baseline-s0"} <= seconds.keys()

    before = written(workspace)
    forbid(monkeypatch, *WORK)
    run(workspace)
    assert written(workspace) == before


def test_one_evaluation_of_a_run_at_a_time_on_a_run_and_a_store_that_stay(workspace):
    """Another run is evaluated meanwhile; what all runs share is made once."""
    skip = ("probing", "hierarchy", "tokens", "latents", "domains")
    with workspace.locked("strict-s0", "an evaluation"):
        with pytest.raises(UserError, match="eval/strict-s0: an evaluation is at work on it"):
            run(workspace, skip=skip)
        run(workspace, skip=skip, names=["baseline-s0"])
    with Run(workspace.runs / "strict-s0").locked(), pytest.raises(UserError, match="a training is at work on it"):
        run(workspace, skip=skip)
    refused = pytest.raises(UserError, match="an extraction is at work on it")
    with replacing([workspace.folder / "store"], "an extraction"), refused:
        run(workspace, skip=skip)
    run(workspace, skip=skip)


def test_a_run_and_a_store_are_held_until_the_end_of_an_evaluation(workspace, monkeypatch):
    found = []

    def core(job):
        for refused in (
            Run(workspace.runs / job.run.name).locked(),
            replacing([workspace.folder / "store"], "an import"),
        ):
            with pytest.raises(UserError, match="an evaluation is at work on it"):
                refused.__enter__()
            found.append(job.run.name)
        return {"reconstruction": {"fvu": 0.5}, "sparsity": {"l0": 1.0}}

    monkeypatch.setitem(STAGES, "core", dataclasses.replace(STAGES["core"], compute=core, line=None))
    run(workspace, skip=[name for name in STAGES if name != "core"])
    assert sorted(found) == ["baseline-s0"] * 2 + ["strict-s0"] * 2


def test_what_is_done_is_marked_as_the_versions_before_marked_it(workspace):
    """So that an evaluation of theirs is gone on with: these are the values that version 0.1 hashed."""
    run(workspace, skip=("probing", "hierarchy"), names=["strict-s0"])
    files = ("core.json", "latents.json")
    done = {
        stage: mark
        for name in files
        for stage, mark in read_json(workspace.result("strict-s0", name), "a result")["marks"].items()
    }
    sae = hashed_export("strict-s0", workspace.runs / "strict-s0" / "sae")
    heldout, train = workspace.heldout.manifest.fingerprint, workspace.train.manifest.fingerprint
    hashed = [1, sae.weights_sha256, sae.cfg_sha256]
    assert done["core"] == fingerprint([*hashed, heldout, None])
    assert done["splice"] == fingerprint([*hashed, heldout, 4, 0])
    assert done["latents"] == fingerprint([*hashed, train, to_dict(LatentsConfig())])
    config = resolved(CONFIG, {"resolved": "offline"})
    settings = ["sae_probes", [TASK], [1, 2], "l2", 42]
    settings += [to_dict(workspace.heldout.manifest.model), to_dict(workspace.heldout.manifest.tokenizer), HOOK]
    assert STAGES["probing"].inputs(Evaluation(workspace, config)) == [settings]
    assert STAGES["probing"].language_model.inputs(Evaluation(workspace, config)) == [1, "pca", settings]


def test_another_sae_is_measured_anew_and_the_rest_is_kept(workspace):
    run(workspace, skip=("probing", "latents"))
    before = {name: core(workspace, name) for name in ("baseline-s0", "strict-s0")}
    saved_sae(workspace.runs / "strict-s0" / "sae", D, F, seed=7, hook=HOOK)
    stamp = workspace.result("baseline-s0", "core.json").stat().st_mtime_ns
    run(workspace, skip=("probing", "latents"))
    assert workspace.result("baseline-s0", "core.json").stat().st_mtime_ns == stamp
    after = core(workspace, "strict-s0")
    assert after["reconstruction"]["fvu"] != before["strict-s0"]["reconstruction"]["fvu"]
    assert after["model"]["kl_spliced"] != before["strict-s0"]["model"]["kl_spliced"]
    assert after["model"]["ce_clean"] == pytest.approx(before["strict-s0"]["model"]["ce_clean"])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"contexts": 2}, ("model", "contexts")),
        ({"seed": 3}, ("model", "ce_clean")),
        ({"heldout_rows": 30}, ("rows",)),
    ],
)
def test_a_changed_setting_redoes_its_stage(workspace, changes, part):
    def figure():
        value = core(workspace, "baseline-s0")
        for key in part:
            value = value[key]
        return value

    skip, base = ("probing", "latents"), dataclasses.replace(CONFIG, contexts=3)
    run(workspace, base, skip)
    first = figure()
    run(workspace, dataclasses.replace(base, **changes), skip)
    assert figure() != first
    assert core(workspace, "baseline-s0")["model"]


@pytest.mark.parametrize("changes", [{"ks": (2,)}, {"penalty": "l1"}, {"probe_seed": 1}])
def test_a_changed_probing_setting_redoes_probing(workspace, changes):
    def settings():
        return json.loads(workspace.result("baseline-s0", "probing.json").read_text())["eval_config"]

    run(workspace, CONFIG, ("splice", "latents"), names=["baseline-s0"])
    first = settings()
    run(workspace, dataclasses.replace(CONFIG, **changes), ("splice", "latents"), names=["baseline-s0"])
    assert settings() != first
    assert not workspace.result("strict-s0", "probing.json").exists()


def test_a_stage_that_failed_is_done_the_next_time(workspace, monkeypatch):
    with monkeypatch.context() as broken:
        forbid(broken, "hafs_evaluate.core.splice.splice_metrics")
        with pytest.raises(AssertionError):
            run(workspace, skip=("probing", "latents"))
    assert core(workspace, "baseline-s0")["model"] == {}
    run(workspace, skip=("probing", "latents"))
    assert core(workspace, "baseline-s0")["model"]["contexts"] == 4


def test_latents_do_not_depend_on_what_another_stage_has_loaded(workspace):
    """Splicing needs the language model in float32; the promoted tokens are those of the model as it was extracted."""
    for store in (workspace.train, workspace.heldout):
        model = dataclasses.replace(store.manifest.model, dtype="bfloat16")
        write_manifest(store.folder, dataclasses.replace(store.manifest, model=model))
    workspace, skip = Workspace(workspace.folder), ["probing", "hierarchy", "domains", "across"]
    path = workspace.result("baseline-s0", "latents.json")
    run(workspace, skip=[*skip, "splice"], names=["baseline-s0"])
    alone = path.read_bytes()
    path.unlink()
    run(workspace, skip=skip, names=["baseline-s0"])
    assert path.read_bytes() == alone


def test_skipped_stages_leave_no_file(workspace):
    run(workspace, skip=("splice", "probing", "hierarchy", "tokens", "latents"), names=["strict-s0"])
    assert {path.name for path in workspace.eval.rglob("*.*")} == {
        "core.json",
        "core_latents.npz",
        "done.json",
        "seconds.json",
    }
    assert not workspace.result("baseline-s0", "core.json").exists()


def test_a_run_of_another_hook_point_is_refused(workspace):
    saved_sae(workspace.runs / "strict-s0" / "sae", D, F, hook="blocks.0.hook_resid_post")
    with pytest.raises(UserError, match=r"run strict-s0 was trained at blocks.0.hook_resid_post, the held-out store"):
        run(workspace, skip=("splice", "probing", "hierarchy", "latents"))


def test_the_hub_is_left_alone_where_nothing_needs_it(workspace, monkeypatch):
    def asked():
        raise AssertionError("the hub was asked")

    offline = []
    monkeypatch.setattr(hafs_evaluate.stage, "hub_problem", asked)
    monkeypatch.setattr(hafs_evaluate.stage, "go_offline", lambda: offline.append(True))
    run(workspace, skip=("splice", "probing", "hierarchy", "latents"))
    assert offline
    monkeypatch.setattr(hafs_evaluate.stage, "hub_problem", lambda _: None)
    offline.clear()
    run(workspace, dataclasses.replace(CONFIG, suite="standard"), skip=("splice", "probing", "hierarchy", "latents"))
    assert offline  # standard needs it, but probing is skipped
    monkeypatch.setattr(hafs_evaluate.stage, "hub_problem", lambda _: "no route")
    with pytest.raises(UserError, match="SAE-Bench has none of that name"):
        run(workspace, dataclasses.replace(CONFIG, suite="standard", tasks=("local/x",)), skip=("splice", "latents"))


def test_the_standard_suite_says_what_space_it_needs(workspace, monkeypatch):
    monkeypatch.setattr(hafs_evaluate.stage, "hub_problem", lambda _: None)
    monkeypatch.setattr(hafs_evaluate.stage, "go_offline", lambda: None)
    monkeypatch.setattr("hafs_evaluate.saebench.standard.StandardProbing.downloads", lambda self: None)
    monkeypatch.setattr("hafs_evaluate.saebench.standard.StandardProbing.bytes_needed", lambda self: 10**18)
    with pytest.raises(UserError, match=r"needs 1000000000\.0 GB, found .* GB free; .* or take another --suite"):
        run(workspace, dataclasses.replace(CONFIG, suite="standard", tasks=()), skip=("splice", "latents"))


def test_auto_is_what_extraction_wrote_and_nothing_is_guessed(workspace, tmp_path):
    with pytest.raises(UserError, match=r"profile auto: expected .*auto.json, found none; run `hafs extract`, or name"):
        open_workspace(tmp_path, "auto")
    (tmp_path / "auto.json").write_text('{"profile": "offline", "reason": "a test"}')
    assert open_workspace(tmp_path, "auto").folder == workspace.folder
    with pytest.raises(UserError, match=r"profile 'ofline': expected a folder .*; did you mean 'offline'\?"):
        open_workspace(tmp_path, "ofline")


def test_runs_are_found_by_name(workspace):
    assert [each.name for each in finished_runs(workspace)] == ["baseline-s0", "strict-s0"]
    assert [each.name for each in finished_runs(workspace, ["strict-s0", "strict-s0"])] == ["strict-s0"]
    with pytest.raises(UserError, match=r"no run 'strict-s1' in .*; did you mean 'strict-s0'\?"):
        finished_runs(workspace, ["strict-s1"])
    with pytest.raises(
        UserError, match=r"run adaptive-s0: expected .*run.json, found none; finish it with `make train`"
    ):
        finished_runs(workspace, ["adaptive-s0"])
    for path in workspace.runs.glob("*/run.json"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"expected a finished run in .* \(adaptive-s0, baseline-s0, strict-s0 not finish"
    ):
        finished_runs(workspace)


def test_an_export_that_lacks_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run x: expected an exported SAE's .*sae_weights.safetensors, found none"):
        hashed_export("x", tmp_path)


def test_names_for_saebench_change_with_weights_and_config(tmp_path):
    folder = saved_sae(tmp_path / "sae", 5, 7)
    first = hashed_export("run", folder)
    saved_sae(folder, 5, 7, seed=1)
    second = hashed_export("run", folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, "apply_b_dec_to_input": False}))
    third = hashed_export("run", folder)
    assert len({first.unique_name, second.unique_name, third.unique_name}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--out", "nowhere"], "error: profile auto: expected nowhere/auto.json, found none"),
        (["evaluate", "--contxts", "3"], "did you mean '--contexts'"),
        (["evaluate", "--contexts", "0"], "error: --contexts 0: expected at least 1"),
        (["evaluate", "--skip", "core"], "invalid choice: 'core'"),
        (["export", "no/where"], "error: expected a run's folder at no/where, found none"),
        ([], "error: expected one of the commands evaluate, synth-score,"),
        (["evalute"], "did you mean 'evaluate'?"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert len(captured.strip().splitlines()) == 1


def test_the_command_line_runs(workspace, tmp_path, capsys):
    place = ["--out", str(tmp_path), "--profile", "offline"]
    skip = ["--skip", "splice", "probing", "latents"]
    assert main(["evaluate", *place, "--runs", "strict-s0", *skip, "--heldout-rows", "50"]) == 0
    assert capsys.readouterr().out.strip() == str(workspace.eval)
    assert core(workspace, "strict-s0")["rows"] == 50
    assert main(["export", str(workspace.runs / "strict-s0")]) == 0
    assert capsys.readouterr().out.strip().endswith("strict-s0/sae")


def test_the_first_line_names_the_device_that_auto_is(workspace, monkeypatch, capsys):
    monkeypatch.setattr("hafs_evaluate.stages.evaluate", lambda *_: None)
    place = ["--out", str(workspace.folder.parent), "--profile", workspace.profile]
    assert main(["evaluate", *place]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"profile {workspace.profile}: ") and first.endswith(f", device {pick_device('auto')}")
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *place, "--device", "none"])
    assert capsys.readouterr().err.splitlines()[0].startswith("error: device 'none' cannot be used")


def test_help_is_complete_and_our_package_is_the_one_that_runs():
    environment = dict(os.environ)
    shown = subprocess.run(
        [sys.executable, "-m", "hafs_jax", "evaluate", "--help"],
        cwd=ROOT.parent, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for field in dataclasses.fields(EvalConfig):
        assert "--" + field.name.replace("_", "-") in shown
    for name in ("--out", "--profile", "--runs", "--skip", "62_wikidata_occupation_ispolitician", "fancyzhx/ag_news"):
        assert name in shown


def test_a_result_carries_its_own_mark(workspace, monkeypatch):
    """A result of other settings is measured again, whatever done.json says; one of an earlier version is kept."""
    skip = [name for name in STAGES if name != "core"]
    run(workspace, skip=skip)
    path = workspace.result("strict-s0", "core.json")
    whole, values = path.read_bytes(), read_json(path, "core metrics")
    run(workspace, dataclasses.replace(CONFIG, heldout_rows=50), skip=skip)  # by another process, meanwhile
    other = path.read_bytes()
    assert other != whole
    write_json(path.with_name("done.json"), values["marks"])
    run(workspace, skip=skip)
    assert path.read_bytes() == whole
    old = {key: value for key, value in values.items() if key not in ("marks", "files_sha256")}
    write_json(path, old)  # as an earlier version left it
    forbid(monkeypatch, WORK[0])
    run(workspace, skip=skip)
    assert read_json(path, "core metrics") == old


@pytest.mark.parametrize("name", ["core.json", "core_latents.npz"])
def test_a_damaged_result_is_measured_again(workspace, name, caplog):
    skip = [stage for stage in STAGES if stage != "core"]
    run(workspace, skip=skip)
    path = workspace.result("strict-s0", name)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    run(workspace, skip=skip)
    assert path.read_bytes() == whole
    assert f"{name}" in caplog.text and "core is measured again" in caplog.text


def test_what_compares_all_runs_is_left_where_nothing_changed(workspace, monkeypatch):
    skip = [name for name in STAGES if name not in ("core", "across")]
    run(workspace, skip=skip)
    forbid(monkeypatch, WORK[0])
    monkeypatch.setitem(STAGES, "across", dataclasses.replace(STAGES["across"], compute_all=lambda _: 1 / 0))
    run(workspace, skip=skip)
    path = workspace.result("strict-s0", "core_latents.npz")
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises((ZeroDivisionError, AssertionError)):
        run(workspace, skip=skip)


def test_with_nothing_to_do_neither_torch_nor_jax_is_imported(workspace):
    """They take seconds. The settings of `hierarchy` and `tokens` still need torch."""
    for folder in workspace.runs.glob("*-s0/sae"):
        own = Run(folder.parent)
        write_checksums(folder, [path.name for path in folder.iterdir()], {"of": own.state()})
    skip = [name for name in STAGES if name not in ("core", "across", "domains")]
    script = (
        "import sys; from hafs_evaluate.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or sorted({'torch', 'jax', 'scipy', 'pandas'} & set(sys.modules)) or None)"
    )
    command = [sys.executable, "-c", script, "evaluate", "--out", str(workspace.folder.parent)]
    command += ["--profile", "offline", "--device", "cpu", "--skip", *(name for name in skip if not STAGES[name].modes)]
    for first in (True, False):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
        assert first or done.returncode == 0, done.stderr
