"""The suite sae_probes: SAE-Bench's sparse probing on sae-probes' tasks, of SAEs and of the language model. Torch.

The code that scores is SAE-Bench 0.6.0's `sparse_probing_sae_probes.run_eval`, unchanged. `task_activations` gives it
the activations. It has three traps, which are avoided here:

- It returns the old scores of an SAE whose name it knows, so the name carries a hash of the SAE's weights.
- It aggregates over all results that lie in its folder, so a hash of the settings names the folder.
- It aggregates even where tasks are missing, so its result is checked to be complete.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from hafs_evaluate.saebench.datasets import PROBING_DATASETS
from hafs_evaluate.saebench.harness import check_hook_point, logged, read_output
from hafs_evaluate.saebench.task_activations import ActivationCache
from hafs_evaluate.workspace import fingerprint
from hafs_jax.store.manifest import Manifest

METRICS = ("test_accuracy", "test_auc", "test_f1")


@dataclass(frozen=True)
class ProbeSettings:
    """What decides the scores, beside the SAE and the activations."""

    tasks: tuple[str, ...]
    ks: tuple[int, ...]  # latents that a probe may use
    penalty: str  # "l1" or "l2"
    seed: int  # of the splits into training and test texts


def probe_sae(
    unique_name: str, sae: Any, hook_point: str, cache: ActivationCache, settings: ProbeSettings, root: Path
) -> dict[str, Any]:
    """SAE-Bench's own result for one SAE, as the JSON of its output file. SAE-Bench's files are kept under `root`.

    It has top-k probes on the SAE's latents at each text's last token, and the full probe on the activations themselves
    (`llm_test_*`), which is trained once for all SAEs. An interrupted run goes on at the task where it stopped. Raises
    `UserError` for a hook point whose name SAE-Bench cannot read.
    """
    check_hook_point(hook_point)
    # its logistic regressions are small: on busy cores, BLAS threads that wait for each other made them 20 times slower
    with logged(root / "saebench.log"), threadpool_limits(1, user_api="blas"), _registered_datasets(settings.tasks):
        from sae_bench.evals.sparse_probing_sae_probes import SparseProbingSaeProbesEvalConfig, run_eval

        results = root / "results" / _settings_key(cache, settings)
        _drop_torn(results)
        run_eval(
            SparseProbingSaeProbesEvalConfig(
                model_name=cache.model_name,
                random_seed=settings.seed,
                dataset_names=list(settings.tasks),
                reg_type=settings.penalty,
                ks=list(settings.ks),
                results_path=str(results),
                model_cache_path=str(cache.folder),
                include_llm_baseline=True,
            ),
            [(unique_name, sae)],
            device=str(sae.device),
            output_path=str(results / "output"),
            force_rerun=True,
        )
        values = read_output(results / "output", unique_name)
    _check_complete(values, settings)
    return values


def probe_language_model(
    manifest: Manifest, cache: ActivationCache, settings: ProbeSettings, root: Path
) -> dict[str, Any]:
    """The language model's own probes: {"model", "hook_point", "tasks": {task: {"full": ..., "top_1": ..., ...}}}.

    - full: sae-probes' logistic regression on all D dimensions of the activations;
    - top_k: the sparse probe of `probe_sae` with the identity in the place of an SAE, so on the k dimensions of the
      activations that tell the classes apart best;
    - pca_k: see `pca_probes`.
    """
    layer = check_hook_point(manifest.hook_point)
    with logged(root / "saebench.log"):
        from sae_bench.custom_saes.identity_sae import IdentitySAE

        identity = IdentitySAE(
            manifest.d_model,
            cache.model_name,
            layer,
            torch.device("cpu"),
            torch.float32,
            hook_name=manifest.hook_point,
        )
    values = probe_sae("identity", identity, manifest.hook_point, cache, settings, root)
    tasks = {}
    for task in settings.tasks:
        components = pca_probes(task, manifest.hook_point, cache, settings, root)
        tasks[task] = {"full": full_probe(values, task), **top_probes(values, task), **components}
    return {"model": manifest.model.name, "hook_point": manifest.hook_point, "tasks": tasks}


def pca_probes(
    task: str, hook_point: str, cache: ActivationCache, settings: ProbeSettings, root: Path
) -> dict[str, dict[str, float]]:
    """{"pca_<k>": {metric: value}}: probes on the first k principal components of the task's training activations.

    The components follow from the variance alone and not from the classes, so they say what any k directions of the
    activations are worth. The split, the logistic regression, the choice of C and the metrics are sae-probes' own
    (`get_xy_traintest`, `find_best_reg`), and so is the standardisation of each dimension before the components are
    taken (`find_best_pcareg`). Where k exceeds the number of components, all of them are taken.
    """
    with logged(root / "saebench.log"), threadpool_limits(1, user_api="blas"), _registered_datasets([task]):
        from sae_probes.run_baselines import DATASET_SIZES
        from sae_probes.utils_data import get_xy_traintest
        from sae_probes.utils_training import find_best_reg
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler

        n_train = min(DATASET_SIZES[task] - 100, 1024)  # as sae-probes has it, for its baselines and for SAEs
        place = {"model_name": cache.model_name, "model_cache_path": str(cache.folder), "seed": settings.seed}
        train_ND, train_y, test_ND, test_y = get_xy_traintest(n_train, task, hook_point, **place)
        scaler = StandardScaler().fit(train_ND)
        pca = PCA(min(*train_ND.shape, max(settings.ks)), random_state=settings.seed).fit(scaler.transform(train_ND))
        train_NK, test_NK = (pca.transform(scaler.transform(acts_ND)) for acts_ND in (train_ND, test_ND))
        found = {}
        for k in settings.ks:
            of_k = train_NK[:, :k], train_y, test_NK[:, :k], test_y
            metrics = find_best_reg(*of_k, penalty=settings.penalty, seed=settings.seed).metrics
            values = (metrics.test_acc, metrics.test_auc, metrics.test_f1)
            found[f"pca_{k}"] = dict(zip(METRICS, map(float, values), strict=True))
    return found


def full_probe(values: dict[str, Any], task: str) -> dict[str, float]:
    """The full probe on the language model's activations, from a SAE-Bench result."""
    detail = _detail(values, task)
    return {metric: detail[f"llm_{metric}"] for metric in METRICS}


def top_probes(values: dict[str, Any], task: str) -> dict[str, dict[str, float]]:
    """{"top_<k>": {metric: value}} from a SAE-Bench result."""
    return {f"top_{k}": metrics for k, metrics in _detail(values, task)["sae_metrics_by_k"].items()}


def _detail(values: dict[str, Any], task: str) -> dict[str, Any]:
    return next(detail for detail in values["eval_result_details"] if detail["dataset_name"] == task)


def _check_complete(values: dict[str, Any], settings: ProbeSettings) -> None:
    """Raises `RuntimeError` where SAE-Bench left out a task or a k, which it does without a word."""
    found = {detail["dataset_name"]: detail for detail in values["eval_result_details"]}
    if set(found) != set(settings.tasks):
        raise RuntimeError(f"SAE-Bench returned the tasks {sorted(found)}, asked for {sorted(settings.tasks)}")
    for task, detail in found.items():
        ks = {int(k) for k in detail["sae_metrics_by_k"] or {}}
        if ks != set(settings.ks) or detail["llm_test_accuracy"] is None:
            raise RuntimeError(f"SAE-Bench returned k={sorted(ks)} for {task}, asked for {sorted(settings.ks)}")


def _settings_key(cache: ActivationCache, settings: ProbeSettings) -> str:
    versions = [version("sae-bench"), version("sae-probes")]
    tasks = sorted(settings.tasks)
    return fingerprint([cache.key, tasks, list(settings.ks), settings.penalty, settings.seed, versions])


@contextlib.contextmanager
def _registered_datasets(names: Sequence[str]) -> Iterator[None]:
    """Within it, sae-probes finds those of `names` that are registered datasets among its own tasks."""
    ours = {name: PROBING_DATASETS[name].balanced() for name in names if name in PROBING_DATASETS}
    if not ours:
        yield
        return
    import pandas
    from sae_probes import run_baselines, utils_data

    read, sizes = utils_data.read_numbered_dataset_df, run_baselines.DATASET_SIZES  # its modules share this dict

    def read_ours_too(name: str) -> Any:
        return pandas.DataFrame(ours[name], columns=["prompt", "target"]) if name in ours else read(name)

    utils_data.read_numbered_dataset_df = read_ours_too
    sizes.update({name: len(rows) for name, rows in ours.items()})
    try:
        yield
    finally:
        utils_data.read_numbered_dataset_df = read
        for name in ours:
            del sizes[name]


def _drop_torn(results: Path) -> None:
    """Removes files that an interruption left half-written, since sae-probes takes any file for a finished task."""
    for path in results.rglob("*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            path.unlink()
