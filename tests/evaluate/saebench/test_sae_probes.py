"""The activation cache against sae-probes' own, and SAE-Bench's sae-probes evaluation on a small case."""

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.saebench import task_activations
from hafs_evaluate.saebench.sae_probes import (
    ProbeSettings,
    check_hook_point,
    full_probe,
    pca_probes,
    probe_language_model,
    probe_sae,
)
from hafs_evaluate.saebench.suites import OFFLINE_TASKS
from hafs_evaluate.saebench.task_activations import ActivationCache, fill_cache, last_activations, read_task, task_key
from hafs_evaluate.workspace import fingerprint
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import TokenizerInfo, read_manifest
from tests.support.stores import write_store
from tests.support.tiny_models import sentence
from tests.support.torch_saes import random_sae, tiny_model

D, HOOK = 20, "blocks.2.hook_resid_post"
TASK = "117_us_state_FL"  # the smallest of sae-probes: 1,000 short texts
SETTINGS = ProbeSettings((TASK,), (1, 2, 5), "l2", 42)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def manifest(model, tmp_path):
    write_store(tmp_path / "store", np.ones((3, D), np.float32))
    manifest = read_manifest(tmp_path / "store")
    tokenizer = TokenizerInfo("tiny", 401, model.bos_token_id, True)
    info = dataclasses.replace(model.info, name="org/tiny")
    return dataclasses.replace(manifest, model=info, tokenizer=tokenizer, hook_point=HOOK)


def save_task(folder, name, texts, labels=None):
    path = folder / "cleaned_data" / f"{name}.csv.zst"
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = labels or ["yes", "no"] * len(texts)
    pandas.DataFrame({"prompt": texts, "target": labels[: len(texts)]}).to_csv(path, compression="zstd")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Two tasks that share two texts, one of them with a text twice."""
    monkeypatch.setattr(task_activations, "_data_folder", lambda: tmp_path / "data")
    first = [sentence(seed, 2 + seed % 7) for seed in range(9)]
    save_task(tmp_path / "data", "1_first", [*first, first[0]])
    save_task(tmp_path / "data", "2_second", [first[3], sentence(50, 30), first[4], sentence(51, 3)])
    return ("1_first", "2_second")


class Counting:
    """A model that counts the tokens run, and can fail after some."""

    def __init__(self, model, fail_after=10**9):
        self._model, self.tokens, self.fail_after = model, Counter(), fail_after

    def __getattr__(self, name):
        return getattr(self._model, name)

    def activations(self, tokens_BL, hook_point):
        if sum(self.tokens.values()) >= self.fail_after:
            raise KeyboardInterrupt
        self.tokens.update(tokens_BL.flatten().tolist())
        return self._model.activations(tokens_BL, hook_point)


def no_model():
    raise AssertionError("the model was loaded for what is cached")


def cached(cache, task):
    path = cache.folder / f"model_activations_{cache.model_name}" / f"{task}_{HOOK}.pt"
    return torch.load(path, weights_only=True)


def test_the_cache_equals_what_sae_probes_itself_computes(model, manifest, tasks, tmp_path):
    from sae_probes.generate_model_activations import _process_activations

    cache = fill_cache(tasks, manifest, tmp_path / "cache", lambda: model, max_tokens=16, batch_tokens=40)
    bridge = model.bridge  # its tokenizer prepends BOS and pads, as a HookedTransformer's
    longest = 0
    for task in tasks:
        texts = list(read_task(task).texts)
        longest = max(longest, *(len(ids) for ids in bridge.tokenizer(texts)["input_ids"]))
        theirs = _process_activations(bridge, texts, 3, 16, [HOOK], None, "cpu")[HOOK]
        torch.testing.assert_close(cached(cache, task), theirs, rtol=1e-4, atol=1e-5)
    assert longest > 16  # truncation, on the left, was put to the test


def test_sae_probes_finds_the_cache_and_loads_no_model(model, manifest, tasks, tmp_path):
    from sae_probes.generate_model_activations import ensure_dataset_activations

    cache = fill_cache(tasks, manifest, tmp_path / "cache", lambda: model)
    assert cache.model_name == "tiny"
    ensure_dataset_activations("tiny", list(tasks), [HOOK], cache.folder, device="none", model=object())


def test_a_shared_text_is_run_once_and_nothing_twice(model, manifest, tasks, tmp_path):
    counting = Counting(model)
    cache = fill_cache(tasks, manifest, tmp_path / "cache", lambda: counting, batch_tokens=1)
    texts = {text for task in tasks for text in read_task(task).texts}
    assert cache.tokens == sum(len(ids) + 1 for ids in model.tokenize(sorted(texts)))
    assert sum(counting.tokens.values()) == cache.tokens
    assert fill_cache(tasks, manifest, tmp_path / "cache", no_model).tokens == 0
    assert fill_cache(tasks[::-1], manifest, tmp_path / "cache", no_model).folder == cache.folder
    one = fill_cache(tasks[:1], manifest, tmp_path / "cache", no_model)
    torch.testing.assert_close(cached(one, tasks[0]), cached(cache, tasks[0]), rtol=0, atol=0)
    assert one.folder != cache.folder


def test_a_damaged_task_is_computed_again(model, manifest, tasks, tmp_path, caplog):
    whole = cached(fill_cache(tasks[:1], manifest, tmp_path / "cache", lambda: model), tasks[0])
    (file,) = (tmp_path / "cache" / "tasks").glob("*.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    again = fill_cache(tasks[:1], manifest, tmp_path / "cache", lambda: model)
    torch.testing.assert_close(cached(again, tasks[0]), whole, rtol=0, atol=0)
    assert again.tokens > 0 and "the task's activations are computed again" in caplog.text


def test_an_interrupted_fill_goes_on_with_the_next_task(model, manifest, tasks, tmp_path):
    first = sum(len(ids) + 1 for ids in model.tokenize(sorted(set(read_task(tasks[0]).texts))))
    with pytest.raises(KeyboardInterrupt):
        fill_cache(tasks, manifest, tmp_path / "cache", lambda: Counting(model, first), batch_tokens=1)
    resumed = fill_cache(tasks, manifest, tmp_path / "cache", lambda: model, batch_tokens=1)
    whole = fill_cache(tasks, manifest, tmp_path / "other", lambda: model, batch_tokens=1)
    assert resumed.tokens == whole.tokens - first
    for task in tasks:
        torch.testing.assert_close(cached(resumed, task), cached(whole, task), rtol=0, atol=0)


def test_batching_by_length_changes_nothing(model):
    ids = [np.arange(1, 2 + length % 9, dtype=np.int32) for length in range(20)]
    one_by_one = torch.cat([model.activations(torch.tensor(each[None].astype(np.int64)), HOOK)[:, -1] for each in ids])
    torch.testing.assert_close(last_activations(model, ids, HOOK, batch_tokens=30), one_by_one, rtol=1e-4, atol=1e-5)


def test_the_key_changes_with_all_that_matters(manifest, tasks):
    task = read_task(tasks[0])
    keys = [task_key(task, manifest, 16), task_key(task, manifest, 17)]
    for changes in ({"name": "other"}, {"revision": "abc"}, {"dtype": "bfloat16"}, {"origin": "hub"}):
        model = dataclasses.replace(manifest.model, **changes)
        keys.append(task_key(task, dataclasses.replace(manifest, model=model), 16))
    tokenizer = dataclasses.replace(manifest.tokenizer, prepend_bos=False)
    keys.append(task_key(task, dataclasses.replace(manifest, tokenizer=tokenizer), 16))
    keys.append(task_key(task, dataclasses.replace(manifest, hook_point="blocks.1.hook_resid_post"), 16))
    keys.append(task_key(dataclasses.replace(task, sha256="0"), manifest, 16))
    keys.append(task_key(dataclasses.replace(task, texts=task.texts[:-1]), manifest, 16))
    keys.append(task_key(read_task(tasks[1]), manifest, 16))
    assert len(set(keys)) == len(keys)
    other_seed = dataclasses.replace(manifest, seed=7, rows=8)
    assert task_key(task, other_seed, 16) == keys[0]


def test_errors_of_tasks_name_what_to_do(model, manifest, tasks, tmp_path):
    with pytest.raises(UserError, match=r"sae-probes carries no such task; did you mean '1_first'\?"):
        read_task("1_fist")
    save_task(tmp_path / "data", "3_empty", ["", "a cell"])
    with pytest.raises(UserError, match=r"3_empty: row 0 of .* has no text"):
        read_task("3_empty")
    without_bos = dataclasses.replace(manifest, tokenizer=dataclasses.replace(manifest.tokenizer, prepend_bos=False))
    mute = SimpleNamespace(tokenize=lambda texts: [np.zeros(0, np.int32)] * len(texts))
    with pytest.raises(UserError, match=r"2_second: the text '.*' has no token, so it has no activation"):
        fill_cache(["2_second"], without_bos, tmp_path / "cache", lambda: mute)
    save_task(tmp_path / "data", "4_three", ["a", "b", "c"], ["x", "y", "z"])
    with pytest.raises(UserError, match="4_three: expected a column of texts and two labels"):
        read_task("4_three")
    with pytest.raises(UserError, match=r"hook_embed: SAE-Bench.s probing reads only blocks\.<layer>\.<name>; --skip"):
        check_hook_point("hook_embed")


# SAE-Bench's own evaluation on planted activations


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Activations of TASK in which dimension 3 tells the labels apart, and dimension 5 three times out of four."""
    from sae_probes.utils_data import get_yvals

    labels = get_yvals(TASK)
    acts = np.random.default_rng(0).normal(size=(len(labels), 6)).astype(np.float32)
    acts[:, 3] += 8 * labels
    flipped = np.random.default_rng(1).random(len(labels)) < 0.25
    acts[:, 5] += 8 * (labels ^ flipped)
    folder = tmp_path_factory.mktemp("planted")
    path = folder / "model_activations_tiny" / f"{TASK}_{HOOK}.pt"
    path.parent.mkdir()
    torch.save(torch.from_numpy(acts), path)
    return ActivationCache(folder, "tiny", "planted", 0)


def sae_of(*dimensions):
    """An SAE whose latents are the activations' `dimensions`, shifted to be positive."""
    sae = random_sae(6, len(dimensions), hook=HOOK)
    W_enc = torch.zeros(6, len(dimensions))
    W_enc[list(dimensions), range(len(dimensions))] = 1
    sae.load_state_dict(
        {"W_enc": W_enc, "W_dec": W_enc.T, "b_enc": torch.full((len(dimensions),), 10.0), "b_dec": torch.zeros(6)}
    )
    return sae


def top_1(values):
    return values["eval_result_details"][0]["sae_top_1_test_accuracy"]


def test_probing_finds_what_was_planted_in_saebench_schema(planted, tmp_path):
    from sae_bench.evals.sparse_probing_sae_probes import SparseProbingSaeProbesEvalOutput

    values = probe_sae("run-abc", sae_of(0, 1, 3, 5, 2), HOOK, planted, SETTINGS, tmp_path)
    (detail,) = values["eval_result_details"]
    assert detail["dataset_name"] == TASK
    assert detail["llm_test_accuracy"] > 0.99
    assert top_1(values) > 0.99
    assert detail["sae_metrics_by_k"].keys() == {"1", "2", "5"}
    assert values.keys() == {field.name for field in dataclasses.fields(SparseProbingSaeProbesEvalOutput)}
    assert values["eval_type_id"] == "sparse_probing_sae_probes"
    assert values["sae_lens_release_id"] == "run-abc"
    assert values["sae_bench_commit_hash"].startswith("sae-bench==")
    json.dumps(values, allow_nan=False)


def test_an_sae_without_the_planted_latent_scores_lower_under_another_name(planted, tmp_path):
    good = probe_sae("run-1", sae_of(3, 5), HOOK, planted, SETTINGS_12, tmp_path)
    partial = probe_sae("run-2", sae_of(0, 5), HOOK, planted, SETTINGS_12, tmp_path)
    assert top_1(good) > 0.99
    assert 0.68 < top_1(partial) < 0.85
    stale = probe_sae("run-1", sae_of(0, 5), HOOK, planted, SETTINGS_12, tmp_path)
    assert top_1(stale) == top_1(good)  # the trap: sae-probes keeps what it has under a name


SETTINGS_12 = dataclasses.replace(SETTINGS, ks=(1, 2))


def test_settings_have_folders_of_their_own(planted, tmp_path):
    sae = sae_of(0, 5, 2)
    l2 = probe_sae("run", sae, HOOK, planted, SETTINGS_12, tmp_path)
    l1 = probe_sae("run", sae, HOOK, planted, dataclasses.replace(SETTINGS_12, penalty="l1"), tmp_path)
    seed = probe_sae("run", sae, HOOK, planted, dataclasses.replace(SETTINGS_12, seed=1), tmp_path)
    assert [values["eval_config"]["reg_type"] for values in (l2, l1, seed)] == ["l2", "l1", "l2"]
    assert top_1(seed) != top_1(l2)
    assert len(list((tmp_path / "results").iterdir())) == 3


def test_half_written_files_of_a_killed_run_are_made_anew(planted, tmp_path):
    whole = probe_sae("run", sae_of(3, 5), HOOK, planted, SETTINGS_12, tmp_path)
    torn = [path for path in (tmp_path / "results").rglob(f"*{TASK}*.json")]
    assert len(torn) == 2  # the SAE's and the language model's
    for path in torn:
        path.write_text(path.read_text()[:40])
    again = probe_sae("run", sae_of(3, 5), HOOK, planted, SETTINGS_12, tmp_path)
    assert again["eval_result_details"] == whole["eval_result_details"]


def test_the_language_models_own_probes(planted, manifest, tmp_path):
    manifest = dataclasses.replace(manifest, d_model=6)
    values = probe_language_model(manifest, planted, SETTINGS, tmp_path)
    assert values["hook_point"] == HOOK
    assert values["model"] == "org/tiny"
    probes = values["tasks"][TASK]
    assert probes.keys() == {"full", "top_1", "top_2", "top_5", "pca_1", "pca_2", "pca_5"}
    assert all(probe.keys() == {"test_accuracy", "test_auc", "test_f1"} for probe in probes.values())
    assert probes["full"]["test_accuracy"] > 0.99
    assert probes["top_5"]["test_accuracy"] > 0.99


def test_principal_components_see_the_same_split_and_go_by_variance(tmp_path):
    """The label is the second component: the first alone is chance, the two tell it wholly."""
    from sae_probes.utils_data import get_yvals

    label, random = get_yvals(TASK), np.random.default_rng(0)
    acts = random.normal(size=(len(label), 6)) * 0.3
    acts[:, :4] += random.normal(size=(len(label), 1))  # four dimensions of one cause, two of the label
    acts[:, 4:] += 2 * label[:, None] - 1
    folder = tmp_path / "cache" / "model_activations_tiny"
    folder.mkdir(parents=True)
    torch.save(torch.from_numpy(acts.astype(np.float32)), folder / f"{TASK}_{HOOK}.pt")
    cache = ActivationCache(tmp_path / "cache", "tiny", "key", 0)
    found = pca_probes(TASK, HOOK, cache, dataclasses.replace(SETTINGS, ks=(1, 2, 6, 50)), tmp_path)
    assert found.keys() == {"pca_1", "pca_2", "pca_6", "pca_50"}
    assert found["pca_1"]["test_accuracy"] < 0.75
    assert found["pca_2"]["test_accuracy"] > 0.95
    assert found["pca_50"] == found["pca_6"]  # there are only six

    sae = random_sae(6, 6, hook=HOOK)  # relu(x + 100): the activations themselves, to the language model's probe
    eye = torch.eye(6)
    sae.load_state_dict({"W_enc": eye, "W_dec": eye, "b_enc": torch.full((6,), 100.0), "b_dec": torch.zeros(6)})
    full = full_probe(probe_sae("run", sae, HOOK, cache, SETTINGS_12, tmp_path), TASK)
    assert found["pca_6"]["test_auc"] == pytest.approx(full["test_auc"], abs=0.01)


def test_saebench_leaving_something_out_is_an_error(planted, tmp_path, monkeypatch):
    probe_sae("run", sae_of(3, 5), HOOK, planted, SETTINGS_12, tmp_path)
    for path in (tmp_path / "results").rglob(f"sae_probes_tiny/*/*{TASK}*.json"):
        path.write_text(json.dumps(json.loads(path.read_text())[:1]))  # k = 2 is lost
    with pytest.raises(RuntimeError, match=rf"returned k=\[1\] for {TASK}, asked for \[1, 2\]"):
        probe_sae("run", sae_of(3, 5), HOOK, planted, SETTINGS_12, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ks": (1, 1)}, r"ks=\(1, 1\): expected at least one number, each once"),
        ({"ks": (2, 0)}, r"ks\[1\]=0: expected at least 1"),
        ({"tasks": ("a", "a")}, "expected different names"),
        ({"contexts": 0}, "contexts=0: expected at least 1"),
        ({"heldout_rows": 1}, "heldout_rows=1: expected at least 2"),
        ({"seed": -1}, "seed=-1: expected 0 to"),
        ({"suite": "standart"}, "did you mean 'standard'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        EvalConfig(**values)


def test_every_default_task_is_one_of_sae_probes():
    for task in OFFLINE_TASKS:
        assert task_activations.task_path(task).exists()


def test_fingerprints_depend_on_values_not_on_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
