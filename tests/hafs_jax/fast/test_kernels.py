"""Kernels in interpret mode: against numpy, with the sizes and data that go wrong, and in whole steps."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.fast import plan
from hafs_jax.fast.kernels import calls, dots, sums, top
from hafs_jax.fast.kernels.dots import entry_dots
from hafs_jax.fast.kernels.sums import equal_segments, segment_sums, sorted_by
from hafs_jax.fast.kernels.top import largest
from hafs_jax.fast.objective import loss_and_gradients
from hafs_jax.method.loss import Weights
from hafs_jax.method.sae import init_params, pre_activations
from hafs_jax.presets import with_fields
from hafs_jax.targets.gpus import gpu
from hafs_jax.training.train import train
from tests.support.steps import batch, fresh, one_step, small
from tests.support.stores import planted, write_store

B, D, F = 6, 5, 40
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}  # sums of some ten float32 terms of order 1, in another order


def gathered(into: np.ndarray, weights: np.ndarray, from_: np.ndarray, source: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((size, source.shape[1]))
    np.add.at(out, into, weights[:, None].astype(np.float64) * source[from_].astype(np.float64))
    return out


def random_entries(N: int, size: int, M: int, width: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(N + size)
    into, from_ = (rng.integers(0, most, N).astype(np.int32) for most in (size, M))
    return into, rng.standard_normal(N).astype(np.float32), from_, rng.standard_normal((M, width)).astype(np.float32)


def summed(
    into: np.ndarray, weights: np.ndarray, from_: np.ndarray, source: np.ndarray, size: int, count: int | None = None
) -> np.ndarray:
    """What the kernel makes of entries in any order."""
    segments = sorted_by(jnp.asarray(into), size, jnp.int32(len(into) if count is None else count))
    return np.asarray(segment_sums(segments, *map(jnp.asarray, (weights, from_, source)), interpret=True))


@pytest.mark.parametrize("width", [1, 5, 128, 200])
@pytest.mark.parametrize(("N", "count", "size"), [(1, 1, 1), (37, 37, 9), (37, 20, 50), (8, 0, 3)])
def test_sums_of_sorted_entries_are_numpys(N: int, count: int, size: int, width: int) -> None:
    into, weights, from_, source = random_entries(N, size, 7, width)
    found = summed(into, weights, from_, source, size, count)
    expected = gathered(into[:count], weights[:count], from_[:count], source, size)
    assert found.dtype == np.float32 and found.shape == (size, width)
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    np.testing.assert_array_equal(found[np.setdiff1d(np.arange(size), into[:count])], 0)


@pytest.mark.parametrize("most", [4, 256])
def test_a_heavy_latent_is_cut_and_its_pieces_are_added(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has as many entries as fill two pieces exactly, one a single one more than a piece, one not quite three."""
    monkeypatch.setattr(sums, "_MOST", most)
    into = np.repeat(np.array([3, 0, 5, 2], np.int32), [2 * most, most + 1, 3 * most - 1, 1])
    into = np.random.default_rng(0).permutation(into)
    _, weights, from_, source = random_entries(len(into), 6, 7, 5)
    found = summed(into, weights, from_, source, 6)
    np.testing.assert_allclose(found, gathered(into, weights, from_, source, 6), rtol=1e-5, atol=1e-4)  # of 768 terms
    np.testing.assert_array_equal(found[[1, 4]], 0)


def test_a_sum_does_not_depend_on_the_other_entries() -> None:
    """It is the same to the last bit wherever its entries lie: the order of a sum is fixed."""
    into, weights, from_, source = random_entries(900, 3, 50, 5)
    alone = np.flatnonzero(into == 1)
    assert len(alone) > 256
    one = summed(np.zeros(len(alone), np.int32), weights[alone], from_[alone], source, 1)
    np.testing.assert_array_equal(one[0], summed(into, weights, from_, source, 3)[1])


def test_wide_rows_are_taken_in_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "WIDEST", 256)
    into, weights, from_, source = random_entries(30, 4, 7, 600)
    assert calls.widened(jnp.asarray(source)).shape == (7, 768) and calls.blocks_of_columns(768) == 3
    np.testing.assert_allclose(
        summed(into, weights, from_, source, 4), gathered(into, weights, from_, source, 4), rtol=1e-5, atol=1e-5
    )
    to, rows = from_[::-1].copy(), jnp.asarray(source)
    found = entry_dots(jnp.asarray(from_), jnp.asarray(to), jnp.int32(30), rows, rows, interpret=True)
    np.testing.assert_allclose(found, np.sum(source[from_] * source[to], axis=1), rtol=1e-4, atol=1e-4)


def test_entries_that_lie_together_need_no_sort() -> None:
    """The rows of a batch that was taken in blocks are not in order."""
    rows = np.array([2, 0, 3, 1], np.int32)
    into = np.repeat(rows, 3)
    _, weights, from_, source = random_entries(12, 4, 7, 5)
    arrays = map(jnp.asarray, (weights, from_, source))
    found = segment_sums(equal_segments(jnp.asarray(into), 3), *arrays, interpret=True, most=3)
    np.testing.assert_allclose(found, gathered(into, weights, from_, source, 4), **TOLERANCE)


@pytest.mark.parametrize(("N", "count"), [(1, 1), (130, 130), (130, 70), (64, 0)])
@pytest.mark.parametrize("width", [5, 128])
def test_entry_dots_are_numpys(N: int, count: int, width: int) -> None:
    rows, _, latents, of_latents = random_entries(N, B, F, width)
    of_rows = np.random.default_rng(1).standard_normal((B, width)).astype(np.float32)
    arrays = (jnp.asarray(rows), jnp.asarray(latents), jnp.int32(count))
    found = np.asarray(entry_dots(*arrays, jnp.asarray(of_rows), jnp.asarray(of_latents), interpret=True))
    expected = np.sum(of_rows[rows].astype(np.float64) * of_latents[latents], axis=1)
    np.testing.assert_allclose(found[:count], expected[:count], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[count:], 0)


@pytest.mark.parametrize(("N", "most"), [(1, 1), (40, 3), (128, 128), (200, 7), (1_500, 5)])
def test_the_largest_of_a_row_are_top_ks_with_ties(N: int, most: int) -> None:
    rng = np.random.default_rng(N)
    values = np.concatenate([rng.integers(-2, 3, (3, N)), np.zeros((1, N)), rng.standard_normal((2, N))])
    for found, expected in zip(
        largest(jnp.asarray(values, jnp.float32), most, interpret=True),
        jax.lax.top_k(values.astype(np.float32), most),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_row_with_nan_names_columns_of_its_own() -> None:
    """A column past the end would be read as a latent's."""
    values = jnp.full((2, 10), jnp.nan).at[1].set(1.0)
    found, columns = largest(values, 4, interpret=True)
    assert np.isnan(found[0]).all() and int(columns.max()) < 10
    np.testing.assert_array_equal(columns[1], [0, 1, 2, 3])


def test_under_vmap_each_member_has_its_own() -> None:
    into, weights, from_, source = random_entries(20, 4, 7, 5)
    sources = jnp.stack([jnp.asarray(source), 2 * jnp.asarray(source)])

    def of_member(source: jax.Array) -> jax.Array:
        segments = sorted_by(jnp.asarray(into), 4, jnp.int32(20))
        return segment_sums(segments, jnp.asarray(weights), jnp.asarray(from_), source, interpret=True)

    assert "grid=(4,)" in str(jax.make_jaxpr(jax.vmap(of_member))(sources))  # Mosaic compiles no kernel under `vmap`
    found = jax.jit(jax.vmap(of_member))(sources)
    np.testing.assert_allclose(found[1], 2 * gathered(into, weights, from_, source, 4), rtol=1e-5, atol=1e-5)


def compared(architecture: str, sae: dict, dtype: str, platform: str | None) -> tuple:
    """Loss, forward pass and gradients of one batch with kernels and without."""
    fields = {"n_latents": F, "k": 3, "compute_dtype": dtype, **sae}
    config = with_fields(small("baseline", architecture), {"sae": fields, "sparsity": {"aux": 0.0}, "batch_size": B})
    config = dataclasses.replace(config, products="sparse")
    params = init_params(config.sae, D, jax.random.key(0))
    params = {name: value + 0.05 * jax.random.normal(jax.random.key(3), value.shape) for name, value in params.items()}
    acts = jax.random.normal(jax.random.key(1), (B, D))
    if architecture == "relu":
        pre = jnp.sort(pre_activations(params, acts, config.sae).reshape(-1))
        params["b_enc"] -= pre[-3 * B]
    weights = Weights(jnp.int32(2 if sae else 3), jnp.float32(1.0), jnp.zeros(F, bool))
    run = jax.jit(loss_and_gradients, static_argnums=(6, 7))
    how = dataclasses.replace(plan.choose(config, platform), block_bytes=4 * F * B // 2)
    return tuple(
        run(params, acts, acts, weights, jnp.float32(D), jax.random.key(5), config, one)
        for one in (dataclasses.replace(how, kernels="interpreted"), how)
    )


@pytest.mark.parametrize(
    ("architecture", "sae", "dtype", "platform"),
    [
        ("topk", {"k_values": (1.0, 0.5)}, "bfloat16", "gpu"),
        ("batchtopk", {"transcode": True}, "float32", None),
        ("matryoshka", {}, "float32", None),
        ("relu", {}, "bfloat16", "gpu"),
    ],
    ids=str,
)
def test_values_and_every_gradient_are_those_without_kernels(
    architecture: str, sae: dict, dtype: str, platform: str | None
) -> None:
    """In bfloat16 too: both round the same factors, and differ in the order of float32 sums alone."""
    ((loss, forward), grads), ((plain_loss, plain), plain_grads) = compared(architecture, sae, dtype, platform)
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-5)
    np.testing.assert_array_equal(forward.firing_F, plain.firing_F)
    np.testing.assert_allclose(forward.residual_BD, plain.residual_BD, rtol=1e-5, atol=1e-5)
    for name, grad in plain_grads.items():
        assert float(jnp.max(jnp.abs(grad))) > 0, name
        # A rounded factor of the second product may fall to the other side where the first one's sum differs.
        loose = {"rtol": 1e-2, "atol": 1e-4} if dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-6}
        np.testing.assert_allclose(grads[name], grad, err_msg=name, **loose)


def test_a_training_step_with_kernels_is_the_plain_one() -> None:
    """Weights after three steps: Adam divides by the gradient's size, so rounding of 1e-7 grows where that is small."""
    config = dataclasses.replace(small("adaptive", "topk"), products="sparse")
    outcomes = []
    for kernels in ("off", "on", "on"):
        asked = dataclasses.replace(config, kernels=kernels)
        state, scale = fresh(asked)
        for step in range(3):
            state, metrics = one_step(asked, state, scale, batch(step))
        outcomes.append((state.params, metrics))
    (plain, plain_metrics), (params, metrics), (again, _) = outcomes
    assert float(metrics["loss"]) == pytest.approx(float(plain_metrics["loss"]), rel=1e-5)
    for name, value in plain.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(params[name], again[name])


def test_kernels_are_asked_for() -> None:
    config = small("baseline", "topk")
    assert plan.choose(config).kernels == plan.choose(config, "gpu").kernels == "off"
    asked = dataclasses.replace(config, kernels="on")
    assert (plan.choose(asked).kernels, plan.choose(asked, "gpu").kernels) == ("interpreted", "compiled")


def test_the_choice_of_kernels_reaches_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    run = calls.call

    def noted(name: str, *arguments: object) -> object:
        called.append(name)
        return run(name, *arguments)

    for module in (sums, dots, top):
        monkeypatch.setattr(module, "call", noted)
    jax.clear_caches()
    compared("topk", {}, "float32", None)
    counted = {name: called.count(name) for name in set(called)}
    assert counted == {"top_k": 1, "segment_sums": 4, "entry_dots": 1}  # sums: decoder, both matrices, biases


def test_a_machine_that_cannot_run_kernels_is_named() -> None:
    asked = dataclasses.replace(small("baseline", "topk"), kernels="on")
    hopper, earlier = gpu("h100").machine, gpu("a100").machine
    for machine, words in (
        (earlier, r"expected .*\(Hopper\) or later, found an earlier GPU"),
        (plan.Machine("tpu", 1, False), r"expected .*\(Hopper\) or later, found a TPU"),
    ):
        with pytest.raises(UserError, match=rf"kernels='on': {words}; leave it out, or say kernels='off'"):
            plan.check_kernels(asked, machine)
        plan.check_kernels(dataclasses.replace(asked, kernels="auto"), machine)
    plan.check_kernels(asked, hopper)


def test_the_plan_of_a_training_on_an_earlier_gpu_has_no_kernels() -> None:
    """The command ends with one line before anything is compiled."""
    flags = ["--target", "a100", "--d-model", "64", "--arch", "topk", "--kernels", "on"]
    done = subprocess.run([sys.executable, "-m", "hafs_jax", "plan", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--kernels on: expected an NVIDIA GPU" in done.stderr


def test_a_training_on_an_earlier_gpu_is_refused_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "tiny" / "store" / "train", planted(40, 6, 8, 2)[0], shard_rows=40)
    monkeypatch.setattr("hafs_jax.training.train.this_machine", lambda: gpu("a100").machine)
    asked = dataclasses.replace(small("baseline", "topk"), kernels="on")
    with pytest.raises(UserError, match="kernels='on': expected an NVIDIA GPU"):
        train(asked, store, tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("[!.]*"))
