"""SAEDashboard's and Neuronpedia's files: against the former's own classes where installed, else its frozen keys."""

import gzip
import inspect
import json
from datetime import UTC, datetime

import pytest

from hafs_evaluate.cli import main
from hafs_evaluate.exchange.neuronpedia import EMPTY, write_neuronpedia
from hafs_evaluate.latents.dashboards import LatentsConfig, show_latents, write_latents
from hafs_jax.base.files import read_json, write_json
from tests.support.shuffled_store import D, F, shuffled_store, tiny_tokenizer
from tests.support.torch_saes import random_sae

# the arguments of sae_dashboard 0.8.0's NeuronpediaDashboardFeature, -Activation and -Batch
FEATURE = {
    *EMPTY, "feature_index", "correlated_features_indices", "correlated_features_pearson", "neg_str", "neg_values",
    "pos_str", "pos_values", "frac_nonzero", "n_prompts_total", "n_tokens_in_prompt", "dataset", "vector",
    "activations",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
BATCH = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
# the fields of Neuronpedia's tables, as its utilities declare them
TABLES = {
    "release": {
        "name", "description", "creatorName", "creatorId", "visibility", "isNewUi", "featured", "descriptionShort",
        "urls", "creatorEmail", "creatorNameShort", "defaultSourceSetName", "defaultSourceId", "createdAt",
        "defaultUmapSourceIds",
    },
    "model": {
        "id", "instruct", "creatorId", "displayNameShort", "displayName", "tlensId", "dimension", "visibility",
        "defaultSourceSetName", "defaultSourceId", "inferenceEnabled", "layers", "neuronsPerLayer", "createdAt",
        "owner", "updatedAt", "website",
    },
    "sourceset": {
        "modelId", "name", "creatorId", "hasDashboards", "visibility", "description", "type", "creatorName", "urls",
        "creatorEmail", "releaseName", "defaultOfModelId", "defaultRange", "createdAt",
    },
    "source": {
        "id", "modelId", "setName", "creatorId", "hasDashboards", "hfRepoId", "hfFolderId", "visibility", "dataset",
        "num_prompts", "num_tokens_in_prompt", "notes", "createdAt",
    },
    "features/batch-0": {
        *EMPTY, "modelId", "layer", "index", "creatorId", "createdAt", "maxActApprox", "hasVector", "vector",
        "vectorLabel", "vectorDefaultSteerStrength", "hookName", "topkCosSimIndices", "topkCosSimValues", "neg_str",
        "correlated_features_indices", "correlated_features_pearson", "neg_values", "pos_str", "pos_values",
        "frac_nonzero",
    },
    "activations/batch-0": {
        "id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue", "values",
        "creatorId", "dataSource", "dataIndex", "dfaValues", "dfaTargetIndex", "dfaMaxValue", "createdAt",
        "lossValues", "logitContributions", "binMin", "binMax", "binContains", "qualifyingTokenIndex",
    },
}  # fmt: skip
REQUIRED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "instruct", "creatorId"},
    "sourceset": {"modelId", "name", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
    "features/batch-0": {"modelId", "layer", "index"},
    "activations/batch-0": {
        "id", "tokens", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue", "values",
        "creatorId",
    },
}  # fmt: skip


@pytest.fixture
def run_folder(tmp_path):
    store = shuffled_store(tmp_path / "offline" / "store" / "train")
    folder = tmp_path / "offline" / "runs" / "strict-s0"
    folder.mkdir(parents=True)
    config = LatentsConfig(latents=5, examples=3, random_examples=2, partner_rows=2)
    path = tmp_path / "offline" / "eval" / "strict-s0" / "latents.json"
    values = show_latents(random_sae(D, F, "jumprelu", seed=3), store, tiny_tokenizer(), config)
    write_latents(path, {"run": "strict-s0", **values})
    return folder


def rows(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_the_files_say_what_latents_json_says(run_folder, tmp_path):
    folder = write_neuronpedia(run_folder, tmp_path / "np", set_name="hafs", creator="someone")
    assert folder == tmp_path / "np" / "tiny" / "1-hafs"
    latents = json.loads((tmp_path / "offline" / "eval" / "strict-s0" / "latents.json").read_text())["latents"]
    batch = json.loads((tmp_path / "np" / "sae_dashboard" / "batch-0.json").read_text())
    assert batch.keys() == BATCH
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 1, "hafs")
    for feature, latent in zip(batch["features"], latents, strict=True):
        assert feature.keys() == FEATURE
        assert (feature["feature_index"], feature["frac_nonzero"]) == (latent["index"], latent["density"])
        assert feature["correlated_features_indices"] == [partner["index"] for partner in latent["partners"]]
        contexts = [*latent["contexts"], *latent["random_contexts"]]
        for activation, context in zip(feature["activations"], contexts, strict=True):
            assert activation.keys() == ACTIVATION
            assert (activation["tokens"], activation["values"]) == (context["tokens"], context["values"])
            assert activation["qualifying_token_index"] == context["peak"]
        random = feature["activations"][len(latent["contexts"]) :]
        assert sum(activation["bin_contains"] for activation in random) == pytest.approx(1)
        for activation in random:
            peak = activation["values"][activation["qualifying_token_index"]]
            assert activation["bin_min"] <= peak <= activation["bin_max"] * 1.01
    for name, fields in TABLES.items():
        found = rows(folder / f"{name}.jsonl.gz")
        assert found
        for row in found:
            assert row.keys() <= fields and row.keys() >= REQUIRED[name], name
    features, activations = rows(folder / "features/batch-0.jsonl.gz"), rows(folder / "activations/batch-0.jsonl.gz")
    assert [row["index"] for row in features] == [str(latent["index"]) for latent in latents]
    assert {row["layer"] for row in (*features, *activations)} == {rows(folder / "source.jsonl.gz")[0]["id"]}
    assert len({row["id"] for row in activations}) == len(activations)
    assert all(row["values"][row["maxValueTokenIndex"]] == row["maxValue"] for row in activations)


def test_saedashboards_own_classes_read_and_write_it_alike(run_folder, tmp_path):
    dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    write_neuronpedia(run_folder, tmp_path / "np")
    batch = json.loads((tmp_path / "np" / "sae_dashboard" / "batch-0.json").read_text())
    assert dashboard.NeuronpediaDashboardBatch(**batch).to_dict() == batch
    assert set(inspect.signature(dashboard.NeuronpediaDashboardFeature.__init__).parameters) - {"self"} == FEATURE


def test_equal_inputs_give_equal_bytes(run_folder, tmp_path):
    when = datetime(2026, 1, 1, tzinfo=UTC)
    folders = [write_neuronpedia(run_folder, tmp_path / name, created=when) for name in "ab"]
    first, second = ({path.name: path.read_bytes() for path in folder.rglob("*.gz")} for folder in folders)
    assert first == second


def test_the_command_and_a_run_that_was_not_evaluated(run_folder, tmp_path, capsys):
    assert main(["neuronpedia", str(run_folder), "--out", str(tmp_path / "np")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "np" / "tiny" / "1-strict-s0")
    latents = tmp_path / "offline" / "eval" / "strict-s0" / "latents.json"
    values = read_json(latents, "latents")
    write_json(latents, {**values, "latents": [{**latent, "partners": None} for latent in values["latents"]]})
    with pytest.raises(SystemExit, match="2"):
        main(["neuronpedia", str(run_folder), "--out", str(tmp_path / "np")])
    assert "latents.json is of an earlier version; run `make eval` again" in capsys.readouterr().err
    latents.unlink()
    with pytest.raises(SystemExit, match="2"):
        main(["neuronpedia", str(run_folder), "--out", str(tmp_path / "np")])
    assert "run strict-s0: expected" in capsys.readouterr().err
