"""Several hook points in one forward pass: a profile each, the same rows in the same order, whatever befalls."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hafs_extract import passes, run
from hafs_extract.cli import main
from hafs_extract.config import ExtractConfig, parse_source
from hafs_extract.journal import is_complete, profile_names, store_folders, work_root
from hafs_extract.models import LanguageModel, load_model
from hafs_extract.parts import files
from hafs_extract.profiles import OFFLINE, resolve
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of
from hafs_jax.store import shards
from hafs_jax.store.manifest import read_manifest
from hafs_jax.store.reader import Store, check_aligned
from hafs_jax.store.verify import verify
from tests.support.tiny_models import D, save_jsonl, save_model, sentence

HOOKS = ("blocks.3.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre")
SPLITS = ("train", "heldout")
RESOLVED = resolve("offline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model m and a text t.jsonl."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "m")
    save_jsonl(folder / "t.jsonl", [{"text": sentence(n, 9 + n % 13)} for n in range(60)])
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load_model(str(folder / "m"), "float32", device="cpu")


def _config(folder: Path, **changes) -> ExtractConfig:
    fields = {"model": str(folder / "m"), "sources": (parse_source(str(folder / "t.jsonl"), ()),)}
    fields |= {"model_dtype": "float32", "dtype": "float32", "context_length": 17, "shard_rows": 150}
    fields |= {"batch_tokens": 128, "heldout_fraction": 0.25, "norm_multiple": 1.1, "hook_point": ",".join(HOOKS)}
    return dataclasses.replace(OFFLINE, **{**fields, **changes})


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The OUT in which all three hook points were extracted."""
    out = tmp_path_factory.mktemp("out")
    run.extract(_config(folder), RESOLVED, out)
    return out


def _store(out: Path, hook: str, split: str) -> Store:
    return Store(out / "offline" / hook / "store" / split)


def _all(store: Store) -> tuple[np.ndarray, np.ndarray]:
    n = range(len(store.shard_sizes))
    return np.concatenate([store.read(i) for i in n]), np.concatenate([store.rows(i) for i in n])


def _names(folder: Path) -> list[str]:
    """What lies in a folder beside its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def _digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in ("timing.json", ".lock"))
    return {str(path.relative_to(root)): sha256_of(path) for path in files}


def test_one_pass_gives_what_a_pass_for_each_gives_and_runs_no_further(model: LanguageModel) -> None:
    tokens_BL = torch.from_numpy(np.random.default_rng(0).integers(1, 300, (3, 7)))
    ran: list[int] = []
    layers = model.hf.base_model.layers
    hooks = [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers]  # of a bridge
    handles = [
        layer.register_forward_hook(lambda *_, n=number: ran.append(n), always_call=True)
        for number, layer in enumerate(layers)
    ]
    together = model.activations_at(tokens_BL, HOOKS)
    assert ran == [0, 1, 2, 3] and list(together) == list(HOOKS)
    for handle in handles:
        handle.remove()
    assert [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers] == hooks
    for hook in HOOKS:
        torch.testing.assert_close(together[hook], model.activations(tokens_BL, hook), rtol=0, atol=0)
    assert not torch.equal(together[HOOKS[0]], together[HOOKS[1]])


def test_each_hook_point_has_its_stores_of_the_same_rows_in_the_same_order(made: Path, model: LanguageModel) -> None:
    assert _names(made / "offline") == sorted(HOOKS)
    for split in SPLITS:
        first = _store(made, HOOKS[0], split)
        assert len(first) > 100
        for hook in HOOKS:
            store = _store(made, hook, split)
            assert verify(store.folder) == [] and _names(store.folder.parent) == sorted(SPLITS)
            assert store.manifest.hook_point == hook and store.manifest.config["hook_point"] == ",".join(HOOKS)
            check_aligned(first, store)
            acts, rows = _all(store)
            np.testing.assert_array_equal(rows, _all(first)[1])
            assert (rows["position"] > 0).all()  # no BOS
            layer, side = int(hook.split(".")[1]), hook[-4:]
            for number in np.unique(rows["context"])[:9]:
                tokens = torch.from_numpy(store.contexts()[number].astype(np.int64))[None]
                with torch.no_grad():
                    states = model.hf(tokens, output_hidden_states=True).hidden_states
                state = states[layer + (side == "post")][0].numpy()
                here = rows["context"] == number
                # another batch shape sums in another order
                np.testing.assert_allclose(acts[here], state[rows["position"][here]], rtol=1e-5, atol=1e-6)
        with pytest.raises(UserError, match="expected the same rows in the same order"):
            check_aligned(first, _store(made, HOOKS[0], SPLITS[split == "train"]))


def test_a_row_that_one_hook_point_drops_all_drop(made: Path, folder: Path, tmp_path: Path) -> None:
    """Against each hook point extracted alone and unfiltered, whose norms and medians say what is to stay."""
    norms, rows, acts = {}, {}, {}
    for hook in HOOKS:
        root = run.extract(_config(folder, hook_point=hook, norm_multiple=None), RESOLVED, tmp_path / hook)
        for split in SPLITS:
            acts[hook, split], rows[split] = _all(Store(root[hook][split]))
            squares = acts[hook, split].astype(np.float64) ** 2
            norms[hook, split] = np.sqrt(squares.sum(1)).astype(np.float32).astype(np.float64)
    for split in SPLITS:
        within = {hook: norms[hook, split] <= 1.1 * np.median(norms[hook, "train"]) for hook in HOOKS}
        kept = np.all(list(within.values()), axis=0)
        assert 0 < kept.sum() < min(mask.sum() for mask in within.values())  # no one hook point decides
        for hook in HOOKS:
            store = _store(made, hook, split)
            np.testing.assert_array_equal(_all(store)[0], acts[hook, split][kept])
            np.testing.assert_array_equal(_all(store)[1], rows[split][kept])
            norm_filter = store.manifest.norm_filter
            assert norm_filter.median_norm == np.median(norms[hook, "train"])
            assert norm_filter.max_norm == 1.1 * norm_filter.median_norm
            assert norm_filter.dropped_rows == (~kept).sum()


def test_one_name_alone_keeps_its_place(folder: Path, tmp_path: Path) -> None:
    one, several = _config(folder, hook_point=HOOKS[0]), _config(folder)
    assert profile_names(one) == {HOOKS[0]: "offline"} and work_root(one, tmp_path) == tmp_path / "offline" / "store"
    assert store_folders(one, tmp_path)[HOOKS[0]]["train"] == tmp_path / "offline" / "store" / "train"
    assert profile_names(several) == {hook: f"offline/{hook}" for hook in HOOKS}
    assert work_root(several, tmp_path) == tmp_path / "offline"


@pytest.mark.parametrize("hook_point", ["a,", ",a", "a,,b", "a, b", "a,b,a"])
def test_a_list_that_is_none_is_named(folder: Path, hook_point: str) -> None:
    with pytest.raises(
        UserError, match=rf"hook_point='{hook_point}': expected different names divided by commas alone"
    ):
        _config(folder, hook_point=hook_point)


class Killed(BaseException):
    """Stands for SIGKILL; buffers are flushed on the way out, so that files run ahead of the journal."""


STEPS: list[tuple[object, str]] = [
    (run, "write_journal"),
    (files, "write_atomic"),
    (passes, "write_atomic"),
    (shards, "write_npy"),
    (run, "write_manifest"),
    (Path, "rename"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_run_stopped_at_any_step_ends_with_the_same_bytes(
    folder: Path,
    model: LanguageModel,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    when: str,
) -> None:
    """Attempt n is stopped at its n-th such step, until one is not."""
    original: Callable = getattr(owner, name)
    attempt = calls = 0

    def stopping(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == attempt and when == "before":
            raise Killed
        result = original(*args, **kwargs)
        if calls == attempt:
            raise Killed
        return result

    monkeypatch.setattr(run, "load_model", lambda *_: model)
    monkeypatch.setattr(owner, name, stopping)
    config, finished = _config(folder), False
    folders = [place for splits in store_folders(config, tmp_path).values() for place in splits.values()]
    while not finished:
        attempt, calls = attempt + 1, 0
        with contextlib.suppress(Killed):
            run.extract(config, RESOLVED, tmp_path)
            finished = True
        for place in folders:  # where there is a store, it is whole; where there is a train, every heldout is
            assert not place.exists() or verify(place) == []
            assert place.name != "train" or not place.exists() or all(f.exists() for f in folders if f.name != "train")
    assert attempt > 1 and _digests(tmp_path) == _digests(made)
    assert _names(tmp_path / "offline") == sorted(HOOKS)


def test_stores_that_are_made_are_put_in_place_without_the_model(
    folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "put_in_place", stop)
        run.extract(_config(folder), RESOLVED, tmp_path)
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("the model was loaded again"))
    run.extract(_config(folder), RESOLVED, tmp_path)
    assert _digests(tmp_path) == _digests(made)


def test_stores_of_another_list_are_kept_unless_forced(folder: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out")
    out, config = tmp_path / "out", _config(folder)
    before = _digests(out)
    assert is_complete(config, out)
    fewer = _config(folder, hook_point=",".join(HOOKS[:2]))
    with pytest.raises(UserError, match=r"was extracted with hook_point='.*', not '.*'; pass --force"):
        run.extract(fewer, RESOLVED, out)
    shutil.rmtree(out / "offline" / HOOKS[1] / "store" / "heldout")
    assert not is_complete(config, out)
    run.extract(config, RESOLVED, out)
    assert _digests(out) == before
    run.extract(fewer, RESOLVED, out, force=True)
    assert read_manifest(out / "offline" / HOOKS[1] / "store" / "train").config["hook_point"] == ",".join(HOOKS[:2])
    assert _store(out, HOOKS[2], "train").manifest.config["hook_point"] == ",".join(HOOKS)  # not asked for


def test_the_command_line_notes_the_first_and_names_what_is_not_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = ["extract", "--profile", "offline", "--model", str(folder / "m"), "--text", str(folder / "t.jsonl")]
    flags += ["--heldout-fraction", "0.25", "--context-length", "17", "--out", str(tmp_path), "--hook-point"]
    with pytest.raises(SystemExit) as stopped:
        main([*flags, f"{HOOKS[0]},blocks.7.hook_resid_post"])
    assert stopped.value.code == 2
    assert "'blocks.7.hook_resid_post': " in capsys.readouterr().err
    assert main([*flags, ",".join(HOOKS[:2])]) == 0
    said = capsys.readouterr().out
    for hook in HOOKS[:2]:
        assert f"; {tmp_path}/offline/{hook}/store/train\n" in said
    assert said.count("tokens/s") == 1
    expected = {"profile": f"offline/{HOOKS[0]}", "reason": "named on the command line"}
    assert read_json(tmp_path / "auto.json", "auto") == expected

    from hafs_evaluate.workspace import open_workspace

    assert open_workspace(tmp_path, "auto").train.manifest.hook_point == HOOKS[0]
    assert open_workspace(tmp_path, f"offline/{HOOKS[1]}").heldout.manifest.hook_point == HOOKS[1]
    monkeypatch.setattr("hafs_extract.run.extract", lambda *_: pytest.fail("extracted again"))
    assert main([*flags, ",".join(HOOKS[:2])]) == 0
    assert "the stores are there already" in capsys.readouterr().err


@pytest.mark.parametrize("hook", HOOKS)
def test_rows_that_cannot_be_stored_name_their_hook_point(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    model = load_model(str(folder / "m"), "float32", device="cpu")
    whole = model.activations_at

    def broken(tokens_BL: torch.Tensor, hook_points: tuple[str, ...]) -> dict[str, torch.Tensor]:
        acts = {point: values.clone() for point, values in whole(tokens_BL, hook_points).items()}
        acts[hook][0, 2, 5] = float("inf")
        return acts

    monkeypatch.setattr(model, "activations_at", broken)
    monkeypatch.setattr(run, "load_model", lambda *_: model)
    with pytest.raises(
        UserError, match=rf"^{hook} of document \d+ .* position 2 .* value inf in dimension 5 is not fin"
    ):
        run.extract(_config(folder), RESOLVED, tmp_path)


@pytest.mark.slow
def test_hook_points_of_other_kinds_and_widths(folder: Path, tmp_path: Path) -> None:
    """A transcoder's input and target, and a wider one, through TransformerLens's bridge in one pass."""
    hooks = ("blocks.2.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.2.mlp.hook_post")
    folders = run.extract(_config(folder, hook_point=",".join(hooks)), RESOLVED, tmp_path)
    model = load_model(str(folder / "m"), "float32", device="cpu")
    widths = [D, D, model.check_hook_point(hooks[2])]
    assert widths[2] > D
    for hook, width in zip(hooks, widths, strict=True):
        store = Store(folders[hook]["train"])
        assert verify(store.folder) == [] and store.manifest.d_model == width
        check_aligned(Store(folders[hooks[0]]["train"]), store)
        acts, rows = _all(store)
        number = rows["context"][0]
        alone = model.activations(torch.from_numpy(store.contexts()[number].astype(np.int64))[None], hook)[0].numpy()
        here = rows["context"] == number
        np.testing.assert_allclose(acts[here], alone[rows["position"][here]], rtol=1e-4, atol=1e-6)
