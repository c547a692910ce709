"""SAE-Bench's standard sparse probing on a small case: local texts in the place of the hub's datasets."""

import dataclasses

import jaxtyping
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from hafs_evaluate.config import EvalConfig
from hafs_evaluate.saebench import hub_texts
from hafs_evaluate.saebench import standard as saebench_standard
from hafs_evaluate.saebench.datasets import PROBING_DATASETS, ProbingDataset
from hafs_evaluate.saebench.standard import StandardProbing
from hafs_extract.hub.files import Fetch, HubFile
from hafs_jax.base.errors import UserError
from hafs_jax.store.manifest import TokenizerInfo, read_manifest
from tests.support.stores import write_store
from tests.support.tiny_models import WORDS, save_parquet
from tests.support.torch_saes import random_sae, tiny_model

D, HOOK = 20, "blocks.2.hook_resid_post"
DATASETS = ("local/words", "local/places")
NAMES = [f"{name}_results" for name in DATASETS]  # what SAE-Bench calls them in its output


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: on busy cores, threads waiting for each other would take most of the time."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def manifest(model, tmp_path):
    write_store(tmp_path / "store", np.ones((3, D), np.float32))
    tokenizer = TokenizerInfo("tiny", 401, model.bos_token_id, True)
    info = dataclasses.replace(model.info, name="org/tiny")
    manifest = read_manifest(tmp_path / "store")
    return dataclasses.replace(manifest, model=info, tokenizer=tokenizer, hook_point=HOOK)


@pytest.fixture
def local_datasets(monkeypatch):
    """Two datasets of two classes, each class with words of its own; SAE-Bench's functions know no others."""
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    asked = []

    def texts(seed, words, count):
        random = np.random.default_rng(seed)
        return [" ".join(random.choice(words, 5 + index % 4)) for index in range(count)]

    def data(name, train_size, test_size, random_seed):
        asked.append((name, train_size, test_size, random_seed))
        classes = enumerate({"a": WORDS[:9], "b": WORDS[9:]}.items())
        train, test = {}, {}
        for seed, (label, words) in classes:
            train[label], test[label] = texts(seed, words, 48), texts(seed + 10, words, 16)
        return train, test

    monkeypatch.setattr(dataset_utils, "get_multi_label_train_test_data", data)
    monkeypatch.setattr(dataset_info, "chosen_classes_per_dataset", {name: ["a", "b"] for name in DATASETS})
    return asked


def suite(manifest, model, root, **changes):
    return StandardProbing(manifest, model, **{"datasets": DATASETS, "ks": (1, 5), "seed": 42, "root": root, **changes})


def sae():
    return random_sae(D, 33, hook=HOOK)


def scores(values):
    return values["eval_result_metrics"], values["eval_result_details"]


def test_scores_in_saebench_schema_with_the_original_config(model, manifest, local_datasets, tmp_path):
    from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput

    probing = suite(manifest, model, tmp_path / "saebench")
    values = probing.score("run-abc", sae())
    assert values.keys() == {field.name for field in dataclasses.fields(SparseProbingEvalOutput)}
    assert values["eval_type_id"] == "sparse_probing"
    assert [detail["dataset_name"] for detail in values["eval_result_details"]] == NAMES
    for detail in values["eval_result_details"]:
        assert detail["llm_test_accuracy"] > 0.8
        assert 0.5 <= detail["sae_top_1_test_accuracy"] <= detail["sae_top_5_test_accuracy"] + 0.1
    assert set(local_datasets) == {(name, 4000, 1000, 42) for name in DATASETS}
    assert values["eval_config"]["context_length"] == 128
    llm = probing.language_model(values)
    assert list(llm["tasks"]) == NAMES
    assert llm["tasks"][NAMES[0]].keys() == {"full", "top_1", "top_5", "pca_1", "pca_5"}
    for task in llm["tasks"].values():
        assert task["pca_5"]["test_accuracy"] >= max(0.75, task["pca_1"]["test_accuracy"] - 0.1)
    assert probing.language_model(values) == llm


def test_the_cache_is_filled_first_so_that_every_sae_is_scored_alike(model, manifest, local_datasets, tmp_path):
    probing = suite(manifest, model, tmp_path / "saebench")
    first = probing.score("run-1", sae())
    assert len(local_datasets) == 2
    second = probing.score("run-2", sae())
    assert len(local_datasets) == 2
    assert scores(first) == scores(second)
    assert probing.bytes_needed() == 0


def test_an_interrupted_fill_leaves_nothing_half_made(model, manifest, local_datasets, tmp_path, monkeypatch):
    probing = suite(manifest, model, tmp_path / "saebench")
    whole = torch.save

    def killed(values, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        probing.score("run", sae())
    monkeypatch.setattr(torch, "save", whole)
    again = probing.score("run", sae())
    assert scores(again) == scores(suite(manifest, model, tmp_path / "fresh").score("run", sae()))


def test_folders_differ_with_all_that_matters(model, manifest, local_datasets, tmp_path):
    root = tmp_path / "saebench"
    base = suite(manifest, model, root)
    others = [
        suite(manifest, model, root, ks=(1, 2)),
        suite(manifest, model, root, seed=7),
        suite(dataclasses.replace(manifest, hook_point="blocks.1.hook_resid_post"), model, root),
        suite(dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, dtype="float16")), model, root),
    ]
    assert len({probing._folder for probing in [base, *others]}) == 5
    fewer = suite(manifest, model, root, datasets=DATASETS[:1])
    assert fewer._folder == base._folder  # a dataset's cache serves whatever others are asked for
    assert base.bytes_needed() == 2 * fewer.bytes_needed() == 2 * 2 * 2500 * 128 * D * 4


def test_the_model_sees_bos_first_and_padding_on_the_right(model, manifest, tmp_path):
    tokenizer = saebench_standard._Adapter(model).tokenizer
    long = " ".join(WORDS * 9)
    ids = tokenizer(["the cell", long], padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    theirs = model.bridge.tokenizer(
        ["the cell", long], padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    )
    torch.testing.assert_close(ids.to("cpu").data["input_ids"], theirs["input_ids"])
    assert tokenizer.pad_token_id == model.bridge.tokenizer.pad_token_id


def test_what_was_replaced_in_saebench_is_put_back(model, manifest, local_datasets, tmp_path):
    from sae_bench.evals.sparse_probing import main
    from sae_bench.sae_bench_utils import dataset_utils

    before = main.HookedTransformer, dataset_utils.load_dataset, jaxtyping.config.jaxtyping_disable
    was_recording = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    suite(manifest, model, tmp_path / "saebench", datasets=DATASETS[:1]).score("run", sae())
    assert not torch.is_grad_enabled()
    torch.set_grad_enabled(was_recording)
    assert (main.HookedTransformer, dataset_utils.load_dataset, jaxtyping.config.jaxtyping_disable) == before


def test_github_code_is_read_from_parquet_with_its_language(tmp_path, monkeypatch):
    files = ["a/b.py", "c.h", "d.PY", "Makefile", "x.php5", "y.html", "z.cpp", "Main.java"]
    save_parquet(tmp_path / "train-0.parquet", [{"path": name, "content": f"code of {name}"} for name in files])
    monkeypatch.setattr(hub_texts, "GITHUB_CODE_FILES", str(tmp_path / "train-*.parquet"))
    monkeypatch.setattr(hub_texts, "repository", lambda kind, name: ("ab" * 20, {}))
    texts = hub_texts.HubTexts(tmp_path / "commits.json")
    flags = {"streaming": True, "split": "train", "trust_remote_code": True, "languages": ["C"]}
    rows = list(texts.load("codeparrot/github-code", **flags))
    assert [row["language"] for row in rows] == ["Python", "C", "PHP", "HTML", "Java"]
    assert rows[0]["code"] == "code of a/b.py"
    assert texts.commits(["codeparrot/github-code", "fancyzhx/ag_news"]) == {"codeparrot/github-code": "ab" * 20}


def test_a_dataset_is_read_in_the_commit_that_was_noted(tmp_path, monkeypatch):
    asked = []

    def plan_split(name, subset, split, revision):
        asked.append((name, split, revision))
        save_parquet(tmp_path / "snapshots" / "c1" / f"{split}.parquet", [{"text": split}])
        return Here("dataset", name, "c1", (HubFile(f"{split}.parquet"),))

    class Here(Fetch):
        @property
        def folder(self):
            return tmp_path / "snapshots" / self.commit

    monkeypatch.setattr(hub_texts, "plan_split", plan_split)
    texts = hub_texts.HubTexts(tmp_path / "commits.json")
    found = texts.load("LabHC/bias_in_bios")
    assert {split: table["text"].tolist() for split, table in found.items()} == {"train": ["train"], "test": ["test"]}
    assert asked == [("LabHC/bias_in_bios", "train", None), ("LabHC/bias_in_bios", "test", "c1")]
    hub_texts.HubTexts(tmp_path / "commits.json").load("LabHC/bias_in_bios")
    assert {revision for _, _, revision in asked[2:]} == {"c1"}
    assert texts.commits(["LabHC/bias_in_bios_class_set1", "LabHC/bias_in_bios_class_set2"]) == {
        "LabHC/bias_in_bios": "c1"
    }


def test_errors_name_what_to_do(model, manifest, local_datasets, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"SAE-Bench has none of that name; did you mean 'local/words'\?"):
        suite(manifest, model, tmp_path, datasets=("local/word",))

    def refused(*args):
        raise UserError("dataset x cannot be had: no route to the hub")

    monkeypatch.setattr(hub_texts, "plan_split", refused)
    with pytest.raises(UserError, match=r"no route to the hub; or take --suite sae_probes, whose tasks need no hub"):
        hub_texts.HubTexts(tmp_path / "none").load("fancyzhx/ag_news")


def test_the_sizes_are_saebenchs_or_smaller(model, manifest, local_datasets, tmp_path):
    small = suite(manifest, model, tmp_path / "saebench", datasets=DATASETS[:1], train_texts=40, test_texts=20)
    whole = suite(manifest, model, tmp_path / "saebench", datasets=DATASETS[:1])
    assert (small.bytes_needed(), whole.bytes_needed()) == (2 * 30 * 128 * D * 4, 2 * 2500 * 128 * D * 4)
    assert small._folder != whole._folder
    values = small.score("run", sae())
    assert local_datasets == [(DATASETS[0], 40, 20, 42)]
    assert values["eval_config"]["probe_train_set_size"] == 40
    with pytest.raises(UserError, match=r"probe_train_texts=42: expected a multiple of 4"):
        EvalConfig(probe_train_texts=42)
    with pytest.raises(UserError, match=r"probe_test_texts=1004: expected 20 to 1,?000"):
        EvalConfig(probe_test_texts=1004)


def test_a_registered_dataset_is_probed_beside_saebenchs_own(model, manifest, local_datasets, tmp_path, monkeypatch):
    from sae_bench.sae_bench_utils import dataset_info, dataset_utils

    before = dataset_utils.get_multi_label_train_test_data, dataset_info.chosen_classes_per_dataset
    rows = [
        (" ".join(np.random.default_rng(n).choice(WORDS[:9] if n % 2 else WORDS[9:], 20)), "ab"[n % 2])
        for n in range(120)
    ]
    monkeypatch.setitem(PROBING_DATASETS, "mine", ProbingDataset("mine", "made up", lambda: rows))
    probing = suite(manifest, model, tmp_path / "saebench", datasets=(DATASETS[0], "mine"))
    values = probing.score("run", sae())
    names = [detail["dataset_name"] for detail in values["eval_result_details"]]
    assert names == [NAMES[0], "mine_results"]
    assert values["eval_result_details"][1]["llm_test_accuracy"] > 0.8
    folder = probing._folder
    assert folder != suite(manifest, model, tmp_path / "saebench", datasets=DATASETS[:1])._folder
    monkeypatch.setitem(PROBING_DATASETS, "mine", ProbingDataset("mine", "other texts", lambda: rows[:100]))
    assert probing._folder != folder
    assert (dataset_utils.get_multi_label_train_test_data, dataset_info.chosen_classes_per_dataset) == before
