"""Checkpoints of the first format, whose W_enc is [D, F], are read; those of a later one are refused."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hafs_jax.base.errors import UserError
from hafs_jax.fast.mesh import mesh_for, state_shardings
from hafs_jax.training import checkpoint
from hafs_jax.training.checkpoint import Checkpoints, load_checkpoint
from hafs_jax.training.state import TrainState
from tests.support.steps import D, F, batch, fresh, one_step, small

ENCODERS = 4  # W_enc, its average and its two moments


def trained() -> tuple[TrainState, object]:
    """A state in which nothing is zero, with an average."""
    config = small("strict", optimizer={"average": 0.9})
    state, scale = fresh(config)
    return one_step(config, state, scale, batch())[0], scale


def encoders(state: TrainState) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {checkpoint._name(path): np.asarray(leaf) for path, leaf in leaves if checkpoint._is_encoder(path)}


def in_format_1(folder: Path, state: TrainState, scale: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the state as versions up to 0.1.0 did."""

    def turned(path: tuple, leaf: jax.Array) -> jax.Array:
        return np.swapaxes(leaf, -1, -2) if checkpoint._is_encoder(path) else leaf

    plain = checkpoint._plain
    with monkeypatch.context() as patch, Checkpoints(folder) as checkpoints:
        old = jax.tree_util.tree_map_with_path(turned, plain(state, scale))  # type: ignore[arg-type]
        del old["format"]
        patch.setattr(checkpoint, "_plain", lambda *_: old)
        checkpoints.save(state, scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("square", [False, True])
def test_a_checkpoint_of_the_first_format_is_the_same_state(
    tmp_path: Path, square: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where D = F, so that the shapes alone would not tell."""
    state, scale = trained()
    if square:
        values = np.arange(F * F, dtype=np.float32).reshape(F, F)
        state = state.replace(params={**state.params, "W_enc": values})
    in_format_1(tmp_path / "old", state, scale, monkeypatch)
    with Checkpoints(tmp_path / "new") as checkpoints:
        checkpoints.save(state, scale)
    for folder in ("old", "new"):
        with Checkpoints(tmp_path / folder) as checkpoints:
            found, _ = checkpoints.restore(state, scale)
        assert len(encoders(found)) == ENCODERS
        for name, value in encoders(state).items():
            np.testing.assert_array_equal(encoders(found)[name], value, err_msg=f"{folder}: {name}")


def test_it_is_read_where_the_latents_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, scale = trained()
    in_format_1(tmp_path, state, scale, monkeypatch)
    mesh = mesh_for(dataclasses.replace(small(), batch_size=8 * jax.device_count()))
    like = jax.device_put(state, state_shardings(state, mesh))
    with Checkpoints(tmp_path) as checkpoints:
        found, _ = checkpoints.restore(like, jax.device_put(scale, NamedSharding(mesh, PartitionSpec())))
    assert found.params["W_enc"].shape == (F, D)
    assert found.params["W_enc"].sharding == like.params["W_enc"].sharding
    for name, value in encoders(state).items():
        np.testing.assert_array_equal(encoders(found)[name], value, err_msg=name)


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, scale = trained()
    with monkeypatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        patch.setattr(checkpoint, "FORMAT", 3)
        checkpoints.save(state, scale)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"has format 3, .*reads 1 to 2; install"):
        checkpoints.restore(state, scale)


def test_a_run_of_the_first_format_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    state, scale = fresh(config)
    in_format_1(tmp_path, state, scale, monkeypatch)
    found, _ = load_checkpoint(tmp_path, config, D)
    np.testing.assert_array_equal(found.params["W_enc"], state.params["W_enc"])


def two_checkpoints(folder: Path) -> tuple[TrainState, TrainState, object]:
    """The states of step 1 and 2, both saved."""
    config = small()
    state, scale = fresh(config)
    states = []
    with Checkpoints(folder) as checkpoints:
        for _ in range(2):
            state = one_step(config, state, scale, batch())[0]
            states.append(jax.tree.map(lambda leaf: leaf.copy(), state))
            checkpoints.save(state, scale)
    return states[0], states[1], scale


def damage(folder: Path, step: int) -> None:
    """Damages the checkpoint's arrays."""
    for path in (folder / str(step)).rglob("d/*"):
        path.write_bytes(bytes(len(path.read_bytes())))


def test_of_a_damaged_checkpoint_there_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Orbax reads arrays in tasks. What a second of them met is said by asyncio when its task is collected."""
    said, asyncio = "Task exception was never retrieved\nfuture: <Task coro=<{}() done>>", logging.getLogger("asyncio")
    with Checkpoints(tmp_path / "run"):
        asyncio.error(said.format("orbax/checkpoint/handlers.py: ArrayHandler.metadata"))
        asyncio.error(said.format("theirs"))
    assert caplog.messages == [said.format("theirs")]


def test_a_first_checkpoint_that_was_not_yet_on_disk_lets_the_training_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The power fails between the checkpoint's last rename and its sync. One that is damaged later is still refused."""

    class PowerFails(Exception):
        pass

    def sync_tree(_: Path) -> None:
        raise PowerFails

    state, scale = trained()
    with monkeypatch.context() as patch, Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.resume(state, scale) is None  # type: ignore[arg-type]
        patch.setattr("hafs_jax.base.process.saving.sync_tree", sync_tree)
        with pytest.raises(PowerFails):
            checkpoints.save(state, scale)  # type: ignore[arg-type]
    (step,) = [int(path.name) for path in (tmp_path / "run").glob("[0-9]*")]
    damage(tmp_path / "run", step)
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.resume(state, scale) is None  # type: ignore[arg-type]
        assert caplog.messages == [
            f"checkpoint {step} was not yet on disk when the machine stopped; the training begins anew"
        ]
        checkpoints.save(state, scale)  # type: ignore[arg-type]
    assert (tmp_path / f"run.damaged-{step}").is_dir()
    damage(tmp_path / "run", step)
    with Checkpoints(tmp_path / "run") as checkpoints, pytest.raises(UserError, match="train the run again with"):
        checkpoints.resume(state, scale)  # type: ignore[arg-type]


def test_a_note_of_the_first_checkpoint_goes_once_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the checkpoint and the note's removal leaves it: a later damage is none of that moment."""
    (state, scale), unlink = trained(), Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "first.json":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.resume(state, scale) is None  # type: ignore[arg-type]
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(state, scale)  # type: ignore[arg-type]
    assert (tmp_path / "run" / "first.json").exists()
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.resume(state, scale) is not None  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "first.json").exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, scale = two_checkpoints(tmp_path / "run")
    damage(tmp_path / "run", 2)
    with Checkpoints(tmp_path / "run") as checkpoints:
        found, _ = checkpoints.resume(second, scale)  # type: ignore[arg-type, misc]
        np.testing.assert_array_equal(found.params["W_dec"], first.params["W_dec"])
        (line,) = caplog.messages
        assert "checkpoint 2 in" in line and "damaged" in line and line.endswith("going back to checkpoint 1")
        checkpoints.save(second, scale)  # type: ignore[arg-type]
        found, _ = checkpoints.restore(second, scale, 2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.params["W_dec"], second.params["W_dec"])
    assert (tmp_path / "run.damaged-2").is_dir()


def test_a_flipped_bit_of_an_array_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing in Orbax's files shows it: here the arrays that come back are other ones."""
    _, second, scale = two_checkpoints(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        real = checkpoints._manager.restore

        def flipped(step: int, **options: object) -> object:
            tree = real(step, **options)
            bits = np.array(tree["state"]["params"]["b_dec"]).view(np.uint32)
            bits[-1] ^= 1
            tree["state"]["params"]["b_dec"] = bits.view(np.float32)
            return tree

        monkeypatch.setattr(checkpoints._manager, "restore", flipped)
        with pytest.raises(UserError, match=r"checkpoint 2 .* is damaged \(state.params.b_dec is not the array"):
            checkpoints.restore(second, scale, 2)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="train the run again"):
            checkpoints.restore(second, scale)  # type: ignore[arg-type]


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.ocp.args.StandardSave

    def of_an_earlier_version(plain: dict[str, Any]) -> Any:
        del plain["sha256"]
        return save(plain)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.args, "StandardSave", of_an_earlier_version)
        _, second, scale = two_checkpoints(tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        found, _ = checkpoints.restore(second, scale)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.params["W_dec"], second.params["W_dec"])


def test_a_finished_run_is_not_an_earlier_checkpoint(tmp_path: Path) -> None:
    _, second, scale = two_checkpoints(tmp_path)
    damage(tmp_path, 2)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoint 2 .*damaged.*remove run\.json"):
            checkpoints.restore(second, scale, 2)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"expected checkpoint 3 in .*, found 1, 2"):
            checkpoints.restore(second, scale, 3)  # type: ignore[arg-type]
