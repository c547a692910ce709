"""Sparse-probing results in one form, and means over the datasets that all runs have. Standard library; no files."""

import re
from collections.abc import Iterable
from typing import Any

_TOP_K = re.compile(r"(sae|llm)_top_(\d+)_test_(accuracy|auc)")


def sae_probing(output: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {"top_<k>": {"test_accuracy", "test_auc"}}} from a result in either of SAE-Bench's two schemas."""
    return {
        detail["dataset_name"]: {f"top_{k}": metrics for k, metrics in sorted(_by_k(detail, "sae").items()) if metrics}
        for detail in sorted(output.get("eval_result_details") or [], key=lambda detail: detail["dataset_name"])
    }


def llm_probing(own: dict[str, Any], outputs: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The language model's own probes, by task: from its own file, or else from SAE-Bench's outputs for SAEs."""
    tasks = own.get("tasks")
    if tasks:
        return {task: tasks[task] for task in sorted(tasks)}
    for output in outputs:
        found = {}
        for detail in sorted(output.get("eval_result_details") or [], key=lambda detail: detail["dataset_name"]):
            probes = {f"top_{k}": metrics for k, metrics in sorted(_by_k(detail, "llm").items())}
            if detail.get("llm_test_accuracy") is not None:
                full = {"test_accuracy": detail["llm_test_accuracy"], "test_auc": detail.get("llm_test_auc")}
                probes = {"full": full, **probes}
            if probes:
                found[detail["dataset_name"]] = probes
        if found:
            return found
    return {}


def _by_k(detail: dict[str, Any], of: str) -> dict[int, dict[str, float]]:
    if of == "sae" and detail.get("sae_metrics_by_k"):
        return {int(k): metrics for k, metrics in detail["sae_metrics_by_k"].items()}
    found: dict[int, dict[str, float]] = {}
    for key, value in detail.items():
        match = _TOP_K.fullmatch(key)
        if match and match[1] == of and value is not None:
            found.setdefault(int(match[2]), {})[f"test_{match[3]}"] = value
    return found


def column(probes: dict[str, dict[str, dict[str, float]]], measure: str) -> dict[str, dict[str, float]]:
    """{task: {"full", "top_<k>" or "pca_<k>": the measure}}, in the order of k; tasks without it are left out."""
    columns = {
        task: {
            name: values[measure]
            for name, values in sorted(by_name.items(), key=lambda item: (item[0].startswith("pca_"), _k(item[0])))
            if is_probe(name) and values.get(measure) is not None
        }
        for task, by_name in probes.items()
    }
    return {task: values for task, values in columns.items() if values}


def mean_probing(results: dict[str, Any]) -> tuple[list[str], dict[str | None, dict[str, float]]]:
    """(tasks, {variant: {"top_<k>": mean accuracy}}), over the tasks that every variant with probing results has.

    The key None is the language model's means over the same tasks. It is missing where the model lacks one of them.
    """
    by_variant = {name: values["probing"] for name, values in results["variants"].items() if values["probing"]}
    return mean_over_shared(by_variant, results["llm"]["probing"])


Scores = dict[str, dict[str, float]]  # {dataset: {measure: value}}


def mean_over_shared(
    by_run: dict[str, Scores], reference: Scores | None = None
) -> tuple[list[str], dict[str | None, dict[str, float]]]:
    """(datasets, {run: {measure: its mean}}), over the datasets that every run has, so that the means compare.

    A measure that one of these datasets lacks, or has as null, is left out. The key None is the `reference`'s means
    over them. Without any run, the datasets are the reference's own.
    """
    reference = reference or {}
    shared = sorted(set.intersection(*map(set, by_run.values())) if by_run else reference, key=_by_number)
    means: dict[str | None, dict[str, float]] = {}
    for name, scores in [*by_run.items(), (None, reference)]:
        if not shared or not set(shared) <= set(scores):
            continue
        columns = [column for column in scores[shared[0]] if all(scores[one].get(column) is not None for one in shared)]
        means[name] = {column: sum(scores[one][column] for one in shared) / len(shared) for column in columns}
    return shared, means


def _by_number(task: str) -> tuple[int, str]:
    """A key that sorts tasks: by the number that their name begins with, as sae-probes' do, then by name."""
    number = re.match(r"\d+", task)
    return (int(number[0]) if number else 1 << 30, task)


def is_probe(name: str) -> bool:
    """Whether `name` is one that a probe has: "full", "top_<k>" or "pca_<k>"."""
    return re.fullmatch(r"full|(top|pca)_[0-9]{1,9}", name) is not None


def top_k(name: str) -> int:
    """The k of "top_<k>" or "pca_<k>"; 0 for "full"."""
    return 0 if name == "full" else int(name.partition("_")[2])


def _k(name: str) -> int:
    return top_k(name) if is_probe(name) else 0
