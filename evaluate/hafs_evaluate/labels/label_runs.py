"""Labels of latents from a language model, written to labels.csv one by one. Labels by people stay as they are."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from hafs_evaluate.labels import prompts
from hafs_evaluate.labels.labels_file import BY_MODEL, LABELS, Label, read_labels, write_labels
from hafs_evaluate.results.arms import build_arms
from hafs_evaluate.results.readings import LATENTS, read_result
from hafs_evaluate.results.results import build_results
from hafs_evaluate.workspace import Workspace
from hafs_jax.base.errors import UserError
from hafs_jax.base.log import bar_options
from hafs_jax.base.process.locks import locked

LOG = logging.getLogger(__name__)

DENSEST = 0.01  # a denser latent is likely to be active on any text, so that its label is not tested
ANSWER_TOKENS = 200  # of a model that thinks aloud, the answer is cut


class Model(Protocol):
    """What is asked; `endpoint.Endpoint` is one."""

    @property
    def model(self) -> str: ...
    def ask(self, messages: list[dict[str, str]], most_tokens: int, /) -> str: ...


def label_runs(
    workspace: Workspace, runs: Sequence[str], model: Model, latents: int, scored: bool = True
) -> tuple[int, int]:
    """Labels `latents` latents of each run's sample, the most selective first: (labels written, answers of no use).

    A latent that has a label is passed over, so that an interrupted call goes on. The file is read again before each
    label is added, and may be edited meanwhile.
    """
    path = workspace.folder / LABELS
    with locked(workspace.lock("labels"), "a labelling", path):
        return _label_all(workspace, path, runs, model, latents, scored)


def _label_all(
    workspace: Workspace, path: Path, runs: Sequence[str], model: Model, latents: int, scored: bool
) -> tuple[int, int]:
    names, todo = _names(workspace), []
    read_labels(path, names)
    for run in runs:
        values = read_result(workspace.eval / run, LATENTS)
        if not values:
            found = workspace.eval / run / LATENTS
            raise UserError(f"run {run}: expected {found}, found none; run `hafs evaluate` without --skip latents")
        sample = [latent for latent in sorted(values["latents"], key=_order) if latent["contexts"]]
        todo += [(run, latent, sample) for latent in sample[:latents]]
    written = useless = 0
    for run, latent, sample in tqdm(todo, unit="latent", desc="label", **bar_options(LOG)):
        if (run, latent["index"]) in _known(read_labels(path, names), names):
            continue
        label = _label(run, latent, sample, model, scored)
        if label is None:
            useless += 1
            continue
        labels = read_labels(path, names)
        if (run, latent["index"]) not in _known(labels, names):
            write_labels(path, [*labels, label])
            written += 1
    return written, useless


def _label(
    run: str, latent: dict[str, Any], sample: Sequence[dict[str, Any]], model: Model, scored: bool
) -> Label | None:
    """The label of one latent; None where the model's answer holds none."""
    text = prompts.label_of(model.ask(prompts.naming(latent), ANSWER_TOKENS))
    if not text:
        return None
    score = None
    others = [other for other in sample if other is not latent]
    asked = prompts.detection(text, latent, others, latent["index"]) if scored else None
    if asked is not None and latent["density"] <= DENSEST:
        messages, is_own = asked
        found = prompts.detected(model.ask(messages, ANSWER_TOKENS), len(is_own))
        score = None if found is None else prompts.balanced_accuracy(found, is_own)
    return Label(run, latent["index"], text, BY_MODEL + model.model, score)


def _order(latent: dict[str, Any]) -> tuple[float, int]:
    found = latent.get("selectivity") or {}
    return -(found.get("auroc") or 0.0), latent["index"]


def _names(workspace: Workspace) -> dict[str, list[str]]:
    """{run or arm: its runs}, all names that a label may bear."""
    results = build_results(workspace.folder)
    run_of = {name: values["run"] for name, values in results["variants"].items()}
    arms = {name: [run_of[one] for one in arm["runs"]] for name, arm in build_arms(results).items()}
    return {run: [run] for run in run_of.values()} | arms


def _known(labels: Sequence[Label], names: dict[str, list[str]]) -> set[tuple[str, int]]:
    """(run, latent) of every label; one of an arm counts for all of its runs."""
    return {(run, label.latent) for label in labels for run in names[label.variant]}
