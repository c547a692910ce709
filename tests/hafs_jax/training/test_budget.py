"""The memory that a training needs: what is counted, how it scales, and the refusal before anything compiles."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.config import TrainConfig
from hafs_jax.fast import plan, room
from hafs_jax.fast.room import available_bytes, check_room, size
from hafs_jax.presets import preset
from hafs_jax.store.reader import Store
from hafs_jax.training import budget as module
from hafs_jax.training.budget import budget
from hafs_jax.training.data import input_scale
from hafs_jax.training.loop import Stores
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, init_state
from hafs_jax.training.sweeps import sweep
from hafs_jax.training.train import describe, train
from tests.support.stores import write_store

B, D, F = 64, 16, 48


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    acts = np.random.default_rng(0).normal(size=(640, D)).astype(np.float32)
    return Stores(Store(write_store(tmp_path_factory.mktemp("budget") / "train", acts, "float16")))


def config_of(architecture: str = "relu", products: str = "dense") -> TrainConfig:
    config = preset("baseline", architecture)
    sae = dataclasses.replace(config.sae, n_latents=F, k=3)
    return dataclasses.replace(config, tokens=640, batch_size=B, steps_per_dispatch=5, products=products, sae=sae)


def test_what_is_counted(stores: Stores) -> None:
    found = budget(config_of(), stores)
    assert found.parameters == 4 * (2 * D * F + F + D)
    assert 2 * found.parameters < found.optimizer < 2 * found.parameters + 4 * 4 * F  # Adam's moments, and counters
    assert found.step == 1.5 * found.parameters + 3 * 4 * B * F
    assert found.batches == 5 * 5 * B * D * 2
    assert found.total == found.parameters + found.optimizer + found.step + found.batches
    kept = config_of("topk", "sparse")
    assert budget(kept, stores).step == found.step  # the auxiliary loss takes as much
    without = dataclasses.replace(kept, sparsity=dataclasses.replace(kept.sparsity, aux=0.0))
    assert budget(without, stores).step == found.step - 2 * 4 * B * F
    penalised = dataclasses.replace(config_of(), penalty=dataclasses.replace(config_of().penalty, kind="hinge"))
    assert budget(penalised, stores).step == found.step + 0.5 * found.parameters
    many, one_by_one = (budget(config_of(), stores, 3, together) for together in ("vmap", "map"))
    assert (many.parameters, many.batches) == (3 * found.parameters, found.batches)
    assert many.step == 3 * (found.step + 1.5 * found.parameters)  # a move that is not in place
    other = dataclasses.replace(config_of(), optimizer=dataclasses.replace(config_of().optimizer, name="lion"))
    assert budget(other, stores).step == found.step + 1.5 * found.parameters
    assert (one_by_one.optimizer, one_by_one.step) == (3 * found.optimizer, found.step)
    assert budget(config_of(), Stores(stores.train, stores.train)).batches == 2 * found.batches  # a transcoder


def test_blocks_are_counted_only_where_the_batch_divides(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = 4 * B * F
    monkeypatch.setitem(plan._BLOCK_BYTES, "cpu", whole // 4)
    parameters = budget(config_of(), stores).parameters
    assert budget(config_of(), stores).step == 1.5 * parameters + 3 * whole // 4
    prime = dataclasses.replace(config_of(), batch_size=67)
    assert budget(prime, stores).step == 1.5 * parameters + 3 * 4 * 67 * F
    assert budget(config_of("jumprelu"), stores).step > 5 * whole


@pytest.mark.parametrize(
    ("architecture", "products"),
    [("relu", "dense"), ("topk", "sparse"), ("gated", "dense"), ("hierarchical_topk", "dense")],
)
def test_the_estimate_is_near_what_the_compiler_plans(stores: Stores, architecture: str, products: str) -> None:
    config = config_of(architecture, products)
    config = dataclasses.replace(config, batch_size=256, sae=dataclasses.replace(config.sae, n_latents=2048))
    config = dataclasses.replace(config, sparsity=dataclasses.replace(config.sparsity, aux_k=32))
    scale, hyper = input_scale(stores.train), hyperparameters(config)
    state = jax.eval_shape(lambda: init_state(config, D, jax.random.key(0), hyper))
    block = jax.ShapeDtypeStruct((2, 256, D), np.float16)
    planned = compile_steps().lower(state, block, scale, hyper, config).compile().memory_analysis()
    found = budget(config, stores)
    assert 0.6 < planned.temp_size_in_bytes / found.step < 1.5
    assert planned.argument_size_in_bytes == pytest.approx(found.parameters + found.optimizer, rel=0.05)


def test_the_estimate_of_many_saes_at_once_is_near_what_the_compiler_plans(stores: Stores) -> None:
    config = config_of("topk", "sparse")
    config = dataclasses.replace(config, batch_size=256, sae=dataclasses.replace(config.sae, n_latents=2048))
    config = dataclasses.replace(config, sparsity=dataclasses.replace(config.sparsity, aux_k=32))
    scale, hyper = input_scale(stores.train), hyperparameters(config)
    one = jax.eval_shape(lambda: init_state(config, D, jax.random.key(0), hyper))
    state, hypers = (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), tree) for tree in (one, hyper)
    )
    block = jax.ShapeDtypeStruct((2, 256, D), np.float16)
    planned = compile_steps(members="vmap").lower(state, block, scale, hypers, config).compile().memory_analysis()
    assert 0.6 < planned.temp_size_in_bytes / budget(config, stores, 2, "vmap").step < 1.5


def test_sizes_are_said_for_people(stores: Stores) -> None:
    assert (size(12_345), size(12_345_678), size(1_234_567_890)) == ("12 kB", "12 MB", "1.2 GB")
    assert "kB: parameters 6 kB, optimizer 13 kB" in describe(config_of(), stores)


def test_a_training_that_does_not_fit_is_refused_before_it_leaves_anything(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = budget(config_of(), stores).total * jax.local_device_count()
    monkeypatch.setattr(module, "available_bytes", lambda: needed - 1)
    monkeypatch.setattr("hafs_jax.training.train.fit", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"relu F=48 with batch_size=64 needs about .* found .* free on .*lower batch"):
        train(config_of(), stores.train.folder, tmp_path)
    assert not list(tmp_path.glob("[!.]*"))
    monkeypatch.setattr("hafs_jax.training.sweeps.fit", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(module, "available_bytes", lambda: needed)
    seeds = [dataclasses.replace(config_of(), seed=seed) for seed in range(2)]
    with pytest.raises(UserError, match="lower most_together, batch_size"):
        sweep(seeds, stores, tmp_path, "vmap")


def test_nothing_is_refused_where_memory_is_not_known(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    assert train(config_of(), stores.train.folder, tmp_path).finished()


def test_the_free_memory_of_this_machine() -> None:
    found = available_bytes()
    assert found is None or 1 << 20 < found < 1 << 50


def test_on_an_accelerator_a_compiled_step_that_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's own plan decides."""

    def step(acts_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
        gram_NN = acts_ND @ acts_ND.T
        return gram_NN, jax.numpy.sort(gram_NN, axis=1)[:, 0]

    compiled = jax.jit(step).lower(jax.ShapeDtypeStruct((100, 10), np.float32)).compile()
    planned = compiled.memory_analysis()
    needed = planned.temp_size_in_bytes + planned.output_size_in_bytes
    assert needed >= 40_000 + 400
    monkeypatch.setattr(room, "available_bytes", lambda: needed - 1)
    check_room(compiled)  # on a CPU other processes use the memory too: what is free now says little
    monkeypatch.setattr(room, "target", lambda: "gpu")
    with pytest.raises(
        UserError, match=r"the compiled step needs \d+ kB beside .* already; found .* free; lower batch"
    ):
        check_room(compiled)
    with pytest.raises(UserError, match="lower most_together, "):
        check_room(compiled, members=3)
    monkeypatch.setattr(room, "available_bytes", lambda: needed)
    check_room(compiled)


def test_what_takes_the_place_of_an_argument_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    step = jax.jit(lambda acts_ND: acts_ND + 1.0, donate_argnums=0)
    compiled = step.lower(jax.ShapeDtypeStruct((100, 100), np.float32)).compile()
    monkeypatch.setattr(room, "target", lambda: "gpu")
    monkeypatch.setattr(room, "available_bytes", lambda: 1_000)
    check_room(compiled)


def test_a_training_checks_the_room_of_what_it_compiled(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(compiled: jax.stages.Compiled, members: int) -> None:
        raise UserError(f"{compiled.memory_analysis().temp_size_in_bytes > 0}, {members} member")

    monkeypatch.setattr("hafs_jax.training.loop.check_room", refuse)
    with pytest.raises(UserError, match="True, 1 member"):
        train(config_of(), stores.train.folder, tmp_path)
