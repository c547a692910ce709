"""The suite standard: SAE-Bench's sparse probing on its eight datasets from the hub, with its own config. Torch.

The code that scores is SAE-Bench 0.6.0's `sparse_probing.run_eval`: 4,000 training and 1,000 test texts for each pair
of classes, or fewer, 128 tokens, seed 42, mean over tokens. Three things are replaced while it runs, in this process
alone:

- its model, by the one that made the store, with that one's tokenizer, rather than a second download;
- its reader of datasets (see `hub_texts`): each is read in one commit, and `codeparrot/github-code`, a dataset with a
  script, which `datasets` refuses from version 4 on, from its parquet files;
- jaxtyping's checks, which one of its own functions fails.

Its cache of activations has two traps. Its key names dataset, model and hook point alone, so here a hash of everything
names its folder. And a hit skips random draws, so that an SAE scores differently with and without one; so here each
dataset's cache is filled first, with a run whose scores are thrown away, and every SAE is scored from the cache.
"""

import contextlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hafs_evaluate.core.encode import to_numpy
from hafs_evaluate.saebench.datasets import PROBING_DATASETS, dataset_shas, registered_classes
from hafs_evaluate.saebench.harness import (
    check_hook_point,
    logged,
    model_short_name,
    read_output,
    without_type_checks,
)
from hafs_evaluate.saebench.hub_texts import STREAMED, HubTexts
from hafs_evaluate.workspace import fingerprint
from hafs_jax.base.errors import UserError
from hafs_jax.base.options import did_you_mean
from hafs_jax.store.manifest import Manifest


class StandardProbing:
    """The suite for one model, hook point and set of datasets."""

    def __init__(
        self,
        manifest: Manifest,
        model: Any,
        datasets: tuple[str, ...],
        ks: tuple[int, ...],
        seed: int,
        root: Path,
        train_texts: int = 4_000,
        test_texts: int = 1_000,
    ) -> None:
        """`model` is a `LanguageModel`; SAE-Bench's folders lie under `root`. `UserError` for an unknown dataset.

        A probe of one class against another sees `train_texts`, and is tested on `test_texts`, half of each class.

        The SAE and the cached activations are float32, whatever dtype the model computes in.
        """
        check_hook_point(manifest.hook_point)
        with logged(root / "saebench.log"), without_type_checks():
            from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
            from sae_bench.sae_bench_utils import activation_collection, dataset_info

        self.manifest, self.model, self.root, self.ks = manifest, _Adapter(model), root, ks
        self._classes = dataset_info.chosen_classes_per_dataset | registered_classes()
        for name in datasets:
            if name not in self._classes:
                raise UserError(f"dataset {name!r}: SAE-Bench has none of that name{did_you_mean(name, self._classes)}")
        name = model_short_name(manifest)
        self.config = SparseProbingEvalConfig(
            model_name=name,
            dataset_names=list(datasets),
            random_seed=seed,
            k_values=list(ks),
            llm_batch_size=activation_collection.LLM_NAME_TO_BATCH_SIZE.get(name, 64),
            llm_dtype="float32",
            probe_train_set_size=train_texts,
            probe_test_set_size=test_texts,
        )
        self._texts = HubTexts(self._folder / "commits.json")

    def score(self, unique_name: str, sae: Any) -> dict[str, Any]:
        """SAE-Bench's own result for one SAE, as the JSON of its output file. `sae` is moved to float32."""
        for dataset in self.config.dataset_names:
            self._fill(dataset)
        output = self._folder / "output"
        with logged(self.root / "saebench.log"), _patched(self.model, self._texts):
            self._run(self.config.dataset_names, unique_name, sae, output, self._folder)
            values = read_output(output, unique_name)
        values["eval_config"]["dataset_commits"] = self._texts.commits(self.config.dataset_names)
        return values

    def language_model(self, values: dict[str, Any]) -> dict[str, Any]:
        """The language model's own probes: those in every SAE's result (`values`), and those of `_components`."""
        tasks = {}
        for dataset, detail in zip(self.config.dataset_names, values["eval_result_details"], strict=True):
            probes = {"full": {"test_accuracy": detail["llm_test_accuracy"]}}
            probes |= {f"top_{k}": {"test_accuracy": detail[f"llm_top_{k}_test_accuracy"]} for k in self.ks}
            tasks[detail["dataset_name"]] = probes | self._components(dataset)
        return {"model": self.manifest.model.name, "hook_point": self.manifest.hook_point, "tasks": tasks}

    def _components(self, dataset: str) -> dict[str, dict[str, float]]:
        """{"pca_<k>": ...}: SAE-Bench's probes on the first k principal components of the texts' mean activations.

        The components are those of the training texts of all classes, with each dimension standardised, as in
        `sae_probes.pca_probes`.
        """
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler

        self._fill(dataset)
        with logged(self.root / "saebench.log"), _patched(self.model, self._texts):
            from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
            from sae_bench.sae_bench_utils.activation_collection import create_meaned_model_activations

            seed, acts = self.config.random_seed, torch.load(self._cached(dataset), map_location="cpu")
            means = [create_meaned_model_activations(acts.pop(split)) for split in ("train", "test")]
            train_ND = to_numpy(torch.cat(list(means[0].values())))
            scaler = StandardScaler().fit(train_ND)
            pca = PCA(min(*train_ND.shape, max(self.ks)), random_state=seed).fit(scaler.transform(train_ND))
            train, test = (
                {
                    label: torch.from_numpy(pca.transform(scaler.transform(to_numpy(acts_ND))))
                    for label, acts_ND in split.items()
                }
                for split in means
            )
            found = {}
            for k in self.ks:
                random.seed(seed)  # it decides which texts of the other classes are the negatives
                torch.manual_seed(seed)
                of_k = ({label: acts_NK[:, :k] for label, acts_NK in split.items()} for split in (train, test))
                _, accuracies = train_probe_on_activations(*of_k)
                found[f"pca_{k}"] = {"test_accuracy": float(np.mean(list(accuracies.values())))}
        return found

    def bytes_needed(self) -> int:
        """Disk space that the activations not yet cached will take; every token of every text is kept."""
        rows = (self.config.probe_train_set_size + self.config.probe_test_set_size) // 2 * self.config.context_length
        missing = [name for name in self.config.dataset_names if not self._cached(name).exists()]
        return sum(len(self._classes[name]) * rows * self.manifest.d_model * 4 for name in missing)

    def downloads(self) -> str | None:
        """What will be fetched from the hub, in words; None where nothing is. `UserError` where the hub refuses it."""
        missing = [
            name
            for name in self.config.dataset_names
            if name not in PROBING_DATASETS and not self._cached(name).exists()
        ]
        fetched: dict[str, int] = {}
        for plan in self._texts.plans(missing):
            fetched[plan.name] = fetched.get(plan.name, 0) + plan.missing_bytes
        parts = [f"{name} {size / 1e6:,.1f} MB" for name, size in fetched.items() if size]
        parts += [f"{name} streamed until it has enough texts" for name in STREAMED if name in missing]
        whole = sum(fetched.values()) / 1e6
        return f"the probing suite standard will fetch {whole:,.1f} MB whole: {', '.join(parts)}" if parts else None

    @property
    def _folder(self) -> Path:
        values = asdict(self.config) | {"dataset_names": None}  # each dataset is a file of its own
        model, tokenizer = asdict(self.manifest.model), asdict(self.manifest.tokenizer)
        versions = [version("sae-bench"), version("datasets")]
        ours = dataset_shas(self.config.dataset_names)
        return self.root / fingerprint([values, model, tokenizer, self.manifest.hook_point, versions, *ours])

    def _cached(self, dataset: str, folder: Path | None = None) -> Path:
        """Where SAE-Bench keeps the activations of `dataset`, in `folder` [the suite's own]."""
        place = (folder or self._folder) / "sparse_probing" / self.config.model_name / self.manifest.hook_point
        return place / f"{dataset}_activations.pt".replace("/", "_")

    def _fill(self, dataset: str) -> None:
        """Makes the cache of one dataset, in a folder beside it, and moves it into its place when it is whole."""
        path = self._cached(dataset)
        if path.exists():
            return
        shutil.rmtree(filling := self._folder / "filling", ignore_errors=True)
        with logged(self.root / "saebench.log"), _patched(self.model, self._texts):
            self._run([dataset], "identity", self._identity(), filling / "output", filling)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._cached(dataset, filling).rename(path)
        shutil.rmtree(filling)

    def _run(self, datasets: list[str], name: str, sae: Any, output: Path, artifacts: Path) -> None:
        from sae_bench.evals.sparse_probing import main

        config = type(self.config)(**(asdict(self.config) | {"dataset_names": datasets}))
        main.run_eval(
            config,
            [(name, sae)],
            device=str(self.model.device),
            output_path=str(output),
            force_rerun=True,
            artifacts_path=str(artifacts),
        )

    def _identity(self) -> Any:
        from sae_bench.custom_saes.identity_sae import IdentitySAE

        layer = check_hook_point(self.manifest.hook_point)
        name, hook = self.config.model_name, self.manifest.hook_point
        return IdentitySAE(self.manifest.d_model, name, layer, self.model.device, torch.float32, hook_name=hook)


class _Adapter:
    """A `LanguageModel` that SAE-Bench can call as a HookedTransformer, as far as sparse probing does."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device = model.device
        self.tokenizer = _Tokenizer(model)

    def run_with_hooks(self, tokens_BL: Tensor, stop_at_layer: int, fwd_hooks: list[tuple[str, Any]]) -> None:
        ((hook_point, keep),) = fwd_hooks
        keep(self._model.activations(tokens_BL, hook_point).float(), None)

    def to(self, device: Any) -> "_Adapter":
        return self


class _Tokenizer:
    """The store's tokenizer as a HookedTransformer has it: BOS in front, padded and cut on the right."""

    def __init__(self, model: Any) -> None:
        self._model = model
        of_model = model.tokenizer
        self.bos_token_id, self.eos_token_id = of_model.bos_token_id, of_model.eos_token_id
        self.pad_token_id = of_model.pad_token_id if of_model.pad_token_id is not None else of_model.eos_token_id

    def __call__(
        self, texts: list[str], padding: str, truncation: bool, max_length: int, return_tensors: str
    ) -> "_Tokenized":
        input_ids = np.full((len(texts), max_length), self.pad_token_id, np.int64)
        bos = [self.bos_token_id] if self._model.prepend_bos else []
        for row, ids in enumerate(self._model.tokenize(texts)):
            kept = np.concatenate([bos, ids])[:max_length]
            input_ids[row, : len(kept)] = kept
        return _Tokenized({"input_ids": torch.from_numpy(input_ids)})


class _Tokenized:
    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def to(self, device: Any) -> "_Tokenized":
        return _Tokenized({name: tensor.to(device) for name, tensor in self.data.items()})


@contextlib.contextmanager
def _patched(model: _Adapter, hub: HubTexts) -> Iterator[None]:
    """Within it, SAE-Bench uses `model`, reads datasets by `hub` and registered ones, and checks no array types."""
    with without_type_checks():
        from sae_bench.evals.sparse_probing import main
        from sae_bench.sae_bench_utils import dataset_info, dataset_utils

        loader = SimpleNamespace(from_pretrained_no_processing=lambda *args, **kwargs: model)
        transformer, load_dataset = main.HookedTransformer, dataset_utils.load_dataset
        classes, texts = dataset_info.chosen_classes_per_dataset, dataset_utils.get_multi_label_train_test_data

        def texts_of(name: str, train_size: int, test_size: int, seed: int) -> Any:
            ours = PROBING_DATASETS.get(name)
            return (ours.split if ours else partial(texts, name))(train_size, test_size, seed)

        main.HookedTransformer, dataset_utils.load_dataset = loader, hub.load
        dataset_info.chosen_classes_per_dataset = classes | registered_classes()
        dataset_utils.get_multi_label_train_test_data = texts_of
        try:
            with torch.enable_grad():  # its probe training leaves gradients on
                yield
        finally:
            main.HookedTransformer, dataset_utils.load_dataset = transformer, load_dataset
            dataset_info.chosen_classes_per_dataset = classes
            dataset_utils.get_multi_label_train_test_data = texts
