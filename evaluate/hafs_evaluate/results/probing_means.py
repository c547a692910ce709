"""Sparse-probing results as they were written, and their means over tasks. Pure: no files. Standard library only."""

import re
from collections.abc import Iterable
from typing import Any

_TOP_K = re.compile(r"(sae|llm)_top_(\d+)_test_(accuracy|auc)")


def sae_probing(output: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {"top_<k>": {"test_accuracy", "test_auc"}}} of either of SAE-Bench's sparse-probing schemas."""
    return {
        detail["dataset_name"]: {f"top_{k}": metrics for k, metrics in sorted(_by_k(detail, "sae").items()) if metrics}
        for detail in sorted(output.get("eval_result_details") or [], key=lambda detail: detail["dataset_name"])
    }


def llm_probing(own: dict[str, Any], outputs: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The language model's own probes: those of `own`, its file; else those inside SAE-Bench's `outputs`."""
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
    """{task: {"full" | "top_<k>" | "pca_<k>": the measure}}, full first, then by k; tasks without it are left out."""
    columns = {
        task: {
            name: values[measure]
            for name, values in sorted(by_name.items(), key=lambda item: (item[0].startswith("pca_"), top_k(item[0])))
            if values.get(measure) is not None
        }
        for task, by_name in probes.items()
    }
    return {task: values for task, values in columns.items() if values}


def mean_probing(results: dict[str, Any]) -> tuple[list[str], dict[str | None, dict[str, float]]]:
    """The tasks that every probed variant has, and {variant, or None for the language model: {"top_<k>": mean}}.

    The language model's means are over the same tasks, and missing where it lacks one of them.
    """
    probed = {name: values["probing"] for name, values in results["variants"].items() if values["probing"]}
    return mean_over_shared(probed, results["llm"]["probing"])


Scores = dict[str, dict[str, float]]  # {dataset: {measure: value}}


def mean_over_shared(
    by_run: dict[str, Scores], reference: Scores | None = None
) -> tuple[list[str], dict[str | None, dict[str, float]]]:
    """The datasets that every run has, and {run, or None for the `reference`: {measure: its mean over these datasets}}.

    The means are over these datasets alone, so that they compare; a measure that one of them lacks is left out. Without
    runs the datasets are the reference's own.
    """
    reference = reference or {}
    shared = sorted(set.intersection(*map(set, by_run.values())) if by_run else reference, key=_by_number)
    means: dict[str | None, dict[str, float]] = {}
    for name, scores in [*by_run.items(), (None, reference)]:
        if not shared or not set(shared) <= set(scores):
            continue
        columns = [column for column in scores[shared[0]] if all(column in scores[one] for one in shared)]
        means[name] = {column: sum(scores[one][column] for one in shared) / len(shared) for column in columns}
    return shared, means


def _by_number(task: str) -> tuple[int, str]:
    """The order of tasks: sae-probes' by the number that begins their names, others after them by name."""
    number = re.match(r"\d+", task)
    return (int(number[0]) if number else 1 << 30, task)


def top_k(name: str) -> int:
    """The k of "top_<k>" and of "pca_<k>"; 0 for "full"."""
    return 0 if name == "full" else int(name.partition("_")[2])
