"""What every architecture under every variant promises. A new one joins by its line in the presets.

Shapes are checked for every pair. The compiled step against the plain one, and a whole run with its export, are checked
for every architecture, and for every variant on the default one; beside those only where the two could interfere.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sae_lens import SAE as TorchSAE

from hafs_jax.base.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.method.architectures import ARCHITECTURES as FORMS
from hafs_jax.method.architectures import OperatingPoint
from hafs_jax.method.sae import SAE, init_params
from hafs_jax.presets import ARCHITECTURES, VARIANTS, preset
from hafs_jax.saelens import export_saelens
from hafs_jax.store.reader import Store
from hafs_jax.training.checkpoint import load_checkpoint
from hafs_jax.training.data import input_scale
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, init_state
from hafs_jax.training.step import train_step
from hafs_jax.training.train import train
from tests.support.stores import planted, write_store

B, D, F, K = 50, 13, 29, 4
EVERY = [(variant, architecture) for variant in VARIANTS for architecture in ARCHITECTURES]
WHOLE = [
    (variant, architecture)
    for variant, architecture in EVERY
    if variant in ("baseline", "adaptive", "random_init") or architecture == "batchtopk"
]
every, whole = (
    pytest.mark.parametrize(("variant", "architecture"), pairs, ids=["-".join(pair) for pair in pairs])
    for pairs in (EVERY, WHOLE)
)


def config_of(variant: str, architecture: str, steps: int = 600) -> TrainConfig:
    config = preset(variant, architecture)
    return dataclasses.replace(
        config,
        tokens=steps * B,
        batch_size=B,
        sae=dataclasses.replace(config.sae, n_latents=F, k=K),
        penalty=dataclasses.replace(config.penalty, tau=0.5 if config.penalty.gate else None, mu0=0.1, chunk_size=8),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    acts = 7.0 * planted(6000, D, 24, K, seed=2)[0] + 3.0
    return Store(write_store(tmp_path_factory.mktemp("contract") / "store", acts, shard_rows=2000))


@every
def test_shapes_dtypes_and_unit_rows(variant: str, architecture: str) -> None:
    config = config_of(variant, architecture)
    params = init_params(config.sae, D, jax.random.key(0))
    own = dict.fromkeys(FORMS[architecture].params, (F,))
    assert {name: value.shape for name, value in params.items()} == {
        "W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), **own
    }  # fmt: skip
    assert {value.dtype for value in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"], axis=1), 1.0, rtol=1e-5)
    for dtype in ("float32", "bfloat16"):
        sae = SAE(dataclasses.replace(config.sae, compute_dtype=dtype), D)
        rows = jax.random.normal(jax.random.key(1), (B, D))
        encoding, recon = sae.apply({"params": params}, rows, OperatingPoint(K))
        assert encoding.latents_BF.shape == (B, F) and recon.shape == (B, D)
        assert encoding.latents_BF.dtype == recon.dtype == jnp.float32
        assert float(encoding.latents_BF.min()) >= 0


@whole
def test_jit_equals_no_jit(variant: str, architecture: str, store: Store) -> None:
    config = config_of(variant, architecture)
    hyper = hyperparameters(config)
    state = init_state(config, D, jax.random.key(0), hyper)
    acts = jnp.asarray(store.read(0, 0, B))
    compiled, ours = jax.jit(train_step, static_argnames="config")(state, acts, input_scale(store), hyper, config)
    with jax.disable_jit():
        plain, theirs = train_step(state, acts, input_scale(store), hyper, config)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for name, value in plain.params.items():
        np.testing.assert_allclose(compiled.params[name], value, atol=2e-5, err_msg=name)


@whole
def test_trains_saves_loads_and_exports(
    variant: str,
    architecture: str,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One run each: the loss falls, L0 is as promised, rows keep unit norm, it compiles once, torch agrees."""
    config = config_of(variant, architecture)
    programs = []  # with the number of configs that they were compiled for before: trainings of a kind share one

    def noted(*args: object) -> object:
        program = compile_steps(*args)
        programs.append((program, program._cache_size()))
        return program

    monkeypatch.setattr("hafs_jax.training.loop.compile_steps", noted)
    with jax.log_compiles():
        run = train(config, store.folder, tmp_path)
    assert [program._cache_size() - before for program, before in programs] == [1]
    assert sum("Finished XLA compilation of jit(train_steps)" in message for message in caplog.messages) == 1
    records = run.metrics()
    first, final = records[0], run.result()["final"]
    if variant != "random_init":
        falls_to = 0.95 if FORMS[architecture].starts_dense else 0.85  # a dense start reconstructs well, at several k
        assert final["loss_reconstruction"] < falls_to * first["loss_reconstruction"]
    penalised = config.penalty.kind != "none"
    assert final["lambda"] <= config.penalty.lam_max + 1e-6 and (final["lambda"] > 0) == penalised
    assert (0 < final["penalty_gradient_share"] < 1) == penalised and final["tau_reached"] in (True, False)
    l0 = np.mean([record["l0"] for record in records[-20:]])
    assert l0 == pytest.approx(K, rel=1e-3 if FORMS[architecture].cost is None else 0.25)

    state, scale = load_checkpoint(run.checkpoints, run.config(), D)
    np.testing.assert_allclose(jnp.linalg.norm(state.params["W_dec"], axis=1), 1.0, rtol=1e-5)

    acts = store.read(1)[:400]
    threshold = state.threshold(config.sparsity.threshold_decay)
    rows, at = scale(jnp.asarray(acts)), OperatingPoint(K, threshold)
    encoding, recon = SAE(run.config().sae, D).apply({"params": state.params}, rows, at)
    if FORMS[architecture].saelens is None:
        with pytest.raises(UserError, match=f"no SAELens form for architecture '{architecture}'"):
            export_saelens(run.folder)
        return
    theirs = TorchSAE.load_from_disk(export_saelens(run.folder))
    with torch.no_grad():
        latents = theirs.encode(torch.tensor(acts))
        theirs_recon = theirs.decode(latents).numpy()
    ours_recon = np.asarray(recon) / float(scale.scale) + np.asarray(scale.mean_D)
    assert np.abs(theirs_recon - ours_recon).max() / np.abs(ours_recon).max() < 1e-5
    ours_latents = np.asarray(encoding.latents_BF) / float(scale.scale)
    np.testing.assert_allclose(latents.numpy(), ours_latents, atol=1e-5 * float(ours_latents.max()))
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_post" and theirs.cfg.d_sae == F
    np.testing.assert_allclose(theirs.W_dec.norm(dim=1).detach().numpy(), 1.0, rtol=1e-5)


def test_exporting_twice_gives_the_same_bytes_and_an_unfinished_run_is_refused(store: Store, tmp_path: Path) -> None:
    run = train(config_of("baseline", "batchtopk", steps=16), store.folder, tmp_path)
    folder = export_saelens(run.folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"cfg.json", "sae_weights.safetensors", "checksums.json"}
    assert {path.name: path.read_bytes() for path in export_saelens(run.folder).iterdir()} == before
    run.result_path.unlink()
    with pytest.raises(UserError, match=r"expected a finished run's run\.json"):
        export_saelens(run.folder)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_bfloat16_products_end_near_float32(architecture: str, store: Store, tmp_path: Path) -> None:
    """A whole run: FVU and L0 within 5%, and what float32 learns slowly (thresholds, the averages) is learned too."""
    config = config_of("adaptive", architecture)
    half = dataclasses.replace(config, sae=dataclasses.replace(config.sae, compute_dtype="bfloat16"))
    runs = [train(c, store.folder, tmp_path / str(i)) for i, c in enumerate((config, half))]
    finals = [run.result()["final"] for run in runs]
    assert finals[1]["fvu_ema"] == pytest.approx(finals[0]["fvu_ema"], rel=0.05)
    l0s = [np.mean([record["l0"] for record in run.metrics()[-20:]]) for run in runs]
    assert l0s[1] == pytest.approx(l0s[0], rel=0.05)
    assert finals[1]["fvu_ema"] != finals[0]["fvu_ema"]
    states = [load_checkpoint(run.checkpoints, run.config(), D)[0] for run in runs]
    assert {leaf.dtype for leaf in jax.tree.leaves(states[1].params)} == {jnp.dtype("float32")}
    if architecture == "jumprelu":
        thresholds = [np.asarray(state.params["threshold"]) for state in states]
        first = init_params(config.sae, D, jax.random.key(0))["threshold"]
        moved = [float(np.abs(threshold - first).mean()) for threshold in thresholds]
        assert moved[0] > 0.1 and moved[1] == pytest.approx(moved[0], rel=0.2)
