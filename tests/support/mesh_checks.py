"""Checks of trainings on meshes. They need four devices, so they run in processes that have them: `run`."""

import json
import re
import shutil
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hafs_jax import load, preset, train, with_fields
from hafs_jax.config import TrainConfig
from hafs_jax.fast import hinge, lanes, plan
from hafs_jax.fast import mesh as meshes
from hafs_jax.fast.mesh import BATCHES, make_mesh, split, state_shardings
from hafs_jax.method.penalties import Structure
from hafs_jax.method.sae import InputScale, unit_rows
from hafs_jax.ops import selection
from hafs_jax.ops.axes import LATENT, OWNERS, Axes
from hafs_jax.store.arrays import write_array_store
from hafs_jax.targets.traffic import messages
from hafs_jax.training.data import input_scale
from hafs_jax.training.loop import Stores, first_state
from hafs_jax.training.programs import compile_steps
from hafs_jax.training.state import hyperparameters, init_state
from hafs_jax.training.train import open_stores, resolve
from tests.support.meshes import compare, config_of


def steps_by_active_latents() -> None:
    compare(config_of("adaptive", "topk", products="sparse"), (Axes(1, 4),))


def steps_with_kernels() -> None:
    """Each device's kernels sum over its own rows, for its own latents."""
    config, axes = config_of("adaptive", "topk", products="sparse", kernels="on"), Axes(2, 2)
    assert plan.choose(config, axes=axes).kernels == "interpreted"
    compare(config, (axes,))


def steps_with_resampling() -> None:
    fields = {"resample_every_steps": 2, "resample_until": 1.0}
    compare(config_of("adaptive", "batchtopk", sparsity=fields), (Axes(2, 2),))


def steps_in_blocks_of_rows() -> None:
    with mock.patch.dict(plan._BLOCK_BYTES, {"cpu": 4 * 32 * 2}):
        compare(config_of("adaptive", "relu", penalty={"sharing": "parent", "parents": 9}), (Axes(4, 1),))


def ties() -> None:
    """Rows full of equal numbers: the same entries are chosen as on one device, the first of equal ones."""
    values = jnp.round(jax.nn.relu(jax.random.normal(jax.random.key(0), (8, 64))), 0)
    nothing = jnp.zeros(64)
    for axes in (Axes(2, 2),):

        def mask(entries: selection.Entries, shape: tuple[int, ...]) -> jax.Array:
            return jnp.zeros(shape, bool).at[entries.rows_N, entries.columns_N].max(entries.real_N)

        def found(values: jax.Array, offset: jax.Array, axes: Axes) -> tuple[jax.Array, ...]:
            B, here = len(values) * axes.data, values.size if axes.devices > 1 else None
            rows = mask(selection.largest_of_rows(values, offset, 6, 5, axes), values.shape)
            every = mask(selection.largest_of_all(values, offset, 6 * B, 5 * B, axes, here), values.shape)
            threshold = selection.batch_threshold(values, 6 * B, 5 * B, axes)
            return rows, every, values >= threshold, values >= selection.largest_values(values, 6, axes)[:, 4:5]

        rows = P("data", LATENT)
        whole = jax.jit(split(partial(found, axes=axes), make_mesh(axes), (rows, P(LATENT)), rows))(values, nothing)
        expected = jax.jit(partial(found, axes=Axes()))(values, nothing)
        assert int(expected[0].sum()) == 5 * 8  # each row has as many positive entries, and more that equal the last
        for number in (0, 2, 3):
            np.testing.assert_array_equal(whole[number], expected[number])
        np.testing.assert_array_equal(whole[1], expected[2])  # ties at the threshold are all taken


def lanes_that_overflow() -> None:
    """A penalty whose rows take several turns to travel equals that of one device, at each sharing of directions."""
    F, D, axes = 48, 5, Axes(2, 2)
    W_FD, key = unit_rows(jax.random.normal(jax.random.key(0), (F, D))), jax.random.key(3)
    structure = Structure(jnp.arange(F, dtype=jnp.int32) // 5, jax.random.uniform(jax.random.key(1), (F,)))
    for fields in ({"sharing": "contiguous", "yielding": "rarer"},):
        config = config_of("adaptive", "topk", penalty={"chunk_size": 7, "mu0": 0.05, **fields}).penalty

        def penalty(W_OD: jax.Array, structure: Structure, axes: Axes, config: Any = config) -> tuple[Any, Any]:
            chosen = plan.choose(config_of("adaptive", "topk"), axes=axes)
            return hinge.penalty_and_gradient(W_OD, jnp.float32(0.4), structure, 0.05, config, key, chosen)

        with mock.patch.object(lanes, "lane_rows", lambda owned, devices: 2):
            specs = (P(OWNERS), P()), (P(), P(OWNERS))
            found = jax.jit(split(partial(penalty, axes=axes), make_mesh(axes), *specs))(W_FD, structure)
        for one, other in zip(penalty(W_FD, structure, Axes()), found, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


_BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2}


def collectives(program: str) -> list[tuple[str, int]]:
    """The kind and the bytes of the result of each collective in a compiled program's text."""
    found = []
    pattern = r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for shapes, kind in re.findall(pattern, program):
        sizes = re.findall(r"(pred|s32|u32|f32|bf16)\[([\d,]*)\]", shapes)
        size = sum(_BYTES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in sizes)
        found.append((kind, size))
    return found


def program(config: TrainConfig, D: int, axes: Axes) -> Any:
    """One compiled step."""
    hyper, mesh = hyperparameters(config), make_mesh(axes)
    state = jax.eval_shape(lambda: init_state(config, D, jax.random.key(0), hyper))
    spread = state_shardings(state, mesh)
    state = jax.tree.map(lambda leaf, on: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on), state, spread)
    rows = jax.ShapeDtypeStruct((1, config.batch_size, D), "float32", sharding=jax.NamedSharding(mesh, BATCHES))
    scale = InputScale(jnp.zeros(D), jnp.float32(1), jnp.float32(1))
    return compile_steps(spread).lower(state, rows, scale, hyper, config).compile()


def traffic() -> None:
    """What devices tell each other is what `messages` says, to the byte, and nothing as large as B x F or F x D."""
    B, D, F = 256, 64, 4096
    for variant, architecture, axes in (("adaptive", "topk", Axes(2, 2)), ("baseline", "batchtopk", Axes(1, 4))):
        config = config_of(
            variant, architecture, sae={"n_latents": F, "k": 8}, penalty={"chunk_size": 128}, sparsity={"aux": 0.0},
            batch_size=B, tokens=5 * B,
        )  # fmt: skip
        found = collectives(program(config, D, axes).as_text())
        small = 16 * 1024  # below it lie numbers, vectors of F, and what XLA puts together with them
        sizes = sorted((kind, size) for kind, size in found if size >= small)
        told = messages(config, D, D, axes)
        expected = [(one.kind, one.size) for one in told for _ in range(one.times) if one.size >= small]
        assert sizes == sorted(expected), (axes, sizes, expected)
        assert max(size for _, size in sizes) <= 4 * F * D // axes.latent < 4 * B * F
        assert all(size < 4 * F * D for _, size in sizes)


def shards() -> None:
    """A state that starts or is restored on a mesh is never whole on a device, nor is it while it is made."""
    with tempfile.TemporaryDirectory() as folder:
        stores = open_stores(_store(Path(folder)))
        config, _ = resolve(_config("data=2,latent=2", n_latents=4096), stores.train, Path(folder))
        mesh, scale, hyper = meshes.mesh_for(config), input_scale(stores.train), hyperparameters(config)
        for centre in ("mean", "geometric_median"):
            state = first_state(with_fields(config, {"sae": {"centre": centre}}), stores, scale, hyper, mesh)
            _check_spread(state)
        alone = first_state(with_fields(config, {"sae": {"centre": centre}}), stores, scale, hyper)
        for one, other in zip(jax.tree.leaves(alone.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        _made_in_parts(config, stores, hyper, mesh)


def _made_in_parts(config: TrainConfig, stores: Stores, hyper: Any, mesh: Any) -> None:
    from hafs_jax.training.loop import _fresh

    start = partial(_fresh, config, stores, hyper)
    spread = state_shardings(jax.eval_shape(start), mesh)
    compiled: Any = jax.jit(start, out_shardings=spread).lower().compile()
    whole = 4 * config.sae.F * stores.train.manifest.d_model
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * whole // 4 + 4096


def _check_spread(state: Any) -> None:
    matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert len(matrices) == 6  # two, and two moments of each
    for leaf in matrices:
        assert len(leaf.addressable_shards) == 4
        assert all(shard.data.size == leaf.size // 4 for shard in leaf.addressable_shards)


def other_meshes() -> None:
    """A run of four devices goes on with four to the same bits, and with two and one to the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        store, place = _store(Path(folder)), Path(folder) / "runs"
        run = train(_config("data=2,latent=2"), store, place, progress=False)
        whole = {name: np.asarray(value) for name, value in load(run.folder).params.items()}
        saved = sorted(int(path.name) for path in run.checkpoints.iterdir())
        assert saved == [10, 20], saved
        for mesh, devices in (("latent=2", 4), ("latent=2", 2), ("", 1)):
            shutil.rmtree(run.checkpoints / "20")
            run.result_path.unlink()
            restored: list[int] = []
            with (
                mock.patch.object(meshes, "all_devices", lambda n=devices: jax.devices()[:n]),
                mock.patch("hafs_jax.training.loop.compile_steps", _noting(restored)),
            ):
                train(_config(mesh), store, place, progress=False)
            assert restored == [devices]
            for name, value in load(run.folder).params.items():
                np.testing.assert_allclose(value, whole[name], atol=0 if devices == 4 else 1e-5, rtol=0)


def _noting(states: list[int]) -> Any:
    """`compile_steps`, whose program notes on how many devices the state that it is lowered for lies in parts."""

    def compiled(*arguments: Any) -> Any:
        made = compile_steps(*arguments)
        lower = made.lower

        class Program:
            def __call__(self, *given: Any) -> Any:
                return made(*given)

            def lower(self, state: Any, *given: Any) -> Any:
                leaf = state.params["W_dec"]
                parts = leaf.addressable_shards
                assert all(len(parts) * part.data.size == leaf.size for part in parts)
                states.append(len(parts))
                return lower(state, *given)

        return Program()

    return compiled


def _store(folder: Path) -> Path:
    acts = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    return write_array_store(folder / "made", acts)["train"]


def _config(mesh: str, n_latents: int = 16) -> TrainConfig:
    fields = {"tokens": 64 * 20, "batch_size": 64, "steps_per_dispatch": 5, "checkpoint_every_steps": 10}
    held = {"evaluate_every_steps": 10, "heldout_rows": 48}
    fields |= {"mesh": mesh, "sae": {"n_latents": n_latents, "k": 2}, **held}
    return with_fields(preset("baseline", "topk"), fields)


def run(*names: str) -> None:
    """Prints {check: traceback, or nothing where it passes}."""
    outcomes = {}
    for name in names:
        try:
            globals()[name]()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))
