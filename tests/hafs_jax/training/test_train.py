"""The training loop as a user meets it: resume after a kill, signals, bad data, error lines, a planted dictionary."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hafs_jax.api import load
from hafs_jax.base.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.presets import preset
from hafs_jax.runs import Run
from hafs_jax.training.checkpoint import load_checkpoint
from hafs_jax.training.loop import TrainingStopped
from hafs_jax.training.train import train
from tests.support.stores import planted, resealed, write_store

ROOT = Path(__file__).parents[3]
D, ROWS = 16, 4000
FLAGS = {
    "--tokens": "48000",
    "--batch-size": "80",
    "--sae.k": "3",
    "--sae.n-latents": "24",
    "--checkpoint-every-steps": "40",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `artifacts` folder with a store of planted features."""
    out = tmp_path_factory.mktemp("artifacts")
    write_store(out / "tiny" / "store" / "train", planted(ROWS, D, 20, 3)[0], "float16", shard_rows=700)
    return out


def arguments(out: Path, *extra: str) -> list[str]:
    flags = [text for pair in FLAGS.items() for text in pair]
    return ["train", "--out", str(out), "--profile", "tiny", *flags, *extra]


def command(out: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "hafs_jax", *arguments(out, *extra)]


def spawn(out: Path, *extra: str) -> subprocess.Popen:
    environment = dict(os.environ)
    return subprocess.Popen(
        command(out, *extra), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=1200)
    return process.returncode, stdout, stderr


def weights(run: Run) -> str:
    """A hash of every leaf of the final checkpoint."""
    state, scale = load_checkpoint(run.checkpoints, run.config(), D)
    leaves = jax.tree.leaves((state.replace(key=jax.random.key_data(state.key)), scale))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def losses(run: Run) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in run.metrics()]


def small(variant: str = "baseline", architecture: str = "batchtopk", **changes: Any) -> TrainConfig:
    config = preset(variant, architecture)
    sae = dataclasses.replace(config.sae, n_latents=24, k=3)
    return dataclasses.replace(config, tokens=16_000, batch_size=80, sae=sae, **changes)


def wait_for_step(run: Run, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline:
        records = run.metrics_path.read_text().splitlines() if run.metrics_path.exists() else []
        if len(records) > 1 and json.loads(records[-2])["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("the run did not get going")


@pytest.mark.slow
def test_a_run_killed_anywhere_resumes_to_the_same_bits(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """SIGTERM, then SIGKILL past a checkpoint, then to the end: the same weights, counters, key and losses."""
    from hafs_jax.cli import main

    other = tmp_path / "artifacts"
    (other / "tiny").mkdir(parents=True)
    (other / "tiny" / "store").symlink_to(out / "tiny" / "store")
    extra = ("--variant", "adaptive", "--penalty.tau", "0.3", "--log-every-steps", "4")
    assert main(arguments(out, *extra)) == 0
    whole = Run(out / "tiny" / "runs" / "adaptive-s0")

    run = Run(other / "tiny" / "runs" / "adaptive-s0")
    process = spawn(other, *extra, "--force")
    wait_for_step(run, 90, process)
    process.send_signal(signal.SIGTERM)
    code, _, stderr = finish(process)
    assert code == 128 + signal.SIGTERM
    assert "stopped and checkpointed; run the same command without --force to go on" in stderr
    process = spawn(other, *extra)
    wait_for_step(run, 200, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not run.finished()
    assert main(arguments(other, *extra)) == 0

    assert weights(run) == weights(whole)
    assert losses(run) == losses(whole)
    assert run.result()["final"]["fvu_ema"] == whole.result()["final"]["fvu_ema"]
    capsys.readouterr()
    assert main(arguments(other, *extra)) == 0 and "already trained" in capsys.readouterr().out


def test_logging_does_not_change_training(out: Path, tmp_path: Path) -> None:
    store = out / "tiny" / "store" / "train"
    quiet = train(small(log_every_steps=10**6, coherence_every_steps=10**6), store, tmp_path / "quiet")
    loud = train(small(log_every_steps=1, coherence_every_steps=1), store, tmp_path / "loud")
    assert weights(quiet) == weights(loud)
    assert len(quiet.metrics()) == 1 and len(loud.metrics()) == 200


def test_training_in_another_thread_is_the_same(out: Path, tmp_path: Path) -> None:
    """A server or a notebook trains beside other work: only the main thread may handle signals."""
    store = out / "tiny" / "store" / "train"
    runs = [train(dataclasses.replace(small(), tokens=1600), store, tmp_path / "main")]
    with ThreadPoolExecutor(1) as pool:
        runs.append(pool.submit(train, dataclasses.replace(small(), tokens=1600), store, tmp_path / "other").result())
    assert weights(runs[0]) == weights(runs[1])


def test_metrics_hold_what_the_report_reads(out: Path, tmp_path: Path) -> None:
    run = train(small("strict"), out / "tiny" / "store" / "train", tmp_path)
    last = run.metrics()[-1]
    names = (
        "step tokens seconds tokens_per_second loss loss_reconstruction loss_sparsity loss_aux loss_orthogonality fvu "
        "fvu_ema l0 dead_fraction alpha lambda penalty coherence_mean coherence_max learning_rate "
        "sparsity_coefficient gradient_norm bad_batches"
    )
    assert set(names.split()) <= set(last)
    assert last["loss"] == pytest.approx(
        last["loss_reconstruction"] + last["loss_sparsity"] + last["loss_aux"] + last["loss_orthogonality"], rel=1e-5
    )
    assert last["tokens"] == 16_000 and last["lambda"] == 3.0 and last["l0"] == pytest.approx(3, abs=0.05)
    result = run.result()
    assert result["tau"] is None and result["tau_reached"] is None and result["final"] == last


def test_tau_comes_from_the_baseline_of_the_same_setting(out: Path, tmp_path: Path) -> None:
    store = out / "tiny" / "store" / "train"
    with pytest.raises(UserError, match=r"adaptive needs tau.*train --variant baseline.*found no finished run at"):
        train(small("adaptive"), store, tmp_path)
    baseline = train(small(), store, tmp_path)
    run = train(small("adaptive"), store, tmp_path)
    assert run.config().penalty.tau == pytest.approx(1.25 * baseline.result()["final"]["fvu_ema"])
    assert run.result()["tau_reached"] in (True, False)
    tagged = train(dataclasses.replace(small(), tag="k=3"), store, tmp_path)
    other = train(dataclasses.replace(small("adaptive"), tag="yielding=rarer,k=3"), store, tmp_path)
    assert other.config().penalty.tau == pytest.approx(1.25 * tagged.result()["final"]["fvu_ema"])
    narrow = small("adaptive")
    narrow = dataclasses.replace(narrow, sae=dataclasses.replace(narrow.sae, k=2))
    with pytest.raises(UserError, match=r"baseline-s0 has sae\.k=3, this run 2"):
        train(narrow, store, tmp_path)
    given = dataclasses.replace(small("gate_only"), penalty=dataclasses.replace(small("gate_only").penalty, tau=0.5))
    assert train(given, store, tmp_path / "given").config().penalty.tau == 0.5


def test_a_planted_dictionary_is_recovered(tmp_path: Path) -> None:
    """Mean over planted directions of the best cosine with a dictionary vector; random vectors reach 0.55."""
    acts, directions = planted(20_000, 24, 32, 3, seed=1)
    store = write_store(tmp_path / "store", acts, shard_rows=8192)
    config = preset("baseline")
    config = dataclasses.replace(
        config,
        tokens=400_000,
        batch_size=250,
        sae=dataclasses.replace(config.sae, n_latents=48, k=3),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3),
    )
    run = train(config, store, tmp_path / "runs")
    state, _ = load_checkpoint(run.checkpoints, run.config(), 24)
    best = (directions @ np.asarray(state.params["W_dec"]).T).max(1)
    assert best.mean() > 0.95, best
    assert run.result()["final"]["fvu_ema"] < 0.1


def test_a_run_on_bad_data_stops_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    acts = planted(4000, D, 20, 3)[0]
    folder = write_store(tmp_path / "store", acts, shard_rows=1000)
    shard = np.load(folder / "shard-00002.npy")
    shard[:] = np.nan
    np.save(folder / "shard-00002.npy", shard)
    resealed(folder)
    config = small(checkpoint_every_steps=1, steps_per_dispatch=1)
    with pytest.raises(
        TrainingStopped, match=r"2 of the first (\d+) batches gave.* from step \1: more.*checkpoint is in"
    ):
        train(config, folder, tmp_path / "runs")
    run = Run(tmp_path / "runs" / "baseline-s0")
    assert not run.finished()
    state, _ = load_checkpoint(run.checkpoints, run.config(), D)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)) and int(state.step) > 0


def test_another_config_in_the_same_folder_is_refused_and_force_replaces_it(out: Path, tmp_path: Path) -> None:
    store = out / "tiny" / "store" / "train"
    train(small(), str(store), str(tmp_path))
    faster = dataclasses.replace(small(), optimizer=dataclasses.replace(small().optimizer, learning_rate=0.5))
    with pytest.raises(
        UserError, match=r"holds a run with optimizer\.learning_rate=0\.003, this one has 0\.5; pass tag='NAME'"
    ):
        train(faster, store, tmp_path)
    assert train(faster, store, tmp_path, force=True).config().optimizer.learning_rate == 0.5
    elsewhere = write_store(tmp_path / "other", planted(400, D, 20, 3, seed=9)[0])
    with pytest.raises(UserError, match="was trained on another store"):
        train(faster, elsewhere, tmp_path)


def test_a_damaged_checkpoint_is_one_clear_error(out: Path, tmp_path: Path) -> None:
    """In a process of its own: Orbax's reads that a failed restore leaves behind would report into later tests."""
    run = train(small(), out / "tiny" / "store" / "train", tmp_path)
    script = (
        "import dataclasses, sys; from pathlib import Path\n"
        "from hafs_jax.training.checkpoint import load_checkpoint; from hafs_jax.runs import Run\n"
        "run = Run(Path(sys.argv[1])); config = run.config()\n"
        "wider = dataclasses.replace(config, sae=dataclasses.replace(config.sae, n_latents=25))\n"
        "load_checkpoint(run.checkpoints, wider, int(sys.argv[2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.folder), str(D)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 1 and "UserError: checkpoint 200 in" in done.stderr
    assert "does not fit this config or is damaged" in done.stderr
    with pytest.raises(UserError, match="found none; train the run first"):
        load_checkpoint(tmp_path / "nothing", run.config(), D)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--variant", "adaptiv"], "expected one of baseline, strict"),
        (["train", "--arch", "topkk"], "architecture 'topkk': expected one of"),
        (["train", "--penalty.lam-mx", "1"], "did you mean '--penalty.lam-max'?"),
        (["train", "--profile", "nope"], "profile 'nope': expected a folder"),
        (["train"], "auto.json, found none; run `hafs extract`, or name the --profile"),
        (["train", "--sae.k", "0"], "--sae.k 0: expected at least 1"),
        (["train", "--tokens", "many"], "invalid int value: 'many'"),
        (["tau", "--baseline", "no/where"], "expected a run's folder at no/where, found none"),
        (["inspect", "nowhere"], "no run's folder at nowhere, nor a run of that name: profile auto: expected"),
        (["fly"], "unknown command 'fly'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hafs_jax.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    stderr = capsys.readouterr().err
    # Other threads of this process (Orbax's, after a restore that failed) may write to stderr too: count our own lines.
    ours = [line for line in stderr.splitlines() if line.startswith(("error:", "usage:"))]
    assert stop.value.code == 2 and len(ours) == 1 and message in ours[0], stderr


def test_help_names_every_field_and_inspect_and_tau_read_a_run(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from hafs_jax.cli import main

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for flag in (
        "--sae.k",
        "--penalty.tau",
        "--sparsity.coefficient",
        "--optimizer.learning-rate",
        "--tokens",
        "--variant",
    ):
        assert flag in shown
    run = train(small(), out / "tiny" / "store" / "train", tmp_path)
    capsys.readouterr()
    main(["inspect", str(run.folder)])
    assert "batchtopk, F=24, k=3; finished" in capsys.readouterr().out
    main(["tau", "--baseline", str(run.folder), "--factor", "2"])
    assert float(capsys.readouterr().out) == pytest.approx(2 * run.result()["final"]["fvu_ema"], rel=1e-5)


def with_heldout(tmp_path: Path) -> Path:
    """A store with a held-out sibling."""
    acts = planted(4000, D, 20, 3)[0]
    write_store(tmp_path / "store" / "heldout", acts[3500:], "float16", shard_rows=200)
    return write_store(tmp_path / "store" / "train", acts[:3500], "float16", shard_rows=700)


def test_a_best_checkpoint_of_a_later_step_than_the_last_one_does_not_stop_a_resume(tmp_path: Path) -> None:
    """A kill between the two leaves it; Orbax would keep it and remove the one that is saved."""
    config = small(evaluate_every_steps=16, heldout_rows=300)
    run = train(config, store := with_heldout(tmp_path), tmp_path / "runs")
    expected = run.result()["best"]
    assert expected["step"] > 16
    run.result_path.unlink()
    shutil.rmtree(run.checkpoints)
    (run.best / "first.json").write_text(json.dumps({"step": expected["step"]}))  # of a kill in its last moment
    assert train(config, store, tmp_path / "runs").result()["best"] == expected
    assert [path.name for path in run.best.iterdir()] == [str(expected["step"])]


def test_heldout_measurements_keep_the_best_checkpoint_and_stop_early(tmp_path: Path) -> None:
    store = with_heldout(tmp_path)
    config = small(evaluate_every_steps=16, heldout_rows=300, log_every_steps=10)
    run = train(config, store, tmp_path / "runs")
    held = {record["step"]: record["heldout_fvu"] for record in run.metrics() if "heldout_fvu" in record}
    assert sorted(held) == [*range(16, 200, 16), 200]
    sae = load(run.folder)
    rows = np.load(store.parent / "heldout" / "shard-00000.npy").astype(np.float32)
    rows = np.concatenate([rows, np.load(store.parent / "heldout" / "shard-00001.npy").astype(np.float32)])[:300]
    variance = float(sae.scale.variance) / float(sae.scale.scale) ** 2
    expected = ((np.asarray(sae(rows)) - rows) ** 2).sum(1).mean() / variance
    assert held[200] == pytest.approx(expected, rel=1e-4)
    best = min(held, key=lambda step: held[step])
    assert run.result()["best"] == {"step": best, "heldout_fvu": held[best]}
    assert int(load_checkpoint(run.best, run.config(), D)[0].step) == best and not run.result()["stopped_early"]
    assert load(run.folder, "best").d_model == D
    more = train(dataclasses.replace(config, heldout_rows=50), store, tmp_path / "fewer")
    assert more.result()["best"]["heldout_fvu"] != held[best]

    # With a rate that soon makes it worse, two measurements without a better one end the run.
    wild = dataclasses.replace(config, patience=2, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
    early = train(wild, store, tmp_path / "early")
    assert early.result()["stopped_early"] and early.result()["steps"] < 200
    steps = [record["step"] for record in early.metrics() if "heldout_fvu" in record]
    assert early.result()["best"]["step"] == steps[-3] and early.result()["steps"] == steps[-1]
    with pytest.raises(UserError, match="expected a held-out store beside"):
        train(config, write_store(tmp_path / "alone" / "train", planted(400, D, 20, 3)[0]), tmp_path / "none")


@pytest.mark.parametrize("centre", ["geometric_median", "origin"])
def test_where_b_dec_starts(centre: str, out: Path) -> None:
    from hafs_jax.training.data import first_rows, geometric_median, input_scale
    from hafs_jax.training.loop import first_state
    from hafs_jax.training.state import hyperparameters
    from hafs_jax.training.train import open_stores

    stores = open_stores(out / "tiny" / "store" / "train")
    config = small()
    config = dataclasses.replace(config, sae=dataclasses.replace(config.sae, centre=centre))
    scale = input_scale(stores.train)
    state = first_state(config, stores, scale, hyperparameters(config))
    raw = np.asarray(state.params["b_dec"]) / float(scale.scale) + np.asarray(scale.mean_D)
    expected = np.zeros(D) if centre == "origin" else geometric_median(first_rows(stores.train, 16_384))
    np.testing.assert_allclose(raw, expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["batchtopk", "relu", "jumprelu", "gated"])
def test_a_run_starts_from_a_saelens_folder(architecture: str, out: Path, tmp_path: Path) -> None:
    """Exported and read back, the parameters are those of the run's last checkpoint; and training goes on from them."""
    from hafs_jax.saelens import export_saelens
    from hafs_jax.training.data import input_scale
    from hafs_jax.training.loop import first_state
    from hafs_jax.training.state import hyperparameters
    from hafs_jax.training.train import open_stores, resolve

    store = out / "tiny" / "store" / "train"
    first = train(small("baseline", architecture), store, tmp_path)
    start = small("baseline", architecture, init_from=str(export_saelens(first.folder)))
    stores = open_stores(store)
    resolved, _ = resolve(start, stores.train, tmp_path)
    state = first_state(resolved, stores, input_scale(stores.train), hyperparameters(resolved))
    for name, value in load_checkpoint(first.checkpoints, first.config(), D)[0].params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    assert train(start, store, tmp_path / "again").config().init_from == start.init_from
    wide = dataclasses.replace(start, sae=dataclasses.replace(start.sae, n_latents=30))
    with pytest.raises(UserError, match=r"d_sae=24, this run needs 30; set sae\.n_latents=24"):
        train(wide, store, tmp_path / "wide")


@pytest.mark.parametrize("architecture", ["topk", "gated", "matryoshka"])
def test_a_transcoder_learns_another_stores_rows(architecture: str, out: Path, tmp_path: Path) -> None:
    """The target is a linear map of what the rows' features are: predictable, of another width and scale."""
    acts = planted(ROWS, D, 20, 3)[0]
    mixing = np.random.default_rng(0).normal(size=(D, 7)).astype(np.float32)
    target = write_store(tmp_path / "target", 5.0 * acts @ mixing - 2.0, shard_rows=700)
    store = out / "tiny" / "store" / "train"
    config = dataclasses.replace(small("baseline", architecture), tokens=48_000)
    run = train(config, store, tmp_path / "runs", target=target)
    assert run.config().sae.transcode and run.result()["d_out"] == 7
    assert run.result()["final"]["fvu_ema"] < 0.5
    sae = load(run.folder)
    expected = 5.0 * acts[:500] @ mixing - 2.0
    residual = np.asarray(sae(acts[:500])) - expected
    assert (residual**2).sum() / ((expected - expected.mean(0)) ** 2).sum() < 0.5
    plain = write_store(tmp_path / "other", planted(ROWS, 7, 20, 3, seed=5)[0], shard_rows=700)
    with pytest.raises(UserError, match="was trained on another store"):
        train(config, store, tmp_path / "runs", target=plain)


def test_the_python_interface_gives_raw_latents_and_reconstructions(out: Path, tmp_path: Path) -> None:
    import hafs_jax

    run = hafs_jax.train(small("adaptive", penalty=with_tau(0.5)), out / "tiny" / "store" / "train", tmp_path)
    sae = hafs_jax.load(run.folder)
    acts = planted(ROWS, D, 20, 3)[0][:100]
    latents = sae.encode(acts)
    assert latents.shape == (100, 24) and sae.W_dec.shape == (24, D)
    offset = np.asarray(sae.decode(np.zeros((1, 24), np.float32)))
    np.testing.assert_allclose(sae.decode(latents), latents @ sae.W_dec + offset, rtol=1e-4, atol=1e-4)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = hafs_jax.trian
    with pytest.raises(UserError, match="expected last or best"):
        hafs_jax.load(run.folder, "first")


def with_tau(tau: float) -> Any:
    return dataclasses.replace(preset("adaptive").penalty, tau=tau)


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_start_where_they_can_be(out: Path, tmp_path: Path) -> None:
    def programs_after_a_run() -> set[str]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a folder that the user set is kept
        flags = ["--tokens", "640", "--force", "--tag", "again"]
        subprocess.run(command(out, *flags), env=environment, capture_output=True, timeout=1200, check=True)
        return {path.name for path in (tmp_path / "hafs-jax" / "jax").glob("*-cache")}

    kept = programs_after_a_run()
    assert len(kept) > 20  # the small programs too
    assert programs_after_a_run() == kept


def test_where_no_cache_can_be_written_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hafs_jax.ops.devices import use_compilation_cache

    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("not a folder")
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "hafs-jax" / "jax")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # what is set already is kept
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "hafs-jax" / "jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
