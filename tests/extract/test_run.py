"""A whole extraction through the command line's own path: what is stored, and that no kill changes a byte of it."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from hafs_extract import compiling, models, passes, run
from hafs_extract.cli import main
from hafs_extract.config import ExtractConfig, parse_source
from hafs_extract.contexts import plan_batches
from hafs_extract.models import load_for_manifest, load_model
from hafs_extract.parts import files, making, plan
from hafs_extract.profiles import PYTHIA70M, resolve
from hafs_jax.base.errors import UserError
from hafs_jax.base.files import read_json, sha256_of
from hafs_jax.base.process.locks import locked
from hafs_jax.store import shards
from hafs_jax.store.holding import reading
from hafs_jax.store.manifest import read_manifest
from hafs_jax.store.reader import Store
from hafs_jax.store.shuffle import shuffle_keys
from hafs_jax.store.verify import verify
from tests.support.tiny_models import D, save_model, save_wikitext, save_wmdp

RESOLVED = resolve("pythia70m")
SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model and texts in the hub's schemas, on disk."""

    model: Path
    wikitext: Path
    wmdp: Path

    def flags(self, out: Path, *more: str) -> list[str]:
        """The real `pythia70m` preset's command line, pointed at local copies."""
        texts = ["--text", f"wikitext={self.wikitext}", "--text", f"wmdp-bio={self.wmdp}@0.3"]
        small = ["--context-length", "17", "--shard-rows", "300", "--batch-tokens", "256", "--dtype", "float32"]
        small += ["--heldout-fraction", "0.2", "--norm-multiple", "1.1"]
        return [
            "extract",
            "--profile",
            "pythia70m",
            "--model",
            str(self.model),
            *texts,
            *small,
            "--out",
            str(out),
            *more,
        ]

    def config(self, **changes) -> ExtractConfig:
        sources = tuple(
            parse_source(text, PYTHIA70M.sources) for text in (f"wikitext={self.wikitext}", f"wmdp-bio={self.wmdp}@0.3")
        )
        fields = {"model": str(self.model), "sources": sources, "context_length": 17, "shard_rows": 300}
        fields |= {"batch_tokens": 256, "dtype": "float32", "heldout_fraction": 0.2, "norm_multiple": 1.1}
        return dataclasses.replace(PYTHIA70M, **{**fields, **changes})


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """About two batches in a part. `made` has one part for each split: its bytes are the same."""
    monkeypatch.setattr(plan, "LEAST_BYTES", 40_000)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(save_model(folder / "m"), save_wikitext(folder / "w", 40), save_wmdp(folder / "q", 25))


@pytest.fixture(scope="module")
def made(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both stores, made through the command line."""
    out = tmp_path_factory.mktemp("out")
    assert main(inputs.flags(out)) == 0
    return out / "pythia70m" / "store"


def _extract(config: ExtractConfig, out: Path, **more) -> Path:
    ((_, folders),) = run.extract(config, RESOLVED, out, **more).items()
    return folders["train"].parent


def _all(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """All rows' activations [N, D] and descriptions [N]."""
    n = range(len(store.shard_sizes))
    return np.concatenate([store.read(i) for i in n]), np.concatenate([store.rows(i) for i in n])


def _digests(root: Path) -> dict[str, str]:
    """The checksum of every file of both stores but what time it took."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in ("timing.json", ".lock"))
    return {str(path.relative_to(root)): sha256_of(path) for path in files}


def test_both_stores_verify_and_nothing_else_is_left(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == [".lock", "heldout", "train"]
    for split in SPLITS:
        assert verify(made / split) == []
        manifest = read_manifest(made / split)
        assert manifest.split == split and manifest.d_model == D and manifest.hook_point == "blocks.3.hook_resid_post"
        assert [shard.rows for shard in manifest.shards[:-1]] == [300] * (len(manifest.shards) - 1)
        assert [source.name for source in manifest.sources] == ["wikitext", "wmdp-bio"]
        assert all(source.rows > 0 and source.documents > 0 for source in manifest.sources)
        assert manifest.profile["resolved"] == "pythia70m" and manifest.tokenizer.prepend_bos
    assert read_manifest(made / "train").rows > 900
    timing = read_json(made / "train" / "timing.json", "timing")
    assert timing["attempts"] == 1 and 0 <= timing["padding_share"] < 0.2 and timing["tokens_per_second"] > 0


def test_every_row_is_the_models_own_hidden_state(made: Path, inputs: Inputs) -> None:
    """transformers' hidden_states[4], context by context without padding, against the stored blocks.3 rows."""
    model = load_model(str(inputs.model), "float32", device="cpu")
    for split in SPLITS:
        store = Store(made / split)
        contexts, (acts, rows) = store.contexts(), _all(store)
        for number in np.unique(rows["context"])[:40]:
            tokens = torch.from_numpy(contexts[number].astype(np.int64))[None]
            with torch.no_grad():
                state = model.hf(tokens, output_hidden_states=True).hidden_states[4][0].numpy()
            here = rows["context"] == number
            # another batch shape sums in another order
            np.testing.assert_allclose(acts[here], state[rows["position"][here]], rtol=1e-5, atol=1e-6)


def test_the_splits_share_no_document_and_rows_know_their_text(made: Path, inputs: Inputs) -> None:
    model, texts = load_model(str(inputs.model), "float32", device="cpu"), {}
    for split in SPLITS:
        store = Store(made / split)
        documents, contexts = store.documents(), store.contexts()
        texts[split] = {document["sha256"] for document in documents}
        assert len(texts[split]) == len(documents)
        titled = [d for d in documents if d["source"] == "wikitext"]
        for document in titled:
            of_it = np.flatnonzero(contexts.table["document"] == document["document"])
            ids = np.concatenate([contexts[index][1:] for index in of_it])
            assert model.tokenizer.decode(ids).startswith(f" = {document['labels']['title']} = \n")
            assert len(ids) == document["tokens"]
    assert not texts["train"] & texts["heldout"]
    assert len(texts["train"] | texts["heldout"]) == 40 + 25


def test_rows_are_shuffled_reproducibly_and_by_seed(made: Path, inputs: Inputs, tmp_path: Path) -> None:
    def order(root: Path) -> np.ndarray:
        rows = _all(Store(root / "train"))[1]
        return rows["context"].astype(np.int64) * 100 + rows["position"]

    again = _extract(inputs.config(), tmp_path / "a")
    np.testing.assert_array_equal(order(again), order(made))
    ours = order(made)
    assert (np.diff(ours) == 1).mean() < 0.02  # neighbours in the text are no neighbours in the store
    spread = np.corrcoef(np.arange(len(ours)), ours)[0, 1]
    assert abs(spread) < 5 / len(ours) ** 0.5
    other = order(_extract(inputs.config(seed=1), tmp_path / "b"))
    n = min(len(ours), len(other))
    assert (ours[:n] == other[:n]).mean() < 0.02


def test_the_stored_order_is_that_of_one_shuffle_of_all_rows(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(norm_multiple=None, seed=3)
    root = _extract(config, tmp_path)
    for stream, split in enumerate(SPLITS):
        store = Store(root / split)
        contexts, rows = store.contexts(), _all(store)[1]
        batches = plan_batches(np.array(contexts.table["length"]), config.batch_tokens)
        numbers = np.concatenate([batches[index] for index in range(len(batches))])
        pairs = [(number, position) for number in numbers for position in range(1, contexts.table["length"][number])]
        expected = np.array(pairs)[np.argsort(shuffle_keys(3, stream, 0, len(pairs)))]
        np.testing.assert_array_equal(np.stack([rows["context"], rows["position"]], 1), expected)


def test_the_norm_filter_is_exact_and_the_split_of_work_does_not_matter(
    made: Path, inputs: Inputs, tmp_path: Path
) -> None:
    full = {s: _all(Store(_extract(inputs.config(norm_multiple=None), tmp_path / "full") / s)) for s in SPLITS}
    manifest = read_manifest(tmp_path / "full" / "pythia70m" / "store" / "train")
    assert manifest.norm_filter.multiple is None and manifest.norm_filter.dropped_rows == 0
    norms = {s: np.sqrt((acts.astype(np.float64) ** 2).sum(1)).astype(np.float32) for s, (acts, _) in full.items()}
    median = float(np.median(norms["train"].astype(np.float64)))
    other = _extract(inputs.config(batch_tokens=41), tmp_path / "other")
    for split in SPLITS:
        kept = norms[split].astype(np.float64) <= 1.1 * median
        assert 0 < kept.sum() < len(kept)
        manifest = read_manifest(made / split)
        assert manifest.norm_filter.median_norm == median
        assert manifest.norm_filter.dropped_rows == (~kept).sum() and manifest.rows == kept.sum()
        np.testing.assert_array_equal(_all(Store(made / split))[0], full[split][0][kept])

        # batches of 41 positions, not of 256: the numbers round differently, the estimate and the rows are the same
        manifest = read_manifest(other / split)
        assert manifest.norm_filter.median_norm == pytest.approx(median, rel=1e-6)
        rows, theirs = (np.sort(_all(Store(root / split))[1], order=["context", "position"]) for root in (made, other))
        np.testing.assert_array_equal(rows, theirs)


def test_max_rows_and_dtype_and_context_length_take_effect(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(max_rows=605, norm_multiple=None, dtype="bfloat16", context_length=9, model_dtype="bfloat16")
    root = _extract(config, tmp_path)
    manifest, store = read_manifest(root / "train"), Store(root / "train")
    assert manifest.rows == 605 and store.raw(0).dtype == np.uint16 and verify(root / "train") == []
    assert store.contexts().table["length"].max() == 9 and manifest.model.dtype == "bfloat16"


class Killed(BaseException):
    """Stands for SIGKILL; buffers are flushed on the way out, so that files run ahead of the journal."""


STEPS: list[tuple[object, str]] = [
    (run, "write_journal"),
    (making, "part_records"),
    (files, "write_atomic"),
    (files, "write_record"),
    (run, "write_contexts"),
    (shards, "write_npy"),
    (run, "write_manifest"),
    (Path, "rename"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_a_run_stopped_at_any_step_ends_with_the_same_bytes(
    inputs: Inputs, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, when: str
) -> None:
    """Attempt n is stopped at its n-th such step, until one is not. Every second batch ends a part."""
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

    model = load_model(str(inputs.model), "float32", device="cpu")
    monkeypatch.setattr(run, "load_model", lambda *_: model)
    monkeypatch.setattr(owner, name, stopping)
    root, place = None, tmp_path / "pythia70m" / "store"
    while root is None:
        attempt, calls = attempt + 1, 0
        with contextlib.suppress(Killed):
            root = _extract(inputs.config(), tmp_path)
        for split in SPLITS:  # where there is a store, it is whole; where there is train, there is heldout
            assert not (place / split).exists() or verify(place / split) == []
        assert (place / "heldout").exists() or not (place / "train").exists()
    assert attempt > 1 and _digests(root) == _digests(made)
    assert sorted(path.name for path in root.iterdir()) == [".lock", "heldout", "train"]


CHILD = """
import os, signal, sys
from hafs_extract.parts import making, plan
from hafs_jax.store import shards
plan.LEAST_BYTES = 40_000
owner, name, at = {"part": (making, "write_part"), "npy": (shards, "write_npy")}[sys.argv[1]] + (int(sys.argv[2]),)
original, calls = getattr(owner, name), 0
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == at:
        if name == "write_npy":  # amid the writing
            args[0].with_name(f".{args[0].name}.{os.getpid()}.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, dying)
from hafs_extract.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_a_run_killed_in_both_passes_ends_with_the_same_bytes(inputs: Inputs, made: Path, tmp_path: Path) -> None:
    """SIGKILL amid pass 1, then amid pass 2, each in a process of its own; then the same command to its end."""

    def attempt(step: str, at: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", CHILD, step, str(at), *inputs.flags(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1200)

    work = tmp_path / "pythia70m" / "store" / ".work"
    assert attempt("part", 3).returncode == -signal.SIGKILL
    assert [path.name for path in sorted((work / "train-parts").glob("*.json"))] == [
        "part-00000.json",
        "part-00001.json",
    ]
    killed = attempt("npy", 4)
    assert killed.returncode == -signal.SIGKILL and "going on with the extraction" in killed.stderr
    assert (work / "stores" / "blocks.3.hook_resid_post" / "train" / "shard-00000.npy").exists()
    assert main(inputs.flags(tmp_path)) == 0
    root = tmp_path / "pythia70m" / "store"
    assert _digests(root) == _digests(made)
    assert read_json(root / "train" / "timing.json", "timing")["attempts"] == 3


def test_an_existing_store_is_kept_unless_forced(inputs: Inputs, tmp_path: Path, capsys) -> None:
    root = _extract(inputs.config(max_rows=600), tmp_path)
    before = _digests(root)
    with pytest.raises(UserError, match=r"store/train was extracted with max_rows=600, not 610; pass --force"):
        _extract(inputs.config(max_rows=610), tmp_path)
    other = inputs.config(max_rows=600, sources=inputs.config().sources[::-1])
    with pytest.raises(UserError, match=r"extracted with sources\[0\].name='wikitext', not 'wmdp-bio'"):
        _extract(other, tmp_path)
    monitored = (root / "train" / "manifest.json").stat().st_mtime_ns
    assert _digests(_extract(inputs.config(max_rows=600), tmp_path)) == before
    assert (root / "train" / "manifest.json").stat().st_mtime_ns == monitored
    assert _digests(_extract(inputs.config(max_rows=610), tmp_path, force=True)) != before
    assert read_manifest(root / "train").config["max_rows"] == 610


def test_unfinished_work_of_another_config_is_kept_unless_forced(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def stop(*_):
            raise Killed

        patch.setattr(run, "write_stores", stop)
        with pytest.raises(Killed):
            _extract(inputs.config(), tmp_path)
    with pytest.raises(UserError, match=r"unfinished extraction with seed=0, not 1; pass --force to discard it"):
        _extract(inputs.config(seed=1), tmp_path)
    root = _extract(inputs.config(seed=1), tmp_path, force=True)
    assert read_manifest(root / "train").seed == 1


def test_two_extractions_do_not_share_a_folder(inputs: Inputs, tmp_path: Path) -> None:
    root = tmp_path / "pythia70m" / "store"
    with locked(root / ".lock", "an extraction", root), pytest.raises(UserError, match="an extraction is at work on"):
        _extract(inputs.config(), tmp_path)


def test_a_store_that_is_read_is_not_replaced(inputs: Inputs, tmp_path: Path) -> None:
    root = _extract(inputs.config(), tmp_path)
    refused = pytest.raises(UserError, match=f"{root}: a training is at work on it .*; wait for it")
    with reading([Store(root / "train")], "a training"), refused:
        _extract(inputs.config(seed=1), tmp_path, force=True)
    assert _extract(inputs.config(seed=1), tmp_path, force=True) == root


def test_too_little_space_is_said_before_the_model_runs(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    monkeypatch.setattr(making, "part_records", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=r"needs 0\.\d GB of free disk space .* found 0.0 GB; free some"):
        _extract(inputs.config(), tmp_path)


@pytest.mark.parametrize(
    ("asked", "least", "calls"), [("on", 10**9, 1), ("auto", 1, 1), ("auto", 10**9, 0), ("off", 1, 0)]
)
def test_blocks_are_compiled_where_it_is_asked_for_or_pays(
    inputs: Inputs, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, least: int, calls: int
) -> None:
    found: list[tuple] = []
    monkeypatch.setattr(compiling, "COMPILED_FROM_TOKENS", least)
    monkeypatch.setattr(models.LanguageModel, "compile_blocks", lambda _, *asked: found.append(asked))
    root = _extract(inputs.config(compile=asked), tmp_path)
    assert found == [(("blocks.3.hook_resid_post",), (15, 17))] * calls  # 256 tokens in contexts of 17
    timing = read_json(root / "train" / "timing.json", "timing")
    assert timing["compiled"] == ("compile" in timing["seconds_by_stage"]) == bool(calls)


def test_what_cannot_be_compiled_is_an_error_only_where_it_was_asked_for(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hafs_extract")

    def fail(*_: object) -> None:
        raise UserError("no compiler")

    monkeypatch.setattr(compiling, "COMPILED_FROM_TOKENS", 1)
    monkeypatch.setattr(models.LanguageModel, "compile_blocks", fail)
    with pytest.raises(UserError, match="compile=on: no compiler; pass --compile auto"):
        _extract(inputs.config(compile="on"), tmp_path / "asked")
    with pytest.raises(UserError, match="batch_tokens=33 is less than two contexts of 17 tokens"):
        _extract(inputs.config(compile="on", batch_tokens=33), tmp_path / "long")
    with pytest.raises(UserError, match=r"compile=on: hook point blocks.1.mlp.hook_post is not of the residual stream"):
        _extract(inputs.config(compile="on", hook_point="blocks.1.mlp.hook_post"), tmp_path / "bridge")
    root = _extract(inputs.config(), tmp_path / "auto")
    assert "the model's blocks are not compiled: no compiler" in caplog.text
    assert read_json(root / "train" / "timing.json", "timing")["compiled"] is False


@pytest.mark.parametrize("fails", [False, True])
def test_rows_are_stored_beside_the_models_next_batch_where_it_has_a_device_of_its_own(
    inputs: Inputs, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr(passes, "_overlaps", lambda _: True)
    if fails:
        monkeypatch.setattr(passes, "_store", lambda *_: (_ for _ in ()).throw(UserError("a row that is not finite")))
        with pytest.raises(UserError, match="a row that is not finite"):
            _extract(inputs.config(), tmp_path)
    else:
        assert _digests(_extract(inputs.config(), tmp_path)) == _digests(made)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, "float16", r"value 1e\+06 in dimension 3 does not fit into float16; say --dtype bfloat16"),
        (float("nan"), "float32", r"value nan in dimension 0 is not finite"),
    ],
)
def test_rows_that_cannot_be_stored_are_named(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: str, message: str
) -> None:
    model = load_model(str(inputs.model), "float32", device="cpu")
    token = int(model.tokenize(["cell"])[0][-1])
    with torch.no_grad():
        model.hf.base_model.embed_in.weight[token, 3] = value
    monkeypatch.setattr(run, "load_model", lambda *_: model)
    where = r"blocks.3.hook_resid_post of document \d+ of the train split \(source w\S+\), position \d+ of context"
    with pytest.raises(UserError, match=f"{where}.*{message}"):
        _extract(inputs.config(dtype=dtype), tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_norm_filter_that_drops_all_is_an_error(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"norm_multiple=0.001 drops every row of the train split"):
        _extract(inputs.config(norm_multiple=0.001), tmp_path)


def test_another_model_under_the_same_name_is_not_gone_on_with(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_part", stop)
        with pytest.raises(Killed):
            _extract(inputs.config(), tmp_path)
    model = load_model(str(inputs.model), "float32", device="cpu")
    model.info = dataclasses.replace(model.info, revision="another")
    monkeypatch.setattr(run, "load_model", lambda *_: model)
    with pytest.raises(
        UserError, match=r"the interrupted extraction used .* found .*another.*; delete .* to begin anew"
    ):
        _extract(inputs.config(), tmp_path)


@pytest.fixture
def own(inputs: Inputs, tmp_path: Path) -> Inputs:
    """Inputs with a model of their own, to change."""
    return dataclasses.replace(inputs, model=shutil.copytree(inputs.model, tmp_path / "own"))


def _change_a_weight(model: Path) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    weights["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"][3] += 0.5
    save_file(weights, path, {"format": "pt"})


def test_weights_that_change_are_noticed_by_a_resumed_extraction(
    own: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_part", stop)
        with pytest.raises(Killed):
            _extract(own.config(), tmp_path / "out")
    _change_a_weight(own.model)
    with pytest.raises(UserError, match=r"own: config, tokenizer or weights have changed: the interrupted extraction"):
        _extract(own.config(), tmp_path / "out")


def test_weights_that_change_are_noticed_by_the_same_command_and_by_evaluation(own: Inputs, tmp_path: Path) -> None:
    folder = _extract(own.config(), tmp_path / "out")
    manifest = read_manifest(folder / "train")
    assert _extract(own.config(), tmp_path / "out") == folder
    load_for_manifest(manifest, device="cpu")
    _change_a_weight(own.model)
    with pytest.raises(UserError, match=r"train was extracted with another model at .*own .*; put them back, or pass"):
        _extract(own.config(), tmp_path / "out")
    with pytest.raises(UserError, match=r"weights have changed: the store was made by .*; put the files back"):
        load_for_manifest(manifest, device="cpu")
    _extract(own.config(), tmp_path / "out", force=True)
    load_for_manifest(read_manifest(folder / "train"), device="cpu")
    shutil.rmtree(own.model)
    assert _extract(own.config(), tmp_path / "out") == folder  # the stores are there, and whole


def test_text_that_changes_is_noticed(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an extraction that goes on and by one that has nothing to do; `force` takes the new text."""
    out, changing = tmp_path / "out", dataclasses.replace(inputs, wmdp=shutil.copytree(inputs.wmdp, tmp_path / "q"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_stores", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            _extract(changing.config(), out)
    save_wmdp(changing.wmdp, 24)
    with pytest.raises(
        UserError, match=r"an unfinished extraction: .*q has changed since .*; put it back, or pass --f"
    ):
        _extract(changing.config(), out)
    folder = _extract(changing.config(), out, force=True)
    manifest = read_manifest(folder / "train")
    assert sum(source.documents for source in manifest.sources if source.name == "wmdp-bio") <= 24
    assert all(len(source.fingerprint or "") == 64 for source in manifest.sources)
    assert _extract(changing.config(), out) == folder
    save_wmdp(changing.wmdp, 25)
    with pytest.raises(UserError, match=r"was extracted from other text: .*q has changed since .*; put it back, o"):
        _extract(changing.config(), out)
    _extract(changing.config(), out, force=True)
    shutil.rmtree(changing.wmdp)
    assert _extract(changing.config(), out) == folder  # the stores are there, and whole


def test_a_model_that_sees_what_follows_is_refused(own: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = {"hidden_size": D, "intermediate_size": 14, "num_hidden_layers": 5, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=401, max_position_embeddings=64, **sizes)).save_pretrained(own.model)
    with pytest.raises(SystemExit) as stopped:
        main(own.flags(tmp_path / "out"))
    assert stopped.value.code == 2 and "is not causal at blocks.3.hook_resid_post" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("manifest.json"))
