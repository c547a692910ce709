"""Core metrics against closed forms and naive loops, and against what SAE-Bench gets wrong."""

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hafs_evaluate.core import encode
from hafs_evaluate.core.reconstruction import core_metrics, store_moments
from hafs_evaluate.core.splice import splice_metrics
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import read_manifest, write_manifest
from hafs_jax.store.reader import Store
from tests.support.stores import resealed, write_store
from tests.support.torch_saes import identity_sae, random_sae, tiny_model

N, D, F = 90, 6, 11

SAE_BENCH_FIELDS = {
    "explained_variance": "reconstruction.explained_variance",
    "explained_variance_legacy": "reconstruction.explained_variance_by_row",
    "mse": "reconstruction.mse",
    "cossim": "reconstruction.cosine",
    "l2_norm_in": "reconstruction.norm_in",
    "l2_norm_out": "reconstruction.norm_out",
    "l2_ratio": "reconstruction.l2_ratio",
    "relative_reconstruction_bias": "reconstruction.relative_reconstruction_bias",
    "l0": "sparsity.l0",
    "l1": "sparsity.l1",
    "freq_over_1_percent": "sparsity.common_fraction",
    "freq_over_10_percent": "sparsity.dense_fraction",
    "normalized_freq_over_1_percent": "sparsity.common_share",
    "normalized_freq_over_10_percent": "sparsity.dense_share",
    "average_max_encoder_cosine_sim": "weights.encoder_nearest_cosine_mean",
    "average_max_decoder_cosine_sim": "geometry.mean_coherence",
    "frac_alive": "sparsity.alive_fraction",
    "total_tokens_eval_sparsity_variance": "rows",
    "ce_loss_without_sae": "model.ce_clean",
    "ce_loss_with_sae": "model.ce_spliced",
    "ce_loss_with_ablation": "model.ce_ablated",
    "ce_loss_score": "model.ce_score",
    "kl_div_with_sae": "model.kl_spliced",
    "kl_div_with_ablation": "model.kl_ablated",
    "kl_div_score": "model.kl_score",
    "total_tokens_eval_reconstruction": "model.tokens",
}
"""SAE-Bench's name of each figure of its core output, and where that is in core.json."""

SAE_BENCH_LATENT_FIELDS = {
    "feature_density": "density",
    "consistent_activation_heuristic": "rows_a_context",
    "encoder_bias": "encoder_bias",
    "encoder_norm": "encoder_norm",
    "encoder_decoder_cosine_sim": "encoder_decoder_cosine",
    "max_decoder_cosine_sim": "decoder_nearest_cosine",
    "max_encoder_cosine_sim": "encoder_nearest_cosine",
}
"""SAE-Bench's name of each figure of a latent, and its array in core_latents.npz."""


@pytest.fixture
def store(tmp_path):
    acts = np.random.default_rng(0).normal(size=(N, D)) * [1, 2, 3, 1, 1, 1] + 4
    folder = write_store(tmp_path / "heldout", acts.astype(np.float32), shard_rows=40)
    for index in range(3):  # as extraction leaves it, a context's rows lie anywhere
        order = np.random.default_rng(index).permutation(len(np.load(folder / f"rows-{index:05d}.npy")))
        for name in ("rows", "shard"):
            path = folder / f"{name}-{index:05d}.npy"
            np.save(path, np.load(path)[order])
    return Store(resealed(folder))


def acts_of(store):
    return np.concatenate([store.read(shard) for shard in range(len(store.shard_sizes))]).astype(np.float64)


def measured(sae, store, **kwargs):
    return core_metrics(sae, store, store_moments(store, kwargs.get("max_rows")), **kwargs)


class Constant:
    """An 'SAE' that reconstructs every row as one vector."""

    def __init__(self, vector):
        self.W_enc, self.W_dec, self.b_dec = torch.eye(D, F), torch.eye(F, D), torch.tensor(vector)
        self.device, self.dtype = torch.device("cpu"), torch.float64

    def encode(self, acts):
        return torch.zeros(*acts.shape[:-1], F, dtype=torch.float64)

    def decode(self, latents):
        return self.b_dec.expand(*latents.shape[:-1], D)


def test_a_mean_predictor_explains_nothing(store):
    found = measured(Constant(acts_of(store).mean(0)), store).values["reconstruction"]
    assert found["explained_variance"] == pytest.approx(0, abs=1e-12)
    assert found["fvu"] == pytest.approx(1, rel=1e-12)


def test_a_perfect_reconstruction_explains_everything(store):
    found = measured(identity_sae(D).to(torch.float64), store).values["reconstruction"]
    assert found["explained_variance"] == pytest.approx(1, abs=1e-12)
    for name in ("cosine", "l2_ratio", "relative_reconstruction_bias"):
        assert found[name] == pytest.approx(1, abs=1e-12)
    assert found["mse"] == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_every_metric_equals_a_naive_loop(store, architecture):
    sae = random_sae(D, F, architecture).to(torch.float64)
    result = measured(sae, store)
    x, context = acts_of(store), np.concatenate([store.rows(i)["context"] for i in range(len(store.shard_sizes))])
    mean = x.mean(0)
    sums = defaultdict(float)
    fired, fired_in = np.zeros(F), [set() for _ in range(F)]
    for row in range(N):
        f = sae.encode(torch.tensor(x[row : row + 1])).numpy()[0]
        y = f @ sae.W_dec.numpy() + sae.b_dec.numpy()
        sums["residual"] += ((x[row] - y) ** 2).sum()
        sums["variation"] += ((x[row] - mean) ** 2).sum()
        sums["share"] += 1 - ((x[row] - y) ** 2).sum() / ((x[row] - mean) ** 2).sum()
        sums["cosine"] += x[row] @ y / np.linalg.norm(x[row]) / np.linalg.norm(y)
        sums["bias_a"] += y @ y
        sums["bias_b"] += x[row] @ y
        sums["ratio"] += np.linalg.norm(y) / np.linalg.norm(x[row])
        sums["norm_in"] += np.linalg.norm(x[row])
        sums["norm_out"] += np.linalg.norm(y)
        sums["l0"] += (f != 0).sum()
        sums["l1"] += np.abs(f).sum()
        for latent in np.flatnonzero(f > 0):
            fired[latent] += 1
            fired_in[latent].add(context[row])
    assert result.values["reconstruction"] == pytest.approx(
        {
            "fvu": sums["residual"] / sums["variation"],
            "explained_variance": 1 - sums["residual"] / sums["variation"],
            "explained_variance_by_row": sums["share"] / N,
            "mse": sums["residual"] / N,
            "cosine": sums["cosine"] / N,
            "norm_in": sums["norm_in"] / N,
            "norm_out": sums["norm_out"] / N,
            "l2_ratio": sums["ratio"] / N,
            "relative_reconstruction_bias": sums["bias_a"] / sums["bias_b"],
        },
        rel=1e-9,
    )
    density = fired / N
    assert result.values["sparsity"] == pytest.approx(
        {
            "l0": sums["l0"] / N,
            "l1": sums["l1"] / N,
            "dead_fraction": (density == 0).mean(),
            "alive_fraction": (density > 0).mean(),
            "common_fraction": (density > 0.01).mean(),
            "dense_fraction": (density > 0.1).mean(),
            "common_share": density[density > 0.01].sum() / density.sum(),
            "dense_share": density[density > 0.1].sum() / density.sum(),
            "n_latents": F,
        },
        rel=1e-9,
    )
    np.testing.assert_array_equal(result.latents["density"], density)
    per_context = [fired[j] / len(fired_in[j]) if fired_in[j] else np.nan for j in range(F)]
    np.testing.assert_allclose(result.latents["rows_a_context"], per_context, rtol=1e-12)


def test_geometry_and_weights_equal_the_whole_cosine_matrix(store):
    sae = random_sae(D, F, "jumprelu")
    result = measured(sae, store)
    u = sae.W_dec.double().numpy()
    e = sae.W_enc.double().numpy().T
    units = e / np.linalg.norm(e, axis=1, keepdims=True)
    cosines, encoder = u @ u.T - 9 * np.eye(F), units @ units.T - 9 * np.eye(F)
    assert result.values["geometry"] == pytest.approx(
        {
            "max_coherence": cosines.max(),
            "mean_coherence": cosines.max(1).mean(),
            "frobenius_excess": ((u @ u.T)[~np.eye(F, dtype=bool)] ** 2).mean() * D,
        },
        rel=1e-6,
    )
    weights = result.values["weights"]
    assert weights["encoder_nearest_cosine_mean"] == pytest.approx(encoder.max(1).mean(), rel=1e-6)
    assert weights["encoder_decoder_cosine_mean"] == pytest.approx((units * u).sum(1).mean(), rel=1e-6)
    assert weights["encoder_bias_mean"] == pytest.approx(sae.b_enc.mean().item(), rel=1e-6)
    assert weights["encoder_norm_mean"] == pytest.approx(np.linalg.norm(e, axis=1).mean(), rel=1e-6)
    assert weights["threshold_mean"] == pytest.approx(sae.threshold.mean().item(), rel=1e-6)
    assert weights["decoder_norm_max"] == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(result.latents["decoder_nearest_cosine"], cosines.max(1), rtol=1e-6)


def test_no_figure_depends_on_the_batch_size(store, monkeypatch):
    sae = random_sae(D, F).to(torch.float64)
    whole = measured(sae, store)
    monkeypatch.setattr(encode, "BATCH_FLOATS", 7 * (D + 2 * F))
    small = measured(sae, store)
    for group in ("reconstruction", "sparsity"):
        assert small.values[group] == pytest.approx(whole.values[group], rel=1e-12)
    np.testing.assert_allclose(small.latents["rows_a_context"], whole.latents["rows_a_context"], rtol=0)


def test_max_rows_measures_the_first_rows_about_their_own_mean(store):
    first = acts_of(store)[:50]
    result = measured(Constant(first.mean(0)), store, max_rows=50)
    assert result.values["rows"] == 50
    assert result.values["reconstruction"]["fvu"] == pytest.approx(1, rel=1e-12)
    always_on = measured(identity_sae(D), store, max_rows=50)
    np.testing.assert_array_equal(always_on.latents["density"], np.ones(D))


def test_l1_takes_absolute_values_and_l0_counts_negative_latents(store):
    signed = Constant(np.zeros(D))
    signed.encode = lambda acts: torch.nn.functional.pad(acts - 4, (0, F - D))
    found = measured(signed, store).values["sparsity"]
    assert found["l1"] == pytest.approx(np.abs(acts_of(store) - 4).sum(1).mean(), rel=1e-12)
    assert found["l0"] == D


def test_a_source_is_centred_on_its_own_mean(tmp_path):
    acts = np.random.default_rng(1).normal(size=(40, D)).astype(np.float32)
    acts[25:] += 10
    folder = write_store(tmp_path / "two", acts, shard_rows=64)
    rows = np.load(folder / "rows-00000.npy")
    rows["source"][25:] = 1
    np.save(folder / "rows-00000.npy", rows)
    manifest = read_manifest(resealed(folder))
    (source,) = manifest.sources
    sources = (source, dataclasses.replace(source, name="biology"))
    write_manifest(folder, dataclasses.replace(manifest, sources=sources))
    store = Store(folder)
    found = measured(Constant(acts[25:].astype(np.float64).mean(0)), store).values
    assert found["by_source"]["biology"]["fvu"] == pytest.approx(1, rel=1e-6)
    assert found["by_source"]["biology"]["rows"] == 15
    assert found["by_source"]["text"]["rows"] == 25
    assert found["by_source"]["text"]["fvu"] > 10


def test_an_sae_that_never_fires_has_figures(store):
    found = measured(Constant(np.zeros(D)), store).values
    assert found["sparsity"]["dead_fraction"] == 1
    assert found["sparsity"]["l0"] == 0
    assert found["reconstruction"]["cosine"] == 0
    assert found["reconstruction"]["relative_reconstruction_bias"] is None


def test_saebench_explains_variance_with_the_mean_alone_and_scales_mse_by_the_batch(store):
    """SAE-Bench 0.6.0 on the very same rows: its explained variance does not centre, its MSE depends on the batch."""
    from sae_bench.evals.core.main import get_sparsity_and_variance_metrics

    x = torch.tensor(acts_of(store), dtype=torch.float32)
    sae = Constant(acts_of(store).mean(0).astype(np.float32))
    sae.cfg = SimpleNamespace(d_sae=F, hook_name="hook", hook_layer=0, hook_head_index=None)

    def theirs(batch):
        rows = iter(x.split(batch * 5))
        acts = SimpleNamespace()

        def get_batch_tokens(_):
            acts.now = next(rows).reshape(-1, 5, D)
            return torch.zeros(acts.now.shape[:2], dtype=torch.long)

        model = SimpleNamespace(run_with_cache=lambda *args, **kwargs: (None, {"hook": acts.now}))
        return get_sparsity_and_variance_metrics(
            sae,
            model,
            SimpleNamespace(get_batch_tokens=get_batch_tokens),
            n_batches=N // (5 * batch),
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
            eval_batch_size_prompts=batch,
            model_kwargs={},
        )[0]

    ours = measured(sae, store).values["reconstruction"]
    assert ours["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert theirs(6)["explained_variance"] > 0.3
    assert theirs(3)["mse"] == pytest.approx(2 * theirs(6)["mse"], rel=1e-5)
    assert theirs(6)["mse"] * 30 == pytest.approx(ours["mse"], rel=1e-5)
    assert theirs(6)["cossim"] == pytest.approx(ours["cosine"], rel=1e-5)
    assert theirs(6)["l2_ratio"] == pytest.approx(ours["l2_ratio"], rel=1e-5)


def test_every_field_of_saebench_core_output_is_ours_too(store, tmp_path):
    from sae_bench.evals.core.eval_output import CoreFeatureMetric, CoreMetricCategories

    sae, model = random_sae(D, F), tiny_model(tmp_path / "model")
    result = measured(sae, store)
    spliced = splice_metrics(model, store, {"random": random_sae(20, F, hook=store.manifest.hook_point)})["random"]
    categories = [field.type for field in dataclasses.fields(CoreMetricCategories)]
    theirs = {field.name for category in categories for field in dataclasses.fields(category)}
    assert theirs == SAE_BENCH_FIELDS.keys()
    for place in SAE_BENCH_FIELDS.values():
        value = {**result.values, "model": spliced}
        for key in place.split("."):
            value = value[key]
        assert isinstance(value, (int, float))
    of_latents = {field.name for field in dataclasses.fields(CoreFeatureMetric)} - {"index"}
    assert of_latents == SAE_BENCH_LATENT_FIELDS.keys()
    assert set(SAE_BENCH_LATENT_FIELDS.values()) == result.latents.keys()
    assert all(array.shape == (F,) for array in result.latents.values())


def test_errors_name_what_is_wrong(store, tmp_path):
    with pytest.raises(UserError, match=r"activations of the SAE's width 5, found d_model=6; evaluate the SAE on a"):
        measured(random_sae(5, F), store)
    constant = Store(write_store(tmp_path / "constant", np.ones((20, D), np.float32)))
    with pytest.raises(UserError, match="its 20 held-out rows do not vary"):
        measured(random_sae(D, F), constant)
