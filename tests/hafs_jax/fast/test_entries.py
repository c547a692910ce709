"""Products with the active latents alone: values and every gradient are the dense form's."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hafs_jax.config import TrainConfig
from hafs_jax.fast import entries, plan
from hafs_jax.fast.forms import capacity
from hafs_jax.fast.objective import loss_and_gradients
from hafs_jax.method.loss import Weights
from hafs_jax.method.sae import init_params, pre_activations
from hafs_jax.ops.products import blocks_of
from hafs_jax.ops.selection import (
    batch_threshold,
    count_threshold,
    largest_of_all,
    largest_of_rows,
    positive,
    where_true,
)
from hafs_jax.presets import preset, with_fields

B, D, F = 24, 16, 200


def config_of(architecture: str, **sae: object) -> TrainConfig:
    fields = {"n_latents": F, "k": 5, **sae}
    return with_fields(preset("baseline", architecture), {"sae": fields, "batch_size": B, "tokens": 100 * B})


def outcome(
    config: TrainConfig, dead: int, seed: int = 0, k: int = 5, l0: float | None = None, platform: str | None = None
):
    """The loss, the gradients and what the forward pass returned for one batch in which `dead` latents count as dead.

    With `l0`, biases give so many latents of each row a positive pre-activation.
    """
    params = init_params(config.sae, D, jax.random.key(seed))
    params = {name: value + 0.05 * jax.random.normal(jax.random.key(3), value.shape) for name, value in params.items()}
    acts = jax.random.normal(jax.random.key(seed + 1), (B, D))
    if l0 is not None:
        pre = pre_activations(params, acts, config.sae)
        largest = jnp.sort(pre.reshape(-1))[::-1]
        params["b_enc"] -= (largest[round(l0 * B) - 1] + largest[round(l0 * B)]) / 2
    weights = Weights(jnp.int32(k), jnp.float32(1.0), jnp.arange(F) % 3 == 0 if dead == -1 else jnp.arange(F) < dead)
    run = jax.jit(loss_and_gradients, static_argnums=(6, 7))
    return run(params, acts, acts, weights, jnp.float32(D), jax.random.key(5), config, plan.choose(config, platform))


@pytest.mark.parametrize(
    ("architecture", "products_", "l0"),
    [("topk", "sparse", None), ("relu", "sparse", 5.0), ("relu", "dense", 60.0), ("gated", "dense", 60.0)],
)
def test_a_batch_in_blocks_of_rows_is_the_whole_one(
    architecture: str, products_: str, l0: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config_of(architecture), products=products_)
    (loss, whole), grads = outcome(config, dead=-1, l0=l0)
    monkeypatch.setitem(plan._BLOCK_BYTES, "cpu", 4 * F * B // 3)
    assert blocks_of(B, F, plan.choose(config).block_bytes) == 3
    (loss_in_blocks, forward), grads_in_blocks = outcome(config, dead=-1, l0=l0)
    assert forward.encoding is None
    assert float(loss_in_blocks) == pytest.approx(float(loss), rel=1e-5)
    for name, value in whole.parts.items():
        np.testing.assert_allclose(forward.parts[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(forward.residual_BD, whole.residual_BD, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(forward.firing_F, whole.firing_F)
    for name, grad in grads.items():
        np.testing.assert_allclose(grads_in_blocks[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dead", [0, 7, -1], ids=["none dead", "few dead", "many dead"])
@pytest.mark.parametrize(
    ("architecture", "sae"),
    [
        ("topk", {}),
        ("batchtopk", {}),
        ("matryoshka", {}),
        ("matryoshka", {"sampled_prefixes": 3}),
        ("hierarchical_topk", {}),
        ("hierarchical_topk", {"k_values": (2.0, 1.0), "budgets": (0.4, 0.7, 1.0)}),
        ("topk", {"k_values": (2.0, 1.0)}),
        ("batchtopk", {"k_values": (2.0, 1.0)}),
        ("batchtopk", {"transcode": True}),
    ],
    ids=str,
)
def test_the_sparse_step_is_the_dense_one(architecture: str, sae: dict, dead: int) -> None:
    config = config_of(architecture, **sae)
    (loss, forward), grads = outcome(dataclasses.replace(config, products="sparse"), dead)
    (plain_loss, plain), plain_grads = outcome(dataclasses.replace(config, products="dense"), dead)
    assert forward.encoding is None and plain.encoding is not None
    assert float(plain.parts["loss_aux"] > 0) == (dead != 0)
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-5)
    for name, value in plain.parts.items():
        np.testing.assert_allclose(forward.parts[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(forward.firing_F, plain.firing_F)
    if architecture not in ("topk", "hierarchical_topk"):
        assert float(forward.smallest) == pytest.approx(float(plain.smallest))
    for name, grad in plain_grads.items():
        assert float(jnp.max(jnp.abs(grad))) > 0, name
        np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dead", [0, 7])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "hierarchical_topk", "relu"])
def test_the_form_of_accelerators_is_the_same(
    architecture: str, dead: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_BLOCK_BYTES_ELSEWHERE", 4 * F * B // blocks)
    config = config_of(architecture)
    l0 = 5.0 if architecture == "relu" else None
    (loss, forward), grads = outcome(dataclasses.replace(config, products="sparse"), dead, l0=l0, platform="gpu")
    (plain_loss, plain), plain_grads = outcome(dataclasses.replace(config, products="dense"), dead, l0=l0)
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-5)
    np.testing.assert_array_equal(forward.firing_F, plain.firing_F)
    for name, grad in plain_grads.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("l0", [0.5, 7.0, 8.0])
@pytest.mark.parametrize(
    ("architecture", "sae"),
    [
        ("relu", {}),
        ("matryoshka_relu", {}),
        ("matryoshka_relu", {"sampled_prefixes": 3}),
        ("relu", {"transcode": True}),
    ],
    ids=str,
)
def test_latents_that_are_few_or_many_give_the_same_by_either(architecture: str, sae: dict, l0: float) -> None:
    config = config_of(architecture, **sae)
    assert capacity(config.sae) == 7
    (loss, forward), grads = outcome(dataclasses.replace(config, products="sparse"), dead=7, l0=l0)
    (plain_loss, plain), plain_grads = outcome(dataclasses.replace(config, products="dense"), dead=7, l0=l0)
    assert float(jnp.sum(plain.firing_F)) == pytest.approx(l0 * B)
    assert forward.encoding is None and plain.encoding is not None
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-5)
    assert forward.parts.keys() == plain.parts.keys()
    for name, value in plain.parts.items():
        np.testing.assert_allclose(forward.parts[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(forward.firing_F, plain.firing_F)
    for name, grad in plain_grads.items():
        assert float(jnp.max(jnp.abs(grad))) > 0, name
        np.testing.assert_allclose(grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_input_that_is_no_number_is_seen() -> None:
    values = jnp.full((3, 40), -1.0).at[1, 7].set(2.0)
    assert positive(values, jnp.zeros(40), 6).complete
    assert not positive(values.at[2].set(jnp.nan), jnp.zeros(40), 6).complete


@pytest.mark.parametrize(("l0", "taken"), [(7.0, True), (7.1, False)])
def test_active_latents_alone_are_multiplied_if_all_fit_the_capacity(
    l0: float, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    decode = entries.decode
    jax.clear_caches()
    monkeypatch.setattr(entries, "decode", lambda *of: jax.debug.callback(lambda: calls.append(None)) or decode(*of))
    jax.block_until_ready(outcome(dataclasses.replace(config_of("relu"), products="sparse"), dead=0, l0=l0))
    jax.effects_barrier()
    jax.clear_caches()
    assert bool(calls) == taken


def test_in_bfloat16_the_two_differ_by_its_rounding() -> None:
    config = config_of("topk", compute_dtype="bfloat16")
    (loss, _), grads = outcome(dataclasses.replace(config, products="sparse"), dead=7)
    (plain_loss, _), plain_grads = outcome(dataclasses.replace(config, products="dense"), dead=7)
    assert float(loss) == pytest.approx(float(plain_loss), rel=2e-3)
    for name, grad in plain_grads.items():
        assert float(jnp.linalg.norm(grads[name] - grad)) < 2e-2 * float(jnp.linalg.norm(grad)), name


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000])
def test_the_places_of_what_is_true_are_numpys(length: int, share: float) -> None:
    """With as many outputs as true entries, with more and with fewer; with words that are empty, full and cut off."""
    mask_T = np.random.default_rng(length).random(length) < share
    masks_2T = np.stack([mask_T, ~mask_T])
    for size in (1, length // 3 + 1, length + 7):
        together_2N = jax.vmap(partial(where_true, size=size))(jnp.asarray(masks_2T))  # as in a sweep
        for mask_T, together_N in zip(masks_2T, together_2N, strict=True):
            expected_N = np.zeros(size, int)
            found_N = np.flatnonzero(mask_T)[:size]
            expected_N[: len(found_N)] = found_N
            np.testing.assert_array_equal(where_true(jnp.asarray(mask_T), size), expected_N)
            np.testing.assert_array_equal(together_N, expected_N)


def test_a_row_without_positive_entries_keeps_nothing() -> None:
    values = jnp.zeros((3, 40)).at[1, 7].set(2.0).at[1, 39].set(1.0)
    for found_N in (largest_of_rows(values, jnp.zeros(40), 2, 2), largest_of_all(values, jnp.zeros(40), 6, 6)):
        real = np.asarray(found_N.real_N)
        found = set(zip(np.asarray(found_N.rows_N)[real], np.asarray(found_N.columns_N)[real], strict=True))
        assert found == {(1, 7), (1, 39)}


@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (64, 1000), (300, 640)])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3])
def test_the_largest_of_a_batch_are_those_of_a_sort(shape: tuple[int, int], share: float) -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal(shape).astype(np.float32), 0.0)
    most = max(1, round(share * values.size))
    for count in (most, max(1, most // 2)):
        entries = jax.jit(largest_of_all, static_argnums=2)(jnp.asarray(values), jnp.zeros(shape[1]), most, count)
        real = np.asarray(entries.real_N)
        found = values[np.asarray(entries.rows_N)[real], np.asarray(entries.columns_N)[real]]
        expected = np.sort(values[values > 0])[::-1][:count]
        np.testing.assert_array_equal(np.sort(found)[::-1], expected)
        pairs = np.stack([entries.rows_N, entries.columns_N], 1)[real]
        assert len(np.unique(pairs, axis=0)) == len(expected)
        assert (np.diff(pairs[:, 0]) >= 0).all(), "row by row"
        thresholds = (batch_threshold(jnp.asarray(values), most, count), count_threshold(jnp.asarray(values), count))
        assert len({int(np.sum(values >= np.maximum(float(t), 1e-38))) for t in thresholds}) == 1


@pytest.mark.parametrize("shape", [(5, 40), (9, 1003)])
def test_the_largest_of_rows_are_those_of_a_sort(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    values, offset = (
        random.standard_normal(shape).astype(np.float32),
        random.standard_normal(shape[1]).astype(np.float32),
    )
    entries = jax.jit(largest_of_rows, static_argnums=2)(jnp.asarray(values), jnp.asarray(offset), 6, 4)
    real = np.asarray(entries.real_N).reshape(-1, 6)
    assert real[:, :4].all() and not real[:, 4:].any()
    columns = np.asarray(entries.columns_N).reshape(-1, 6)[:, :4]
    np.testing.assert_array_equal(columns, np.argsort(-(values + offset), axis=1)[:, :4])
    none = largest_of_rows(jnp.asarray(values), jnp.full(shape[1], -100.0), 6, 4)
    assert not np.asarray(none.real_N).any()
